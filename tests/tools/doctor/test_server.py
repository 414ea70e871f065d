"""The doctor and a running server: what is accepted, what is refused, and what is not to be
seen.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from aioserver.tools import remote
from aioserver.tools.doctor import server as doctor
from aioserver.tools.doctor.results import Facts
from aioserver.wings.simulator.engine import EngineOptions
from tests.support.doctor import examined as ask_doctor
from tests.support.keys import key_of, keys_of
from tests.support.ledgers import line, wait_until
from tests.support.process import run_command
from tests.support.server import HTTP_CLIENT, QUICK
from tests.support.simulator import Behaviour
from tests.support.waiting import patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from tests.support.doctor import Examined
    from tests.support.server import MakeServer, RunningServer

SIMULATED = {"simulated": True, "model": "demo", "http_client": HTTP_CLIENT}


async def examined(url: str, key: str | None = None, *, ask: bool = False) -> Examined:
    """What is told of the server at *url*, which does not show the key."""
    found = await ask_doctor(url=url, key=key, ask=ask)
    assert key is None or key not in str(found)
    return found


async def test_a_client_of_a_server_with_keys_sees_each_event_of_an_answer_that_costs_nothing(
    make_server: MakeServer,
) -> None:
    """It takes two seconds: an answer whose events are spread over one, so that their spread can
    be seen.
    """
    # A list of models that takes more than one packet, in which the simulated one comes last.
    models = [f"a-model-with-a-long-name-{number}" for number in range(2000)]
    changes = {"llm.providers.zzz": SIMULATED, "llm.providers.sim.models": models}
    server = await make_server(**keys_of("web"), **changes)

    found = await examined(server.base, key_of("web"))

    assert found.code == 0, found
    assert found.of("warn") == []
    for face in ("WebSocket", "SSE", "OpenAI"):
        assert any("an answer came whole" in line for line in found.of("ok", face)), found
    assert "key: accepted" in found.of("ok")
    assert any("a page of" in line for line in found.of("ok"))
    # No admin's key: the verdict is not for it.
    assert any("its verdict: GET /stats: HTTP 403" in line for line in found.of("skip"))
    assert server.simulator.stats().requests == 0


@pytest.mark.parametrize("key", [None, "aio-unknown"])
async def test_a_key_that_is_missing_or_unknown_ends_the_examination(
    make_server: MakeServer, key: str | None
) -> None:
    server = await make_server(**keys_of("web"))

    found = await examined(server.base, key)

    text = "the key is not known to it" if key else "it wants a key, and there is none"
    assert found.code == 1
    assert found.of("fail") == [f"key: {text}"]


async def test_one_question_is_asked_of_a_server_without_a_simulated_model_unless_forbidden(
    make_server: MakeServer,
) -> None:
    server = await make_server(QUICK, **keys_of("web"))

    found = await examined(server.base, key_of("web"))
    assert server.simulator.stats().requests == 0
    assert any("--no-ask" in line for line in found.of("skip"))
    found = await examined(server.base, key_of("web"), ask=True)

    assert server.simulator.stats().requests == 1
    # All of it comes at once, which a model may do by itself, unless the machine is busy.
    forms = (*found.of("warn"), *found.of("ok"))
    assert any(line.startswith("SSE: an answer came whole, ") for line in forms), found
    assert found.of("fail") == []


async def test_a_short_answer_proves_nothing_although_it_comes_at_once(
    make_server: MakeServer,
) -> None:
    server = await make_server(replace(QUICK, tokens=5), **keys_of("web"))

    found = await examined(server.base, key_of("web"), ask=True)

    assert found.of("warn") == []
    assert any(line.startswith("SSE: an answer came whole, each") for line in found.of("ok"))


async def test_what_the_server_finds_wrong_with_itself_is_told_to_an_admin(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(**keys_of("root"), **{"usage.path": str(tmp_path / "usage")})
    ledger = server.context.usage.ledger
    assert ledger is not None

    async def state() -> list[str]:
        facts = Facts(url=server.base)
        async with remote.session(key_of("root")) as facts.session:
            return [str(result) async for result in doctor.state(facts) if result.level != "ok"]

    assert await state() == []

    (tmp_path / "usage").rename(tmp_path / "away")
    (tmp_path / "usage").write_text("no directory")
    ledger.put(line())
    wait_until(lambda: ledger.trouble is not None)
    server.context.monitor.tick()

    (warned,) = await state()
    assert "No ledger: The ledger in " in warned
    assert "cannot be written: " in warned
    assert "Make the directory of usage.path writable" in warned
    (tmp_path / "usage").unlink()


async def test_habits_of_clients_that_lose_caches_are_told_with_their_regions(
    make_server: MakeServer,
) -> None:
    engine = EngineOptions(prefill=1e7, decode=1e4)
    server = await make_server(Behaviour(tokens=3, engine=engine), **{"llm.cache_losses": True})

    async def told(session: str, system: str, tools: str = "", more: str = "") -> list[str]:
        """Ask, and return what the doctor says then."""
        functions = [{"name": name, "description": name * 18_000} for name in tools]
        contents = {"system": system, "user": f"Hello {more}"}
        body = {
            "messages": [{"role": role, "content": text} for role, text in contents.items()],
            "tools": [{"type": "function", "function": function} for function in functions],
        }
        url, headers = f"{server.v1}/chat/completions", {"session-id": session}
        async with server.session.post(url, json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
        server.context.monitor.tick()
        facts = Facts(url=server.base)
        async with remote.session(None) as facts.session:
            return [result.text async for result in doctor.state(facts) if result.level == "warn"]

    long = "and say something. " * 900
    assert await told("s1", "It is 9:00.", more=long) == []
    (head,) = await told("s1", "It is 9:01.", more=long)
    assert "prompts differ at messages[0]: in the last hour " in head
    assert await told("s2", "Be brief.", "abc") == [head]
    tools, *others = await told("s2", "Be brief.", "dbc")
    assert "prompts differ at tools[0]: " in tools
    assert others == [head]
    assert await told("s3", "Be brief.", "efg") == [tools, head]
    reordered, *others = await told("s3", "Be brief.", "gef")
    assert "prompts have the same regions in another order: " in reordered
    assert others == [head]


async def test_a_page_of_the_servers_own_address_may_always_connect(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **keys_of("web"), **{"chat.websocket.allow_origins": ["https://a.example"]}
    )

    found = await examined(server.base.replace("127.0.0.1", "localhost"), key_of("web"))

    assert any(line.startswith("WebSocket: /ws/chat upgrades") for line in found.of("ok")), found


async def test_a_server_that_is_stopping_is_not_ready(server: RunningServer) -> None:
    server.owners.context.lifecycle.ready = False
    try:
        found = await examined(server.base)
    finally:
        server.owners.context.lifecycle.ready = True

    assert found.of("fail") == ["server: not ready: starting or stopping"]


# Answers of something else, or through something that spoils them.


@asynccontextmanager
async def standing_in(
    status: int,
    body: str,
    kind: str = "text/html",
    *,
    refused: str = "",
    headers: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[str]:
    """The address of a program that answers every request alike, and at the path *refused* that it
    is denied.
    """

    async def answer(request: web.Request) -> web.Response:
        if request.path == refused:
            return web.Response(status=403)
        return web.Response(status=status, text=body, content_type=kind, headers=headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, lingering_time=0.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


HEALTHY = (200, json.dumps({"status": "healthy"}), "application/json")
DENIED = json.dumps({"error": {"code": "host_not_allowed", "message": "x"}})


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ((200, "<html>"), "GET /health: HTTP 200, and no aioserver's answer"),
        ((502, "<html>"), "GET /health: HTTP 502"),
        ((403, DENIED, "application/json"), "GET /health: HTTP 403 host_not_allowed"),
        ((200, "[1]", "application/json"), "no aioserver's answer"),
    ],
)
async def test_another_answer_than_an_aioservers_ends_the_examination(
    answer: Any, text: str
) -> None:
    async with standing_in(*answer) as url:
        found = await examined(url)

    (failed,) = found.of("fail")
    assert text in failed


async def test_a_redirect_is_reported_with_its_target_and_no_control_character() -> None:
    async with standing_in(308, "", headers={"Location": "https://chat.example/\u202e"}) as url:
        found = await examined(url)

    (failed,) = found.of("fail")
    assert failed.startswith("server: GET /health: redirects to https://chat.example/ : give")


async def test_a_proxy_without_upgrades_and_a_clock_that_is_wrong_are_reported() -> None:
    date = {"Date": "Wed, 01 Jan 2020 00:00:00 GMT"}
    async with standing_in(*HEALTHY, headers=date) as url:
        found = await examined(url)

    assert found.of("fail") == ["WebSocket: /ws/chat is not upgraded: HTTP 200"]
    assert any("differs from ours by -" in line for line in found.of("warn"))


async def test_a_page_of_an_address_that_the_server_does_not_know_may_not_connect() -> None:
    async with standing_in(*HEALTHY, refused="/ws/chat") as url:
        found = await examined(url)

    (failed,) = found.of("fail")
    assert "HTTP 403: pages of this address may not connect" in failed


async def test_nobody_there_is_one_failure_with_exit_code_1() -> None:
    code, out, err = await run_command("doctor", "127.0.0.1:1")

    assert (code, err) == (1, "")
    assert out.startswith("fail  server: no connection: 127.0.0.1 port 1: Connection refused\n")
    assert out.endswith("\n1 fail\n")


# Silence, and arrivals.


async def silence(server: RunningServer, seconds: float) -> str:
    """What is told of a WebSocket that is silent for so many seconds."""
    facts = Facts(url=server.base, idle=seconds)
    facts.session = server.session
    (_opened, result) = [each async for each in doctor.websocket(facts)]
    return f"{result.level} {result.text}"


async def test_an_idle_socket_that_is_closed_is_reported(make_server: MakeServer) -> None:
    changes = {"ping_interval": 0.2, "ping_timeout": 0.2, "idle_timeout": 0.3}
    server = await make_server(**{f"chat.websocket.{name}": n for name, n in changes.items()})

    assert (await silence(server, 20.0)).startswith("fail was closed after ")
    assert (await silence(server, 0.01)).startswith("ok lives for 0 s of silence")


async def test_pings_are_counted_and_answered(make_server: MakeServer) -> None:
    """It takes a second: a socket that does not answer its pings would be closed in the
    meantime.
    """
    changes = {"chat.websocket.ping_interval": 0.2, "chat.websocket.ping_timeout": 0.2}
    server = await make_server(**changes)

    told = await silence(server, 1.0)

    assert told.startswith("ok lives for 1 s of silence, with ")
    assert "with 0 pings" not in told


def test_gathered_events_are_told_from_events_that_come_one_by_one() -> None:
    steady = [0.03] * 39
    # A busy server sends what has come in a quarter of a second at once.
    busy = [*[0.0] * 7, 0.25] * 5
    at_the_end = [0.0001] * 39
    # A buffer of 4 KiB that fills once, and the rest.
    in_two = [*[0.0] * 24, 0.5, *[0.0] * 14]

    assert all(doctor.bursts(gaps) > doctor.MAX_BURSTS for gaps in (steady, busy))
    assert [doctor.bursts(gaps) for gaps in (at_the_end, in_two)] == [1, 2]


async def test_an_answer_that_fails_is_reported_by_its_code_alone(make_server: MakeServer) -> None:
    server = await make_server(
        QUICK, **keys_of("web"), **{"llm.providers.sim.base_url": "http://127.0.0.1:9/v1"}
    )

    async with asyncio.timeout(patience(30)):
        found = await examined(server.base, key_of("web"), ask=True)

    assert "SSE: an answer failed: connect_error" in found.of("fail")

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
from aioserver.tools.doctor import arrivals, silence
from aioserver.tools.doctor.arrivals import Road
from aioserver.tools.doctor.findings import Report
from aioserver.tools.doctor.server import Examination
from tests.support.chat import STREAMED
from tests.support.keys import bearer, key_of, keys_of
from tests.support.ledgers import line, wait_until
from tests.support.process import run_command
from tests.support.server import HTTP_CLIENT, QUICK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

SIMULATED = {"simulated": True, "model": "demo", "http_client": HTTP_CLIENT}


async def examined(
    url: str, key: str | None = None, *, ask: bool = False
) -> tuple[Report, dict[str, list[str]]]:
    """The report on the server at *url*, and the lines of each level."""
    lines: dict[str, list[str]] = {"ok": [], "warn": [], "fail": [], "skip": []}
    report = Report(
        lambda finding: lines[finding.level].append(f"{finding.subject}: {finding.text}")
    )
    await Examination(report, url, key).run(ask=ask, idle=0.0)
    return report, lines


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

    report, lines = await examined(server.base, key_of("web"))

    assert not report.failed, lines
    assert lines["warn"] == []
    for face in arrivals.FACES:
        assert any(line.startswith(f"{face}: an answer came whole") for line in lines["ok"]), lines
    assert "key: accepted" in lines["ok"]
    assert any("pages of" in line or "a page of" in line for line in lines["ok"])
    # No admin's key: the snapshots are not for it.
    assert "/events: not followed: HTTP 403" in lines["skip"]
    assert server.simulator.stats().requests == 0
    assert key_of("web") not in json.dumps(report.plain())


@pytest.mark.parametrize("key", [None, "aio-unknown"])
async def test_a_key_that_is_missing_or_unknown_ends_the_examination(
    make_server: MakeServer, key: str | None
) -> None:
    server = await make_server(**keys_of("web"))

    report, lines = await examined(server.base, key)

    assert report.failed
    (failed,) = lines["fail"]
    assert (
        failed
        == f"key: {'the key is not known to it' if key else 'it wants a key, and there is none'}"
    )
    assert "aio-unknown" not in json.dumps(report.plain())


@pytest.mark.one_loop
async def test_one_question_is_asked_of_a_server_without_a_simulated_model_unless_forbidden(
    make_server: MakeServer,
) -> None:
    server = await make_server(QUICK, **keys_of("web"))

    _, lines = await examined(server.base, key_of("web"))
    assert server.simulator.stats().requests == 0
    assert any("--no-ask" in line for line in lines["skip"])
    _, lines = await examined(server.base, key_of("web"), ask=True)

    assert server.simulator.stats().requests == 1
    # All of it comes at once, which a model may do by itself, unless the machine is busy.
    forms = (*lines["warn"], *lines["ok"])
    assert any(line.startswith("SSE: an answer came whole, ") for line in forms), lines
    assert lines["fail"] == []


@pytest.mark.one_loop
async def test_a_ledger_that_is_not_written_is_reported(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(**keys_of("root"), **{"usage.path": str(tmp_path / "usage")})
    ledger = server.context.usage.ledger
    assert ledger is not None
    _, lines = await examined(server.base, key_of("root"))
    assert "server: its ledger is written" in lines["ok"]

    (tmp_path / "usage").rename(tmp_path / "away")
    (tmp_path / "usage").write_text("no directory")
    ledger.put(line())
    wait_until(lambda: ledger.trouble is not None)
    server.context.monitor.tick()
    _, lines = await examined(server.base, key_of("root"))

    assert any("its ledger cannot be written: " in text for text in lines["warn"]), lines
    (tmp_path / "usage").unlink()


@pytest.mark.one_loop
async def test_a_provider_that_refuses_to_report_its_usage_is_named(
    make_server: MakeServer,
) -> None:
    server = await make_server(replace(QUICK, refuses=("stream_options",)), **keys_of("root"))
    _, lines = await examined(server.base, key_of("root"))
    assert not any("stream_options" in text for text in lines["warn"]), lines

    body = {"model": "m", **STREAMED}
    url = f"{server.v1}/chat/completions"
    async with server.session.post(url, json=body, headers=bearer("root")) as answer:
        assert answer.status == 200
        await answer.read()
    server.context.monitor.tick()
    _, lines = await examined(server.base, key_of("root"))

    assert any("refused stream_options: sim: " in text for text in lines["warn"]), lines


async def test_a_page_of_the_servers_own_address_may_always_connect(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **keys_of("web"), **{"chat.websocket.allow_origins": ["https://a.example"]}
    )

    _, lines = await examined(server.base.replace("127.0.0.1", "localhost"), key_of("web"))

    assert any(line.startswith("WebSocket: /ws/chat upgrades") for line in lines["ok"]), lines


@pytest.mark.one_loop
async def test_a_server_that_is_stopping_is_not_ready(server: RunningServer) -> None:
    """It takes four seconds: without keys the snapshots are followed, one each second."""
    server.owners.context.lifecycle.ready = False
    try:
        _, lines = await examined(server.base)
    finally:
        server.owners.context.lifecycle.ready = True

    assert lines["fail"] == ["server: not ready: starting or stopping"]
    assert "/events: each event arrives as it comes" in lines["ok"]


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
        ((403, DENIED, "application/json"), "it does not answer to the name 127.0.0.1"),
        ((200, "[1]", "application/json"), "no aioserver's answer"),
    ],
)
async def test_another_answer_than_an_aioservers_ends_the_examination(
    answer: Any, text: str
) -> None:
    async with standing_in(*answer) as url:
        _, lines = await examined(url)

    (failed,) = lines["fail"]
    assert text in failed


async def test_a_redirect_is_reported_with_its_target_and_no_control_character() -> None:
    async with standing_in(308, "", headers={"Location": "https://chat.example/\u202e"}) as url:
        _, lines = await examined(url)

    assert lines["fail"] == ["server: redirects to https://chat.example/ "]


async def test_a_proxy_without_upgrades_and_a_clock_that_is_wrong_are_reported() -> None:
    date = {"Date": "Wed, 01 Jan 2020 00:00:00 GMT"}
    async with standing_in(*HEALTHY, headers=date) as url:
        _, lines = await examined(url)

    assert lines["fail"] == ["WebSocket: /ws/chat is not upgraded: HTTP 200"]
    assert any("differs from ours by -" in line for line in lines["warn"])
    assert "/events: not followed: HTTP 200" in lines["skip"]


async def test_a_page_of_an_address_that_the_server_does_not_know_may_not_connect() -> None:
    async with standing_in(*HEALTHY, refused="/ws/chat") as url:
        _, lines = await examined(url)

    (failed,) = lines["fail"]
    assert "HTTP 403: pages of this address may not connect" in failed


@pytest.mark.one_loop
async def test_nobody_there_is_one_failure_with_exit_code_1() -> None:
    code, out, err = await run_command("doctor", "127.0.0.1:1")

    assert (code, err) == (1, "")
    assert out.startswith("fail  server: no connection: 127.0.0.1 port 1: Connection refused\n")
    assert out.endswith("\n1 fail\n")


# Silence, and arrivals.


async def test_an_idle_socket_that_is_closed_is_reported_with_what_to_raise(
    make_server: MakeServer,
) -> None:
    changes = {"ping_interval": 0.2, "ping_timeout": 0.2, "idle_timeout": 0.3}
    server = await make_server(**{f"chat.websocket.{name}": n for name, n in changes.items()})
    texts: list[str] = []
    report = Report(lambda finding: texts.append(str(finding)))
    road = Road(server.base, remote.PATHS, None)

    await silence.examine(report, road, 20.0)
    assert texts[0].startswith("fail  idle WebSocket: was closed after ")
    await silence.examine(report, road, 0.01)

    assert report.failed
    assert texts[1].startswith("ok    idle WebSocket: lives for 0.01 s")


@pytest.mark.one_loop
async def test_pings_are_counted_and_answered(make_server: MakeServer) -> None:
    """It takes a second: a socket that does not answer its pings would be closed in the
    meantime.
    """
    changes = {"chat.websocket.ping_interval": 0.2, "chat.websocket.ping_timeout": 0.2}
    server = await make_server(**changes)
    texts: list[str] = []

    await silence.examine(
        Report(lambda finding: texts.append(str(finding))),
        Road(server.base, remote.PATHS, None),
        1.0,
    )

    assert texts[0].startswith("ok    idle WebSocket: lives for 1 s of silence, with ")
    assert "with 0 pings" not in texts[0]


def test_gathered_events_are_told_from_events_that_come_one_by_one() -> None:
    steady = [0.03 * number for number in range(40)]
    # A busy server sends what has come in a quarter of a second at once.
    busy = [0.25 * (number // 8) for number in range(40)]
    at_the_end = [1.2 + 0.0001 * number for number in range(40)]
    # A buffer of 4 KiB that fills once, and the rest.
    in_two = [0.7] * 25 + [1.2] * 15

    assert [arrivals.gathered(times) for times in (steady, busy)] == [False, False]
    assert [arrivals.gathered(times) for times in (at_the_end, in_two)] == [True, True]
    # Too few to say anything.
    assert not arrivals.gathered([0.0] * 5)
    assert arrivals.bursts([]) == 0


async def test_an_answer_that_fails_is_reported_by_its_code_alone(make_server: MakeServer) -> None:
    server = await make_server(
        QUICK, **keys_of("web"), **{"llm.providers.sim.base_url": "http://127.0.0.1:9/v1"}
    )

    async with asyncio.timeout(30):
        _, lines = await examined(server.base, key_of("web"), ask=True)

    assert "SSE: an answer failed: connect_error" in lines["fail"]

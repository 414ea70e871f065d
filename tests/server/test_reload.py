"""SIGHUP: what a new configuration changes while clients are connected, and what it leaves
alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import trustme

from aioserver.config import Configuration
from aioserver.protocol import eventstream
from aioserver.providers.breaker import FEW, LONG_PATIENCE
from aioserver.server import preflight
from tests.support.chat import CHAT, STREAMED, chat, numbers, read_frames, to_end, until_status
from tests.support.failing import kill
from tests.support.raw import CLOSE, TEXT, Raw, closing
from tests.support.scripted_provider import ScriptedProvider
from tests.support.server import (
    CONCURRENCY,
    QUICK,
    SILENT,
    SIM_HTTP_CLIENT,
    MakeServer,
    provider_entry,
)
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aioserver.providers.provider import Provider
    from tests.support.scripted_provider import Peer
    from tests.support.server import RunningServer


PACED = Behaviour(ttft=0, interval=0.01, tokens=60)
SLOW = Behaviour(ttft=0, interval=0.02, tokens=2000)


def reloads(server: RunningServer) -> dict[str, int]:
    return {name: int(counter.value) for name, counter in server.context.metrics.reloads.items()}


def incidents(server: RunningServer) -> list[str]:
    return [incident["text"] for incident in server.incidents() if incident["kind"] == "reload"]


async def ask(server: RunningServer, **fields: Any) -> Any:
    """The JSON of an answer on the OpenAI face, its status in `status`."""
    async with server.session.post(
        f"{server.v1}/chat/completions", json=CHAT | fields
    ) as response:
        return {**await response.json(), "status": response.status}


# What is invalid changes nothing.


async def test_every_fault_is_reported_and_nothing_changes(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server()
    before = server.settings.chat

    done = await server.change(
        **{
            f"{CONCURRENCY}.max_connections": 0,
            "chat.websocket.prot": 1,
            f"{SIM_HTTP_CLIENT}.read_timeout": "x",
        }
    )

    assert not done
    assert server.settings.chat is before
    texts = [record.getMessage() for record in caplog.records if record.name == "aioserver.reload"]
    assert len(texts) == 3
    for place in (
        "chat.websocket.concurrency.max_connections: ",
        "chat.websocket.prot: unknown key (did you mean port?)",
        "llm.providers.sim.http_client.read_timeout: ",
    ):
        assert any(f"{server.file}:" in line and place in line for line in texts), place
    assert reloads(server) == {"applied": 0, "invalid": 1, "failed": 0}
    assert incidents(server) == ["the configuration has 3 faults, and was not applied"]
    assert (await ask(server))["status"] == 200


def broken(file: Path, how: str) -> None:
    """Put something in the place of *file* that is no configuration."""
    text = file.read_text()
    file.unlink()
    match how:
        case "half":
            file.write_text(text[: text.index("concurrent_requests") + 30])
        case "a folder":
            file.mkdir()
        case "a pipe":
            os.mkfifo(file)
        case "too large":
            file.write_text("#" * (1 << 20) + "\n" + text)


def mended(file: Path, text: str) -> None:
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    "how",
    ["gone", "half", "a folder", "a pipe", "too large"],
)
async def test_a_file_that_cannot_be_read_changes_nothing(
    make_server: MakeServer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server()
    file = Path(server.file)
    text = await asyncio.to_thread(file.read_text)
    await asyncio.to_thread(broken, file, how)

    async with asyncio.timeout(patience(10)):
        assert not await server.reload.once()

    assert all(server.file in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 1 or how == "half"
    assert reloads(server)["invalid"] == 1
    assert (await ask(server))["status"] == 200
    await asyncio.to_thread(mended, file, text)
    assert await server.reload.once()


async def test_a_pipe_with_a_key_is_not_waited_for(
    make_server: MakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server()
    pipe = tmp_path / "key"
    os.mkfifo(pipe)
    two = provider_entry(server.simulator.base_url) | {"api_key_file": str(pipe)}

    async with asyncio.timeout(patience(10)):
        assert not await server.change(**{"llm.providers.two": two})

    assert "llm.providers.two.api_key_file: is a pipe, which cannot be read again" in caplog.text
    assert reloads(server)["invalid"] == 1


def linked(file: Path) -> Path:
    """*file* is a link now; another link to a changed copy."""
    first, second, link = (file.with_name(name) for name in ("first", "second", "link"))
    text = file.read_text()
    first.write_text(text)
    second.write_text(text.replace("max_connections: 50", "max_connections: 49"))
    file.unlink()
    file.symlink_to(first)
    link.symlink_to(second)
    return link


async def test_a_link_that_was_swapped_is_followed(make_server: MakeServer) -> None:
    server = await make_server()
    file = Path(server.file)
    link = await asyncio.to_thread(linked, file)
    assert await server.reload.once()
    assert server.context.admission.gate.limit == 50

    await asyncio.to_thread(link.replace, file)  # as orchestrators swap a mounted file

    assert await server.reload.once()
    assert server.context.admission.gate.limit == 49


async def test_certificates_that_are_none_are_a_fault(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server()
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    secure = provider_entry("https://127.0.0.1:9/v1") | {"ca_file": str(file)}

    assert not await server.change(
        **{"llm.providers.two": secure, f"{CONCURRENCY}.max_connections": 49}
    )

    assert reloads(server)["invalid"] == 1
    assert server.context.admission.gate.limit == 50
    assert list(server.context.router.providers) == ["sim"]


async def test_a_configuration_that_could_not_be_started_is_not_applied(
    make_server: MakeServer,
) -> None:
    server = await make_server()

    assert not await server.change(**{"llm.providers.sim.api_key_env": "NO_SUCH_KEY"})

    assert (await ask(server))["status"] == 200
    assert "1 fault," in incidents(server)[0]


async def test_an_address_that_others_reach_stays_guarded(make_server: MakeServer) -> None:
    # The file names another address now; the one that is listened on is still open to others.
    server = await make_server(**{"chat.websocket.host": "0.0.0.0", "auth": {"open": True}})

    assert not await server.change(**{"chat.websocket.host": "127.0.0.1"})

    assert reloads(server)["invalid"] == 1


async def test_a_bug_in_it_is_logged_and_changes_nothing(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    server = await make_server()
    certificates = tmp_path / "gone.pem"
    settings = server.settings.llm

    def gone(_settings: Any) -> None:
        raise FileNotFoundError(certificates)

    server.owners.provider_registry.prepare = gone  # type: ignore[method-assign,assignment]
    assert not await server.change(**{f"{CONCURRENCY}.max_connections": 49})

    assert server.settings.llm is settings
    assert server.context.admission.gate.limit == 50
    assert reloads(server)["failed"] == 1
    (record,) = caplog.records
    assert record.exc_info is not None


# Limits.


async def test_more_places_let_waiters_in_and_fewer_turn_nobody_out(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        SLOW, **{f"{CONCURRENCY}.max_connections": 1, f"{CONCURRENCY}.queue_timeout": 30}
    )
    async with Raw(server) as first, Raw(server) as second, Raw(server) as third:
        for raw in (first, second):
            await raw.upgrade()
        assert (await second.json_frame())["status"] == "queued"

        assert await server.change(**{f"{CONCURRENCY}.max_connections": 2})

        await second.send_json({"action": "ping"})
        while (await second.json_frame())["status"] != "pong":
            pass
        assert await server.change(
            **{f"{CONCURRENCY}.max_connections": 1, f"{CONCURRENCY}.queue_timeout": 0}
        )
        await third.upgrade()
        refused = await third.json_frame()
        message = refused["chunk"]["error"]
        assert message.startswith("the server is full: 1 of 1 places are taken; try again in ")
        assert message.endswith(" s (chat.websocket.concurrency.max_connections=1 reached)")
        assert server.context.admission.gate.inside == 2
        for raw in (first, second):
            await raw.send_json({"action": "ping"})
            assert (await raw.json_frame())["status"] == "pong"


async def test_http_limits_and_origins_hold_for_the_next_request(make_server: MakeServer) -> None:
    server = await make_server()
    async with Raw(server) as kept:
        await kept.get("/health")
        assert (await kept.answer()).status == 200

        assert await server.change(
            **{
                f"{CONCURRENCY}.uvicorn.h11_max_request_line_size": 100,
                f"{CONCURRENCY}.uvicorn.max_keepalive_requests": 2,
                "chat.websocket.allow_origins": ["http://one.example"],
                "chat.websocket.max_message_size": 50,
            }
        )

        await kept.get("/health", "Origin: http://one.example")
        answer = await kept.answer()
        assert answer.headers["access-control-allow-origin"] == "http://one.example"
        assert answer.headers["connection"] == "close"
    async with Raw(server) as raw:
        await raw.get("/" + "x" * 100)
        assert (await raw.answer()).status == 414
    async with Raw(server) as raw:
        assert (await raw.upgrade("Origin: http://two.example")).status == 403
    async with Raw(server) as raw:
        await raw.upgrade("Origin: http://one.example")
        await raw.send_json(chat("r1", "x" * 50))
        frames = await raw.frames()
        assert closing(frames[-1][1])[0] == 1009
    assert (await ask(server))["error"]["code"] == "request_too_large"


@pytest.mark.virtual_time
async def test_open_sockets_are_pinged_as_the_configuration_says_now(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **{"chat.websocket.ping_interval": 0.2, "chat.websocket.ping_timeout": 0.1}
    )
    async with Raw(server) as raw:
        await raw.upgrade()
        opcode, payload = await raw.frame()

        assert await server.change(
            **{
                "chat.websocket.ping_interval": 0.2,
                "chat.websocket.ping_timeout": 0.1,
                "chat.websocket.idle_timeout": 0.05,
            }
        )

        while opcode != CLOSE:
            await raw.send_frame(10, payload)
            opcode, payload = await raw.frame()
    assert closing(payload) == (1000, b"idle")


async def test_new_bounds_hold_for_kept_streams(make_server: MakeServer) -> None:
    server = await make_server(SILENT)
    async with server.connect() as ws:
        for name in ("r1", "r2", "r3"):
            await ws.send_json(chat(name))
        await server.simulator.until(lambda stats: stats.active == 3)
    await until(lambda: server.held()["detached"] == 3)

    assert await server.change(
        **{"chat.streams.max_detached": 1, "chat.streams.max_kept_bytes": 1_234_567}
    )

    await server.simulator.until(lambda stats: stats.aborted == 2)
    assert server.owners.streams.stats().max_bytes == 1_234_567
    server.context.gateway.drain()


async def test_the_prompt_is_the_one_of_now(make_server: MakeServer) -> None:
    server = await make_server()
    assert await server.change(**{"chat.service.system_prompt": "Be brief."})
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await to_end(ws)

    assert server.simulator.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}


async def test_the_log_level_is_the_one_of_now(make_server: MakeServer) -> None:
    server = await make_server()
    root = logging.getLogger()
    before = root.level
    try:
        assert await server.change(**{"logging.level": "ERROR"})
        assert root.level == logging.ERROR
    finally:
        root.setLevel(before)


async def test_settings_that_only_a_restart_changes_are_named_and_stay(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server()
    changes = {
        "chat.websocket.port": 8123,
        "chat.websocket.endpoint": "/elsewhere",
        "chat.sse.endpoint": "/stream",
        f"{CONCURRENCY}.uvicorn.backlog": 64,
        "cluster.name": "another",
    }

    for _ in range(2):  # it is as true the second time
        caplog.clear()
        assert await server.change(**changes)

        named = {
            record.getMessage().split(" has changed")[0]
            for record in caplog.records
            if "until a restart" in record.getMessage()
        }
        assert named == {*changes, "cluster"} - {"cluster.name"}
    assert server.settings.chat.sse.endpoint == "/sse/chat"
    async with server.session.post(server.sse, json={"request_id": "r1", "text": "x"}) as response:
        assert (await read_frames(response))[-1]["status"] == "complete"


async def test_changes_are_logged_by_name_and_never_by_value(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server()
    with caplog.at_level(logging.INFO, "aioserver"):
        assert await server.change(
            **{
                "llm.providers.sim.api_key": "canary-key",
                "llm.providers.sim.headers": {"X-Canary": "canary-header"},
                f"{CONCURRENCY}.max_connections": 40,
            }
        )

    (incident,) = incidents(server)
    assert incident == (
        "configuration applied: chat.websocket.concurrency.max_connections, "
        "llm.providers.sim.api_key, llm.providers.sim.headers"
    )
    logged = caplog.text + json.dumps(server.incidents())
    assert "canary" not in logged.replace("X-Canary", "")


# One provider.


async def test_a_provider_that_stays_the_same_keeps_its_connections(
    make_server: MakeServer,
) -> None:
    server = await make_server()
    provider = server.provider
    await ask(server)

    assert await server.change(
        **{f"{SIM_HTTP_CLIENT}.read_timeout": 4.0, f"{SIM_HTTP_CLIENT}.max_retries": 1}
    )
    await ask(server)

    assert server.provider is provider
    assert server.simulator.stats().connections_accepted == 1


async def test_certificates_are_read_again_under_the_same_name(
    make_server: MakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(file))
    changes = {"llm.providers.sim.ca_file": str(file)}
    server = await make_server(**changes)
    await ask(server)

    assert await server.change(**changes)
    await ask(server)

    assert server.simulator.stats().connections_accepted == 2


async def test_places_of_a_provider_grow_and_shrink_in_place(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
    async with server.connect() as ws:
        for name in ("r1", "r2", "r3"):
            await ws.send_json(chat(name))
        await until(lambda: server.held()["sim waiting"] == 2)

        assert await server.change(**{f"{SIM_HTTP_CLIENT}.concurrent_requests": 2})
        await server.simulator.until(lambda stats: stats.active == 2)
        assert server.held()["sim waiting"] == 1
        assert await server.change(**{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})
        await ws.send_json({"action": "cancel", "request_id": "r1"})
        await until_status(ws, "cancelled")

        assert server.held()["sim waiting"] == 1, "one is under way, of one"
        await ws.send_json({"action": "cancel", "request_id": "r2"})
        await server.simulator.until(lambda stats: stats.requests == 3)
    server.context.gateway.drain()


@pytest.mark.virtual_time
async def test_a_faster_pace_is_felt_at_once(make_server: MakeServer) -> None:
    server = await make_server(
        **{f"{SIM_HTTP_CLIENT}.requests_per_minute": 1, f"{SIM_HTTP_CLIENT}.queue_timeout": 90}
    )
    await ask(server)
    waiting = asyncio.ensure_future(ask(server))
    await until(lambda: server.held()["sim waiting"] == 1)

    assert await server.change(**{f"{SIM_HTTP_CLIENT}.requests_per_minute": 6000})

    async with asyncio.timeout(patience(10)):
        assert (await waiting)["status"] == 200


async def test_a_new_key_goes_with_the_next_request_on_another_connection(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{"llm.providers.sim.api_key": "first"})
    await ask(server)
    assert await server.change(**{"llm.providers.sim.api_key": "second"})
    await ask(server)

    sent = [request.headers["authorization"] for request in server.simulator.requests]
    assert sent == ["Bearer first", "Bearer second"]
    await server.simulator.until(
        lambda stats: (stats.connections_accepted, stats.open_connections) == (2, 1)
    )


async def test_a_provider_that_refused_our_key_is_asked_again(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(fail_rate=1.0, fail_status=401))
    assert (await ask(server))["status"] == 502
    assert server.provider.stats().flagged
    server.simulator.behaviour = QUICK

    assert await server.change()

    assert (await ask(server))["status"] == 200


async def test_a_rest_is_over_for_another_key(make_server: MakeServer) -> None:
    key = "llm.providers.sim.api_key"
    limited = Behaviour(fail_rate=1.0, fault="retry-after-100")
    server = await make_server(limited, **{key: "old"})
    assert (await ask(server))["status"] == 429
    server.simulator.behaviour = QUICK

    assert await server.change(**{key: "old"})
    assert server.provider.stats().pace.cooling > 90
    assert await server.change(**{key: "new"})

    assert (await ask(server))["status"] == 200


async def test_a_dead_provider_stays_dead_at_the_same_address_only(
    make_server: MakeServer,
) -> None:
    server = await make_server(Behaviour(fail_rate=1.0, fail_status=500))
    kill(server.provider.health.breaker)

    assert await server.change(**{f"{SIM_HTTP_CLIENT}.max_keepalive": 9})
    assert server.provider.stats().state == "dead"

    async with Simulator(QUICK) as elsewhere:
        assert await server.change(**{"llm.providers.sim.base_url": elsewhere.base_url})
        assert (await ask(server))["status"] == 200
        await server.provider.close()


@pytest.mark.parametrize(
    "way", ["a key that is refused", "a key of too many requests", "an address that fails"]
)
async def test_attempts_with_the_old_settings_prove_nothing_about_the_new(
    way: str, make_server: MakeServer
) -> None:
    status = {"a key that is refused": 401, "a key of too many requests": 429}.get(way)
    came: list[bytes] = []
    answers = asyncio.Event()

    async def play(peer: Peer) -> None:
        came.append(await peer.request())
        await answers.wait()
        if status:
            head = f"HTTP/1.1 {status} No\r\nRetry-After: 99\r\nContent-Length: 0\r\n\r\n"
            await peer.send(head.encode())

    server = await make_server()
    async with ScriptedProvider(play) as played:
        before = {"llm.providers.sim.base_url": played.url, "llm.providers.sim.api_key": "old"}
        assert await server.change(**before)
        asked = [asyncio.ensure_future(ask(server)) for _ in range(5)]
        await until(lambda: len(came) == len(asked))

        now = {**before, "llm.providers.sim.api_key": "new"} if status else {}
        assert await server.change(**now)
        for _ in range(FEW - 1):
            # With one failure more the provider would be dead.
            server.provider.health.breaker.failed(time.monotonic() - LONG_PATIENCE, trial=False)
        answers.set()

        expected = 429 if status == 429 else 502
        assert [frame["status"] for frame in await asyncio.gather(*asked)] == [expected] * len(
            asked
        )
        stats = server.provider.stats()
        assert (stats.flagged, stats.state, stats.pace.cooling) == (False, "well", 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {
            f"{SIM_HTTP_CLIENT}.{name}": 6
            for name in ("max_connections", "max_keepalive", "concurrent_requests")
        },
        {"llm.providers.sim.headers": {"X-New": "1"}},
    ],
)
async def test_answers_on_all_faces_go_on_while_their_pool_is_replaced_twice(
    make_server: MakeServer, changes: dict[str, Any]
) -> None:
    server = await make_server(PACED)
    limit = changes.get(f"{SIM_HTTP_CLIENT}.max_connections", 20)
    async with AsyncExitStack() as stack:
        ws = await stack.enter_async_context(server.connect())
        await ws.send_json(chat("ws"))
        sse = await stack.enter_async_context(
            server.session.post(server.sse, json={"request_id": "sse", "text": "x"})
        )
        sdk = await stack.enter_async_context(
            server.session.post(f"{server.v1}/chat/completions", json=STREAMED)
        )
        plain = asyncio.ensure_future(ask(server))
        await server.simulator.until(lambda stats: stats.active == 4 and stats.tokens_sent > 20)

        assert await server.change(**changes)
        assert await server.change()  # and back, while the first ones run still
        assert await server.change(**changes)
        new = [asyncio.ensure_future(ask(server)) for _ in range(30)]

        frames = await to_end(ws, "ws")
        assert frames[-1]["status"] == "complete"
        assert numbers(frames) == list(range(1, len(frames) + 1))
        events = await read_frames(sse)
        assert events[-1]["status"] == "complete"
        assert numbers(events) == list(range(1, len(events) + 1))
        assert (await sdk.read()).endswith(b"data: [DONE]\n\n")
        assert (await plain)["status"] == 200
        assert {frame["status"] for frame in await asyncio.gather(*new)} == {200}
        stats = server.simulator.stats()
        assert stats.aborted == 0
        assert stats.peak_active <= max(4, limit)
        assert stats.peak_connections <= max(20, limit)
        assert await server.change()
        await server.simulator.until(lambda stats: stats.open_connections == 0)


async def test_old_and_new_pool_together_keep_to_the_limit(make_server: MakeServer) -> None:
    # The old pool has two connections in use when the limit becomes two: nobody else may start.
    server = await make_server(SLOW, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": 4})
    lowered = {
        f"{SIM_HTTP_CLIENT}.{name}": 2 for name in ("max_connections", "concurrent_requests")
    }
    lowered[f"{SIM_HTTP_CLIENT}.max_keepalive"] = 2
    async with server.connect() as ws:
        for name in ("r1", "r2"):
            await ws.send_json(chat(name))
        await server.simulator.until(lambda stats: stats.active == 2)
        assert await server.change(**lowered)
        for name in ("r3", "r4"):
            await ws.send_json(chat(name))
        await until(lambda: server.held()["sim waiting"] == 2)
        assert server.provider.stats().pool.open == 2
        for name in ("r1", "r2", "r3", "r4"):
            await ws.send_json({"action": "cancel", "request_id": name})
            await server.simulator.until(lambda stats: stats.peak_connections == 2)
        await until(lambda: not server.held()["running"])
    assert server.simulator.stats().peak_connections == 2


async def test_a_provider_that_moves_finishes_at_the_old_place(make_server: MakeServer) -> None:
    server = await make_server(PACED)
    async with Simulator(QUICK) as elsewhere, server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until_status(ws, "chunk")

        assert await server.change(**{"llm.providers.sim.base_url": elsewhere.base_url})

        assert (await ask(server))["status"] == 200
        assert (elsewhere.stats().requests, server.simulator.stats().requests) == (1, 1)
        assert (await to_end(ws))[-1]["status"] == "complete"
        assert server.simulator.stats().aborted == 0
        await server.simulator.until(lambda stats: stats.open_connections == 0)
        assert await server.change()


# Several providers.


async def test_a_new_provider_is_asked_counted_and_shown(make_server: MakeServer) -> None:
    server = await make_server()
    server.context.monitor.tick()
    async with Simulator(QUICK) as second:
        assert await server.change(**{"llm.providers.two": provider_entry(second.base_url)})

        assert (await ask(server, model="two"))["status"] == 200
        async with server.session.get(f"{server.v1}/models") as response:
            ids = {model["id"] for model in (await response.json())["data"]}
        assert {"two", "two/other-model"} <= ids
        server.context.monitor.tick()
        async with server.session.get(f"{server.base}/stats") as response:
            assert (await response.json())["providers"]["two"]["requests"] == 1
        async with server.session.get(f"{server.base}/metrics") as response:
            text = await response.text()
        for line in (
            'aioserver_provider_attempts_total{outcome="ok",provider="two"} 1.0',
            'aioserver_provider_limit{provider="two"} 20.0',
            'aioserver_tokens_total{model="other-model",provider="two",source="provider",type="input"}',
            'aioserver_reloads_total{outcome="applied"} 1.0',
        ):
            assert line in text, line
        async with server.session.get(f"{server.base}/events") as events:
            data = b""
            while b"event: stats" not in data:
                data += await events.content.readany()
        history = next(event for event in eventstream.parse(data) if event.event == b"history")
        seen = json.loads(history.data)["providers"]["two"]["in_flight"]
        assert seen[0] is None, "it was not there then"
        assert seen[-1] == 0
        assert await server.change()


async def test_another_one_is_active_and_first_to_be_asked(make_server: MakeServer) -> None:
    server = await make_server()
    async with Simulator(QUICK) as second:
        two = {"llm.providers.two": provider_entry(second.base_url), "llm.active": "two"}
        assert await server.change(**two)
        await ask(server)
        assert (second.stats().requests, server.simulator.stats().requests) == (1, 0)
        second.behaviour = Behaviour(fail_rate=1.0, fail_status=500)
        assert await server.change(**two, **{"llm.fallbacks": ["sim"]})
        assert (await ask(server))["status"] == 200
        assert (second.stats().requests, server.simulator.stats().requests) == (2, 1)
        assert await server.change()


async def test_answers_at_a_removed_provider_end_there_and_waiters_go_elsewhere(
    make_server: MakeServer,
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.01, tokens=60))
    async with Simulator(QUICK) as second, server.connect() as ws:
        client: dict[str, Any] = dict.fromkeys(
            ("max_connections", "max_keepalive", "concurrent_requests"), 1
        )
        first = provider_entry(server.simulator.base_url, **client)
        assert await server.change(
            **{
                "llm.providers": {"one": first, "two": provider_entry(second.base_url)},
                "llm.active": "one",
                "llm.fallbacks": ["two"],
            }
        )
        leaving: Provider = server.context.router.providers["one"]
        await ws.send_json(chat("runs"))
        await until_status(ws, "chunk")
        await ws.send_json(chat("waits"))
        await ws.send_json(chat("pinned", provider="one"))
        await until(lambda: leaving.stats().queue.waiting == 2)

        assert await server.change(
            **{"llm.providers": {"two": provider_entry(second.base_url)}, "llm.active": "two"}
        )

        ends: dict[str, str] = {}
        while len(ends) < 3:
            last = (await to_end(ws))[-1]
            ends[last["request_id"]] = (
                last["chunk"].get("code") or (last["chunk"]["metadata"]["provider"])
            )
        assert ends == {"runs": "one", "waits": "two", "pinned": "no_provider"}
        assert server.simulator.stats().aborted == 0
        assert (await ask(server, model="one/x"))["status"] == 200, "to the active one, as it came"
        await ws.send_json(chat("late", provider="one"))
        assert (await to_end(ws))[-1]["chunk"]["code"] == "model_not_found"
        await server.simulator.until(lambda stats: stats.open_connections == 0)
        await ws.close()
        assert await server.change()


async def test_a_provider_that_comes_back_counts_what_still_runs_there(
    make_server: MakeServer,
) -> None:
    server = await make_server(SLOW)
    async with Simulator(QUICK) as second, server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until_status(ws, "chunk")
        leaving = server.provider
        two = {"llm.providers": {"two": provider_entry(second.base_url)}, "llm.active": "two"}
        assert await server.change(**two)

        assert await server.change(**{f"{SIM_HTTP_CLIENT}.concurrent_requests": 1})

        assert server.provider is leaving
        await ws.send_json(chat("r2"))
        await until(lambda: server.held()["sim waiting"] == 1)
        await ws.send_json({"action": "cancel", "request_id": "r1"})
        await server.simulator.until(lambda stats: stats.requests == 2)
        await ws.send_json({"action": "cancel", "request_id": "r2"})
        await until(lambda: not server.held()["sim places"])
        assert await server.change(**two)  # nothing runs there: it is closed at once
        await server.simulator.until(lambda stats: stats.open_connections == 0)
        assert await server.change()
        assert server.provider is not leaving


async def test_the_simulator_is_started_when_it_is_first_wanted(make_server: MakeServer) -> None:
    server = await make_server()
    demo = provider_entry("", max_connections=200) | {"simulated": True, "base_url": ""}
    assert await server.change(**{"llm.providers.demo": demo, "llm.active": "demo"})
    answer = await ask(server, max_tokens=1)
    assert answer["status"] == 200
    assert server.simulator.stats().requests == 0
    assert await server.change()


async def test_a_provider_whose_key_is_gone_is_off_and_back_with_it(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server()
    key = tmp_path / "key"
    two = provider_entry(server.simulator.base_url) | {"api_key_file": str(key)}
    assert await server.change(**{"llm.providers.two": two})
    assert "two" not in {model["id"] for model in (await models(server))}

    key.write_text("secret\n")

    assert await server.change(**{"llm.providers.two": two})
    assert (await ask(server, model="two"))["status"] == 200
    assert server.simulator.requests[-1].headers["authorization"] == "Bearer secret"
    assert await server.change()


async def models(server: RunningServer) -> list[Any]:
    async with server.session.get(f"{server.v1}/models") as response:
        return list((await response.json())["data"])


# What the process must have for it.


@pytest.fixture
def few_files() -> Iterator[Callable[[int], None]]:
    """Sets the limits of open files, which are as they were at the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(files: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_more_clients_have_the_descriptors_that_they_need(
    make_server: MakeServer, few_files: Callable[[int], None]
) -> None:
    server = await make_server()
    few_files(preflight.wanted_files(Configuration.load(server.file, environ={}).settings))
    more = {f"{CONCURRENCY}.max_connections": 100, f"{CONCURRENCY}.connection_queue_size": 120}

    assert await server.change(**more)

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft >= preflight.wanted_files(Configuration.load(server.file, environ={}).settings)


async def test_more_clients_than_there_can_be_descriptors_are_refused(
    make_server: MakeServer, few_files: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server()
    few_files(preflight.wanted_files(Configuration.load(server.file, environ={}).settings))
    most = 2**31 - 1
    many = {
        f"{CONCURRENCY}.max_connections": most,
        f"{CONCURRENCY}.connection_queue_size": most,
        f"{CONCURRENCY}.uvicorn.backlog": most,
    }

    assert not await server.change(**many)

    assert f"chat.websocket.concurrency.max_connections={most}" in caplog.text
    assert server.context.admission.gate.limit == 50
    assert reloads(server)["invalid"] == 1


# One at a time.


async def test_a_reload_asked_for_during_a_reload_comes_behind_it(make_server: MakeServer) -> None:
    server = await make_server()
    running = asyncio.ensure_future(server.reload.run())
    try:
        for _ in range(5):
            server.reload.ask()
        await until(lambda: reloads(server)["applied"] == 1)
        server.reload.ask()
        await until(lambda: reloads(server)["applied"] == 2)
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert reloads(server) == {"applied": 2, "invalid": 0, "failed": 0}


async def test_reloads_under_load_lose_no_answer(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.002, tokens=10))
    over = asyncio.Event()
    answers: list[int] = []

    async def client() -> None:
        async with aiohttp.ClientSession() as session:
            while not over.is_set():
                async with session.post(f"{server.v1}/chat/completions", json=CHAT) as response:
                    await response.read()
                    answers.append(response.status)

    clients = [asyncio.ensure_future(client()) for _ in range(10)]
    for number in range(12):
        keepalive = {
            f"{SIM_HTTP_CLIENT}.max_keepalive": number % 3,
            f"{SIM_HTTP_CLIENT}.max_connections": 8 + number,
        }
        assert await server.change(**{f"{SIM_HTTP_CLIENT}.concurrent_requests": 8}, **keepalive)
        seen = len(answers)
        await until(lambda seen=seen: len(answers) > seen + 10)  # type: ignore[misc]
    over.set()
    await asyncio.gather(*clients)

    assert set(answers) == {200}
    assert server.simulator.stats().aborted == 0
    # A pool that was replaced has no idle connections.
    pool = server.provider.stats
    await until(lambda: pool().pool.open == pool().pool.idle)


async def test_a_socket_that_is_open_is_never_closed_by_a_reload(server: RunningServer) -> None:
    async with Raw(server) as raw:
        await raw.upgrade()
        for limit in (1, 50):
            assert await server.change(**{f"{CONCURRENCY}.max_connections": limit})
        await raw.send_json({"action": "ping"})
        opcode, _ = await raw.frame()
        assert opcode == TEXT

"""Gaps in an answer are attributed to the provider, to us, or to a client that takes nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.streams.entries import COMPLETE
from aioserver.telemetry.loop_lag import INTERVAL
from aioserver.telemetry.request_log import RequestRecord
from tests.support.chat import CHAT
from tests.support.jumping_loop import block
from tests.support.logs import fields_of
from tests.support.simulator import Behaviour
from tests.support.transport import BIG, client, say, stream_of
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.server import MakeServer, RunningServer


GAP = 0.25  # seconds between two tokens of the provider
BLOCK = 0.6  # that the loop is blocked


def test_the_longest_silence_is_kept() -> None:
    record = RequestRecord()

    assert [record.silent(*gap) for gap in ((1.0, 1.5), (1.5, 4.0), (4.0, 5.0))] == [0.5, 2.5, 2.5]
    assert record.silence_end == 4.0


@pytest.fixture
def finished(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The fields of the log lines of finished requests."""
    with caplog.at_level(logging.INFO, logger="aioserver.requests"):
        yield lambda: fields_of(caplog)


async def ask(server: RunningServer, face: str) -> None:
    """One streamed answer, read to its end."""
    if face == "websocket":
        async with server.connect() as ws:
            await ws.send_json({"action": "chat", "request_id": "r", "payload": {"text": "Hello"}})
            while (await ws.receive_json())["status"] != "complete":
                pass
        return
    url, body = {
        "sse": (server.sse, {"request_id": "r", "text": "Hello"}),
        "openai": (f"{server.v1}/chat/completions", {**CHAT, "stream": True}),
    }[face]
    async with server.session.post(url, json=body) as response:
        await response.read()


@pytest.mark.parametrize("face", ["websocket", "sse", "openai"])
async def test_a_provider_that_falls_silent_is_reported_as_its_gap(
    face: str, make_server: MakeServer, finished: Callable[[], list[dict[str, Any]]]
) -> None:
    # Takes a second: the gaps are what is measured.
    server = await make_server(Behaviour(ttft=0, interval=GAP, tokens=4))

    await ask(server, face)
    await until(lambda: len(finished()) == 1)

    (fields,) = finished()
    # What this loop was late meanwhile, on a busy machine, is taken out of it.
    assert fields["provider_gap_ms"] + fields.get("our_gap_ms", 0.0) >= GAP * 900
    assert fields["provider_gap_ms"] >= GAP * 300
    assert "client_gap_ms" not in fields
    server.context.monitor.tick()
    stats: Any = server.context.monitor.snapshot
    assert stats["providers"]["sim"]["silence"]["p99"] >= GAP * 0.3
    assert stats["delay"]["ours"]["count"] == stats["delay"]["client"]["count"] == 1


@pytest.mark.parametrize("face", ["websocket", "openai"])
async def test_a_loop_that_was_blocked_is_our_gap_and_not_the_providers(
    face: str, make_server: MakeServer, finished: Callable[[], list[dict[str, Any]]]
) -> None:
    # Takes a second: that long the loop is blocked.
    server = await make_server(Behaviour(ttft=0, interval=0.005, tokens=40))
    asking = asyncio.create_task(ask(server, face))
    await until(lambda: server.provider.meter.events > 5)

    block(BLOCK)
    await asking
    await until(lambda: len(finished()) == 1)

    (fields,) = finished()
    assert fields["our_gap_ms"] >= (BLOCK - INTERVAL) * 900
    assert fields.get("provider_gap_ms", 0.0) < (BLOCK - INTERVAL) * 900


async def test_a_client_that_takes_nothing_is_the_clients_gap() -> None:
    async with client(slow=True) as peer:
        stream = stream_of()
        stream.record = RequestRecord()
        peer.follow(stream)
        say(stream, "x" * BIG)  # more than its socket takes
        await until(lambda: peer.socket.draining == 1)
        say(stream, "waits")
        began = time.monotonic()
        await until(lambda: time.monotonic() > began + 0.05)  # it takes its time

        peer.socket.take()
        await until(lambda: peer.rendered == 2)

        assert stream.record.client_stall >= 0.05
        assert stream.record.delay < stream.record.client_stall


@pytest.mark.parametrize("end", ["dropped", "ended", "left"])
async def test_a_client_that_takes_nothing_any_more_is_the_clients_gap_as_well(end: str) -> None:
    async with client(slow=True) as peer:
        stream = stream_of()
        stream.record = RequestRecord()
        cursor = peer.follow(stream)
        say(stream, "x" * BIG)
        await until(lambda: peer.socket.draining == 1)
        began = time.monotonic()
        await until(lambda: time.monotonic() > began + 0.05)

        match end:
            case "dropped":
                peer.writer.abort("it takes nothing")
            case "ended":
                stream.end(COMPLETE, {})  # its request is counted now
            case "left":
                peer.writer.unfollow(cursor)

        assert stream.record.client_stall >= 0.05


async def test_an_event_that_waits_for_its_turn_is_our_delay() -> None:
    async with client() as peer:
        busy, other = stream_of("busy"), stream_of("other")
        other.record = RequestRecord()
        peer.follow(busy)
        peer.follow(other)
        await ticks()

        say(other, "waits for the end of this turn")
        block(0.05)  # which is long
        await until(lambda: peer.rendered == 1)

        assert other.record.delay >= 0.05
        assert other.record.client_stall == 0.0


async def test_events_from_before_a_reader_came_have_not_waited_for_us() -> None:
    async with client() as peer:
        stream = stream_of()
        stream.record = RequestRecord()
        say(stream, "long ago")
        stream.entries[0].received_at -= 1000.0

        peer.follow(stream)
        await until(lambda: peer.rendered == 1)

        assert stream.record.delay < 500.0

"""The lifetime of streams in virtual time: who ends a stream without a reader, and when."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import pytest

from aioserver.config.settings import Streams
from aioserver.errors import ServerAtCapacity, ServerShutdown
from aioserver.streams.cursor import ConditionReader
from aioserver.streams.entries import CANCELLED, COMPLETE
from aioserver.streams.lifetime import Lifetime
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.streams.stream import Stream

pytestmark = pytest.mark.virtual_time

WINDOW = 8.0


class Place(NamedTuple):
    """An attempt that has a place at a provider, where *waiting* requests wait."""

    place: str = "sim"
    waiting: int = 0


class Streamed:
    """A lifetime, and streams that run in it until they are cancelled."""

    def __init__(self) -> None:
        self.lifetime = Lifetime(Streams(max_detached=4))
        self.cancelled: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def open(self, name: str, *, window: float = WINDOW, sent: bool = True) -> Stream:
        stream = self.lifetime.store.open(name, "me", window=window)
        stream.outcome.sent = sent
        stream.producer = asyncio.create_task(self._produce(stream))
        self.tasks.append(stream.producer)
        return stream

    async def _produce(self, stream: Stream) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not stream.ended:
                self.cancelled.append(stream.request_id)
                stream.end(CANCELLED, {})

    def leave(self, stream: Stream) -> None:
        """Let a reader of *stream* come, and leave again."""
        reader = ConditionReader(stream, lambda _stream: False)
        self.lifetime.reader_added(stream)
        reader.leave()
        self.lifetime.reader_removed(stream)


@pytest.fixture
async def streamed() -> AsyncIterator[Streamed]:
    made = Streamed()
    yield made
    for task in made.tasks:
        task.cancel()
    await asyncio.gather(*made.tasks)
    made.lifetime.close()


async def test_a_stream_without_a_reader_runs_for_its_window_and_is_kept_as_long(
    streamed: Streamed,
) -> None:
    stream, store = streamed.open("r"), streamed.lifetime.store
    await ticks()

    streamed.leave(stream)
    await asyncio.sleep(WINDOW - 1)
    assert (streamed.lifetime.detached, streamed.cancelled) == (1, [])
    streamed.leave(stream)
    await asyncio.sleep(WINDOW - 1)
    assert streamed.cancelled == [], "its reader has been here meanwhile"
    await asyncio.sleep(2)
    assert (streamed.lifetime.detached, streamed.cancelled) == (0, ["r"])

    await asyncio.sleep(WINDOW - 2)
    assert store.find("me", "r") is stream
    await asyncio.sleep(3)
    assert (store.find("me", "r"), store.stats().bytes) == (None, 0)


@pytest.mark.parametrize(("window", "sent"), [(0.0, True), (WINDOW, False)])
async def test_a_stream_to_which_nobody_can_come_back_or_that_was_not_sent_ends_at_once(
    streamed: Streamed, window: float, *, sent: bool
) -> None:
    stream = streamed.open("r", window=window, sent=sent)
    await ticks()

    streamed.leave(stream)
    assert stream.producer is not None
    assert stream.producer.cancelling()
    await ticks()

    assert streamed.lifetime.store.find("me", "r") is None
    assert streamed.lifetime.store.stats().bytes == 0


async def test_an_ended_stream_that_is_still_read_is_kept_for_another_window(
    streamed: Streamed,
) -> None:
    stream = streamed.open("r")
    reader = ConditionReader(stream, lambda _stream: False)
    stream.end(COMPLETE, {})

    await asyncio.sleep(1.5 * WINDOW)
    assert stream.entries
    reader.leave()
    await asyncio.sleep(WINDOW)

    assert not stream.entries


async def test_so_many_streams_run_without_a_reader_and_one_more_ends_the_oldest(
    streamed: Streamed,
) -> None:
    streams = [streamed.open(f"r{number}") for number in range(5)]
    await ticks()

    for stream in streams:
        streamed.leave(stream)
    await ticks()

    assert (streamed.lifetime.detached, streamed.cancelled) == (4, ["r0"])


async def test_waiting_requests_end_the_oldest_streams_without_a_reader_at_their_provider(
    streamed: Streamed,
) -> None:
    streams = [streamed.open(f"r{number}") for number in range(3)]
    for stream, place in zip(streams, ("other", "sim", "sim"), strict=True):
        stream.attempt = Place(place)  # type: ignore[assignment]
    await ticks()
    for stream in streams:
        streamed.leave(stream)

    streamed.lifetime.make_room("sim", 1)
    streamed.lifetime.make_room("sim", 1)  # the first one is about to give its place back
    await ticks()

    assert streamed.cancelled == ["r1"]


async def test_streams_without_a_reader_end_with_the_reason_when_the_server_drains(
    streamed: Streamed,
) -> None:
    before, after, read = (streamed.open(name) for name in ("before", "after", "read"))
    reader = ConditionReader(read, lambda _stream: False)
    await ticks()

    streamed.lifetime.drain(lambda: ServerShutdown("the server is stopping"))
    streamed.leave(after)
    await ticks()

    assert sorted(streamed.cancelled) == ["after", "before"]
    assert isinstance(before.cancel_reason, ServerShutdown)
    assert read.cancel_reason is None
    reader.leave()


async def test_a_stream_in_the_background_needs_no_reader_and_has_a_place_of_its_own(
    streamed: Streamed,
) -> None:
    lifetime = streamed.lifetime
    streams = [streamed.open(f"r{number}", sent=False) for number in range(2)]
    await ticks()
    for stream in streams:
        lifetime.check_background("me" if stream is streams[0] else "another")
        lifetime.run_in_background(stream)
        streamed.leave(stream)
    with pytest.raises(ServerAtCapacity, match="2 answers run in the background already"):
        lifetime.check_background("me")
    await asyncio.sleep(2 * WINDOW)
    assert (streamed.cancelled, lifetime.background) == ([], 2)

    streams[0].end(COMPLETE, {})
    lifetime.leave_background(streams[1])
    assert lifetime.background == 0
    lifetime.check_background("me")
    lifetime.end(streams[1])
    await ticks()
    assert streamed.cancelled == ["r1"]

"""When a log pauses its provider, and when it lets it go on."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.streams.entries import CHUNK, COMPLETE, Entry
from aioserver.streams.store import StreamStore
from aioserver.streams.stream import PAUSE_BYTES, RESUME_BYTES
from tests.support.transport import client, say
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.streams.stream import Stream
    from tests.support.transport import FakeClient

pytestmark = pytest.mark.both_loops

SIZE = 10_000
TEXT = "x" * SIZE


class Provider:
    """A source that writes down what it is told."""

    def __init__(self) -> None:
        self.paused = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def complete(self) -> bool:
        return False


def store(max_stream_bytes: int = 1 << 22) -> StreamStore:
    return StreamStore(max_stream_bytes=max_stream_bytes, max_kept_bytes=1 << 30)


def fill(stream: Stream, provider: Provider) -> None:
    """Append until the provider is paused."""
    for _ in range(2 * PAUSE_BYTES // SIZE):
        if provider.paused:
            return
        say(stream, TEXT)
    raise AssertionError("the provider is not paused")


async def test_a_provider_pauses_until_its_reader_has_read_on() -> None:
    async with client(slow=True) as peer:
        stream = store().open("r1", "me", window=0)
        stream.source = provider = Provider()
        peer.follow(stream)

        fill(stream, provider)
        assert PAUSE_BYTES < stream.bytes < PAUSE_BYTES + 2 * SIZE
        while provider.paused:
            assert stream.bytes > RESUME_BYTES
            peer.socket.take()
            await ticks()

        assert stream.bytes <= RESUME_BYTES
        assert peer.dropped == []


@pytest.mark.parametrize("window", [0.1, 30.0])
async def test_a_provider_goes_on_where_the_client_can_come_back(window: float) -> None:
    async with client(slow=True) as peer:
        stream = store().open("r1", "me", window=window)
        stream.source = provider = Provider()
        peer.follow(stream)

        for _ in range(3 * PAUSE_BYTES // SIZE):
            say(stream, TEXT)

        assert not provider.paused


async def test_a_small_log_pauses_before_it_would_drop_its_reader() -> None:
    async with client(slow=True) as peer:
        stream = store(200_000).open("r1", "me", window=0)
        stream.source = provider = Provider()
        peer.follow(stream)

        fill(stream, provider)

        assert peer.dropped == []


async def test_the_reader_that_is_ahead_decides() -> None:
    async with client(slow=True) as slow, client() as fast:
        stream = store().open("r1", "me", window=0)
        stream.source = provider = Provider()
        slow.follow(stream)
        fast.follow(stream)

        for _ in range(3 * PAUSE_BYTES // SIZE):
            say(stream, TEXT)
        assert not provider.paused
        fast.writer.close()
        say(stream, TEXT)

        assert provider.paused


async def test_an_end_pauses_nothing() -> None:
    async with client(slow=True) as peer:
        stream = store().open("r1", "me", window=0)
        stream.source = provider = Provider()
        peer.follow(stream)
        while stream.bytes < PAUSE_BYTES - SIZE:
            say(stream, TEXT)

        stream.append(CHUNK, [b'{"data":"%b"}' % TEXT.encode()], more=True)
        stream.append(CHUNK, [b'{"data":"%b"}' % TEXT.encode()], more=True)
        stream.end(COMPLETE, {})

        assert not provider.paused


class Deaf(Provider):
    """A source that reads on, whatever it is told: a request waits for its place."""

    def pause(self) -> None:
        """Go on."""


class Looked(list[Entry]):
    """Entries that count how often one of them is looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("readers", [1, 2, 3])
async def test_an_event_costs_the_same_however_much_is_unread(readers: int) -> None:
    """A pause may be refused: the log of a slow reader then goes on growing."""
    async with AsyncExitStack() as stack:
        stream = store().open("r1", "me", window=0)
        stream.entries = entries = Looked()
        stream.source = Deaf()
        for _ in range(readers):
            peer = await stack.enter_async_context(client(slow=True))
            peer.follow(stream)
        say(stream, TEXT * 20)

        looks = []
        for number in range(2000):
            before = entries.looks
            say(stream, f"w{number}")
            looks.append(entries.looks - before)

        assert stream.bytes > 2 * PAUSE_BYTES
        # On the average of the events: the first ones find little unread, the last ones much.
        assert sum(looks[-160:]) / 160 < 100
        if readers == 1:
            assert max(looks) < 10


async def test_the_reader_that_is_ahead_lets_a_provider_go_on_when_it_has_read() -> None:
    async with client(slow=True) as slow, client(slow=True) as other:
        stream = store().open("r1", "me", window=0)
        stream.source = provider = Provider()
        slow.follow(stream)
        other.follow(stream)

        fill(stream, provider)
        while provider.paused:
            other.socket.take()
            await ticks()

        assert stream.bytes > PAUSE_BYTES, "the other reader still needs all of it"


async def _lag(stream: Stream, peer: FakeClient) -> None:
    """Let *stream* drop *peer*, as what it has not read is more than the log may keep."""
    while not peer.dropped:
        say(stream, TEXT)


async def _shed(stream: Stream, peer: FakeClient) -> None:
    """Let the store drop *peer*, for want of room."""
    while not stream.shed():
        say(stream, TEXT)
    assert peer.dropped


async def _go(stream: Stream, peer: FakeClient) -> None:
    """Let the client go, which holds up what is kept."""
    while stream.bytes < 5 * SIZE:
        say(stream, TEXT)
    await until(lambda: peer.socket.draining == 1)
    peer.socket.lose()
    await until(lambda: peer.writer.closed)


@pytest.mark.parametrize("lose", [_lag, _shed, _go], ids=["too late", "no room", "gone"])
async def test_what_a_reader_that_was_lost_had_still_to_read_holds_up_no_other(
    lose: Callable[[Stream, FakeClient], Awaitable[None]],
) -> None:
    async with client(slow=True) as slow, client() as fast:
        stream = store(10 * SIZE).open("r1", "me", window=0)
        stream.source = provider = Provider()
        slow.follow(stream)
        fast.follow(stream)

        await lose(stream, slow)

        assert len(stream.readers) == 1
        assert not provider.paused
        assert stream.bytes == 0, "the other reader has passed all of it"

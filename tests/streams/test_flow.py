"""When a log pauses its provider, and when it lets it go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aioserver.streams.entries import CHUNK, COMPLETE
from aioserver.streams.flow import PAUSE_BYTES, RESUME_BYTES
from aioserver.streams.store import StreamStore
from tests.support.transport import client, say
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from aioserver.streams.stream import Stream

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
    async with client(slow=True) as one:
        stream = store().open("r1", "me", window=0)
        stream.source = provider = Provider()
        one.follow(stream)

        fill(stream, provider)
        assert PAUSE_BYTES < stream.bytes < PAUSE_BYTES + 2 * SIZE
        while provider.paused:
            assert stream.bytes > RESUME_BYTES
            one.socket.take()
            await ticks()

        assert stream.bytes <= RESUME_BYTES
        assert one.dropped == []


@pytest.mark.parametrize("window", [0.1, 30.0])
async def test_a_provider_goes_on_where_the_client_can_come_back(window: float) -> None:
    async with client(slow=True) as one:
        stream = store().open("r1", "me", window=window)
        stream.source = provider = Provider()
        one.follow(stream)

        for _ in range(3 * PAUSE_BYTES // SIZE):
            say(stream, TEXT)

        assert not provider.paused


async def test_a_small_log_pauses_before_it_would_drop_its_reader() -> None:
    async with client(slow=True) as one:
        stream = store(200_000).open("r1", "me", window=0)
        stream.source = provider = Provider()
        one.follow(stream)

        fill(stream, provider)

        assert one.dropped == []


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
    async with client(slow=True) as one:
        stream = store().open("r1", "me", window=0)
        stream.source = provider = Provider()
        one.follow(stream)
        while stream.bytes < PAUSE_BYTES - SIZE:
            say(stream, TEXT)

        stream.append(CHUNK, [b'{"data":"%b"}' % TEXT.encode()], more=True)
        stream.append(CHUNK, [b'{"data":"%b"}' % TEXT.encode()], more=True)
        stream.end(COMPLETE, {})

        assert not provider.paused

"""A client's socket in memory: a transport that takes what a test lets it take, and a writer on
it.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.streams.entries import CHUNK
from aioserver.streams.formats import Format
from aioserver.streams.outbox import Outbox
from aioserver.streams.store import StreamStore
from aioserver.streams.writer import WRITE_BYTES, Writer
from tests.support.waiting import until

if TYPE_CHECKING:
    import socket as sockets
    from collections.abc import AsyncIterator

    from aioserver.streams.cursor import Cursor
    from aioserver.streams.entries import Entry
    from aioserver.streams.stream import Stream

# The marks of asyncio's transports: above HIGH a writer waits, at LOW it goes on.
HIGH, LOW = 1 << 16, 1 << 14
BIG = WRITE_BYTES + 1


class FakeTransport(asyncio.Transport):
    """A transport whose peer reads everything at once or, with *slow*, only what `take` takes.

    *held* bytes wait in its buffer from the start.
    """

    def __init__(self, *, slow: bool = False, held: int = 0) -> None:
        super().__init__()
        self.slow = slow
        self.writes: list[bytes] = []
        self.held = held
        self.under: sockets.socket | None = None
        self.aborted = False
        self.closing = False
        self.draining = 0
        self.drain_cancelled = False
        self._drained: asyncio.Future[None] | None = None

    @property
    def written(self) -> bytes:
        return b"".join(self.writes)

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        assert not self.closing, "written after the end"
        self.writes.append(bytes(data))
        if self.slow:
            self.held += len(data)

    def get_write_buffer_size(self) -> int:
        return self.held

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self.under if name == "socket" else default

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = True
        self.lose()

    def lose(self) -> None:
        """Lose the connection."""
        self.closing = True
        self.held = 0
        if self._drained is not None and not self._drained.done():
            self._drained.set_exception(ConnectionResetError())

    def take(self, size: int | None = None) -> None:
        """Let the peer read *size* bytes, or everything."""
        self.held -= self.held if size is None else min(size, self.held)
        if self.held <= LOW and self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    async def drain(self) -> None:
        if self.held <= HIGH:
            return
        self._drained = asyncio.get_running_loop().create_future()
        self.draining += 1
        try:
            await self._drained
        except asyncio.CancelledError:
            self.drain_cancelled = True
            raise
        finally:
            self.draining -= 1
            self._drained = None


class FakeClient:
    """A writer on a fake transport, which records what its callbacks are told."""

    def __init__(self, *, slow: bool = False, send_timeout: float = 30.0) -> None:
        self.socket = FakeTransport(slow=slow)
        self.dropped: list[str] = []
        self.left: list[Stream] = []
        self.ended: list[Stream] = []
        self.rendered = 0
        self.look = Format(
            "test",
            self.render,
            None,
            lambda _stream, error, _seen: f"<{error.code}>".encode(),
            render_position=lambda _stream, queued: b"<%d>" % queued.position,
        )
        self.writer = Writer(
            self.socket,
            self.socket.drain,
            Outbox(asyncio.get_running_loop()),
            send_timeout=send_timeout,
            on_drop=self.dropped.append,
            on_unfollow=self.left.append,
        )

    def render(self, _stream: Stream, entry: Entry, skip: int) -> bytes:
        self.rendered += 1
        assert entry.frames is not None
        return b"".join(_text(frame) for frame in entry.frames[skip:])

    def follow(self, stream: Stream, after: int = 0) -> Cursor:
        def finished(cursor: Cursor) -> None:
            assert cursor.removed
            self.ended.append(cursor.stream)

        return self.writer.follow(stream, after, self.look, on_end=finished)


def _text(frame: bytes) -> bytes:
    text: str = orjson.loads(frame)["chunk"].get("data", ".")
    return text.encode()


@asynccontextmanager
async def client(*, slow: bool = False, send_timeout: float = 30.0) -> AsyncIterator[FakeClient]:
    """A fake client, which leaves at the end of the block."""
    fake = FakeClient(slow=slow, send_timeout=send_timeout)
    yield fake
    fake.writer.close()
    fake.socket.lose()
    await until(lambda: fake.socket.draining == 0)
    assert not fake.socket.drain_cancelled, "a blocked write is never cancelled"


def stream_of(name: str = "r1", *, window: float = 30.0, most: int = 1 << 30) -> Stream:
    streams = StreamStore(max_stream_bytes=most, max_kept_bytes=1 << 30)
    return streams.open(name, "me", window=window)


def say(stream: Stream, *texts: str) -> None:
    stream.append(CHUNK, [orjson.dumps({"data": text}) for text in texts])

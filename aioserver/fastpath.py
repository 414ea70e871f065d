r"""The fast path: one event from the provider's socket to the client's, in one call.

Most of what a gateway does is to pass an event on to the one client who waits for it, and most of
what that costs are objects: each one that an event touches is a miss in the processor's caches when
a thousand streams take turns. So where nothing else is to be done for an event it touches four, the
provider's connection, this object, the log and the client's transport:

    WireProtocol.data_received → FastPath.take → transport.write

*When it may be taken.* It is opened after a read that went the long way, by who knows that all of
this holds, and each of these is asked in turn (`Exchange` → `EventSink` → `Stream` → `Writer`):

    the provider's parser stands between two chunks, and its answer goes on
    no event is half read, and one has been passed on already
    the log is empty, cannot be found by anybody else, and has one reader
    that reader has written all it had, to an HTTP/1.1 client that takes it

None of this can change but by a read that goes the long way, which begins by leaving the fast path,
or in the writer, which closes it: when its client is blocked, leaves, or is given something else.

*What it takes.* One read that is one whole chunk with one whole event that is nothing special. The
chunk's framing is what our client gets, too, so the bytes pass unchanged. Every other form of the
same bytes, every end, error, finish_reason and comment goes the long way, and has the same effect
there; the tests feed both with the same streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import Transport
    from collections.abc import Callable

    from aioserver.streams import Stream

MAX_CHUNK_BYTES = 1 << 16
_ERROR, _FINISH, _FINISH_SPACED = b'"error"', b'"finish_reason":"', b'"finish_reason": "'


class FastPath:
    """From one stream to one client. *last*: the loop's time when it was taken last."""

    __slots__ = ("_full", "_now", "_room", "_stream", "_transport", "last", "open")

    def __init__(
        self,
        stream: Stream,
        transport: Transport,
        now: Callable[[], float],
        *,
        room: int,
        full: Callable[[], None],
    ) -> None:
        self.open = False
        self.last = 0.0
        self._stream = stream
        self._transport = transport
        self._now = now
        self._room = room  # bytes that the transport may hold
        self._full = full  # called when it holds more

    def take(self, read: bytes) -> bool:
        """Pass *read* on; False, with nothing done, where it has to go the long way."""
        find = read.find
        start = find(b"\r\n") + 2
        end = len(read) - 2
        transport = self._transport
        if (
            not self.open
            or not read.startswith(b"%x\r\ndata: {" % (end - start))
            or not read.endswith(b"\n\n\r\n")
            or find(b"\n", start) != end - 2  # one line, and so one event and no [DONE]
            or find(b"\r", start) != end
            or find(_ERROR) >= 0
            or find(_FINISH) >= 0
            or find(_FINISH_SPACED) >= 0
            or end > MAX_CHUNK_BYTES
            or transport.is_closing()
        ):
            return False
        transport.write(read)
        self.last = self._now()
        self._stream.last += 1
        if transport.get_write_buffer_size() > self._room:
            self._full()
        return True

"""The one writer of a client's socket.

This file is one concept: one writer decides what is written to its socket, and handles its
blocking.

Every byte to a client goes through its writer: events, heartbeats, pings, pongs, close frames. A
writer keeps cursors into logs, not events; only control frames are queued, at most 64. Writing is
synchronous and happens within `Stream.append` itself, which notifies its cursors: a token reaches
the client's socket without a task switch.

Most tokens do not pass through the writer: when nothing else is to be written, it opens a fast
path for its stream (fast_path.py). The bytes of the fast path are written before anything else of
the writer.

When the transport's buffer is over its high-water mark, the writer is *blocked*: it stops
rendering, one task waits in `drain()`, and a watchdog aborts the transport once the client is gone
(limits/write_watchdog.py). A blocked write is never cancelled. An idle writer has no task and no
timer.

A writer with one cursor writes at once; one with several gathers the events of one iteration of
the event loop. Cursors take turns, with one write in each iteration, so that a long replay delays
no other stream.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from aioserver.errors import ResumeGap
from aioserver.limits.write_watchdog import WriteWatchdog, reset, vanished, watch_rest
from aioserver.streams.cursor import Cursor
from aioserver.streams.ending import run_all
from aioserver.streams.fast_path import Destination, FastPath, new_path

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.protocol.openai import Shape
    from aioserver.streams.formats import Format
    from aioserver.streams.outbox import Outbox
    from aioserver.streams.stream import Stream

logger = logging.getLogger("aioserver.streams")

# Bytes rendered for one write, and so for one cursor before the next; the last entry may exceed
# it. It is also the high-water mark of a transport's buffer, as in asyncio: `drain()` waits above
# it.
WRITE_BYTES = 1 << 16
MAX_CONTROL_FRAMES = 64


def _ignore(_reason: str) -> None:
    """Ignore that the client is dropped."""


class Writer:
    """Writes the new events of its cursors, in as few writes as possible.

    Always: nothing is written while blocked; a cursor in `_ready` has something to write; once
    closed it follows nothing, so that no later append can reach the connection's next response.

    *head* goes before the first write, and *tail* after the end of a stream, in the same write.
    *chunked*: each write is one chunk (RFC 9112, 7.1). *on_drop* is called with the reason when
    the client is dropped, *on_unfollow* with each stream that is no longer followed.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        drain: Callable[[], Awaitable[None]],
        outbox: Outbox,
        *,
        send_timeout: float,
        on_drop: Callable[[str], None] = _ignore,
        chunked: bool = False,
        head: bytes = b"",
        tail: bytes = b"",
        on_unfollow: Callable[[Stream], None] = lambda _stream: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._drain = drain
        self._outbox = outbox
        self._send_timeout = send_timeout
        self._on_drop = on_drop
        self._chunked = chunked
        self._head = head
        self._tail = tail
        self._on_unfollow = on_unfollow
        self._cursors: dict[Cursor, None] = {}
        self._ready: dict[Cursor, None] = {}
        self._control: list[bytes] = []
        self._scheduled: asyncio.Handle | None = None
        self._draining: asyncio.Task[None] | None = None
        self._watchdog: WriteWatchdog | None = None
        # The callbacks that continue, one after the other, once a blocked client reads again. A
        # callback that blocks the writer once more goes to the end.
        self._turns: list[Callable[[], None]] = []
        # The monotonic time at which the client last stopped reading.
        self._blocked_at = 0.0
        # Whether nothing will be written from now on.
        self.closed = False
        self._path: FastPath | None = None
        self._last_write = self._loop.time()

    @property
    def last_write(self) -> float:
        """The loop's time of the last write."""
        path = self._path
        return self._last_write if path is None else max(self._last_write, path.forwarded_at)

    @property
    def blocked(self) -> bool:
        """Whether the client is not reading at the moment."""
        return self._draining is not None

    @property
    def following(self) -> int:
        """The number of streams that are followed."""
        return len(self._cursors)

    def follow(
        self,
        stream: Stream,
        after: int,
        event_format: Format,
        *,
        on_end: Callable[[Cursor], None] = lambda _cursor: None,
    ) -> Cursor:
        """Write the events of *stream* after event *after*, including those to come.

        *on_end* is called once the last event was written. A writer that is closed already
        unfollows *stream* in the next iteration of the event loop.

        Raises:
            ResumeGap: see `Stream.locate`.
        """
        cursor = Cursor(self, stream, after, event_format, on_end)
        if self.closed:
            cursor.removed = True
            # Not now: the face must first register this reader with the stream's lifetime.
            self._loop.call_soon(self._on_unfollow, stream)
            return cursor
        stream.add_reader(cursor)
        self._cursors[cursor] = None
        if self._path is not None:
            self._close_path()
        if cursor.next_index < stream.offset + len(stream.entries) or stream.ended:
            self._ready[cursor] = None
            self._schedule()
        return cursor

    def unfollow(self, cursor: Cursor) -> None:
        """Stop following the stream of *cursor*; a second call does nothing."""
        if cursor.removed:
            # Its farewell may not be written yet.
            self._ready.pop(cursor, None)
            return
        cursor.removed = True
        if self._path is not None:
            self._close_path()
        if self._draining is not None:
            cursor.note_blocked(self._blocked_at)
        del self._cursors[cursor]
        self._ready.pop(cursor, None)
        stream = cursor.stream
        stream.remove_reader(cursor)
        self._on_unfollow(stream)

    def drop(self, cursor: Cursor) -> None:
        """Unfollow the stream of *cursor*, and write its `farewell` as soon as the client
        reads.
        """
        self._on_drop("reader fell behind")
        self.unfollow(cursor)
        if not self.closed:
            self._ready[cursor] = None
            if self._draining is None:
                self._schedule()

    def write_now(self, data: bytes) -> bool:
        """Write *data*, the next bytes of the only cursor.

        Return False, with nothing done, if something else must be written before them.
        """
        if self._ready or self._draining is not None or self.closed or len(self._cursors) != 1:
            return False
        self._write(data)
        return True

    def open_fast_path(self, cursor: Cursor, shape: Shape | None) -> FastPath | None:
        """Return the fast path of *cursor*; None if it can have none now: see fast_path.py."""
        if self._ready or self._draining is not None or self.closed or len(self._cursors) != 1:
            return None
        path = self._path
        if path is None or path.cursor is not cursor or path.shape is not shape:
            socket, clock, full = self._transport, self._loop.time, self._block
            destination = Destination(
                socket, self._outbox, clock, WRITE_BYTES, full, self._chunked
            )
            path = self._path = new_path(cursor, destination, shape)
        if path is not None:
            path.open = True
        return path

    def notify(self, cursor: Cursor) -> None:
        """Write what *cursor* has not rendered, at once or in a later write."""
        if self._ready or self._draining is not None or self.closed or len(self._cursors) != 1:
            self._ready[cursor] = None
            if self._draining is not None:
                if cursor.stream.ended:
                    # The request is counted now, while the client is still not reading.
                    cursor.note_blocked(self._blocked_at)
            elif not self.closed:
                self._schedule()
            return
        try:
            if data := cursor.render_newest():
                self._write(data)
            else:
                self._ready[cursor] = None
                self.pump()
        except Exception as bug:  # noqa: BLE001 - whatever it is, it is this client's alone
            self._give_up(bug)

    def send(self, data: bytes) -> None:
        """Write a control frame or a comment before all events that are not written yet.

        While the writer is blocked, *data* is queued; beyond MAX_CONTROL_FRAMES the client is
        dropped. So is a client that has vanished while the kernel had room for what was written to
        it.
        """
        if self.closed:
            return
        if self._draining is not None:
            if len(self._control) >= MAX_CONTROL_FRAMES:
                self.abort("more than 64 control frames wait")
                return
            self._control.append(data)
        elif vanished(self._transport, self._send_timeout):
            self.abort(f"nothing answered for {self._send_timeout} s")
        else:
            self._write(data)

    def pass_on(self, data: bytes, again: Callable[[], None]) -> bool:
        """Write *data*, whole messages that another instance has rendered.

        Return False, with nothing done, while the client reads nothing: *again* is called, in its
        turn, when it does.
        """
        if self._draining is not None:
            self._turns.append(again)
            return False
        if not self.closed:
            self._write(data)
        return True

    def send_head(self) -> None:
        """Write the head alone, unless an earlier write had it."""
        if self._head and not self.closed:
            self._write(b"")

    def pump(self) -> None:
        """Write what is ready, about WRITE_BYTES in one turn of the loop, until the transport's
        buffer is full.
        """
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        try:
            self._write_ready()
        except Exception as bug:  # noqa: BLE001 - as above
            self._give_up(bug)

    def _write_ready(self) -> None:
        """Write once; the rest is written in the next iteration of the event loop."""
        ready = self._ready
        if self._draining is not None or self.closed or not (ready or self._control):
            return
        parts, self._control = self._control, []
        room = WRITE_BYTES
        ended: list[Cursor] = []
        for cursor in list(ready):
            try:
                room = cursor.render(parts, room)
            except ResumeGap:
                # Each entry that was read has at least one event.
                cursor.drop(cursor.next_index)
                continue
            del ready[cursor]
            stream = cursor.stream
            if room <= 0 and cursor.behind:
                # The cursor goes behind the others, which are written next.
                ready[cursor] = None
                stream.note_passed()
            elif stream.ended or cursor.farewell:
                # The entries that it has passed are discarded when it is unfollowed.
                ended.append(cursor)
            else:
                stream.note_passed()
            if room <= 0:
                break
        data = b"".join(parts)
        if data or ended:
            self._write(data, self._tail if ended else b"")
        for cursor in ended:
            # A dropped cursor is unfollowed already.
            if not cursor.removed or (cursor.farewell and not self.closed):
                self.unfollow(cursor)
                cursor.on_end(cursor)
        if ready and not (self.blocked or self.closed):
            self._schedule()

    async def flush(self) -> None:
        """Wait until everything that is ready is in the transport, or the writer is closed.

        Cancelling is safe: it does not cancel a blocked write.
        """
        while not self.closed and (self._ready or self._control or self._draining is not None):
            if self._draining is not None:
                await asyncio.wait((self._draining,))
            else:
                if self._scheduled is None:
                    self.pump()
                await asyncio.sleep(0)

    def abort(self, reason: str) -> None:
        """Drop the client: reset its connection, discarding whatever is still to be written."""
        if not self.closed:
            self._on_drop(reason)
            for cursor in self._cursors:
                cursor.stream.record.slow_client = True
        reset(self._transport)
        self.close()

    def end(self, data: bytes) -> None:
        """Write *data* after everything in the transport, and close the writer."""
        self._outbox.flush()
        if not self._transport.is_closing():
            self._transport.write(data)
        self.close()

    def close(self) -> None:
        """Unfollow every stream and write nothing from now on; a second call does nothing.

        The transport still sends its buffer. If the client does not read it, a watchdog aborts the
        connection.
        """
        if self.closed:
            return
        self.closed = True
        if self._cursors:
            run_all([partial(self.unfollow, cursor) for cursor in self._cursors] + [self._stop])
        else:
            self._stop()

    def _stop(self) -> None:
        self._ready.clear()
        self._control.clear()
        self._turns.clear()
        # Otherwise a socket and its writer would be in a reference cycle.
        self._on_drop = _ignore
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        if self._watchdog is None:
            watch_rest(self._transport, self._send_timeout)

    def _give_up(self, bug: Exception) -> None:
        """Reset the connection: its client would wait for ever for bytes that cannot be written."""
        logger.error("bug in a writer", exc_info=bug)
        for cursor in list(self._cursors)[:1]:
            cursor.stream.record.note_bug(bug)
        reset(self._transport)
        self.close()

    def _schedule(self) -> None:
        if self._scheduled is None:
            self._scheduled = self._loop.call_soon(self.pump)

    def _write(self, data: bytes, tail: bytes = b"") -> None:
        transport = self._transport
        if transport.is_closing():
            self.close()
            return
        self._last_write = self._loop.time()
        if self._path is not None:
            self._outbox.flush()
        if data and self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head or tail:
            data = self._head + data + tail
            self._head = b""
        if data:
            transport.write(data)
            if transport.get_write_buffer_size() > WRITE_BYTES:
                self._block()

    def _close_path(self) -> None:
        if (path := self._path) is not None:
            self._outbox.flush()
            path.open = False
            self._last_write = max(self._last_write, path.forwarded_at)
            self._path = None

    def _block(self) -> None:
        self._close_path()
        if self._draining is not None:
            # The path's last bytes, which were flushed just now, have blocked the writer.
            return
        self._blocked_at = monotonic()
        if self.pump not in self._turns:
            self._turns.append(self.pump)
        self._draining = self._loop.create_task(self._unblock())
        self._watchdog = WriteWatchdog(
            self._loop,
            self._transport,
            self._send_timeout,
            lambda: self.abort(f"nothing taken for {self._send_timeout} s"),
        )

    async def _unblock(self) -> None:
        try:
            await self._drain()
        except ConnectionError:
            # The client has left.
            self.close()
        finally:
            self._draining = None
            if self._watchdog is not None:
                self._watchdog.stop()
                self._watchdog = None
            for cursor in self._cursors:
                cursor.note_blocked(self._blocked_at)
        while self._turns and not (self.closed or self.blocked):
            self._turns.pop(0)()

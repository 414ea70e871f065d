"""Links, which send logs of this instance to mirrors elsewhere (mirrors.py).

A link is a reader of its log like any other, so that the rules of a stream with or without readers
hold for it (its window, `max_detached`). It sends the log as blocks (log_codec.py) for as long as
the mirror gives credit. The credit bounds the bytes that are sent before slow clients read them.

A link ends when the mirror asks for it, or when no message has come from the mirror for a while. It
does not end when everything was sent, since a block may be lost.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aioserver.errors import SlowClient
from aioserver.wings.cluster.answers import log_codec
from aioserver.wings.cluster.answers.peer_messages import BLOCK_BYTES, Block, Position, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.streams.contracts import Queued
    from aioserver.streams.stream import Stream
    from aioserver.wings.cluster.answers.peer_messages import Message

# Bytes that may be on their way to one mirror, at most.
CREDIT = 1 << 18


class Link:
    """A reader of *stream* for another instance, which has the events up to *after*.

    Always: at most `limit` bytes were sent; `next_index` is the index of the next entry to be sent.

    *send* sends a message to the other instance, which calls this link *number*. *on_drop* is
    called when the log has discarded the next events. *heard_at* is the loop's time of the last
    message from the other side.
    """

    def __init__(
        self,
        stream: Stream,
        number: int,
        after: int,
        limit: int,
        send: Callable[[Message], None],
        on_drop: Callable[[Link], None],
    ) -> None:
        self.stream = stream
        self.number = number
        self.after = after
        self.limit = limit
        self.sent = 0
        self.closed = False
        self.heard_at = 0.0
        # The other instance.
        self.peer = ""
        self.next_index, self._skip = stream.locate(after)
        if stream.whole is not None:
            # The whole body is sent, since the mirror makes the events from it.
            self.next_index, self._skip = stream.offset, 0
        self._send = send
        self._on_drop = on_drop
        # The pieces of items from the log that were not sent yet.
        self._pieces: deque[bytes | memoryview] = deque()
        self._facts: tuple[object, ...] | None = None

    def write_now(self, _data: bytes) -> bool:
        """Return False: the log has to append the entry."""
        return False

    def open_fast_path(self, _shape: object) -> None:
        """Return None: there is no client's socket to forward anything to."""

    def notify(self) -> None:
        """Send the new entries, as far as the credit allows."""
        if self.closed:
            return
        while self.sent < self.limit:
            room = min(BLOCK_BYTES, self.limit - self.sent)
            parts: list[bytes | memoryview] = []
            while room > 0 and (self._pieces or self._load()):
                piece = self._pieces.popleft()
                if len(piece) > room:
                    piece = memoryview(piece)
                    self._pieces.appendleft(piece[room:])
                    piece = piece[:room]
                parts.append(piece)
                room -= len(piece)
            if not parts:
                return
            data = b"".join(parts)
            self._send(Block(self.number, self.sent, data))
            self.sent += len(data)

    def extend(self, limit: int) -> None:
        """Allow bytes up to *limit*, but never more than CREDIT beyond the sent ones."""
        limit = min(limit, self.sent + CREDIT)
        if limit > self.limit:
            self.limit = limit
            self.notify()
            self.stream.note_passed()

    def drop(self, _seen: int) -> None:
        """Leave the log, which no longer has the next events, and notify the other side."""
        self._on_drop(self)
        error = SlowClient("this client reads more slowly than the answer comes, and fell behind")
        self._send(Refused(self.number, log_codec.pack_fault(error)))

    def report_position(self, queued: Queued) -> None:
        """Tell the other side where the request waits."""
        self._send(Position(self.number, queued.position, queued.eta, queued.at))

    def _load(self) -> bool:
        """Take the next item from the log; return whether there is one."""
        stream, outcome = self.stream, self.stream.outcome
        facts = (
            outcome.provider,
            outcome.model,
            outcome.attempts,
            stream.api,
            stream.answered,
            id(outcome.headers),
        )
        if facts != self._facts:
            first, self._facts = self._facts is None, facts
            item, body = log_codec.facts_of(stream, self.after)
            if not first:
                # The other side notes these facts from the events that it receives.
                item.runs, body = None, b""
            self._pieces.extend(log_codec.pack(item, body))
            return True
        loaded = log_codec.next_item(stream, self.next_index, self._skip)
        if loaded is None:
            return False
        self.next_index, pieces = loaded
        self._skip = 0
        self._pieces.extend(pieces)
        return True

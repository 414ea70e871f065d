"""Mirrors: copies here of logs that other instances own, each filled through a link (links.py).

A mirror gives credit to the owner when its readers have passed events, so that it never keeps more
than the credit. The bytes of a link are numbered. After a gap, a block was lost, and the mirror
attaches to the log again, after the last complete event. Bytes that come twice are dropped.

    attaching → following → done
        ↖______/ a gap

An owner is gone when no process receives the messages to it, or when no message has come from it
for MAX_SILENCE.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aioserver.errors import InternalError, ServerShutdown, StreamNotFound
from aioserver.protocol.whole_answer import text_pieces
from aioserver.streams.entries import NO_TEXT, WholeEntry
from aioserver.wings.cluster.answers import log_codec
from aioserver.wings.cluster.answers.peer_messages import Attach, Credit, Detach, Fault, Malformed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.gateway.contracts.instances import Start
    from aioserver.providers.api import Api
    from aioserver.streams.entries import Entry
    from aioserver.streams.stream import Stream
    from aioserver.wings.cluster.answers.peer_messages import Block, Message

# Attempts to attach without a single event between them.
MAX_ATTEMPTS = 20


class Mirror:
    """Fills *stream* with the log of *owner*, from *start* on.

    Always: the owner may send up to `limit`, at most CREDIT beyond what was `received`; the
    stream's events are those of the owner, without a gap.

    *send* sends a message to the owner. *number* names the link, and *renumber* returns a new
    number. *credit* returns the bytes that may be on their way to one mirror now, at most CREDIT.

    When the owner confirms that it has the log, *on_accept* is called, and then the future
    *accepted* is done. The future *done* is done when the log has ended here. If the owner has no
    such log, both futures raise the error that it has sent.
    """

    def __init__(
        self,
        stream: Stream,
        owner: str,
        start: Start,
        send: Callable[[Message], None],
        renumber: Callable[[Mirror], int],
        credit: Callable[[], int],
        on_accept: Callable[[], None],
        apis: Mapping[str, Api],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.stream = stream
        self.owner = owner
        self.accepted: asyncio.Future[None] = self._loop.create_future()
        self.done: asyncio.Future[None] = self._loop.create_future()
        self.number = 0
        self.received = self.limit = 0
        self.heard_at = self._loop.time()
        self._start = start
        self._send = send
        self._renumber = renumber
        self._credit = credit
        self._on_accept = on_accept
        self._apis = apis
        self._assembler = log_codec.Assembler()
        self._paused = self._agreed = False
        self._attempts = 0
        # The newest event that the owner's facts include.
        self._known = 0
        self._finishing: asyncio.Task[None] | None = None
        # Their exceptions are retrieved here, as there may be no task that waits for them.
        self.accepted.add_done_callback(_retrieve)
        self.done.add_done_callback(self._leave)

    @property
    def request_id(self) -> str:
        """The name by which the owner finds the log."""
        return self.stream.request_id

    def attach(self) -> None:
        """Ask the owner for the log, after the events that are here already."""
        self._attempts += 1
        if self._attempts > MAX_ATTEMPTS:
            self.fail(ServerShutdown("the log of this answer cannot be read", retry_after=1.0))
            return
        self.number = self._renumber(self)
        self.received, self.limit = 0, self._credit()
        self._assembler = log_codec.Assembler()
        caller, start = getattr(self.stream.caller, "name", ""), self._start
        after, sequence, digest, cancel = start
        if self.accepted.done():
            after, sequence, digest, cancel = self.stream.last, None, None, False
        self._send(
            Attach(
                self.number, caller, self.request_id, after, sequence, digest, cancel, self.limit
            )
        )

    def pause(self) -> None:
        """Give no more credit, as the readers have not passed the events that are here."""
        self._paused = True

    def resume(self) -> None:
        """Give credit again."""
        if self._paused:
            self._paused = False
            self._give_credit()

    def receive(self, block: Block) -> None:
        """Take in *block*, unless its bytes were received already."""
        offset, data = block.offset, block.data
        if self.done.done() or offset + len(data) <= self.received:
            return
        if offset > self.received:
            self._reattach()
            return
        data = data[self.received - offset :]
        self.received += len(data)
        entries: list[Entry] = []
        try:
            for head, body in self._assembler.feed(data):
                self._take(head, body, entries)
        except Malformed as exc:
            bug = InternalError("internal error")
            bug.__cause__ = exc
            self.fail(bug)
            return
        if self.done.done():
            return
        self._append(entries)
        if (size := self._assembler.size) != self.stream.text_bytes:
            # Bytes of an item that is not complete count, too.
            self.stream.text_bytes = size
            self.stream.recount()
        self._give_credit()

    def check(self, sent: int) -> None:
        """Attach again if the owner has *sent* more than was received."""
        if sent > self.received and not self.done.done():
            self._reattach()

    def refuse(self, fault: Fault) -> None:
        """Note that the owner has no such log, or cannot send it any further."""
        error = log_codec.unpack_fault(fault)
        if self._agreed and isinstance(error, StreamNotFound):
            # The owner had the log before. A client that comes back finds out whether it is kept
            # elsewhere.
            self.lose()
        else:
            self.fail(error)

    def lose(self) -> None:
        """Note that the owner is gone."""
        self.fail(
            ServerShutdown("the process that has this answer is out of reach", retry_after=1.0)
        )

    def fail(self, error: Exception) -> None:
        """End with *error*, which is not an event of the log."""
        if not self.done.done():
            self._finish(error)

    def close(self) -> None:
        """End, and cancel every wait for the log; a second call does nothing."""
        self.done.cancel()

    def _leave(self, done: asyncio.Future[None]) -> None:
        """Tell the owner to send nothing more."""
        _retrieve(done)
        self._send(Detach(self.number))
        self.stream.source = None
        self.accepted.cancel()
        if self._finishing is not None:
            self._finishing.cancel()

    def _finish(self, error: Exception | None) -> None:
        for future in (self.accepted, self.done):
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

    def _reattach(self) -> None:
        self._send(Detach(self.number))
        self.attach()

    def _give_credit(self) -> None:
        credit = self._credit()
        if not self._paused and self.limit - self.received <= credit // 2:
            self.limit = self.received + credit
            self._send(Credit(self.number, self.limit))

    def _take(self, head: log_codec.Head, body: bytes, entries: list[Entry]) -> None:
        """Take in an item; entries are added to *entries*."""
        match head:
            case log_codec.Facts():
                self._take_facts(head, body)
            case log_codec.Part():
                if head.first + head.count - 1 > self.stream.last + _count(entries):
                    entries.append(log_codec.entry_of(head, body))
                    if head.first > self._known:
                        self.stream.events.note(body, head.first)
            case log_codec.Whole():
                self._finishing = self._loop.create_task(self._take_whole(head, body))
                self._finishing.add_done_callback(_retrieve)
            case log_codec.End():
                if self._finishing is not None:
                    self._finishing.add_done_callback(lambda _task: self._end(head, body))
                    return
                self._append(entries)
                self._end(head, body)

    def _take_facts(self, facts: log_codec.Facts, body: bytes) -> None:
        stream = self.stream
        if not self.accepted.done():
            # The owner has chosen the first event.
            stream.last = max(stream.last, facts.after)
            self._known = facts.last
            stream.source = self
            if not self._agreed:
                self._agreed = True
                self._on_accept()
            if not facts.whole:
                self.accepted.set_result(None)
        log_codec.take_facts(stream, facts, body, self._apis)
        if facts.end_status and facts.after >= facts.last and not facts.whole:
            # The log has ended, and the owner keeps none of its events.
            stream.stop(facts.end_status)
            self._finish(None)

    def _append(self, entries: list[Entry]) -> None:
        if entries and not self.stream.ended:
            self._attempts = 0
            self.stream.extend(entries)
            entries.clear()

    def _end(self, end: log_codec.End, body: bytes) -> None:
        stream = self.stream
        if stream.ended or self.done.done():
            return
        error = None if end.fault is None else log_codec.unpack_fault(end.fault)
        entry = log_codec.entry_of(
            log_codec.Part(end.number, 1, end.status, False, end.frames), body
        )
        if end.number > self._known:
            stream.events.note(body, end.number)
        stream.end_with(entry, error)
        self._finish(None)

    async def _take_whole(self, whole: log_codec.Whole, body: bytes) -> None:
        """Make the events of an answer that was not streamed, as its owner did."""
        stream = self.stream
        pieces = await text_pieces(body) or (NO_TEXT,)
        stream.whole = log_codec.answer_of(stream, whole, body)
        stream.recount()
        now = self._loop.time()
        for number, piece in enumerate(pieces, 1):
            if number > stream.last:
                stream.add_entry(WholeEntry(number, body, piece, now))
        stream.notify()
        if not self.accepted.done():
            self.accepted.set_result(None)


def _count(entries: list[Entry]) -> int:
    return sum([entry.count for entry in entries])


def _retrieve(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()

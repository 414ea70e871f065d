"""Mirrors: logs that another instance fills, and that a client reads here.

Where several processes serve together, a log stays where it is made: its instance is its *owner*. A client
that reads it through another instance has a mirror there: a `Stream` like any other, with the owner's
events and numbers, which is filled by messages between the two (wing `cluster`). A mirror begins
where its reader goes on. It cannot be found, it keeps what its readers have not passed, as any log with a window
of 0 does, and it goes with the last of them.

A mirror ends with the owner's last event. Where the owner is out of reach it stops instead, without an event
of its own: its readers are told an error that has no number, so that a client which comes back
says the number that it would have said anyway.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from aioserver.streams.ending import run_all
from aioserver.streams.entries import ERROR

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioserver.errors import AioserverError
    from aioserver.streams.entries import Entry
    from aioserver.streams.stream import Stream


def add(stream: Stream, entries: Iterable[Entry]) -> None:
    """Add the owner's next *entries* to *stream*, and notify its readers."""
    for entry in entries:
        stream.add_entry(entry)
    stream.notify()


def end(stream: Stream, entry: Entry, error: AioserverError | None) -> None:
    """Add *entry*, the owner's last event, which says *error*, if it is one."""
    stream.error = error
    stream.end_with(entry)


def stop(stream: Stream, status: bytes = ERROR, error: AioserverError | None = None) -> None:
    """End *stream* without an event, with the *status* of its owner's log; its readers are told *error*."""
    stream.ended, stream.end_status = True, status
    stream.error = stream.attachment.broken = error
    stream.details.text_bytes = 0
    notices = [reader.notify for reader in tuple(stream.readers)]
    run_all((partial(stream.recount), *notices, stream.trim, stream.tell_end))

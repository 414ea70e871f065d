"""The parts of a stream that no event touches: facts about its answer, and its ties to clients.

The code that runs for each event uses neither of the two objects, so they cost an event nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from aioserver.streams.contracts import PLAIN_EVENTS

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Mapping

    from aioserver.errors import AioserverError
    from aioserver.streams.contracts import AnswerApi, Keeper


# Bytes of the Python objects of one stream: the log itself, its parts, the record of its request.
STREAM_OVERHEAD: Final = 4096
# Bytes of Python objects per header.
HEADER_OVERHEAD = 200


def headers_size(headers: Mapping[str, str]) -> int:
    """Return the bytes that *headers* take in memory."""
    return sum([len(name) + len(text) + HEADER_OVERHEAD for name, text in headers.items()])


class Held(Protocol):
    """Bytes that are counted (store.py)."""

    def release(self) -> None:
        """Give them back; a second call does nothing."""


class WholeAnswer(Protocol):
    """An answer that was not streamed."""

    @property
    def size(self) -> int:
        """The bytes that this object keeps."""


class AnswerDetails:
    """Facts about the answer in a log, beside its events.

    *whole* is an answer that was not streamed, kept for a client that comes back.
    *text_bytes* counts the text that its producer keeps beside the log while the answer runs.
    *api* says what kind of answer this is, None if it is no provider's, and *events* what its events are.
    """

    __slots__ = (
        "api",
        "conversation_id",
        "events",
        "text_bytes",
        "whole",
    )

    def __init__(self) -> None:
        self.text_bytes = 0
        self.conversation_id: str | None = None
        self.whole: WholeAnswer | None = None
        self.api: AnswerApi | None = None
        self.events = PLAIN_EVENTS

    @property
    def size(self) -> int:
        """The bytes that are kept beside the events."""
        size = self.text_bytes + self.events.size
        if self.whole is not None:
            size += self.whole.size
        return size

    def final_error(self, error: AioserverError, number: int) -> bytes:
        """Return *error* as the last event of the log, whose number is *number*."""
        data = self.events.render(error)
        self.events.note(data, number)
        return data


class Attachment:
    """The state with which clients come back to a log and leave it.

    *digest* tells a repeated request from a conflicting one. *alias* is a second name by which the
    log is found. *timer* runs while the log is detached, and cancels it when its window is over.
    *abandoned* says that the log was cancelled because nobody read it. *cancel_reason* is the
    error with which a cancelled log ends; None if it ends with the event `cancelled`, as when a
    reader asked for that. *held* counts a body that is collected for the log. *keeper* keeps the answer before the log gets its event `complete`. *on_settled* is
    called when its producer has ended, and counts for no limit of its caller any more. *ending* is the last event,
    and what it waits for, of a log that is to end as soon as its answer is kept.

    Where there are other instances: *claimed* is done once it is known which of them fills the log; its
    result is the error, if the answer is refused. *mirrored*: another one does, and this log is its mirror.
    *expected*: the log waits for its first reader. *broken* is the error with which a mirror ended where its
    owner's log goes on.
    """

    __slots__ = (
        "abandoned",
        "alias",
        "broken",
        "cancel_reason",
        "claimed",
        "digest",
        "ending",
        "expected",
        "held",
        "keeper",
        "mirrored",
        "on_settled",
        "timer",
    )

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.alias: str | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.abandoned = False
        self.cancel_reason: AioserverError | None = None
        self.held: Held | None = None
        self.keeper: Keeper | None = None
        self.ending: tuple[Awaitable[None], Mapping[str, Any], bytes] | None = None
        self.on_settled: Callable[[], None] | None = None
        self.claimed: asyncio.Future[AioserverError | None] | None = None
        self.mirrored = self.expected = False
        self.broken: AioserverError | None = None

    @property
    def undecided(self) -> bool:
        """Whether it is not known yet which instance fills the log."""
        return self.claimed is not None and not self.claimed.done()

    def settle_claim(self, error: AioserverError | None = None) -> None:
        """Note that it is known which instance fills the log, or that the answer is refused with *error*."""
        if self.claimed is not None and not self.claimed.done():
            self.claimed.set_result(error)

"""The parts of a stream that no event touches: facts about its answer, and its ties to clients.

The code that runs for each event uses neither of the two objects, so they cost an event nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from aioserver.errors import AioserverError


class ErrorFormat(Protocol):
    """The form of the errors of one kind of answer."""

    def note(self, block: bytes) -> None:
        """Look at a block of the provider's events, for what an error behind them has to repeat."""

    def render(self, error: AioserverError) -> bytes:
        """Return *error* as the last event of the answer."""


class AskedRequest(Protocol):
    """The request whose answer is in a log, as the log sees it."""

    def forget_body(self) -> None:
        """Forget the body: the provider has begun to answer, and no other is asked."""


class AnswerDetails:
    """Facts about the answer in a log, beside its events.

    *attempts* counts the requests sent for it, at all providers. *headers* are those headers of
    the provider's answer that clients may see. *usage* has the token counts, as the provider
    reports them. *whole* is an answer that was not streamed, kept for a client that comes back.
    *error_format* renders the error that ends an answer, where its events have a form of their own.
    *path* is that of the request to the provider, below its base URL: it says what kind of answer this is.
    """

    __slots__ = (
        "attempts",
        "conversation_id",
        "error_format",
        "headers",
        "model",
        "path",
        "provider",
        "usage",
        "whole",
    )

    def __init__(self) -> None:
        self.provider = self.model = self.path = ""
        self.attempts = 0
        self.conversation_id: str | None = None
        self.headers: Mapping[str, str] = {}
        self.usage: Mapping[str, Any] | None = None
        self.whole: object = None
        self.error_format: ErrorFormat | None = None

    def render_error(self, error: AioserverError) -> bytes:
        """Return *error* as an event like the provider's own."""
        if self.error_format is not None:
            return self.error_format.render(error)
        return b"data: %b\n\n" % error.body()


class Attachment:
    """The state with which clients come back to a log and leave it.

    *digest* tells a repeated request from a conflicting one. *alias* is a second name by which the
    log is found. *timer* runs while the log is detached, and cancels it when its window is over.
    *abandoned* says that the log was cancelled because nobody read it. *cancel_reason* is the
    error with which a cancelled log ends; None if it ends with the event `cancelled`, as when a
    reader asked for that. *request* is told when its answer begins; None once it was.
    """

    __slots__ = ("abandoned", "alias", "cancel_reason", "digest", "request", "timer")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.alias: str | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.abandoned = False
        self.cancel_reason: AioserverError | None = None
        self.request: AskedRequest | None = None

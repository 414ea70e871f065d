"""The one error that an answer may raise, and what may happen to a reading on the way to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class AnswerError(Exception):
    """There is no answer, or not the whole of it. It is the only error that an answer raises.

    *code* is the server's code (see the page on errors), or one of the library's own: `connect_error`, the
    server cannot be reached; `deadline_exceeded`; `protocol_error`, what came is not an aioserver's;
    `cancelled`, somebody else has cancelled the answer. *message* is for people. *retryable*: the same question
    may succeed later, and is not paid for twice; after *retry_after* seconds, if they are known. *text* is
    what has come of the answer.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool = False,
        retry_after: float | None = None,
        request_id: str = "",
        text: str = "",
    ) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code
        self.message = message
        self.retryable = retryable
        self.retry_after = retry_after
        self.request_id = request_id
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it be pickled: it may have to cross from one process to another."""
        return AnswerError, (self.code, self.message), vars(self)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a question has no answer yet."""

    code: str
    message: str
    retryable: bool = False
    retry_after: float | None = None


class Interrupted(Exception):
    """A reading cannot go on as it is, because of *fault*."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class Lost(Interrupted):
    """The connection is lost, or could not be opened. The reading may go on at the loop's time *until*."""

    def __init__(self, fault: Fault, until: float) -> None:
        super().__init__(fault)
        self.until = until


class Refused(Interrupted):
    """The server has refused the question, or the rest of the answer; nothing has begun."""


class Broken(Interrupted):
    """Nothing can be had from this server: its bytes are no protocol of ours, or it forbids us to come back."""


def protocol_error(message: str) -> Broken:
    """Return the interruption by bytes that an aioserver does not send."""
    return Broken(Fault("protocol_error", message))

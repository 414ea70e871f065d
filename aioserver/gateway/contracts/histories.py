"""The contract of conversations: the turns in front of a question, and the one it becomes.

A core without the wing keeps no conversation: each question stands alone, under whatever id.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from aioserver.auth.callers import Caller


class Asked:
    """A question of *caller* that came *at* a time, in Unix time, and has no answer yet.

    *deleted*: its conversation was deleted since, so its turn is not kept.
    """

    __slots__ = ("at", "caller", "conversation_id", "deleted")

    def __init__(self, caller: Caller, conversation_id: str, at: float) -> None:
        self.caller, self.conversation_id, self.at = caller, conversation_id, at
        self.deleted = False


class Answered(NamedTuple):
    """A *question* that was *asked*, and its *answer*, as far as that came.

    *usage* is the provider's, None if it has none. *share* is the question's part of the bytes of
    the prompt, which *usage* counts.
    """

    question: str
    answer: str
    asked: Asked
    usage: Mapping[str, Any] | None
    share: float


class Begun(NamedTuple):
    """A question as a storage knows it that several processes share, until its turn is kept.

    *mark* is its name there; *asked* is when it came, by the storage's own clock, None if the
    storage did not answer.
    """

    mark: str
    asked: float | None


class Histories(Protocol):
    """The conversations of all callers. No method raises: a chat goes on without them."""

    @property
    def stored(self) -> bool:
        """Whether a question begins with `begin`."""

    def ask(self, caller: Caller, conversation_id: str) -> Asked:
        """Note that a question has come, until `done`: a deletion is remembered for it."""

    def done(self, asked: Asked) -> None:
        """Note that no turn of a question will be kept any more; a second call does nothing."""

    async def begin(self, asked: Asked, *, known: bool) -> Begun | None:
        """Let the conversation be as its storage has it; without an answer it stays as it is.

        *known*: it may be there already. What is returned is for `keep`, or `leave` instead.
        """

    def messages(self, caller: Caller, conversation_id: str, text: str) -> list[dict[str, Any]]:
        """Return the messages to send for the question *text*, which is the last of them."""

    def keep(self, answered: Answered, begun: Begun | None = None) -> Awaitable[None] | None:
        """Append a turn; not if the conversation was deleted since the question came.

        Return what the end of the answer is to wait for, as `Keeper.keep`; None if it need not
        wait.
        """

    def leave(self, asked: Asked, begun: Begun) -> None:
        """Note that no turn comes of a question that has begun."""


class NoHistories:
    """The place of conversations that nobody keeps."""

    stored = False

    def ask(self, caller: Caller, conversation_id: str) -> Asked:
        """Return the question, which nobody has to know of."""
        return Asked(caller, conversation_id, time.time())

    def done(self, asked: Asked) -> None:
        """Do nothing."""

    async def begin(self, asked: Asked, *, known: bool) -> None:
        """Load nothing."""

    def messages(self, _caller: Caller, _conversation_id: str, text: str) -> list[dict[str, Any]]:
        """Return the question alone."""
        return [{"role": "user", "content": text}]

    def keep(self, answered: Answered, begun: Begun | None = None) -> None:
        """Keep nothing."""

    def leave(self, asked: Asked, begun: Begun) -> None:
        """Do nothing."""

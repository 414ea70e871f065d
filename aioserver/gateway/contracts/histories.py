"""The contract of conversations: the turns before a question, and the turn that it becomes.

A core without the wing stores no conversation: each question stands alone, whatever its id.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from aioserver.auth.callers import Caller


class Asked:
    """A question of *caller*, asked *at* a Unix time, that has no answer yet.

    *deleted*: its conversation was deleted since, so its turn is not stored.
    """

    __slots__ = ("at", "caller", "conversation_id", "deleted")

    def __init__(self, caller: Caller, conversation_id: str, at: float) -> None:
        self.caller, self.conversation_id, self.at = caller, conversation_id, at
        self.deleted = False


class Answered(NamedTuple):
    """A *question*, when it was *asked*, and its *answer* as far as it came.

    *usage* is the provider's, None if there is none. *share* is the question's part of the
    prompt's bytes, which *usage* counts.
    """

    question: str
    answer: str
    asked: Asked
    usage: Mapping[str, Any] | None
    share: float


class Begun(NamedTuple):
    """A question as a storage shared by several processes knows it, until its turn is stored.

    *mark* is its name there; *asked* is its time by the storage's own clock, None if the storage
    did not answer.
    """

    mark: str
    asked: float | None


class Histories(Protocol):
    """The conversations of all callers. No method raises: a chat goes on without them."""

    @property
    def stored(self) -> bool:
        """Whether questions begin with `begin`."""

    def ask(self, caller: Caller, conversation_id: str) -> Asked:
        """Note that a question has come; until `done`, a deletion of its conversation is
        remembered.
        """

    def done(self, asked: Asked) -> None:
        """Note that no turn will be stored for a question any more; a second call does nothing."""

    async def begin(self, asked: Asked, *, known: bool) -> Begun | None:
        """Load the conversation from its storage; if the storage does not answer, it stays as it
        is.

        *known*: the conversation may be loaded already. Pass the result to `keep`, or to `leave`.
        """

    def messages(self, caller: Caller, conversation_id: str, text: str) -> list[dict[str, Any]]:
        """Return the messages to send for the question *text*, which is the last of them."""

    def keep(self, answered: Answered, begun: Begun | None = None) -> Awaitable[None] | None:
        """Append a turn, unless the conversation was deleted since the question came.

        Return an awaitable for the end of the answer, as `Keeper.keep`; None if it need not wait.
        """

    def leave(self, asked: Asked, begun: Begun) -> None:
        """Note that a question that has begun gets no turn."""


class NoHistories:
    """The stand-in without stored conversations."""

    stored = False

    def ask(self, caller: Caller, conversation_id: str) -> Asked:
        """Return the question, which is not recorded."""
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

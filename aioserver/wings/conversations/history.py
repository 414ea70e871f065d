"""The history of conversations: the memory of this process, and a storage beyond it.

Each process has its `Conversations` in memory. A *storage*, if there is one, is authoritative: a
turn goes to both, a question first loads its conversation from there, and lists and pages are read
there. A storage may fail. Then chats continue with the memory of this process, lists are partial,
and a deletion is refused: a deleted conversation must not come back.

A conversation may be deleted while an answer in it runs: that answer is then not kept either. So
the questions without an answer are recorded, and a deletion marks those that it concerns. A
storage remembers it for other processes, but only if there is something to delete. Otherwise a
client could fill the shared storage with deletions of conversations that never existed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from aioserver.errors import ConversationNotFound, HistoryUnavailable
from aioserver.gateway.contracts.histories import Asked
from aioserver.limits.shares import ByOwner
from aioserver.wings.conversations.turn import Turn, counted_tokens

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Context, Persistence
    from aioserver.gateway.contracts.histories import Answered, Begun
    from aioserver.wings.conversations.memory import Conversations
    from aioserver.wings.conversations.turn import Dialogue, Page, Position

# Seconds after which a client may try again.
RETRY_AFTER = 5.0


class Trouble(NamedTuple):
    """A fault of a storage: its kind, in words, and its remedy."""

    kind: str
    text: str
    advice: str


class StorageStats(NamedTuple):
    """A snapshot of a storage: `memory`, `sql` or `redis`.

    *waiting* turns are not written yet, *written* and *lost* are counts since the start. *trouble*
    is the present fault, and *since* its beginning, in Unix time.
    """

    storage: str = "memory"
    waiting: int = 0
    written: int = 0
    lost: int = 0
    trouble: Trouble | None = None
    since: float = 0.0


class Loaded(NamedTuple):
    """The *turns* of a conversation, the oldest first.

    Without *certain*, the storage has no turns, and those in the memory of this process are used.
    """

    turns: Sequence[Turn]
    certain: bool = True


class Storage(Protocol):
    """A storage of conversations. No method waits for long or raises: each reports a failure by its
    result.
    """

    @property
    def troubled(self) -> bool:
        """Whether a read may lack kept turns."""

    def apply(self, persistence: Persistence) -> None:
        """Use new bounds."""

    def stats(self) -> StorageStats:
        """Return a snapshot."""

    async def load(self, caller: Caller, conversation_id: str) -> Loaded | None:
        """Return the turns of a conversation; None if the storage cannot say now."""

    async def begin(
        self, caller: Caller, conversation_id: str, *, known: bool
    ) -> tuple[Loaded | None, Begun | None]:
        """Load as `load` does, for a question whose turn is to come: see `Histories.begin`."""

    def leave(self, caller: Caller, conversation_id: str, begun: Begun) -> None:
        """Note that no turn will come of a question: see `Histories.leave`."""

    def keep(
        self,
        caller: Caller,
        conversation_id: str,
        turn: Turn,
        asked: float,
        begun: Begun | None = None,
    ) -> Awaitable[None] | None:
        """Append *turn* soon, unless the conversation was deleted since its question.

        *asked* is the question's time by the clock of this machine.

        Return the awaitable that the end of the answer must wait for, if any: see
        `Histories.keep`.
        """

    async def listing(self, caller: Caller, limit: int, after: Position | None) -> Page | None:
        """Return part of the caller's conversations, as `Conversations.listing`, or None."""

    async def delete(self, caller: Caller, conversation_id: str, *, asked: bool) -> bool | None:
        """Delete a conversation; return whether there was one, None if that is not certain.

        *asked*: this process has questions of it that have no answer yet.
        """

    async def delete_all(self, caller: Caller, *, asked: bool) -> int | None:
        """Delete all conversations that `listing` shows; return their number, None if that is not
        certain.

        *asked*: this process has questions of the caller that have no answer yet.
        """


class History:
    """The conversations of all callers. *missing* is the fault for which the configured storage is
    not used.
    """

    def __init__(
        self,
        conversations: Conversations,
        storage: Storage | None = None,
        missing: Trouble | None = None,
    ) -> None:
        self._conversations = conversations
        self._storage = storage
        self._missing = missing
        # The questions without an answer, by conversation and by the list that has it.
        self._asked: ByOwner[tuple[Caller, str], Asked, None] = ByOwner()
        self._asked_by: ByOwner[tuple[Caller, str], Asked, None] = ByOwner()
        self._since = conversations.clock()

    @property
    def stored(self) -> bool:
        """Whether there is a storage, from which a question first loads."""
        return self._storage is not None

    def stats(self) -> StorageStats:
        """Return a snapshot of the storage."""
        stats = StorageStats() if self._storage is None else self._storage.stats()
        if self._missing is not None:
            stats = stats._replace(trouble=self._missing, since=self._since)
        return stats

    def apply(self, context: Context, persistence: Persistence) -> None:
        """Use new bounds; a history beyond them is cut at its next use."""
        self._conversations.apply(context, persistence)
        if self._storage is not None:
            self._storage.apply(persistence)

    def ask(self, caller: Caller, conversation_id: str) -> Asked:
        """Note that a question has come: see `Histories.ask`."""
        asked = Asked(caller, conversation_id, self._conversations.clock())
        self._asked.put((caller, conversation_id), asked, None)
        self._asked_by.put((caller, caller.address), asked, None)
        return asked

    def done(self, asked: Asked) -> None:
        """Note that no further turn of a question will be kept."""
        caller = asked.caller
        self._asked.pop((caller, asked.conversation_id), asked)
        self._asked_by.pop((caller, caller.address), asked)

    async def begin(self, asked: Asked, *, known: bool) -> Begun | None:
        """Load the conversation of a question from the storage into this process, if the storage
        answers.
        """
        if self._storage is None:
            return None
        caller, conversation_id = asked.caller, asked.conversation_id
        loaded, begun = await self._storage.begin(caller, conversation_id, known=known)
        self._use(caller, conversation_id, loaded)
        return begun

    def leave(self, asked: Asked, begun: Begun) -> None:
        """Note that no turn will come of a question that has begun."""
        if self._storage is not None:
            self._storage.leave(asked.caller, asked.conversation_id, begun)

    def messages(self, caller: Caller, conversation_id: str, text: str) -> list[dict[str, Any]]:
        """Return the messages to send for the question *text*: see `Conversations.history`."""
        return self._conversations.history(caller, conversation_id, text)

    def keep(self, answered: Answered, begun: Begun | None = None) -> Awaitable[None] | None:
        """Append a turn, unless its conversation was deleted: see `Histories.keep`."""
        question, answer, asked, usage, share = answered
        if asked.deleted:
            if begun is not None:
                self.leave(asked, begun)
            return None
        caller, name, now = asked.caller, asked.conversation_id, self._conversations.clock()
        turn = Turn.of(question, answer, now, counted_tokens(usage, share))
        self._conversations.keep(caller, name, turn)
        if self._storage is None:
            return None
        return self._storage.keep(caller, name, turn, asked.at, begun)

    async def listing(self, caller: Caller, limit: int, after: Position | None) -> Page:
        """Return part of the caller's conversations: see `Conversations.listing`."""
        if self._storage is None:
            return self._conversations.listing(caller, limit, after)
        page = await self._storage.listing(caller, limit, after)
        if page is None:
            page = self._conversations.listing(caller, limit, after)
            return page._replace(partial=True)
        return page._replace(partial=self._storage.troubled)

    async def read(self, caller: Caller, conversation_id: str) -> Dialogue:
        """Return the kept turns of a conversation.

        Raises:
            ConversationNotFound: there is none.
            HistoryUnavailable: the storage may have it.
        """
        partial = False
        if self._storage is not None:
            loaded = await self._storage.load(caller, conversation_id)
            self._use(caller, conversation_id, loaded)
            partial = loaded is None or self._storage.troubled
        dialogue = self._conversations.read(caller, conversation_id)
        if dialogue is None:
            if partial:
                raise _unavailable("it is not known whether there is such a conversation")
            raise ConversationNotFound("no such conversation: it never existed, or is forgotten")
        return dialogue._replace(partial=partial)

    async def delete(self, caller: Caller, conversation_id: str) -> None:
        """Delete a conversation, and the turns of answers that run in it.

        Raises:
            ConversationNotFound: there is none.
            HistoryUnavailable: the storage may still have it.
        """
        deleted = self._conversations.delete(caller, conversation_id)
        running = self._asked.of((caller, conversation_id))
        for asked in running:
            asked.deleted = True
        if self._storage is not None:
            stored = await self._storage.delete(caller, conversation_id, asked=bool(running))
            if stored is None:
                raise _unavailable("it is not certain that this is deleted")
            deleted = stored
        if not deleted:
            raise ConversationNotFound("no such conversation: it never existed, or is forgotten")

    async def delete_all(self, caller: Caller) -> int:
        """Delete the conversations that `listing` shows; return their number.

        Raises:
            HistoryUnavailable: the storage may still have them.
        """
        deleted = self._conversations.delete_all(caller)
        running, number = self._asked_by.of((caller, caller.address)), len(deleted)
        # Without keys, other addresses may have asked in them.
        for asked in (
            *running,
            *(each for name in deleted for each in self._asked.of((caller, name))),
        ):
            asked.deleted = True
        if self._storage is not None:
            stored = await self._storage.delete_all(caller, asked=bool(running))
            if stored is None:
                raise _unavailable("it is not certain that this is deleted")
            number = stored
        return number

    def _use(self, caller: Caller, conversation_id: str, loaded: Loaded | None) -> None:
        if loaded is not None and loaded.certain:
            self._conversations.replace(caller, conversation_id, loaded.turns)


def _unavailable(so: str) -> HistoryUnavailable:
    text = f"the conversations cannot be reached now, so {so}"
    return HistoryUnavailable(text, retry_after=RETRY_AFTER)

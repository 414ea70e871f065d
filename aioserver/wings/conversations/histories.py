"""Conversations for all instances: their turns are in Redis. See `wings.conversations.history.Storage`.

A turn is written when its answer has ended, and all turns are read when the next question of the conversation is
asked. This instance keeps them, too (`wings.conversations.memory`): while Redis is away, a conversation
goes on with what is known here. What is kept is bounded as the settings say, and forgotten a day after
the last turn.

Each caller has a list of its conversations by their last turn; without keys each address has one. A key in Redis is made of
digests: neither the caller nor the id stands in it.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.wings.cluster.claims import name_of
from aioserver.wings.conversations.history import StorageStats
from aioserver.wings.conversations.turn import Page, Position, Summary, Turn, title_of
from aioserver.wings.conversations.turns import Listed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Persistence
    from aioserver.wings.conversations.memory import Conversations
    from aioserver.wings.conversations.turns import TurnStore

    # Awaits a call to Redis for some seconds at most, and returns its result, or None.
    Ask = Callable[[Coroutine[Any, Any, Any], float], Awaitable[Any]]

# Seconds for which a conversation is kept after its last turn.
KEPT = 86_400.0
# Seconds for which an answer of Redis is awaited: by a question, and by what can wait.
LOAD_TIMEOUT, CALL_TIMEOUT = 0.05, 1.0
# Conversations that are deleted in one step.
STEP = 100


class _Turn(msgspec.Struct, array_like=True):
    kept_at: float
    question: str
    answer: str
    # Absent where an older version has written the turn.
    question_tokens: float | None = None
    answer_tokens: float | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Turn)


class Histories:
    """The turns of conversations in Redis; *clock* returns the time of day, which all machines share."""

    def __init__(
        self,
        store: TurnStore,
        conversations: Conversations,
        ask: Ask,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._conversations = conversations
        self._ask = ask
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def troubled(self) -> bool:
        """Whether a read lacks what was kept: it does not, or there is no answer."""
        return False

    def stats(self) -> StorageStats:
        """Return a snapshot; how the instance stands with Redis is said elsewhere."""
        return StorageStats(storage="redis", waiting=len(self._tasks))

    def apply(self, persistence: Persistence) -> None:
        """Do nothing: the bounds are those of the conversations here."""

    async def load(self, caller: Caller, conversation_id: str) -> list[Turn] | None:
        """Return the turns that all have; what makes no sense is left out. None: none are known."""
        name = name_of(caller.name, conversation_id)
        found: tuple[list[bytes], bool] | None = await self._ask(
            self._store.turns(name), LOAD_TIMEOUT
        )
        if found is None:
            return None
        data, deleted = found
        turns = [turn for each in data if (turn := _decoded(each, self._clock())) is not None]
        # Redis may have forgotten what this instance knows still.
        return turns if turns or deleted else None

    def keep(self, caller: Caller, conversation_id: str, turn: Turn, asked: float) -> None:
        """Append a turn soon."""
        task = asyncio.get_running_loop().create_task(
            self._keep(caller, conversation_id, turn, asked)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def listing(self, caller: Caller, limit: int, after: Position | None) -> Page | None:
        """Return part of the caller's conversations; those that Redis has forgotten are left out."""
        owner = _owner(caller)
        found: list[Position] | None = await self._ask(
            self._store.conversations(owner, limit + 1, after), CALL_TIMEOUT
        )
        if found is None:
            return None
        names = [name_of(caller.name, position.conversation_id) for position in found[:limit]]
        firsts: list[tuple[int, bytes]] | None = await self._ask(
            self._store.first_turns(names), CALL_TIMEOUT
        )
        if firsts is None:
            return None
        summaries = []
        for position, (number, data) in zip(found, firsts, strict=False):
            if number:
                turn = _decoded(data, self._clock())
                title = "" if turn is None else title_of(turn.question)
                identity, updated = position.conversation_id, position.updated
                summaries.append(Summary(identity, title, updated, 2 * number))
        return Page(summaries, found[limit - 1] if len(found) > limit else None)

    async def delete(self, caller: Caller, conversation_id: str) -> bool | None:
        """Delete a conversation; return whether there was one, None without an answer of Redis."""
        deleted = await self._delete(caller, [conversation_id])
        return None if deleted is None else deleted > 0

    async def delete_all(self, caller: Caller) -> int | None:
        """Delete the caller's conversations; return their number, None without an answer of Redis."""
        owner, number = _owner(caller), 0
        noted = await self._ask(
            self._store.note_deletion(owner, self._clock(), KEPT), CALL_TIMEOUT
        )
        if noted is None:
            return None
        while True:
            found: list[Position] | None = await self._ask(
                self._store.conversations(owner, STEP, None), CALL_TIMEOUT
            )
            if found is None:
                return None
            if not found:
                return number
            deleted = await self._delete(caller, [position.conversation_id for position in found])
            if deleted is None:
                return None
            number += deleted

    async def close(self) -> None:
        """Wait until what was kept is there, for CALL_TIMEOUT at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CALL_TIMEOUT)
        for task in tuple(self._tasks):
            task.cancel()

    async def _keep(self, caller: Caller, conversation_id: str, turn: Turn, asked: float) -> None:
        data = _encoder.encode(
            _Turn(turn.ended, turn.question, turn.answer, turn.question_tokens, turn.answer_tokens)
        )
        size, turns = self._conversations.shared_bounds
        listed = Listed(_owner(caller), conversation_id, turn.ended, asked)
        name = name_of(caller.name, conversation_id)
        kept = self._store.keep_turn(name, data, (size, turns, KEPT), listed)
        await self._ask(kept, CALL_TIMEOUT)

    async def _delete(self, caller: Caller, ids: list[str]) -> int | None:
        """Delete conversations; return how many there were, None without an answer of Redis."""
        names = {conversation_id: name_of(caller.name, conversation_id) for conversation_id in ids}
        deleted: int | None = await self._ask(
            self._store.delete_turns(_owner(caller), names, self._clock(), KEPT), CALL_TIMEOUT
        )
        return deleted


def _decoded(data: bytes, now: float) -> Turn | None:
    try:
        turn = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None
    # The clock of another machine may be ahead.
    ended = min(now, turn.kept_at)
    return Turn.of(turn.question, turn.answer, ended, (turn.question_tokens, turn.answer_tokens))


def _owner(caller: Caller) -> str:
    """Return the name of the caller's list."""
    return name_of(caller.name, caller.address)

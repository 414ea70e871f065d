"""Conversations that clients name, for all instances: their turns are in Redis.

A turn is written when its answer has ended, and all turns are read when the next question of the conversation is
claimed. This instance keeps them, too (`gateway.conversations`): while Redis is away, a conversation
goes on with what is known here. What is kept is bounded as the settings say, and forgotten a day after
the last turn.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from aioserver.cluster.claims import name_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.auth.callers import Caller
    from aioserver.cluster.claims import ClaimStore
    from aioserver.gateway.conversations import Conversations

# Seconds for which a conversation is kept after its last turn.
KEPT = 86_400.0


class _Turn(msgspec.Struct, array_like=True):
    kept_at: float
    question: str
    answer: str


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Turn)


class Histories:
    """The turns of conversations in Redis; *clock* returns the time of day, which all machines share."""

    def __init__(
        self,
        store: ClaimStore,
        conversations: Conversations,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._conversations = conversations
        self._clock = clock

    async def load(self, caller: Caller, conversation_id: str) -> None:
        """Let this instance have the turns that all have; what makes no sense is left out."""
        turns, now = [], self._clock()
        for data in await self._store.turns(_name(caller, conversation_id)):
            try:
                turn = _decoder.decode(data)
            except (msgspec.MsgspecError, RecursionError):
                continue
            turns.append((max(0.0, now - turn.kept_at), turn.question, turn.answer))
        if turns:
            self._conversations.replace(caller, conversation_id, turns)

    async def keep(self, caller: Caller, conversation_id: str, question: str, answer: str) -> None:
        """Append a turn."""
        turn = _encoder.encode(_Turn(self._clock(), question, answer))
        bounds = (*self._conversations.bounds, KEPT)
        await self._store.keep_turn(_name(caller, conversation_id), turn, bounds)


def _name(caller: Caller, conversation_id: str) -> str:
    return name_of(caller.name, conversation_id)

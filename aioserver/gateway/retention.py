"""The retention policies: which turns of a conversation are kept. Every storage keeps to these bounds.

| policy | a conversation keeps |
| --- | --- |
| `token_limit` | its newest turns with `max_tokens_per_conversation` together |
| `message_count` | its newest turns with `max_messages_per_conversation`, two a turn |
| `time_based` | its turns of the last `retention_days`, 1 MiB at most |
| `unlimited` | its newest turns with 1 MiB |

The newest turn always stays, however large it is, until its days are over.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.config.settings import Persistence
    from aioserver.gateway.turn import Turn

# Bytes of one conversation, if the retention policy sets no bound.
MAX_UNLIMITED_BYTES = 1 << 20
# Bytes of one conversation under the other policies: one turn may have as many, and a conversation is read whole.
MAX_CONVERSATION_BYTES = 1 << 24
SECONDS_PER_DAY = 86_400


class Bounds(NamedTuple):
    """The bounds of one conversation: the tokens, turns and bytes that its turns have together, and their age in seconds."""

    tokens: float = math.inf
    turns: float = math.inf
    size: int = MAX_UNLIMITED_BYTES
    seconds: float = math.inf

    @classmethod
    def of(cls, persistence: Persistence) -> Bounds:
        """Return the bounds that *persistence* sets."""
        match persistence.retention_policy:
            case "token_limit":
                tokens = persistence.max_tokens_per_conversation
                return cls(tokens=tokens, size=MAX_CONVERSATION_BYTES)
            case "message_count":
                turns = persistence.max_messages_per_conversation // 2
                return cls(turns=turns, size=MAX_CONVERSATION_BYTES)
            case "time_based":
                return cls(seconds=persistence.retention_days * SECONDS_PER_DAY)
            case _:
                return cls()

    def kept(self, turns: Sequence[Turn], now: float) -> list[Turn]:
        """Return those of *turns*, the oldest first, that are kept at *now*, in Unix time."""
        young = [turn for turn in turns if turn.ended >= now - self.seconds]
        tokens = size = 0
        first = len(young)
        for number, turn in enumerate(reversed(young), 1):
            tokens += turn.tokens
            size += turn.size
            if number > 1 and (tokens > self.tokens or number > self.turns or size > self.size):
                break
            first -= 1
        return young[first:]

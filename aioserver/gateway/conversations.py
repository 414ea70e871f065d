"""The turns of a conversation, in memory and bounded.

A turn is the client's text and the model's; it is kept when the answer is complete, or with the
text so far when it was cancelled; a failed one leaves nothing. What is kept is bounded by
`chat.service.repository.persistence`, what is sent to the provider by `chat.service.context`;
tokens are estimated as `ceil(utf8_bytes / 4)`. The number of conversations is bounded too: the one
that was used longest ago goes.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from aioserver.config.settings import Context, Persistence

MAX_CONVERSATIONS = 10_000
MAX_KEPT_TOKENS = 1 << 26  # of all conversations together, 256 MiB of text
MAX_UNLIMITED_BYTES = 1 << 20  # of one conversation, where the policy names no bound
SECONDS_PER_DAY = 86_400


@dataclass(slots=True)
class _Turn:
    at: float
    role: str
    text: str
    tokens: int


@dataclass(slots=True)
class _Conversation:
    tokens: int = 0
    turns: list[_Turn] = field(default_factory=list)


class Conversations:
    """Histories, by caller and conversation id.

    Always: all of them have `MAX_KEPT_TOKENS` at most; a history alternates between `user` and `assistant`, the oldest turn being `user`.
    """

    def __init__(
        self,
        context: Context,
        persistence: Persistence,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._persistence = persistence
        self._clock = clock
        self._tokens = 0  # of all
        self._kept: OrderedDict[tuple[Hashable, str], _Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def apply(self, context: Context, persistence: Persistence) -> None:
        """Use new bounds; a history that is longer is cut with its next turn."""
        self._context, self._persistence = context, persistence

    def history(self, caller: Hashable, conversation_id: str, text: str) -> list[dict[str, Any]]:
        """The messages to send: what fits of the history, then *text*. A snapshot."""
        key = (caller, conversation_id)
        conversation = self._kept.get(key)
        if conversation is not None:
            self._kept.move_to_end(key)
        turns = [] if conversation is None else self._alive(conversation)
        room = self._context.max_tokens - self._context.reserve_tokens - tokens(text)
        first = len(turns)
        while first and (
            len(turns) - first < self._context.preserve_recent or room >= turns[first - 1].tokens
        ):
            first -= 1
            room -= turns[first].tokens
        while first < len(turns) and turns[first].role != "user":
            first += 1  # an answer without its question would confuse the model
        messages = [{"role": turn.role, "content": turn.text} for turn in turns[first:]]
        return [*messages, {"role": "user", "content": text}]

    def keep(self, caller: Hashable, conversation_id: str, question: str, answer: str) -> None:
        """Put a turn behind the history."""
        key = (caller, conversation_id)
        conversation = self._kept.setdefault(key, _Conversation())
        self._kept.move_to_end(key)
        now = self._clock()
        for role, text in (("user", question), ("assistant", answer)):
            conversation.turns.append(_Turn(now, role, text, tokens(text)))
        self._bound(conversation)
        now_tokens = sum(map(_tokens, conversation.turns))
        self._tokens += now_tokens - conversation.tokens
        conversation.tokens = now_tokens
        while len(self._kept) > MAX_CONVERSATIONS or self._tokens > MAX_KEPT_TOKENS:
            self._tokens -= self._kept.popitem(last=False)[1].tokens

    def _alive(self, conversation: _Conversation) -> list[_Turn]:
        if self._persistence.retention_policy == "time_based":
            oldest = self._clock() - self._persistence.retention_days * SECONDS_PER_DAY
            conversation.turns = [turn for turn in conversation.turns if turn.at >= oldest]
        return conversation.turns

    def _bound(self, conversation: _Conversation) -> None:
        turns = self._alive(conversation)
        weigh: Callable[[_Turn], int]
        limit: float
        match self._persistence.retention_policy:
            case "message_count":
                weigh, limit = _one, self._persistence.max_messages_per_conversation
            case "token_limit":
                weigh, limit = _tokens, self._persistence.max_tokens_per_conversation
            case _:
                weigh, limit = _tokens, MAX_UNLIMITED_BYTES / 4
        weight = sum(map(weigh, turns))
        while len(turns) > 2 and weight > limit:
            weight -= weigh(turns[0]) + weigh(turns[1])
            del turns[:2]


def tokens(text: str) -> int:
    """An estimate: a token has about four bytes."""
    return (len(text.encode()) + 3) // 4


def _one(_turn: _Turn) -> int:
    return 1


def _tokens(turn: _Turn) -> int:
    return turn.tokens

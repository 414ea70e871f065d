"""The histories of conversations, in memory and bounded.

A history consists of messages: a client's question, the model's answer, and so on. A question and
its answer are kept when the answer is complete, or with the text so far if it was cancelled; a failed
answer leaves nothing. `chat.service.repository.persistence` bounds what is kept, and
`chat.service.context` bounds what is sent to the provider; tokens are estimated as `ceil(utf8_bytes / 4)`. The
number of conversations is bounded too: the least recently used one is forgotten first.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from aioserver.config.settings import Context, Persistence

MAX_CONVERSATIONS = 10_000
# Tokens of all conversations together, the overhead of their messages included: 256 MiB.
MAX_KEPT_TOKENS = 1 << 26
# A message's Python objects, as tokens of 4 bytes: otherwise short messages would be unbounded, nearly.
MESSAGE_OVERHEAD = 64
# Bytes of one conversation, if the retention policy sets no bound.
MAX_UNLIMITED_BYTES = 1 << 20
# Turns of one conversation that several instances share.
MAX_TURNS = 10_000
SECONDS_PER_DAY = 86_400


@dataclass(slots=True)
class _Message:
    kept_at: float
    role: str
    text: str
    tokens: int


@dataclass(slots=True)
class _Conversation:
    tokens: int = 0
    messages: list[_Message] = field(default_factory=list)


class Conversations:
    """Histories, by caller and conversation id.

    Always: all histories together have at most `MAX_KEPT_TOKENS`, overhead counted; a history alternates
    between `user` and `assistant`, and begins with `user`.
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
        # The tokens of all histories.
        self._tokens = 0
        # The least recently used conversation comes first.
        self._kept: OrderedDict[tuple[Hashable, str], _Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def apply(self, context: Context, persistence: Persistence) -> None:
        """Use new bounds; a history beyond them is cut when its next answer is kept."""
        self._context, self._persistence = context, persistence

    def history(self, caller: Hashable, conversation_id: str, text: str) -> list[dict[str, Any]]:
        """Return a snapshot of the messages to send: what fits of the history, then *text*."""
        key = (caller, conversation_id)
        conversation = self._kept.get(key)
        if conversation is not None:
            self._kept.move_to_end(key)
        kept = [] if conversation is None else self._retained(conversation)
        room = self._context.max_tokens - self._context.reserve_tokens - estimated_tokens(text)
        first = len(kept)
        while first and (
            len(kept) - first < self._context.preserve_recent or room >= kept[first - 1].tokens
        ):
            first -= 1
            room -= kept[first].tokens
        while first < len(kept) and kept[first].role != "user":
            # An answer without its question would confuse the model.
            first += 1
        messages = [{"role": message.role, "content": message.text} for message in kept[first:]]
        return [*messages, {"role": "user", "content": text}]

    def replace(
        self, caller: Hashable, conversation_id: str, turns: Iterable[tuple[float, str, str]]
    ) -> None:
        """Let the history consist of *turns*: how many seconds ago each ended, its question and its answer."""
        key, now = (caller, conversation_id), self._clock()
        conversation = self._kept.setdefault(key, _Conversation())
        self._kept.move_to_end(key)
        conversation.messages = [
            _Message(now - age, role, text, estimated_tokens(text))
            for age, question, answer in turns
            for role, text in (("user", question), ("assistant", answer))
        ]
        self._bound(conversation)

    @property
    def bounds(self) -> tuple[int, int]:
        """About how many bytes, and how many turns, of one conversation are kept at most."""
        policy, size, turns = self._persistence.retention_policy, MAX_UNLIMITED_BYTES, MAX_TURNS
        if policy == "message_count":
            turns = min(turns, (self._persistence.max_messages_per_conversation + 1) // 2)
        elif policy == "token_limit":
            size = 4 * self._persistence.max_tokens_per_conversation
        return size, max(1, turns)

    def keep(self, caller: Hashable, conversation_id: str, question: str, answer: str) -> None:
        """Append a question and its answer to the history."""
        key = (caller, conversation_id)
        conversation = self._kept.setdefault(key, _Conversation())
        self._kept.move_to_end(key)
        now = self._clock()
        for role, text in (("user", question), ("assistant", answer)):
            conversation.messages.append(_Message(now, role, text, estimated_tokens(text)))
        self._bound(conversation)

    def _bound(self, conversation: _Conversation) -> None:
        """Keep *conversation*, which has changed, and all of them together within their bounds."""
        self._trim(conversation)
        messages = conversation.messages
        tokens = sum(map(_tokens, messages)) + MESSAGE_OVERHEAD * len(messages)
        self._tokens += tokens - conversation.tokens
        conversation.tokens = tokens
        while len(self._kept) > MAX_CONVERSATIONS or self._tokens > MAX_KEPT_TOKENS:
            self._tokens -= self._kept.popitem(last=False)[1].tokens

    def _retained(self, conversation: _Conversation) -> list[_Message]:
        """Return the messages of *conversation*, without those that are older than `retention_days`."""
        if self._persistence.retention_policy == "time_based":
            oldest = self._clock() - self._persistence.retention_days * SECONDS_PER_DAY
            conversation.messages = [
                message for message in conversation.messages if message.kept_at >= oldest
            ]
        return conversation.messages

    def _trim(self, conversation: _Conversation) -> None:
        """Drop the oldest pairs of messages beyond the bound; the newest pair always stays."""
        messages = self._retained(conversation)
        weigh: Callable[[_Message], int]
        limit: float
        match self._persistence.retention_policy:
            case "message_count":
                weigh, limit = _count, self._persistence.max_messages_per_conversation
            case "token_limit":
                weigh, limit = _tokens, self._persistence.max_tokens_per_conversation
            case _:
                weigh, limit = _tokens, MAX_UNLIMITED_BYTES / 4
        weight = sum(map(weigh, messages))
        while len(messages) > 2 and weight > limit:
            weight -= weigh(messages[0]) + weigh(messages[1])
            del messages[:2]


def estimated_tokens(text: str) -> int:
    """Return the number of tokens in *text*, by the estimate that each has four bytes of UTF-8."""
    return (len(text.encode()) + 3) // 4


def _count(_message: _Message) -> int:
    return 1


def _tokens(message: _Message) -> int:
    return message.tokens

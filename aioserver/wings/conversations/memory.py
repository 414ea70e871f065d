"""The histories of conversations, in memory and bounded.

A history consists of turns: a client's question and the model's answer. A turn is kept when its
answer is complete, or with the text so far if it was cancelled; a failed answer leaves nothing.
`chat.service.repository.persistence` bounds what is kept (turn.py), and `chat.service.context`
bounds what is sent to the provider. The number of conversations is bounded too: the least recently
used one is forgotten first.

A conversation may be deleted while an answer in it runs: that answer is then not kept either.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from aioserver.wings.conversations.turn import (
    MAX_UNLIMITED_BYTES,
    Bounds,
    Dialogue,
    Page,
    Position,
    Summary,
    estimated_tokens,
    title_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Context, Persistence
    from aioserver.wings.conversations.turn import Turn

MAX_CONVERSATIONS = 10_000
# Tokens of all conversations together, four bytes each, the overhead of their messages included:
# 256 MiB.
MAX_KEPT_TOKENS = 1 << 26
# A message's Python objects, as tokens of 4 bytes: otherwise short messages would be unbounded,
# nearly.
MESSAGE_OVERHEAD = 64
# Turns of one conversation that several instances share.
MAX_TURNS = 10_000
# Deletions that are remembered for answers which run meanwhile.
MAX_DELETIONS = 10_000

T = TypeVar("T")


@dataclass(slots=True)
class _Conversation:
    # None: it came from a storage, and without a key it is not known from where it was asked.
    address: str | None
    tokens: int = 0
    turns: list[Turn] = field(default_factory=list)


class Conversations:
    """Histories, by caller and conversation id.

    *clock* returns Unix time, which outlives the process.

    Always: all histories together have at most `MAX_KEPT_TOKENS`, overhead counted; a history
    alternates between `user` and `assistant`, and begins with `user`.
    """

    def __init__(
        self,
        context: Context,
        persistence: Persistence,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.clock = clock
        # The tokens of all histories.
        self._tokens = 0
        # The least recently used conversation comes first.
        self._kept: OrderedDict[tuple[Caller, str], _Conversation] = OrderedDict()
        # When a conversation was deleted, and when all of a caller's at an address were.
        self._deleted: OrderedDict[tuple[Caller, str], float] = OrderedDict()
        self._all_deleted: OrderedDict[tuple[Caller, str], float] = OrderedDict()
        self.apply(context, persistence)

    def __len__(self) -> int:
        return len(self._kept)

    def apply(self, context: Context, persistence: Persistence) -> None:
        """Use new bounds; a history beyond them is cut when it is used next."""
        self._context, self._persistence = context, persistence
        self.bounds = Bounds.of(persistence)

    def history(self, caller: Caller, conversation_id: str, text: str) -> list[dict[str, Any]]:
        """Return a snapshot of the messages to send: what fits of the history, then *text*."""
        key = (caller, conversation_id)
        conversation = self._kept.get(key)
        if conversation is not None:
            self._kept.move_to_end(key)
        kept = [] if conversation is None else self._messages(conversation)
        room = self._context.max_tokens - self._context.reserve_tokens - estimated_tokens(text)
        first = len(kept)
        while first and (
            len(kept) - first < self._context.preserve_recent or room >= kept[first - 1][2]
        ):
            first -= 1
            room -= kept[first][2]
        # An answer without its question would confuse the model.
        first += first % 2
        messages = [{"role": role, "content": content} for role, content, _ in kept[first:]]
        return [*messages, {"role": "user", "content": text}]

    def replace(self, caller: Caller, conversation_id: str, turns: Sequence[Turn]) -> None:
        """Let the history consist of *turns*, the oldest first; without any there is no such
        conversation.
        """
        key = (caller, conversation_id)
        unknown = "" if caller.name else None
        conversation = self._kept.setdefault(key, _Conversation(unknown))
        self._kept.move_to_end(key)
        # The newest turn that was kept here may be one that the storage did not take.
        conversation.address, conversation.turns = unknown, list(turns)
        self._bound(key, conversation)

    @property
    def shared_bounds(self) -> tuple[int, int]:
        """About how many bytes, and how many turns, of one conversation are kept at most."""
        policy, size, turns = self._persistence.retention_policy, MAX_UNLIMITED_BYTES, MAX_TURNS
        if policy == "message_count":
            turns = min(turns, (self._persistence.max_messages_per_conversation + 1) // 2)
        elif policy == "token_limit":
            size = 4 * self._persistence.max_tokens_per_conversation
        return size, max(1, turns)

    def keep(self, caller: Caller, conversation_id: str, turn: Turn, asked: float) -> bool:
        """Append *turn*, whose question came at *asked*; return whether it is kept: not if it was
        deleted since.
        """
        key = (caller, conversation_id)
        if asked <= max(
            self._deleted.get(key, 0.0), self._all_deleted.get((caller, caller.address), 0.0)
        ):
            return False
        conversation = self._kept.setdefault(key, _Conversation(caller.address))
        self._kept.move_to_end(key)
        conversation.address = caller.address
        conversation.turns.append(turn)
        self._bound(key, conversation)
        return True

    def listing(self, caller: Caller, limit: int, after: Position | None) -> Page:
        """Return the newest *limit* of the caller's conversations *after* a position.

        Without keys all clients are one caller: they are those of the client's address then.
        """
        found = []
        for (_, conversation_id), conversation in self._own(caller):
            updated = conversation.turns[-1].ended
            position = Position(updated, conversation_id)
            if after is None or position < after:
                found.append((position, conversation.turns))
        found.sort(key=lambda item: item[0], reverse=True)
        summaries = [
            Summary(
                position.conversation_id,
                title_of(turns[0].question),
                position.updated,
                2 * len(turns),
            )
            for position, turns in found[:limit]
        ]
        return Page(summaries, found[limit - 1][0] if len(found) > limit else None)

    def read(self, caller: Caller, conversation_id: str) -> Dialogue | None:
        """Return what is kept of a conversation; None if there is nothing."""
        conversation = self._kept.get((caller, conversation_id))
        turns = [] if conversation is None else self._retained(conversation)
        return Dialogue(list(turns)) if turns else None

    def delete(self, caller: Caller, conversation_id: str) -> bool:
        """Delete a conversation; return whether there was one."""
        key = (caller, conversation_id)
        _remember(self._deleted, key, self.clock())
        kept = self.read(caller, conversation_id) is not None
        self._forget(key)
        return kept

    def delete_all(self, caller: Caller) -> int:
        """Delete the conversations that `listing` shows; return their number."""
        keys = [key for key, _ in self._own(caller)]
        now = self.clock()
        _remember(self._all_deleted, (caller, caller.address), now)
        for key in keys:
            _remember(self._deleted, key, now)
            self._forget(key)
        return len(keys)

    def _own(self, caller: Caller) -> list[tuple[tuple[Caller, str], _Conversation]]:
        """Return the conversations of *caller* that are not empty; without keys those of its
        address.
        """
        return [
            (key, conversation)
            for key, conversation in self._kept.items()
            if key[0] == caller
            and conversation.address == caller.address
            and self._retained(conversation)
        ]

    def _messages(self, conversation: _Conversation) -> list[tuple[str, str, int]]:
        """Return role, text and tokens of each message."""
        return [
            message
            for turn in self._retained(conversation)
            for message in (
                ("user", turn.question, turn.question_tokens),
                ("assistant", turn.answer, turn.answer_tokens),
            )
        ]

    def _bound(self, key: tuple[Caller, str], conversation: _Conversation) -> None:
        """Keep *conversation*, which has changed, and all of them together within their bounds."""
        turns = self._retained(conversation)
        tokens = sum(-(-turn.size // 4) + 2 * MESSAGE_OVERHEAD for turn in turns)
        self._tokens += tokens - conversation.tokens
        conversation.tokens = tokens
        if not turns:
            self._forget(key)
        while len(self._kept) > MAX_CONVERSATIONS or self._tokens > MAX_KEPT_TOKENS:
            self._tokens -= self._kept.popitem(last=False)[1].tokens

    def _retained(self, conversation: _Conversation) -> list[Turn]:
        """Return the turns of *conversation*, without those beyond the bounds."""
        conversation.turns = self.bounds.kept(conversation.turns, self.clock())
        return conversation.turns

    def _forget(self, key: tuple[Caller, str]) -> None:
        conversation = self._kept.pop(key, None)
        if conversation is not None:
            self._tokens -= conversation.tokens


def _remember(times: OrderedDict[T, float], key: T, now: float) -> None:
    times[key] = now
    times.move_to_end(key)
    if len(times) > MAX_DELETIONS:
        times.popitem(last=False)

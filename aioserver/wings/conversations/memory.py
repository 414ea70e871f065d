"""The histories of conversations, in memory and bounded.

A history consists of turns: a client's question and the model's answer. A turn is kept when its
answer is complete, or with the text so far if it was cancelled; a failed answer leaves nothing.
`chat.service.repository.persistence` bounds the kept turns (turn.py), and `chat.service.context`
bounds the history that is sent to the provider. All conversations together are bounded too: beyond
that the owner that keeps most loses those that it has used least recently.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioserver.limits.shares import ByOwner, Shares
from aioserver.wings.conversations.turn import (
    MAX_UNLIMITED_BYTES,
    Bounds,
    Dialogue,
    Page,
    Position,
    Summary,
    Turn,
    estimated_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Context, Persistence

MAX_CONVERSATIONS = 10_000
# Tokens of all conversations together, four bytes each, the overhead of their messages included:
# 256 MiB.
MAX_KEPT_TOKENS = 1 << 26
# A message's Python objects, as tokens of 4 bytes: otherwise short messages would be nearly
# unbounded.
MESSAGE_OVERHEAD = 64
# The most turns of one conversation that several instances share.
MAX_TURNS = 10_000
# The part of a bound that remains after an eviction, so that not each turn has to evict.
EVICTION_TARGET = 0.99


@dataclass
class _Conversation:
    # The name of the key that has used it last, or the address.
    owner: str
    tokens: int = 0
    turns: list[Turn] = field(default_factory=list)
    # The list that has it, and its place there. None: it is empty, or it came from a storage, and
    # the address of its client is not known because there is no key.
    listed: tuple[tuple[Caller, str], Position] | None = None


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
        self._kept: dict[tuple[Caller, str], _Conversation] = {}
        # The conversations of each owner, the least recently used one first.
        self._used: ByOwner[str, tuple[Caller, str], None] = ByOwner()
        # The tokens of all histories, and their numbers, by owner.
        self._tokens: Shares[str] = Shares()
        self._numbers: Shares[str] = Shares()
        # The conversations of each caller, at each address, the newest last.
        self._lists: dict[tuple[Caller, str], list[Position]] = {}
        self.apply(context, persistence)

    def __len__(self) -> int:
        return len(self._kept)

    def apply(self, context: Context, persistence: Persistence) -> None:
        """Use new bounds; a history beyond them is cut at its next use."""
        self._context, self._persistence = context, persistence
        self.bounds = Bounds.of(persistence)

    def history(self, caller: Caller, conversation_id: str, text: str) -> list[dict[str, Any]]:
        """Return a snapshot of the messages to send: as much of the history as fits,
        then *text*.
        """
        key = (caller, conversation_id)
        conversation = self._kept.get(key)
        if conversation is not None:
            self._use(key, conversation, caller)
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
        """Let the history consist of *turns*, the oldest first. Without turns there is no
        conversation.
        """
        key = (caller, conversation_id)
        conversation = self._used_by(caller, key)
        # The storage may lack the last local turn.
        conversation.turns = list(turns)
        self._bound(key, conversation, "" if caller.name else None)

    @property
    def shared_bounds(self) -> tuple[int, int]:
        """The approximate most bytes, and the most turns, that are kept of one conversation."""
        policy, size, turns = self._persistence.retention_policy, MAX_UNLIMITED_BYTES, MAX_TURNS
        if policy == "message_count":
            turns = min(turns, (self._persistence.max_messages_per_conversation + 1) // 2)
        elif policy == "token_limit":
            size = 4 * self._persistence.max_tokens_per_conversation
        return size, max(1, turns)

    def keep(self, caller: Caller, conversation_id: str, turn: Turn) -> None:
        """Append *turn*."""
        key = (caller, conversation_id)
        conversation = self._used_by(caller, key)
        conversation.turns.append(turn)
        self._bound(key, conversation, caller.address)

    def listing(self, caller: Caller, limit: int, after: Position | None) -> Page:
        """Return the newest *limit* of the caller's conversations *after* a position.

        Without keys all clients are one caller: only the conversations of the client's address are
        returned.
        """
        positions = self._lists.get((caller, caller.address), [])
        index = len(positions) if after is None else bisect_left(positions, after)
        found: list[Summary] = []
        while index and len(found) <= limit:
            index -= 1
            turns = self._retained(self._kept[caller, positions[index].conversation_id])
            if not turns:
                # This conversation has expired, and so have all earlier ones.
                break
            updated, name = positions[index]
            found.append(Summary.of(name, turns[0].question, updated, len(turns)))
        return Page.of(found, limit)

    def read(self, caller: Caller, conversation_id: str) -> Dialogue | None:
        """Return the kept turns of a conversation; None if there are none."""
        conversation = self._kept.get((caller, conversation_id))
        turns = [] if conversation is None else self._retained(conversation)
        return Dialogue(list(turns)) if turns else None

    def delete(self, caller: Caller, conversation_id: str) -> bool:
        """Delete a conversation; return whether there was one."""
        kept = self.read(caller, conversation_id) is not None
        self._forget((caller, conversation_id))
        return kept

    def delete_all(self, caller: Caller) -> list[str]:
        """Delete the conversations that `listing` shows; return their ids."""
        listed = [each.conversation_id for each in self._lists.get((caller, caller.address), ())]
        return [each for each in listed if self.delete(caller, each)]

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

    def _used_by(self, caller: Caller, key: tuple[Caller, str]) -> _Conversation:
        """Return the conversation, a new one if there is none, and mark it as used by *caller*
        now.
        """
        conversation = self._kept.get(key)
        if conversation is None:
            self._kept[key] = conversation = _Conversation(caller.flow)
            self._numbers.add(caller.flow, 1)
        self._use(key, conversation, caller)
        return conversation

    def _use(self, key: tuple[Caller, str], conversation: _Conversation, caller: Caller) -> None:
        former, conversation.owner = conversation.owner, caller.flow
        self._used.pop(former, key)
        self._used.put(caller.flow, key, None)
        if former != caller.flow:
            for shares, size in ((self._numbers, 1), (self._tokens, conversation.tokens)):
                shares.add(former, -size)
                shares.add(caller.flow, size)

    def _bound(
        self, key: tuple[Caller, str], conversation: _Conversation, address: str | None
    ) -> None:
        """Keep *conversation*, which has changed, and all of them together within their bounds.

        *address*: where it is listed.
        """
        turns = self._retained(conversation)
        tokens = sum(-(-turn.size // 4) + 2 * MESSAGE_OVERHEAD for turn in turns)
        self._tokens.add(conversation.owner, tokens - conversation.tokens)
        conversation.tokens = tokens
        if not turns:
            self._forget(key)
            return
        self._unlist(conversation)
        if address is not None:
            position, whose = Position(turns[-1].ended, key[1]), (key[0], address)
            insort(self._lists.setdefault(whose, []), position)
            conversation.listed = whose, position
        for shares, most in ((self._numbers, MAX_CONVERSATIONS), (self._tokens, MAX_KEPT_TOKENS)):
            if shares.total > most:
                self._evict(shares, most * EVICTION_TARGET)

    def _evict(self, shares: Shares[str], most: float) -> None:
        """Evict conversations until *shares* counts no more than *most*: of the owner with the
        largest share, those used least recently.
        """
        for owner in shares.largest_first():
            self._forget(next(iter(self._used.of(owner))))
            if shares.total <= most:
                return

    def _retained(self, conversation: _Conversation) -> list[Turn]:
        """Return the turns of *conversation*, without those beyond the bounds."""
        conversation.turns = self.bounds.kept(conversation.turns, self.clock())
        return conversation.turns

    def _unlist(self, conversation: _Conversation) -> None:
        if conversation.listed is not None:
            whose, position = conversation.listed
            conversation.listed = None
            positions = self._lists[whose]
            del positions[bisect_left(positions, position)]
            if not positions:
                del self._lists[whose]

    def _forget(self, key: tuple[Caller, str]) -> None:
        conversation = self._kept.pop(key, None)
        if conversation is not None:
            self._unlist(conversation)
            self._used.pop(conversation.owner, key)
            self._numbers.add(conversation.owner, -1)
            self._tokens.add(conversation.owner, -conversation.tokens)

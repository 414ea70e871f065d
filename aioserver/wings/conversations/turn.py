"""A turn of a conversation, a question and its answer; and which turns are kept.

`Summary`, `Page` and `Dialogue` are the data of lists and pages.

Tokens are counted by the provider's `usage`, if the answer has one. The usage of a prompt counts
the whole prompt: the history, the question, the tools. The question's share of these tokens is
taken to be its share of the bytes. Without a usage a token is estimated as four bytes of UTF-8.

Every storage enforces the bounds of the policy:

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
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from aioserver.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aioserver.config.settings import Persistence

# Bytes of a token: the estimate without a count, and the bounds beyond which a provider's count
# cannot be true. A token has at least one byte, and in a text of any length far fewer than
# sixteen.
TOKEN_BYTES, MIN_TOKEN_BYTES, MAX_TOKEN_BYTES = 4, 1, 16
# The most characters of a title, and of the question of which it is made.
MAX_TITLE, MAX_READ = 80, 400


class Turn(NamedTuple):
    """A question and its answer; *ended*: when the answer ended, in Unix time.

    *size*: the bytes of both in UTF-8.
    """

    question: str
    answer: str
    ended: float
    question_tokens: int
    answer_tokens: int
    size: int

    @classmethod
    def of(
        cls,
        question: str,
        answer: str,
        ended: float,
        tokens: tuple[float | None, float | None] = (None, None),
    ) -> Self:
        """Return the turn of *question* and *answer*.

        *tokens* are those of both, if a provider has counted them.
        """
        sizes = len(question.encode()), len(answer.encode())
        question_tokens, answer_tokens = map(_tokens, sizes, tokens)
        return cls(question, answer, ended, question_tokens, answer_tokens, sum(sizes))

    @property
    def tokens(self) -> int:
        """The tokens of the question and the answer."""
        return self.question_tokens + self.answer_tokens


class Summary(NamedTuple):
    """A conversation in a list; *updated*: when its last turn ended, in Unix time."""

    conversation_id: str
    title: str
    updated: float
    messages: int

    @classmethod
    def of(cls, conversation_id: str, question: str, updated: float, turns: int) -> Self:
        """Return the entry of a conversation whose first turn has *question*."""
        return cls(conversation_id, title_of(question), updated, 2 * turns)


class Page(NamedTuple):
    """Part of a list of conversations.

    *after* is the position of the next part, None at the end.
    """

    summaries: list[Summary]
    after: Position | None = None
    partial: bool = False

    @classmethod
    def of(cls, found: list[Summary], limit: int) -> Self:
        """Return the page of *limit* conversations at the beginning of *found*."""
        if len(found) <= limit:
            return cls(found)
        last = found[limit - 1]
        return cls(found[:limit], Position(last.updated, last.conversation_id))


class Dialogue(NamedTuple):
    """The turns of a conversation."""

    turns: list[Turn]
    partial: bool = False


class Position(NamedTuple):
    """A position in a list of conversations: after the conversation with these values."""

    updated: float
    conversation_id: str

    def __str__(self) -> str:
        """Return the position as text, for `parse`."""
        return f"{self.updated!r}:{self.conversation_id}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the position in *text*.

        Raises:
            InvalidRequest: *text* is not a position.
        """
        number, colon, conversation_id = text.partition(":")
        try:
            updated = float(number)
        except ValueError:
            updated = math.nan
        if not (colon and math.isfinite(updated)):
            raise InvalidRequest("before must be the `next` of a page", param="before")
        return cls(updated, conversation_id)


def title_of(question: str) -> str:
    """Return the beginning of *question*, on one line."""
    return " ".join(question[:MAX_READ].partition("\0")[0].split())[:MAX_TITLE]


def estimated_tokens(text: str) -> int:
    """Return the number of tokens in *text*, by the estimate that each has four bytes of UTF-8."""
    return _tokens(len(text.encode()), None)


def counted_tokens(
    usage: Mapping[str, Any] | None, share: float
) -> tuple[float | None, float | None]:
    """Return the tokens of a question and of its answer, by the provider's *usage*.

    A count is None if it is not known. *share* is the question's share of the bytes of the prompt.
    Reasoning is not kept with an answer, so its tokens are not counted.
    """
    usage = usage or {}
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    details = usage.get("completion_tokens_details")
    if completion is not None and isinstance(details, dict):
        completion -= _count(details, "reasoning_tokens") or 0
    return None if prompt is None else prompt * share, completion


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    count = usage.get(name)
    return count if isinstance(count, int) and count >= 0 else None


def _tokens(size: int, counted: float | None) -> int:
    """Return the tokens of *size* bytes; a count that cannot be true is bounded."""
    if counted is None:
        return -(-size // TOKEN_BYTES)
    least, most = -(-size // MAX_TOKEN_BYTES), size // MIN_TOKEN_BYTES
    return min(max(math.ceil(min(counted, most)), least), most)


# Bytes of one conversation, if the retention policy sets no bound.
MAX_UNLIMITED_BYTES = 1 << 20
# Bytes of one conversation under the other policies. One turn may have as many, and a conversation
# is read whole.
MAX_CONVERSATION_BYTES = 1 << 24
SECONDS_PER_DAY = 86_400


class Bounds(NamedTuple):
    """The bounds of one conversation: the tokens, turns and bytes of its turns together, and their
    age in seconds.
    """

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

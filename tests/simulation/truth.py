"""What an answer must be: the text that the simulated model writes, and how it may end."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Any

from aioserver.wings.simulator import model
from tests.simulation.plan import NEVER_WHOLE

# What a question has that asks for a large answer: as many words of so many letters, each of which
# is one token.
LARGE, LARGE_WORDS, LARGE_LETTERS = "large", 12, 20_000


class Violation(AssertionError):
    """The server has broken a promise."""


def speech(text: str, turn: int) -> str:
    """Return what the simulated model says, to some questions at length."""
    words = model.speech(text, turn)
    return words + f"\n{'y' * LARGE_LETTERS}" * LARGE_WORDS if LARGE in text else words


@dataclass
class Question:
    """A question of client *number*: *text*, for at most *tokens* tokens, to a model that fails by
    *fault*.

    *turns* are the numbers that it may have among the questions that the model is shown.
    """

    number: int
    text: str
    tokens: int
    fault: str = ""
    # Whether a provider without that fault may answer instead; and how many attempts may say the
    # rest, each of which is asked for one token at least.
    fails_over: bool = False
    hops: int = 0
    turns: tuple[int, ...] = (1,)
    # Questions whose answer may be read instead, where nothing says which of them was refused.
    others: tuple[Question, ...] = ()

    @property
    def name(self) -> str:
        """The first word of the text, which no other question has."""
        return self.text.partition(" ")[0]

    @property
    def model(self) -> str | None:
        """The model to ask for; None is the provider's own."""
        return f"fault-{self.fault}" if self.fault else None

    @functools.cached_property
    def answer(self) -> str:
        """The whole text of the answer, if the model is shown nothing else."""
        return self.answers[0]

    @functools.cached_property
    def answers(self) -> tuple[str, ...]:
        """The whole texts, of which one is that of the answer."""
        texts = (model.tokens(speech(self.text, turn)) for turn in self.turns)
        bounds = range(self.tokens, self.tokens + 1 + self.hops)
        own = ("".join(text[:bound]) for text in texts for bound in bounds)
        return (*own, *(answer for other in self.others for answer in other.answers))

    def rewrite(self, text: str, tokens: int, turns: tuple[int, ...]) -> None:
        """Ask otherwise."""
        self.text, self.tokens, self.turns = text, tokens, turns
        self._forget_answers()

    def may_be_repeated(self) -> None:
        """Let it also be one turn later: it is asked again, and may have been answered before."""
        self.turns = (*self.turns, self.turns[-1] + 1)
        self._forget_answers()

    def may_be(self, other: Question) -> None:
        """Let what is read also be the answer to *other*."""
        self.others = (*self.others, other)
        self._forget_answers()

    def _forget_answers(self) -> None:
        for cached in ("answer", "answers"):
            self.__dict__.pop(cached, None)

    @property
    def may_be_whole(self) -> bool:
        """Whether the answer may end well."""
        kind = re.sub(r"-<?\d+>?$", "", self.fault)
        # `status-500` is a kind by itself.
        whole = self.fails_over or not {kind, self.fault} & NEVER_WHOLE
        return whole or any(other.may_be_whole for other in self.others)

    @property
    def may_end_early(self) -> bool:
        """Whether the answer may end well in the middle of its text."""
        early = self.fault.startswith("early-done")
        return early or any(other.may_end_early for other in self.others)


@dataclass(slots=True)
class Reading:
    """What a client has read of the answer to *question*, on one or more connections.

    Always, or `Violation` is raised: events are numbered without a gap, and the text is a part of
    the truth, whole where it is said to be.
    """

    question: Question
    last: int = 0
    text: str = ""
    # How the answer ended; empty while it has not.
    end: str = ""

    def number(self, event_id: int) -> None:
        """Note the number of an event."""
        if event_id != self.last + 1:
            raise Violation(f"event {event_id} follows event {self.last}")
        self.last = event_id

    def add(self, text: str) -> None:
        """Note a piece of the text."""
        self.text += text
        if not any(answer.startswith(self.text) for answer in self.question.answers):
            raise Violation(
                f"read {self.text[-40:]!r}, which is not in the answer "
                f"{self.question.answer[-40:]!r}"
            )

    def finish(self, status: str) -> None:
        """Note the end: `complete`, or another status."""
        if self.end:
            raise Violation(f"the answer ends twice: {self.end}, {status}")
        self.end = status
        if status != "complete":
            return
        if not self.question.may_be_whole:
            raise Violation(f"complete, though the provider failed by {self.question.fault}")
        if self.text not in self.question.answers and not self.question.may_end_early:
            raise Violation(
                f"complete with {len(self.text)} characters of {len(self.question.answer)}"
            )


@dataclass(slots=True)
class Thoughts:
    """The reasoning that a client has read.

    Always, or `Violation` is raised: it is that of one attempt, once, from its beginning.
    """

    attempt: str = ""
    count: int = 0

    def take(self, delta: dict[str, Any]) -> None:
        """Take the delta of a chunk."""
        if not (text := delta.get("reasoning_content")):
            return
        attempt, _, number = text.strip().partition(".")
        if attempt != (self.attempt or attempt) or int(number) != self.count:
            raise Violation(f"thought {text!r} behind {self.count} of {self.attempt!r}")
        self.attempt, self.count = attempt, self.count + 1


@dataclass(slots=True)
class ToolReading:
    """What a client has read of the call of a tool that is the answer to *question*.

    Always, or `Violation` is raised: there is one call and no text beside it, and its arguments
    are whole where that is said.
    """

    question: Question
    arguments: str = ""
    calls: int = 0

    def take(self, choice: dict[str, Any]) -> None:
        """Take a choice of a chunk."""
        if text := choice["delta"].get("content"):
            raise Violation(f"{text!r} beside the call of a tool")
        for part in choice["delta"].get("tool_calls") or ():
            self.calls += "id" in part
            self.arguments += part["function"]["arguments"]

    def finish(self, reason: str) -> str:
        """Take the end mark, before which the finish had this *reason*; return how the answer has
        ended.
        """
        if reason and not self.question.may_be_whole:
            raise Violation(f"complete, though the provider failed by {self.question.fault}")
        if self.calls != 1:
            raise Violation(f"{self.calls} calls of a tool in one answer")
        if (
            reason == "tool_calls"
            and self.question.name not in json.loads(self.arguments)["query"]
        ):
            raise Violation(f"the arguments are {self.arguments}")
        return "complete" if reason else "done"

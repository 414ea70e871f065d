"""Estimates of the tokens that a request will cost, and of those that an answer without usage has
cost, learned from the usage that providers report.

There is no tokenizer: it would be wrong for most engines, and each estimate is corrected at the
end. The estimates are exponential moving averages, in which the newest value weighs an eighth:

    of each caller, provider and model   tokens of the prompt for each byte of the request, all of
                                         them, and those that a cache holds; tokens for each event
                                         of a stream
    of each caller and model             tokens of an answer, and by how many these are more than
                                         the request has allowed

Each caller has averages of its own. For a caller without any, the averages of all others are
votes, of which the median counts, so that a caller whose bodies are white space moves no other
estimate. A byte always counts for at least a sixteenth of a token, and at most one.

The answer is estimated at the tokens that its request allows, times the choices that it asks for.
The average of the caller's answers replaces this bound if it is less, or if answers have exceeded
their bounds: some engines ignore them. An answer that was cut at its bound says only that it would
have been longer.

The fair queues, the budgets of keys and the pace of providers share one object.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from aioserver.limits.shares import Bounded

if TYPE_CHECKING:
    from collections.abc import Collection

# The weight of the newest value in an average is the inverse of this.
SMOOTHING = 8
# Tokens for each byte of a request, before any usage was reported.
TOKENS_PER_BYTE = 0.25
# The bounds of that average: white space in a body costs next to nothing, and so does the address
# of a picture.
LEAST_PER_BYTE, MOST_PER_BYTE = 1 / 16, 1.0
# Tokens of an answer before any were reported: for a request without a bound; and the most for one
# with a bound. The first burst of a new key must not be underestimated, and a bound that a client
# always sends says little.
UNBOUNDED, LARGEST_FIRST = 1000, 4096
# The most tokens of a prompt: a body with a picture has far fewer than its bytes suggest. The
# second number is the most tokens of an answer, whatever its request allows.
MAX_INPUT, MAX_ANSWER = 128_000, 1 << 40
# The units of work of a request whose tokens cannot be estimated.
UNKNOWN_WORK = 1000
# The cost of a token of an answer, in tokens of a prompt. Sheng et al., "Fairness in Serving Large
# Language Models", OSDI 2024.
OUTPUT_FACTOR = 2
# Averages of callers that are kept; the caller with most of them loses its least recently updated
# one.
MAX_PAIRS = 1000
# Callers whose averages vote for one provider and model: those that were updated last.
MAX_VOICES = 15


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """The tokens of a request: those of its prompt, those of its prompt that no cache holds, and
    those of its answer.
    """

    prompt: int
    uncached: int
    answer: int

    @property
    def tokens(self) -> int:
        """All of its tokens, as budgets count them."""
        return self.prompt + self.answer

    @property
    def work(self) -> int:
        """Its cost for an engine, in tokens of a prompt: the unit of a fair queue."""
        return max(1, self.uncached + OUTPUT_FACTOR * self.answer)


class _Ratios:
    """The averages of one caller, provider and model: tokens for each byte, and for each event."""

    __slots__ = ("cached", "event", "prompt")

    def __init__(
        self, prompt: float = TOKENS_PER_BYTE, cached: float = 0.0, event: float = 1.0
    ) -> None:
        self.prompt, self.cached, self.event = prompt, cached, event


class _Answers:
    """The averages of one caller and model: tokens of an answer for each choice, None before the
    first; and their excess over what the request has allowed.
    """

    __slots__ = ("excess", "tokens")

    def __init__(self) -> None:
        self.tokens: float | None = None
        self.excess = 0.0

    def learn(self, tokens: float, bound: int | None) -> None:
        if bound is not None:
            over = max(0.0, tokens - bound)
            self.excess = over if self.tokens is None else _moved(self.excess, over)
            if tokens == bound and (self.tokens is None or tokens < self.tokens):
                # The answer was cut at its bound.
                return
        self.tokens = tokens if self.tokens is None else _moved(self.tokens, tokens)

    def expected(self, bound: int | None) -> float:
        """Return the expected tokens of an answer, for each choice, if the request allows *bound*."""
        if self.tokens is None:
            return UNBOUNDED if bound is None else min(bound, LARGEST_FIRST)
        return self.tokens if bound is None else min(bound + self.excess, self.tokens)


def _moved(average: float, newest: float) -> float:
    return average + (newest - average) / SMOOTHING


class Estimates:
    """The estimates for all providers, models and callers.

    Always: there are at most MAX_PAIRS averages by caller, provider and model, and as many by
    caller and model. The votes for a provider and model are among the former.
    """

    def __init__(self) -> None:
        self._ratios: Bounded[str, tuple[str, str], _Ratios] = Bounded(MAX_PAIRS)
        self._answers: Bounded[str, str, _Answers] = Bounded(MAX_PAIRS)
        # The averages that vote for each provider and model, the most recently updated last.
        self._voices: dict[tuple[str, str], OrderedDict[str, _Ratios]] = {}

    def before(
        self,
        provider: str,
        model: str,
        caller: str,
        size: int,
        bound: int | None = None,
        choices: int = 1,
    ) -> Estimate:
        """Return the estimate for a request of *caller* with *size* bytes of text and so many
        *choices*, each with at most *bound* tokens by the request itself.
        """
        ratios = self._known(provider, model, caller)
        known = self._answers.of(caller).get(model, _NO_ANSWERS)
        answer = min(known.expected(bound) * choices, MAX_ANSWER)
        prompt = round(size * ratios.prompt)
        uncached = round(size * (ratios.prompt - ratios.cached))
        if prompt > MAX_INPUT:
            prompt, uncached = MAX_INPUT, min(uncached, MAX_INPUT)
        return Estimate(prompt, uncached, round(answer))

    def _known(self, provider: str, model: str, caller: str) -> _Ratios:
        """Return the averages for *caller*: its own, or the median of the votes."""
        pair = provider, model
        voices = self._voices.get(pair)
        if voices is None:
            return _START
        own = voices.get(caller)
        if own is not None:
            return own
        return _median([_START, *islice(reversed(voices.values()), MAX_VOICES)])

    def tokens_per_byte(self, provider: str, model: str, caller: str | None) -> float:
        """Return the tokens of a prompt for each byte of a request of *caller*; None: by the
        median of the votes.
        """
        if caller is not None:
            return self._known(provider, model, caller).prompt
        voices = self._voices.get((provider, model))
        return TOKENS_PER_BYTE if voices is None else _median(voices.values()).prompt

    def unreported(
        self, provider: str, model: str, caller: str, estimate: Estimate, events: int
    ) -> Estimate:
        """Return the cost of an answer without usage: of a request of *caller* with this
        *estimate*, after so many *events*.
        """
        answer = max(1, round(events * self._known(provider, model, caller).event))
        return Estimate(estimate.prompt, estimate.uncached, answer)

    def learn(
        self,
        provider: str,
        model: str,
        caller: str,
        size: int,
        prompt: int,
        cached: int,
        answer: int | None = None,
        events: int = 0,
        bound: int | None = None,
        choices: int = 1,
    ) -> None:
        """Learn from the usage that a provider has reported. *prompt* tokens, *cached* of them
        from its cache, belong to *size* bytes of text, 0 if that is not known. *answer* tokens
        belong to so many *events*, 0 if it was not streamed; None: the answer is incomplete.
        *bound* and *choices* are those of the request.
        """
        ratios = self._taught(provider, model, caller)
        if size:
            per_byte = min(MOST_PER_BYTE, max(LEAST_PER_BYTE, prompt / size))
            ratios.prompt = _moved(ratios.prompt, per_byte)
            if cached or ratios.cached:
                ratios.cached = _moved(ratios.cached, min(cached / size, per_byte))
        if answer is None:
            return
        if events > 0:
            ratios.event = _moved(ratios.event, answer / events)
        answers = self._answers.used(caller, model)
        if answers is None:
            answers = _Answers()
            self._answers.make_room()
            self._answers.put(caller, model, answers)
        answers.learn(answer / choices, bound)

    def _taught(self, provider: str, model: str, caller: str) -> _Ratios:
        """Return the averages of *caller*, marked as the most recently used."""
        pair = provider, model
        ratios = self._ratios.used(caller, pair)
        if ratios is not None:
            self._voices[pair].move_to_end(caller)
            return ratios
        known = self._known(provider, model, caller)
        ratios = _Ratios(known.prompt, known.cached, known.event)
        for owner, other in self._ratios.make_room():
            del self._voices[other][owner]
            if not self._voices[other]:
                del self._voices[other]
        self._ratios.put(caller, pair, ratios)
        self._voices.setdefault(pair, OrderedDict())[caller] = ratios
        return ratios


def _median(voices: Collection[_Ratios]) -> _Ratios:
    """Return the median of *voices*."""
    return _Ratios(
        _middle([each.prompt for each in voices]),
        _middle([each.cached for each in voices]),
        _middle([each.event for each in voices]),
    )


def _middle(values: list[float]) -> float:
    """Return the median of *values*; of two in the middle, the one nearer to the first."""
    first = values[0]
    values.sort()
    middle = values[(len(values) - 1) // 2 : len(values) // 2 + 1]
    return min(middle, key=lambda value: abs(value - first))


_START = _Ratios()
_NO_ANSWERS = _Answers()

"""The tokens that a request will cost, and those that an answer without usage has cost: estimates,
learned from what providers report.

There is no tokenizer: it would be wrong for most engines, and each estimate is corrected at the
end. What is learned are exponential moving averages, in which the newest value weighs an eighth:

    of each provider and model     tokens of the prompt for each byte of the request, all of them,
                                   and those that a cache holds; tokens for each event of a stream
    of each caller and model       tokens of an answer

The fair queues, the budgets of keys and the pace of providers ask one object.
"""

from __future__ import annotations

import msgspec

# The weight of the newest value in an average is the inverse of this.
SMOOTHING = 8
# Tokens for each byte of a request, before any were reported.
TOKENS_PER_BYTE = 0.25
# Tokens of an answer, before any were reported: what the request itself bounds, but no more than
# the second; and without a bound. The first burst of a new key must not be underestimated, and a
# bound that a client always sends says little.
UNBOUNDED, LARGEST_FIRST = 1000, 4096
# Tokens of a prompt at most: a body with a picture has far fewer than its bytes say.
MAX_INPUT = 128_000
# The units of work of a request whose tokens nobody knows.
UNKNOWN_WORK = 1000
# What a token of an answer costs more than one of a prompt. Sheng et al., "Fairness in Serving
# Large Language Models", OSDI 2024.
OUTPUT_FACTOR = 2
# Pairs of which averages are kept; the least recently used ones go.
MAX_PAIRS = 1000
# Bytes of a body that is looked through for pictures: its search takes some 50 µs.
MAX_SEARCHED = 1 << 18


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """The tokens of a request: those of its prompt, how many of these no cache holds, and those of
    its answer.
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
        """What it costs an engine, in tokens of a prompt: the cost of a fair queue."""
        return max(1, self.uncached + OUTPUT_FACTOR * self.answer)


class _Ratios:
    """The averages of one provider and model: tokens for each byte, and for each event."""

    __slots__ = ("cached", "event", "prompt")

    def __init__(self) -> None:
        self.prompt, self.cached, self.event = TOKENS_PER_BYTE, 0.0, 1.0


def text_bytes(body: bytes) -> int:
    """Return the bytes of *body* if all of it may be text; 0 if it has a picture or a file, whose
    tokens have nothing to do with its bytes, or is too large to know.
    """
    size = len(body)
    # In a `data:` URL (RFC 2397) and in Anthropic's objects.
    return 0 if size > MAX_SEARCHED or b"base64" in body else size


class Estimates:
    """The knowledge of the tokens of requests, for all providers, models and callers.

    Always: at most MAX_PAIRS pairs of provider and model, and as many of caller and model, are
    known.
    """

    def __init__(self) -> None:
        # The pair that was learned last is the last in each.
        self._ratios: dict[tuple[str, str], _Ratios] = {}
        self._answers: dict[tuple[str, str], float] = {}

    def before(
        self, provider: str, model: str, caller: str, size: int, bound: int | None = None
    ) -> Estimate:
        """Return what a request of *caller* will cost, of which *size* bytes are known, and whose
        answer has at most *bound* tokens by its own word.
        """
        ratios = self._ratios.get((provider, model)) or _START
        answer = self._answers.get((caller, model))
        if answer is None:
            answer = UNBOUNDED if bound is None else min(bound, LARGEST_FIRST)
        elif bound is not None:
            answer = min(bound, answer)
        prompt = round(size * ratios.prompt)
        uncached = round(size * (ratios.prompt - ratios.cached))
        if prompt > MAX_INPUT:
            prompt, uncached = MAX_INPUT, min(uncached, MAX_INPUT)
        return Estimate(prompt, uncached, round(answer))

    def tokens_per_byte(self, provider: str, model: str) -> float:
        """Return the tokens of a prompt for each byte of a request."""
        return (self._ratios.get((provider, model)) or _START).prompt

    def unreported(self, provider: str, model: str, estimate: Estimate, events: int) -> Estimate:
        """Return what a request of this *estimate* has cost whose answer had so many *events*, and
        reported no usage.
        """
        ratios = self._ratios.get((provider, model)) or _START
        answer = max(1, round(events * ratios.event))
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
    ) -> None:
        """Learn that the provider has counted *prompt* tokens in a request of *size* bytes of text,
        0 if that is not known, of which it had *cached* so many; and *answer* tokens in the answer
        to *caller*, which had so many *events*, or was not streamed. None: all of that answer did
        not come.
        """
        pair = provider, model
        # A pair that is taken out and put back is the newest then.
        ratios = self._ratios.pop(pair, None)
        if ratios is None:
            ratios = _Ratios()
            if len(self._ratios) >= MAX_PAIRS:
                del self._ratios[next(iter(self._ratios))]
        self._ratios[pair] = ratios
        if size:
            ratios.prompt += (prompt / size - ratios.prompt) / SMOOTHING
            if cached or ratios.cached:
                ratios.cached += (cached / size - ratios.cached) / SMOOTHING
        if answer is None:
            return
        if events > 0:
            ratios.event += (answer / events - ratios.event) / SMOOTHING
        pair = caller, model
        average = self._answers.pop(pair, None)
        if average is None:
            average = float(answer)
            if len(self._answers) >= MAX_PAIRS:
                del self._answers[next(iter(self._answers))]
        self._answers[pair] = average + (answer - average) / SMOOTHING


_START = _Ratios()

"""A trace of conversations, as a fleet of engines gets them.

Some users each have one conversation after another. The system prompt is one of 4 (Zipf 1.0) of
1,000 tokens; a first question has 1,500 tokens, later ones 800 (log-normal, sigma 0.5), answers
have 40 (sigma 0.4); a conversation has 4 to 10 turns; before each question is a pause of 2 s
(exponential). 400 s are played, of which the first 80 do not count. A trace that is faster has all
of its pauses in less time, and engines that are as much faster.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aioserver.wings.simulator.engine import EngineOptions

if TYPE_CHECKING:
    from collections.abc import Callable

USERS, ENGINES, PLACES = 32, 4, 4
SECONDS, WARM_UP, BEGIN_WITHIN, PAUSE = 400.0, 80.0, 5.0, 2.0
SYSTEMS, SYSTEM_TOKENS, FIRST, LATER, ANSWER = 4, 1000, 1500, 800, 40
TURNS = (4, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What differs from the trace of the table's first rows."""

    users: int = USERS
    turns: tuple[int, int] = TURNS
    systems: int = SYSTEMS
    system_tokens: int = SYSTEM_TOKENS
    first: int = FIRST
    later: int = LATER
    places: int = PLACES
    instances: int = 1
    # How wrong the seconds per byte are.
    wrong: float = 1.0
    # How many times as fast it is, how many seconds it lasts, and after how many it counts.
    speed: float = 1.0
    seconds: float = SECONDS
    warm_up: float = WARM_UP

    @property
    def options(self) -> EngineOptions:
        """How fast the engines are."""
        usual = EngineOptions()
        return EngineOptions(prefill=usual.prefill * self.speed, decode=usual.decode * self.speed)


@dataclass
class Turn:
    """One question: what is sent, and how long its answer is."""

    messages: list[dict[str, str]]
    answer_tokens: int

    @property
    def body(self) -> bytes:
        """The body of its request."""
        return json.dumps({"model": "m", "messages": self.messages}).encode()

    @property
    def prompt(self) -> bytes:
        """The text that the engine reads."""
        return text_of(self.messages)


def text_of(messages: list[dict[str, str]]) -> bytes:
    """Return the text of *messages* as an engine reads it, with their roles."""
    return "".join(f"<{each['role']}>{each['content']}" for each in messages).encode()


def words(dice: random.Random, tokens: int) -> str:
    """Return text of so many tokens, which is nobody else's."""
    return dice.randbytes(2 * tokens).hex()


@dataclass
class Result:
    """What a run has measured, after its warm-up."""

    prompt: int = 0
    cached: int = 0
    # Prompt tokens in blocks that any engine was given before.
    ideal: int = 0
    output: int = 0
    first_tokens: list[float] = field(default_factory=list)
    starts: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    homes: Counter[str] = field(default_factory=Counter)
    held_back: int = 0

    @property
    def hits(self) -> float:
        """The share of the prompt tokens that could come from a cache and did."""
        return self.cached / max(1, self.ideal)

    @property
    def p90(self) -> float:
        """Seconds within which nine of ten first tokens came."""
        ordered = sorted(self.first_tokens)
        return ordered[int(0.9 * len(ordered))] if ordered else 0.0


class Trace:
    """One run of the trace of *seed* under *load*; `answer` is what is done with a question."""

    def __init__(self, seed: int, load: Load) -> None:
        self.load, self.seed = load, seed
        self.result = Result()
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()

    @property
    def counts(self) -> bool:
        """Whether the warm-up is over."""
        return self._loop.time() - self._began >= self.load.warm_up

    async def ask(self, turn: Turn, user: int, first: Callable[[], None]) -> str:
        """Return the answer to *turn* of *user*; *first* is called with its first token."""
        raise NotImplementedError

    async def _user(self, number: int) -> None:
        """Have one conversation after another."""
        load, dice = self.load, random.Random(f"{self.seed} {number}")
        weights = [1 / rank for rank in range(1, load.systems + 1)]
        await asyncio.sleep(dice.uniform(0, BEGIN_WITHIN) / load.speed)
        while True:
            system = dice.choices(range(load.systems), weights)[0]
            text = words(random.Random(f"system {self.seed} {system}"), load.system_tokens)
            messages = [{"role": "system", "content": text}]
            for turn_number in range(dice.randint(*load.turns)):
                await asyncio.sleep(dice.expovariate(1 / PAUSE) / load.speed)
                mean = load.later if turn_number else load.first
                tokens = max(1, round(mean * dice.lognormvariate(0, 0.5)))
                messages.append({"role": "user", "content": words(dice, tokens)})
                turn = Turn(list(messages), max(2, round(ANSWER * dice.lognormvariate(0, 0.4))))
                said = await self._asked(turn, number)
                messages.append({"role": "assistant", "content": said})

    async def _asked(self, turn: Turn, user: int) -> str:
        began = self._loop.time()

        def first() -> None:
            if self.counts:
                self.result.first_tokens.append(self._loop.time() - began)

        return await self.ask(turn, user, first)

    async def play(self) -> Result:
        """Run the trace."""
        users = [asyncio.create_task(self._user(number)) for number in range(self.load.users)]
        done, _ = await asyncio.wait(users, timeout=self.load.seconds)
        for task in done:
            task.result()
        for task in users:
            task.cancel()
        await asyncio.gather(*users, return_exceptions=True)
        return self.result

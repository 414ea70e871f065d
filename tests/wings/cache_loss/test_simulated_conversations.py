"""Conversations over simulated engines, of which half lose their cache once, by a planted cause:
the verdict and the region are right, and nothing else is ever called lost.
"""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

import pytest

from aioserver.telemetry.bugs import Bugs
from aioserver.telemetry.outcome import CacheLoss, Outcome
from aioserver.wings.cache_loss.turns import Reader
from aioserver.wings.cache_loss.verdict import CHANGED, EVICTED, EXPIRED, MOVED, REORDERED
from tests.support.clock import FakeClock
from tests.support.prefix_cache import PrefixCache
from tests.support.regions import regions_in

# Seconds that an engine keeps a block, and the blocks that it has.
LIFE, BLOCKS = 300.0, 16_384
# Seconds between two turns. The first conversations, without a cause, show how long a prompt is
# kept at least.
PAUSES, FIRST = (1, 5, 20, 60), 6
CLIENT, ENGINE = (CHANGED, REORDERED), (MOVED, EXPIRED, EVICTED)


class Told(NamedTuple):
    """A turn: its planted cause and region, or "" twice, and the loss that was found."""

    cause: str
    at: str
    loss: CacheLoss | None

    @property
    def right(self) -> bool:
        if self.loss is None:
            return not self.cause
        # Why a turn has moved is no region.
        at = "" if self.cause == MOVED else self.loss.at
        return (self.loss.verdict, at) == (self.cause, self.at)


def words(dice: random.Random, least: int, most: int) -> str:
    return dice.randbytes(dice.randint(least, most) // 2).hex()


def other_byte(dice: random.Random, region: dict[str, Any]) -> None:
    """Change one byte of *region*."""
    name = "text" if "text" in region else "content" if "content" in region else "description"
    text = region[name]
    at = dice.randrange(len(text))
    region[name] = text[:at] + "X" + text[at + 1 :]


class Conversation:
    """One conversation of *caller*, whose prompts *reader* reads."""

    def __init__(self, reader: Reader, clock: FakeClock, dice: random.Random, caller: str) -> None:
        self.reader, self.clock, self.dice, self.caller = reader, clock, dice, caller
        self.engines = {name: PrefixCache(BLOCKS, LIFE) for name in ("gpu1", "gpu2")}
        self.engine = "gpu1"
        self.body: dict[str, Any] = {
            "tools": [
                {"name": f"t{number}", "description": words(dice, 200, 900)}
                for number in range(dice.randint(2, 20))
            ],
            "system": [
                {"type": "text", "text": words(dice, 8_000, 30_000)}
                for _ in range(dice.randint(1, 2))
            ],
            "messages": [{"role": "user", "content": words(dice, 12_000, 15_000)}],
        }

    def turn(self) -> CacheLoss | None:
        """Ask, and get an answer; return what was found to be lost."""
        regions = regions_in(self.body)
        assert regions.user is not None
        key = b"%d" % regions.digests[regions.user]
        turn = self.reader.turn(self.caller, key, regions, lambda _name: "sick")
        prompt, cached = self.engines[self.engine].read(self.body, self.clock.now)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        sent_at = self.clock.now
        self.clock.advance(self.dice.randint(1, 5))
        return turn.ended(Outcome(self.engine, "m", usage=usage, sent_at=sent_at))

    def go_on(self) -> None:
        """Add the answer and the next question, after a pause."""
        roles = ("assistant", "user")
        self.body["messages"] += [
            {"role": role, "content": words(self.dice, 200, 4_000)} for role in roles
        ]
        self.clock.advance(self.dice.choice(PAUSES))

    # The causes; each returns the verdict and the region.

    def byte(self) -> tuple[str, str]:
        name = self.dice.choice(["tools", "system"])
        number = self.dice.randrange(len(self.body[name]))
        other_byte(self.dice, self.body[name][number])
        return CHANGED, f"{name}[{number}]"

    def edit(self) -> tuple[str, str]:
        # The first message is the identity. Behind the edited one stands enough to be missed: more
        # than a tenth of the prompt.
        messages = self.body["messages"]
        size = len(json.dumps(self.body))
        sizes = [len(message["content"]) for message in messages]
        early = [n for n in range(1, len(messages) - 2) if sum(sizes[n + 1 : -2]) > size / 5]
        if not early:
            return self.byte()
        number = self.dice.choice(early)
        other_byte(self.dice, messages[number])
        return CHANGED, f"messages[{number}]"

    def swap(self) -> tuple[str, str]:
        tools = self.body["tools"]
        one, other = sorted(self.dice.sample(range(len(tools)), 2))
        tools[one], tools[other] = tools[other], tools[one]
        return REORDERED, f"tools[{one}]"

    def move(self) -> tuple[str, str]:
        self.engine = "gpu2"
        return MOVED, ""

    def evict(self) -> tuple[str, str]:
        self.engines[self.engine].flood(self.clock.now)
        return EVICTED, ""

    def rest(self) -> tuple[str, str]:
        self.clock.advance(LIFE + self.dice.randint(1, 2000))
        return EXPIRED, ""


CAUSES = (
    *(Conversation.byte, Conversation.edit, Conversation.swap),
    *(Conversation.move, Conversation.evict, Conversation.rest),
)


def conversation(
    reader: Reader, clock: FakeClock, number: int, seed: int, most: int
) -> list[Told]:
    """The turns of one conversation, *most* at most; each second one has a cause planted."""
    dice = random.Random(f"{seed}.{number}")
    talk = Conversation(reader, clock, dice, f"caller {number}")
    turns = dice.randint(3, most)
    planted = dice.randrange(2, turns) if number % 2 and number >= FIRST else 0
    told = []
    for turn in range(turns):
        cause, at = dice.choice(CAUSES)(talk) if turn and turn == planted else ("", "")
        told.append(Told(cause, at, talk.turn()))
        talk.go_on()
    return told


@pytest.mark.parametrize(
    ("count", "most"),
    [
        (40, 16),
        pytest.param(1000, 40, marks=[pytest.mark.stress, pytest.mark.timeout(1200)]),
    ],
)
def test_a_planted_cause_is_found_and_nothing_else(count: int, most: int) -> None:
    seed = random.randrange(1 << 30)
    clock = FakeClock()
    reader = Reader(Bugs(), lambda: clock.now)

    all_told = [conversation(reader, clock, number, seed, most) for number in range(count)]

    wrong = [told for told in all_told if not all(turn.right for turn in told)]
    details = [turn for told in wrong for turn in told if not turn.right]
    assert len(wrong) <= count / 100, f"seed {seed}: {details[:5]}"
    for turn in (turn for told in all_told for turn in told if turn.loss is not None):
        assert turn.loss is not None
        blamed = CLIENT if turn.cause in CLIENT else ENGINE
        assert turn.loss.verdict in blamed, f"seed {seed}: {turn}"
    assert not reader.bugs.value
    planted = [turn for told in all_told for turn in told if turn.cause]
    assert len(planted) == (count - FIRST) // 2

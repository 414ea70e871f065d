"""Turns of any shape that are cut anywhere, once, are whole for their clients: each call once, and
of one attempt.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.held_turns import (
    CHAT,
    MESSAGES,
    PIECES,
    REASONING,
    RESPONSES,
    TEXT,
    CuttingProvider,
    Turn,
    ask,
    cutting,
)

if TYPE_CHECKING:
    from tests.support.held_turns import SeenTurn
    from tests.support.server import MakeServer

THINKS: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


def draw(dice: random.Random) -> Turn:
    return Turn(
        reasoning=dice.choice(((), REASONING)),
        text=dice.choice(((), TEXT)),
        calls=dice.choice((1, 2, 3)),
    )


def later(turn: Turn, shown: bytes, *, held: bool) -> Turn:
    """What the next attempt has to say behind what its client has seen."""
    count = 0 if held else sum(piece.strip().encode() in shown for piece in turn.text)
    return turn if not count else Turn(text=turn.text[count:], calls=turn.calls)


def check(seen: SeenTurn, turn: Turn, path: str, attempts: int) -> None:
    assert seen.end == "complete"
    assert list(seen.calls.values()) == ["".join(PIECES)] * turn.calls
    # Of one attempt: the last one.
    assert {name.split("_")[1] for name in seen.calls} == {str(attempts)} or path != CHAT
    assert seen.text == "".join(turn.text)
    assert "".join(turn.reasoning).startswith(seen.reasoning)


@pytest.mark.parametrize("bridged", [False, True])
@pytest.mark.parametrize("count", [40, pytest.param(5000, marks=pytest.mark.stress)])
@pytest.mark.timeout(900)
async def test_turns_that_are_cut_once_anywhere_are_whole(
    make_server: MakeServer, count: int, *, bridged: bool
) -> None:
    provider, attempts = CuttingProvider(Turn()), Counter[int]()
    async with cutting(
        make_server,
        provider,
        1,
        bridged=bridged,
        continuation="prefill",
        spare=True,
        requests_per_minute=1_000_000,
    ) as server:
        for seed in range(count):
            dice = random.Random(f"{bridged} {seed}")
            turn, word = draw(dice), dice.choice(("calls", "turn"))
            path = dice.choice((CHAT, MESSAGES, RESPONSES))
            if path == RESPONSES and not bridged and word == "calls":
                # Nobody can go on with it.
                turn = Turn(turn.reasoning, calls=turn.calls)
            events = turn.events(CHAT if bridged else path, 1)
            cut = dice.randrange(len(events))
            provider.turn, provider.behind, provider.asked = turn, cut, Counter()
            provider.later = later(turn, b"".join(events[:cut]), held=word == "turn")
            # The rest of a text is asked for in another form where a model thinks.
            prefilled = not bridged and word == "calls" and turn.text
            members = THINKS if path == MESSAGES and not prefilled else {}

            seen = await ask(server, path, "t0", word, **members)

            check(seen, turn, path, provider.asked.total())
            attempts[provider.asked.total()] += 1
    # At most one attempt more for one cut.
    assert attempts.keys() <= {1, 2}
    assert attempts[2] > count / 2

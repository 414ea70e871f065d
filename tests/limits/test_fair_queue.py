"""FairQueue: what start-time fair queueing promises, and that positions are those of the order."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest

from aioserver.limits.fair_queue import LENGTH, MAX_STALE, MAX_WEIGHT, FairQueue


class Caller:
    """A caller that may be forgotten."""


def alive(_waiter: object) -> bool:
    return False


def drained(turns: FairQueue[Any]) -> list[Any]:
    return [turns.pop(alive) for _ in range(len(turns))]


def filled(*names: str, weights: dict[str, int] | None = None) -> FairQueue[str]:
    """Each waits as its first letter's caller, in its only line."""
    turns: FairQueue[str] = FairQueue()
    for name in names:
        turns.add(name, name[0], "", (weights or {}).get(name[0], 1))
    return turns


def test_a_turn_is_whole_for_every_weight() -> None:
    assert not any(LENGTH % weight for weight in range(1, MAX_WEIGHT + 1))


def test_callers_of_one_weight_take_turns() -> None:
    turns = filled("a1", "a2", "a3", "b1", "c1", "c2")

    assert drained(turns) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_a_weight_of_three_has_three_turns_for_one() -> None:
    turns = filled(*(f"a{n}" for n in range(9)), *(f"b{n}" for n in range(9)), weights={"a": 3})

    served = drained(turns)

    assert [Counter(name[0] for name in served[:n]) for n in (4, 8, 12)] == [
        {"a": 3, "b": 1},
        {"a": 6, "b": 2},
        {"a": 9, "b": 3},
    ]


def test_a_weight_that_has_changed_holds_for_those_who_wait() -> None:
    turns = filled(*(f"a{n}" for n in range(8)), *(f"b{n}" for n in range(8)))

    turns.add("a8", "a", "", 3)
    served = drained(turns)

    assert [Counter(name[0] for name in served[:n]) for n in (4, 8, 12)] == [
        {"a": 3, "b": 1},
        {"a": 6, "b": 2},
        {"a": 9, "b": 3},
    ]


def test_the_lines_of_a_caller_share_what_it_has() -> None:
    turns: FairQueue[str] = FairQueue()
    for name in ("ann1", "ann2", "ann3", "bob1"):
        turns.add(name, "web", name[:3])
    for name in ("x1", "x2", "x3", "x4"):
        turns.add(name, "batch", "")

    assert drained(turns) == ["ann1", "x1", "bob1", "x2", "ann2", "x3", "ann3", "x4"]


def test_a_caller_that_was_away_for_a_moment_gains_nothing() -> None:
    turns = filled("a1", "b1", "b2", "b3")
    served = [turns.pop(alive), turns.pop(alive)]  # a1, b1: a waits no more

    turns.add("a2", "a", "")
    served += drained(turns)

    assert served == ["a1", "b1", "b2", "a2", "b3"]


def test_a_late_caller_has_no_turns_in_store() -> None:
    turns = filled(*(f"a{n}" for n in range(8)))
    for _ in range(4):
        turns.pop(alive)

    for name in ("b1", "b2", "b3"):
        turns.add(name, "b", "")

    assert drained(turns) == ["b1", "a4", "b2", "a5", "b3", "a6", "a7"]


def test_a_returning_waiter_is_its_callers_next() -> None:
    turns: FairQueue[str] = FairQueue()
    for name, line in (("ann1", "ann"), ("bob1", "bob"), ("bob2", "bob")):
        turns.add(name, "web", line)

    turns.add("bob again", "web", "bob", at_front=True)

    assert list(turns) == ["bob again", "ann1", "bob1", "bob2"]
    assert turns.position("web", "bob", 1) == 1
    assert drained(turns) == ["bob again", "ann1", "bob1", "bob2"]


def test_a_waiter_that_is_gone_costs_its_caller_no_turn() -> None:
    turns = filled("a1", "a2", "b1")

    assert turns.pop(lambda name: name == "a1") == "a2"
    assert turns.pop(lambda name: name == "b1") is None
    assert len(turns) == 0


def test_callers_that_left_are_forgotten() -> None:
    turns: FairQueue[int] = FairQueue()
    turns.add(-1, "stays", "")
    known: weakref.WeakSet[Caller] = weakref.WeakSet()
    for number in range(10 * MAX_STALE):
        caller = Caller()
        known.add(caller)
        turns.add(number, caller, "")
        assert turns.remove(number, caller, "")
        assert not turns.remove(number, caller, "")
        del caller

    assert len(known) <= MAX_STALE + 3
    assert turns.pop(alive) == -1
    assert not known


@pytest.mark.parametrize("run", range(20))
def test_nobody_gets_more_than_its_share_by_more_than_a_turn(run: int) -> None:
    """Theorem 1 of the paper: |W_f / r_f - W_m / r_m| <= l / r_f + l / r_m while both wait."""
    dice = random.Random(run)
    weights = {f"caller {n}": dice.randint(1, MAX_WEIGHT) for n in range(dice.randint(2, 6))}
    turns: FairQueue[str] = FairQueue()
    for caller, weight in weights.items():
        for _ in range(200):
            turns.add(caller, caller, dice.randrange(3), weight)
    served: Counter[str] = Counter()
    history = [dict(served)]

    while all(any(turns.count(caller, line) for line in range(3)) for caller in weights):
        name = turns.pop(alive)
        assert name is not None
        served[name] += 1
        history.append(dict(served))

    for _ in range(200):
        begin, end = sorted(dice.sample(range(len(history)), 2))
        got = {
            caller: Fraction(history[end].get(caller, 0) - history[begin].get(caller, 0), weight)
            for caller, weight in weights.items()
        }
        for former, other in pairwise(weights):
            most = Fraction(1, weights[former]) + Fraction(1, weights[other])
            assert abs(got[former] - got[other]) <= most


@pytest.mark.parametrize("run", range(40))
def test_positions_and_the_order_are_those_in_which_they_are_served(run: int) -> None:
    dice = random.Random(run)
    turns: FairQueue[tuple[int, str, int]] = FairQueue()
    weights = {caller: dice.randint(1, MAX_WEIGHT) for caller in "abcde"}
    waiting: list[tuple[int, str, int]] = []

    for number in range(150):
        match dice.choices(("come", "serve", "leave"), (5, 3, 1))[0]:
            case "come":
                waiter = (number, dice.choice("abcde"), dice.randrange(3))
                _, caller, line = waiter
                behind = turns.count(caller, line) + 1
                expected = turns.position(caller, line, behind, weights[caller])
                turns.add(waiter, caller, line, weights[caller])
                waiting.append(waiter)
                assert list(turns).index(waiter) + 1 == expected
                assert turns.position(caller, line, behind) == expected
            case "serve" if waiting:
                first = next(iter(turns))
                assert turns.pop(alive) == first
                waiting.remove(first)
            case "leave" if waiting:
                leaver = dice.choice(waiting)
                assert turns.remove(leaver, leaver[1], leaver[2])
                waiting.remove(leaver)
        assert len(turns) == len(waiting)
        assert sorted(turns) == sorted(waiting)

    order = list(turns)
    assert drained(turns) == order

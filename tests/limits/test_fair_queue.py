"""FairQueue: what virtual token counters promise, and that positions are those of the order."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from typing import Any

from aioserver.limits.fair_queue import LENGTH, MAX_STALE, MAX_WEIGHT, FairQueue
from tests.support.fair_model import History


class Caller:
    """A caller that may be forgotten."""


def served(queue: FairQueue[Any]) -> Any:
    """The item that starts next; it ends at once, and costs what was estimated."""
    item, charge = queue.pop()
    charge.settle()
    return item


def drained(queue: FairQueue[Any]) -> list[Any]:
    return [served(queue) for _ in range(queue.size)]


def order_of(queue: FairQueue[Any]) -> list[Any]:
    """The items in the order in which the queue says that they are served."""
    return [item for item, _ in queue.order()]


def filled(*names: str, weights: dict[str, int] | None = None) -> FairQueue[str]:
    """Each waits as its first letter's caller, in its only flow."""
    queue: FairQueue[str] = FairQueue()
    for name in names:
        queue.add(name, name[0], "", (weights or {}).get(name[0], 1), 1)
    return queue


def test_a_unit_of_work_is_whole_for_every_weight() -> None:
    assert not any(LENGTH % weight for weight in range(1, MAX_WEIGHT + 1))


def test_callers_of_one_weight_take_turns_if_all_costs_the_same() -> None:
    queue = filled("a1", "a2", "a3", "b1", "c1", "c2")

    assert drained(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_a_caller_whose_requests_are_dear_has_fewer_starts() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(30):
        queue.add(f"cheap{number}", "cheap", "", 1, 100)
        queue.add(f"dear{number}", "dear", "", 1, 500)

    order = drained(queue)

    assert [Counter(name[:4] for name in order[:n]) for n in (6, 12, 18)] == [
        {"chea": 5, "dear": 1},
        {"chea": 10, "dear": 2},
        {"chea": 15, "dear": 3},
    ]


def test_a_weight_of_three_has_three_times_the_work() -> None:
    queue = filled(*(f"a{n}" for n in range(9)), *(f"b{n}" for n in range(9)), weights={"a": 3})

    order = drained(queue)

    assert [Counter(name[0] for name in order[:n]) for n in (4, 8, 12)] == [
        {"a": 3, "b": 1},
        {"a": 6, "b": 2},
        {"a": 9, "b": 3},
    ]


def test_a_weight_that_has_changed_holds_for_those_who_wait() -> None:
    queue = filled(*(f"a{n}" for n in range(8)), *(f"b{n}" for n in range(8)))

    queue.add("a8", "a", "", 3, 1)
    order = drained(queue)

    assert [Counter(name[0] for name in order[:n]) for n in (4, 8, 12)] == [
        {"a": 3, "b": 1},
        {"a": 6, "b": 2},
        {"a": 9, "b": 3},
    ]


def test_what_was_estimated_is_corrected_by_what_it_has_cost() -> None:
    queue: FairQueue[str] = FairQueue()
    running = queue.start("a", "", 1, 1000)
    for name in ("a1", "b1", "b2"):
        queue.add(name, name[0], "", 1, 100)

    running.settle(50)
    running.settle(7000)  # once

    assert order_of(queue) == ["b1", "a1", "b2"]
    assert drained(queue) == ["b1", "a1", "b2"]


def test_the_flows_of_a_caller_share_what_it_has() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("ann1", "ann2", "ann3", "bob1"):
        queue.add(name, "web", name[:3], 1, 1)
    for name in ("x1", "x2", "x3", "x4"):
        queue.add(name, "night", "", 1, 1)

    assert drained(queue) == ["ann1", "x1", "bob1", "x2", "ann2", "x3", "ann3", "x4"]


def test_a_returning_item_is_its_callers_next() -> None:
    queue: FairQueue[str] = FairQueue()
    for name, flow in (("ann1", "ann"), ("bob1", "bob"), ("bob2", "bob")):
        queue.add(name, "web", flow, 1, 1)

    queue.add("bob again", "web", "bob", 1, 1, 1.0)

    # It counts for its flow.
    assert order_of(queue) == ["bob again", "ann1", "bob1", "bob2"]
    assert queue.position("web", "bob", 1.0, waits=True) == 1
    assert queue.position("web", "ann", waits=True) == 2
    assert drained(queue) == ["bob again", "ann1", "bob1", "bob2"]


def test_items_that_come_back_are_served_in_the_order_of_their_first_arrival() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("newcomer", "web", "ann", 1, 1)
    for name, came in (("third", 3.0), ("first", 1.0), ("second", 2.0), ("also second", 2.0)):
        queue.add(name, "web", "bob", 1, 1, came)

    order = ["first", "second", "also second", "third", "newcomer"]
    assert order_of(queue) == order
    assert queue.position("web", "bob", 2.5, waits=False) == 4
    assert drained(queue) == order


def test_an_item_that_has_left_costs_its_caller_no_turn() -> None:
    queue = filled("a1", "a2", "b1")

    assert queue.remove("a1", "a", "")
    assert queue.head() == ("a2", 1)
    assert served(queue) == "a2"
    assert queue.remove("b1", "b", "")
    assert queue.head() is None
    assert queue.size == queue.work == 0


def test_an_item_at_the_front_may_leave() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a1", "a2", "a3"):
        queue.add(name, "a", "", 1, 3, 1.0)

    assert queue.remove("a3", "a", "")
    assert not queue.remove("a3", "a", "")
    assert queue.remove("a1", "a", "")
    assert queue.head() == ("a2", 3)
    assert list(queue.heads()) == ["a2"]
    assert (queue.size, queue.work) == (1, 3)


def test_callers_that_left_are_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.add(-1, "stays", "", 1, 1)
    known: weakref.WeakSet[Caller] = weakref.WeakSet()
    for number in range(10 * MAX_STALE):
        caller = Caller()
        known.add(caller)
        queue.add(number, caller, "", 1, 1)
        assert queue.remove(number, caller, "")
        assert not queue.remove(number, caller, "")
        del caller

    assert len(known) <= MAX_STALE + 3
    assert served(queue) == -1


def test_callers_that_come_once_are_forgotten_though_each_is_ahead() -> None:
    queue: FairQueue[int] = FairQueue()
    for caller in range(20 * MAX_STALE):
        queue.start(caller, "", 1, 1000).settle(2000)
        for flow in range(3):
            queue.start("one", (caller, flow), 1, 1).settle()

    assert len(queue.callers.counters) <= MAX_STALE + 1
    assert len(queue.callers.counters["one"].flows.counters) <= MAX_STALE


def test_a_caller_that_is_far_ahead_is_remembered_among_many_that_come_once() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.start("dear", "", 1, 1).settle(10**6)
    for caller in range(10 * MAX_STALE):
        queue.start(caller, "", 1, 1).settle()

    queue.add("dear again", "dear", "", 1, 1)
    queue.add("another", "another", "", 1, 1)

    assert drained(queue) == ["another", "dear again"]


def test_flows_that_come_once_are_forgotten_while_their_caller_runs() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.start("one", "long", 1, 1)
    for flow in range(20 * MAX_STALE):
        queue.start("one", flow, 1, 1000).settle(2000)

    assert len(queue.callers.counters["one"].flows.counters) <= MAX_STALE + 1


def test_corrections_leave_few_stale_entries() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("a1", "a", "", 1, 1)
    queue.add("b1", "b", "", 1, 1)
    for number in range(10_000):
        queue.start("a", "", 1, 1).settle(number % 7)

    assert len(queue.callers._heap) <= 3 * MAX_STALE  # noqa: SLF001


def test_the_bound_holds_and_the_order_is_that_of_the_plain_model() -> None:
    """Callers, and the flows of one, which both wait differ by 2 (U + N E) at most in what they
    have started, each divided by its weight; without errors that is the paper's 2 U.
    """
    for seed in range(25):
        history = History(seed)

        history.run()

        assert max(history.ratio) <= 1.0


def test_positions_and_the_order_are_those_in_which_they_are_served() -> None:
    for run in range(10):
        dice = random.Random(run)
        queue: FairQueue[tuple[int, str, int]] = FairQueue()
        weights = {caller: dice.randint(1, MAX_WEIGHT) for caller in "abcde"}
        waiting: list[tuple[int, str, int]] = []

        for number in range(150):
            match dice.choices(("come", "serve", "leave"), (5, 3, 1))[0]:
                case "come":
                    item = (number, dice.choice("abcde"), dice.randrange(3))
                    _, caller, flow = item
                    expected = queue.position(caller, flow, waits=False)
                    queue.add(item, caller, flow, weights[caller], 30)
                    waiting.append(item)
                    assert order_of(queue).index(item) + 1 == expected
                    assert queue.position(caller, flow, waits=True) == expected
                case "serve" if waiting:
                    first = order_of(queue)[0]
                    assert served(queue) == first
                    waiting.remove(first)
                case "leave" if waiting:
                    leaver = dice.choice(waiting)
                    assert queue.remove(leaver, leaver[1], leaver[2])
                    waiting.remove(leaver)
            assert queue.size == len(waiting)
            assert queue.work == 30 * len(waiting)
            assert sorted(order_of(queue)) == sorted(waiting)

        order = order_of(queue)
        assert drained(queue) == order


def test_the_order_is_that_in_which_items_of_any_work_are_served() -> None:
    for run in range(5):
        dice = random.Random(run)
        queue: FairQueue[int] = FairQueue()
        for number in range(200):
            work, came = dice.randint(1, 3000), dice.random() if dice.random() < 0.05 else None
            queue.add(number, dice.choice("abc"), dice.randrange(4), 1 + number % 3, work, came)
            if dice.random() < 0.3:
                queue.start(dice.choice("abc"), 0, 1, 9).settle(dice.randint(0, 90))

        order = order_of(queue)

        assert drained(queue) == order

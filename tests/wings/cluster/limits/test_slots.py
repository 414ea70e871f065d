"""Slots in hand do what a plain list of them would do."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from aioserver.wings.cluster.limits.rates import PrefetchedSlots

HORIZON = 10.0

steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.floats(0, 5)),
        st.tuples(st.just("last"), st.floats(0, 5)),
        st.tuples(st.just("take"), st.just(0.0)),
        st.tuples(st.just("wait"), st.floats(0, 6)),
    ),
    max_size=60,
)


@given(steps)
def test_they_are_used_in_order_and_pass_at_their_end(steps: list[tuple[str, float]]) -> None:
    slots, now = PrefetchedSlots(), 100.0
    passing: list[float] = []
    lasting: list[float] = []
    for step, seconds in steps:
        if step == "wait":
            now += seconds
            passing = [begins for begins in passing if begins + HORIZON >= now]
        elif step == "add":
            passing.append(max([now + seconds, *passing]))
            slots.add(passing[-1], passing[-1] + HORIZON)
        elif step == "last":
            lasting.append(max([now + seconds, *lasting]))
            slots.add_lasting(lasting[-1])
        elif passing or lasting:
            slots.take(now)
            begun = [begins for begins in passing if begins <= now]
            of = passing if begun or not lasting else lasting
            if passing and lasting and not begun:
                of = passing if passing[0] <= lasting[0] else lasting
            del of[0]
        assert slots.count(now) == len(passing) + len(lasting)
        assert slots.lasting == len(lasting)
        in_order = sorted(passing + lasting)
        assert [slots.begins(before) for before in range(len(in_order))] == in_order
        assert slots.begun(now) == sum(begins <= now for begins in in_order)
    assert all(passed <= other for passed, other in pairwise(passing))


def test_nothing_is_taken_where_nothing_is_granted() -> None:
    slots = PrefetchedSlots()
    slots.add(1.0, 2.0)
    slots.take(3.0)

    assert slots.count(3.0) == 0

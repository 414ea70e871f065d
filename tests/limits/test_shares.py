"""Shares of what all owners keep within one bound: whoever keeps most makes room."""

from __future__ import annotations

import asyncio
import random

import pytest

from aioserver.limits.shares import Bounded, ByOwner, Places, Shares


def test_room_is_made_by_whoever_keeps_most_and_by_nobody_who_keeps_less() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    for _ in range(100):
        shares: Shares[str] = Shares()
        things = {
            owner: [dice.randint(1, 9) for _ in range(dice.randint(1, 30))] for owner in "abcdef"
        }
        for owner, sizes in things.items():
            shares.add(owner, sum(sizes))
        before, bound = dict(things), dice.randint(0, shares.total)

        if shares.total > bound:
            for owner in shares.largest_first():
                assert shares.of(owner) == max(map(shares.of, things))
                shares.add(owner, -things[owner].pop(0))
                if shares.total <= bound:
                    break

        assert shares.total == sum(map(sum, things.values())) <= max(bound, 0)
        # Who lost something had no less than anybody has now, but for the last thing.
        most = max(map(shares.of, things))
        for owner, sizes in things.items():
            if len(sizes) < len(before[owner]):
                assert shares.of(owner) + 9 >= most


def test_an_owner_from_which_nothing_can_be_taken_is_passed_over() -> None:
    shares: Shares[str] = Shares()
    shares.add("large", 10)
    shares.add("small", 3)
    asked = []

    for owner in shares.largest_first():
        asked.append(owner)
        if owner == "small":
            shares.add("small", -1)

    assert asked == ["large", "small", "small", "small"]
    assert (shares.of("large"), shares.of("small"), shares.total, len(shares)) == (10, 0, 10, 1)


def test_things_of_owners_are_in_the_order_in_which_they_were_put() -> None:
    things: ByOwner[str, int, str] = ByOwner()
    for number in range(3):
        things.put("a", number, str(number))
    things.put("b", 0, "other")

    assert things.put("a", 0, "again") == "0"
    assert list(things.of("a").items()) == [(1, "1"), (2, "2"), (0, "again")]
    assert things.pop("b", 0) == "other"
    assert things.pop("b", 0) is None
    assert (len(things), len(things.of("b"))) == (3, 0)


def test_things_are_bounded_and_whoever_has_most_loses_its_oldest() -> None:
    things: Bounded[str, int, int] = Bounded(64)
    for number in range(5):
        things.put("small", number, number)
    lost: list[tuple[str, int]] = []
    for number in range(1000):
        lost += things.make_room()
        things.put("large", number, number)

    assert len(things) <= 64
    assert list(things.of("small")) == list(range(5))
    assert lost == [("large", number) for number in range(len(lost))]
    assert things.pop("large", 999) == 999
    assert things.pop("large", 999) is None
    before = len(things)
    things.make_room()
    assert len(things) == before, "there is room"


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 192])
@pytest.mark.parametrize("greedy", [1, 2, 5])
async def test_an_owner_alone_has_most_places_and_another_one_finds_some(
    limit: int, greedy: int
) -> None:
    places: Places[str] = Places(limit)
    for owner in [f"greedy{number}" for number in range(greedy)] * limit:
        if places.allows(owner):
            places.add(owner, 1)

    assert places.total <= limit
    if greedy == 1:
        assert places.of("greedy0") >= limit * 2 // 3
    if limit > 2 * greedy:
        assert places.allows("other")


async def test_whoever_waits_and_has_fewest_places_is_next() -> None:
    places: Places[str] = Places(6)
    turns: list[str] = []

    async def take(owner: str) -> None:
        await places.take(owner)
        turns.append(owner)

    async def back(owner: str) -> list[str]:
        """Who begins when *owner* gives a place back."""
        before = len(turns)
        places.give_back(owner)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return turns[before:]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(take(owner)) for owner in ["a"] * 7 + ["b", "c", "d"]]
        await asyncio.sleep(0)
        assert turns == ["a"] * 4 + ["b", "c"]
        tasks[4].cancel()
        assert await back("a") == ["d"], "it has come last, and has none"
        assert await back("a") == [], "with a third it would leave nobody any"
        assert await back("b") == ["a"]
        assert await back("c") == ["a"]
    assert (places.of("a"), places.of("d"), places.total) == (4, 1, 5)


async def test_a_place_that_comes_with_a_cancellation_goes_to_the_next() -> None:
    places: Places[str] = Places(1)
    await places.take("a")
    first, second = (asyncio.create_task(places.take("b")) for _ in range(2))
    await asyncio.sleep(0)

    places.give_back("a")
    first.cancel()
    await second

    assert first.cancelled()
    assert (places.of("a"), places.of("b"), places.total) == (0, 1, 1)
    places.give_back("b")
    assert not places.total


async def test_a_turn_that_was_cancelled_is_passed_over_before_it_has_heard_of_that() -> None:
    places: Places[str] = Places(1)
    await places.take("a")
    cancelled, alone = asyncio.create_task(places.take("b")), asyncio.create_task(places.take("c"))
    await asyncio.sleep(0)

    # As where a place and those that wait for it have the same time, which is over.
    cancelled.cancel()
    alone.cancel()
    places.give_back("a")
    outcomes = await asyncio.gather(cancelled, alone, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2
    assert not places.total
    await places.take("b")
    assert places.of("b") == 1

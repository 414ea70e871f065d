"""Shares of what all owners keep within one bound: whoever keeps most makes room."""

from __future__ import annotations

import random

from aioserver.limits.shares import ByOwner, Shares


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

"""The limits of a key over several instances."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.errors import (
    ConcurrencyExceeded,
    InvalidApiKey,
    RateLimitExceeded,
    TokensExceeded,
)
from aioserver.limits.fixed_share import Scope
from aioserver.wings.cluster.limits.keys import PATIENCE, SharedKey
from tests.support.turns import Turn
from tests.support.waiting import patience, until

pytestmark = pytest.mark.virtual_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.limits.quota import Quota
    from aioserver.wings.cluster.limits.leases import Leases
    from tests.support.reference_server import ReferenceServer


async def joined(reference: ReferenceServer, count: int) -> list[Leases]:
    """*count* instances that know each other, each with a fixed share."""
    instances = [reference.join(f"i{number}", fixed=(number, count)) for number in range(count)]
    # Longer than the grace period of a new epoch; polling would stop the time from jumping.
    await asyncio.sleep(6)
    assert all(len(each.members) == count and not each.standing.grace for each in instances)
    return instances


class Side:
    """A key at one instance, with the answers that run."""

    def __init__(self, leases: Leases, most: int, per_minute: int, **more: Any) -> None:
        clock = asyncio.get_running_loop().time
        self.shared = SharedKey(most, per_minute, clock, leases=leases, name="web", **more)
        self.quota = self.shared.quota
        self.turns: list[Turn] = []

    @property
    def running(self) -> int:
        return self.quota.running

    def begin(self, tokens: int = 0, on_wait: Callable[[], None] | None = None) -> Turn:
        return Turn(self.quota, tokens, on_wait=on_wait)

    def give_back(self) -> None:
        self.turns.pop().end()


def quota(leases: Leases, most: int = 4, per_minute: int = 6000) -> Side:
    return Side(leases, most, per_minute)


async def begin(side: Side, tokens: int) -> Turn | None:
    """The turn of an answer that may begin."""
    try:
        turn = side.begin(tokens)
        await turn.begun()
    except (ConcurrencyExceeded, RateLimitExceeded):
        return None
    side.turns.append(turn)
    return turn


async def take(side: Side) -> bool:
    """Whether an answer may begin."""
    return await begin(side, 0) is not None


async def test_all_instances_together_have_no_more_answers_than_the_key_may_have(
    reference: ReferenceServer,
) -> None:
    quotas = [quota(leases, most=5) for leases in await joined(reference, 3)]
    await asyncio.sleep(5)

    taken = await asyncio.gather(*(take(quota) for quota in quotas for _ in range(5)))

    assert sum(taken) == 5
    assert sum(quota.running for quota in quotas) == 5


async def test_one_instance_gets_all_that_the_others_do_not_use(
    reference: ReferenceServer,
) -> None:
    first, *_others = [quota(leases, most=6) for leases in await joined(reference, 3)]
    await asyncio.sleep(5)

    taken = [await take(first) for _ in range(7)]

    assert taken == [True] * 6 + [False]


async def test_a_place_that_ends_elsewhere_is_had_here(reference: ReferenceServer) -> None:
    first, second = [quota(leases, most=2) for leases in await joined(reference, 2)]
    await asyncio.sleep(5)
    assert await take(first)
    assert await take(first)
    assert not await take(second)

    first.give_back()

    assert await take(second)
    assert not await take(second)


async def test_where_no_place_can_be_free_the_refusal_comes_at_once(
    reference: ReferenceServer,
) -> None:
    (leases,) = await joined(reference, 1)
    only = quota(leases, most=1)
    await asyncio.sleep(5)
    assert await take(only)

    with pytest.raises(ConcurrencyExceeded, match=r"max_concurrent=1$"):
        only.begin()


async def test_an_answer_whose_client_leaves_undecided_takes_nothing(
    reference: ReferenceServer,
) -> None:
    first, second = [quota(leases, most=2) for leases in await joined(reference, 2)]
    await asyncio.sleep(5)
    assert await take(first)
    assert await take(first)

    undecided = [second.begin() for _ in range(2)]
    for turn in undecided:
        assert turn.waiting
        turn.end()
    await asyncio.sleep(2 * PATIENCE)

    answers = second.shared.answers
    assert (second.running, answers.inside, answers.wanting) == (0, 0, 0)
    first.give_back()
    first.give_back()
    assert await take(second)
    assert await take(second)


async def test_answers_that_are_refused_together_leave_no_place_of_another_one(
    reference: ReferenceServer,
) -> None:
    instances = await joined(reference, 2)
    here, there = (quota(leases) for leases in instances)
    for side in (here, here, there, there):
        assert await take(side)
    # Neither finds a place, and nobody has given them back yet.
    refused = [here.begin() for _ in range(2)]
    await until(lambda: not any(each.waiting for each in refused))

    here.give_back()

    assert here.shared.answers.inside == 1
    here.give_back()
    assert here.shared.answers.inside == here.running == 0


async def test_the_rate_holds_over_all_instances_and_is_had_by_any(
    reference: ReferenceServer,
) -> None:
    quotas = [quota(leases, most=100, per_minute=30) for leases in await joined(reference, 3)]
    await asyncio.sleep(5)

    began = 0
    for _ in range(20):
        for side in quotas:
            if await take(side):
                began += 1
                side.give_back()

    assert began <= 31
    # A slot that is used later than it begins is as much of the burst: 0.1 s, or one start here.
    assert began >= 29


async def test_what_begins_no_answer_counts_in_the_rate_of_all_instances(
    reference: ReferenceServer,
) -> None:
    quotas = [quota(leases, most=1, per_minute=30) for leases in await joined(reference, 3)]
    await asyncio.sleep(5)
    assert await take(quotas[0])

    counted = 0
    for _ in range(20):
        for side in quotas:
            with suppress(RateLimitExceeded):
                await side.quota.count()
                counted += 1

    assert 28 <= counted <= 30
    assert quotas[0].running == 1


async def test_a_refusal_by_rate_says_when_to_come_back(reference: ReferenceServer) -> None:
    (leases,) = await joined(reference, 1)
    only = quota(leases, most=100, per_minute=10)
    await asyncio.sleep(5)
    while await take(only):
        pass

    with pytest.raises(RateLimitExceeded, match=r"requests_per_minute=10 ") as refusal:
        only.begin()

    assert refusal.value.retry_after is not None
    assert 0 < refusal.value.retry_after <= 6.0
    await asyncio.sleep(refusal.value.retry_after)
    assert await take(only)


async def test_without_the_server_each_instance_has_its_fixed_share(
    reference: ReferenceServer,
) -> None:
    quotas = [quota(leases, most=4, per_minute=60) for leases in await joined(reference, 2)]
    reference.up = False
    await asyncio.sleep(30)

    taken = [sum([await take(quota) for _ in range(6)]) for quota in quotas]

    assert taken == [2, 2]


async def test_a_burst_has_its_slots_and_what_comes_later_asks_nobody(
    reference: ReferenceServer,
) -> None:
    (leases,) = await joined(reference, 1)
    only = quota(leases, most=100, per_minute=6000)
    await asyncio.sleep(5)
    taken = await asyncio.gather(*(take(only) for _ in range(100)))
    assert all(taken)
    for _ in range(100):
        only.give_back()
    await asyncio.sleep(5)

    assert only.begin().grant is not None


async def test_a_revoked_key_ends_what_is_undecided(reference: ReferenceServer) -> None:
    first, second = [quota(leases, most=1) for leases in await joined(reference, 2)]
    await asyncio.sleep(5)
    assert await take(first)
    undecided = second.begin()
    assert undecided.waiting

    second.quota.revoke()

    with pytest.raises(InvalidApiKey):
        await undecided.begun()
    with pytest.raises(InvalidApiKey):
        second.begin()


def keyed(
    leases: Leases, most: int = 100, *, queue_size: int = 0, per_minute: int = 0, per_day: int = 0
) -> Side:
    tokens = {"tokens_per_minute": per_minute, "tokens_per_day": per_day}
    return Side(leases, most, 60_000, queue_size=queue_size, **tokens)


async def test_all_instances_together_admit_the_tokens_of_the_key_wherever_they_are_wanted(
    reference: ReferenceServer,
) -> None:
    quotas = [keyed(leases, per_minute=30_000) for leases in await joined(reference, 3)]
    await asyncio.sleep(5)

    one = [await begin(quotas[0], 1000) for _ in range(25)]
    others = [await begin(each, 1000) for each in quotas[1:] for _ in range(5)]

    assert None not in one
    # What the first one has in hand is nobody else's.
    assert len([turn for turn in others if turn is not None]) in {3, 4, 5}
    assert sum(quota.running for quota in quotas) <= 30


async def test_a_refusal_names_the_whole_budget_and_when_there_is_room(
    reference: ReferenceServer,
) -> None:
    here, there = (keyed(leases, per_minute=60_000) for leases in await joined(reference, 2))
    await asyncio.sleep(5)
    for _ in range(6):
        assert await begin(here, 10_000)

    turn = there.begin(10_000)
    with pytest.raises(TokensExceeded) as refusal:
        await turn.begun()

    assert re.fullmatch(
        r"tokens_per_minute of this key: limit 60000, used 59\d\d\d, requested about 10000\."
        r" Please try again in (10.0|9\.9)s\.",
        str(refusal.value),
    )
    # Those that ask soon afterwards are refused at once.
    with pytest.raises(TokensExceeded, match="limit 60000, used 59"):
        there.begin(10_000)
    await asyncio.sleep(10.1)
    assert await begin(there, 10_000)


async def test_an_answer_that_is_refused_for_tokens_leaves_no_place_and_no_tokens(
    reference: ReferenceServer,
) -> None:
    here, there = (
        keyed(leases, 4, per_minute=1000, per_day=5000) for leases in await joined(reference, 2)
    )
    await asyncio.sleep(5)
    running = await begin(here, 900)
    assert running is not None

    assert [await begin(there, 500) for _ in range(6)] == [None] * 6

    inside, reserved = there.shared.answers.inside, there.quota.budget.reserved
    assert (there.running, inside, reserved) == (0, 0, 0)
    running.end(0)
    # It is told with the next renewal.
    await asyncio.sleep(3)
    turns = [await begin(there, 100) for _ in range(4)]
    assert None not in turns


async def test_an_answer_whose_client_leaves_before_its_tokens_come_takes_none(
    reference: ReferenceServer,
) -> None:
    (leases,) = await joined(reference, 1)
    only = keyed(leases, per_day=1000)
    await asyncio.sleep(5)

    left = only.begin(900)
    assert left.waiting
    left.end()
    await asyncio.sleep(3)

    assert (only.running, only.quota.budget.reserved) == (0, 0)
    assert only.quota.budget.states()["tokens_per_day"].remaining == 1000
    assert await begin(only, 900)


async def test_what_finds_no_place_at_other_instances_waits_in_the_queue_of_its_key(
    reference: ReferenceServer,
) -> None:
    here, there = (keyed(leases, 2, queue_size=5) for leases in await joined(reference, 2))
    await asyncio.sleep(5)
    running = [await begin(here, 1) for _ in range(2)]
    waits: list[bool] = []

    late = there.begin(1, on_wait=lambda: waits.append(True))
    assert waits == []
    await asyncio.sleep(2 * PATIENCE)

    assert late.waiting
    assert waits == [True]
    assert running[0] is not None
    running[0].end()
    await asyncio.wait_for(late.begun(), patience(5))
    assert not late.waiting
    assert here.running + there.running == 2


async def test_a_request_that_cannot_wait_any_more_is_refused_once_it_has_to(
    reference: ReferenceServer,
) -> None:
    here, there = (keyed(leases, 1, queue_size=5) for leases in await joined(reference, 2))
    await asyncio.sleep(5)
    assert await begin(here, 1)

    def no_room() -> None:
        raise ConcurrencyExceeded("no room")

    late = there.begin(1, on_wait=no_room)
    with pytest.raises(ConcurrencyExceeded, match="no room"):
        await late.begun()

    assert (there.running, len(there.quota.queue)) == (0, 0)


async def test_a_queue_waits_for_tokens_that_others_use_and_large_requests_are_not_overtaken(
    reference: ReferenceServer,
) -> None:
    busy, other = (
        keyed(leases, queue_size=1000, per_minute=60_000) for leases in await joined(reference, 2)
    )
    await asyncio.sleep(5)
    small = [busy.begin(1000) for _ in range(200)]
    await asyncio.sleep(1)

    large = other.begin(40_000)
    await asyncio.wait_for(large.begun(), 60)

    started = sum(not turn.waiting for turn in small)
    assert 60 <= started <= 150
    for turn in small:
        turn.end(unused=True)
    assert busy.quota.budget.reserved == 0


async def test_the_workers_of_a_host_share_the_connections_of_a_key_once_they_are_bounded(
    reference: ReferenceServer,
) -> None:
    here, there = [
        Side(leases, 9, 6000, scope=Scope("host", rank, 2, first=True)).quota
        for rank, leases in enumerate(await joined(reference, 2))
    ]

    async def connect(quota: Quota) -> bool:
        try:
            if (undecided := quota.connect()) is not None:
                try:
                    await undecided
                except ConcurrencyExceeded:
                    quota.disconnect()
                    raise
        except ConcurrencyExceeded:
            return False
        return True

    assert [await connect(here) for _ in range(3)] == [True] * 3
    for quota in (here, there):
        quota.apply(9, 6000, max_connections=4)
    await asyncio.sleep(5)

    connected = [await connect(quota) for quota in (there, there, here, there)]

    assert connected == [True, False, False, False]
    here.disconnect()
    assert await connect(there)
    assert (here.connections, there.connections) == (2, 2)
    for quota in (here, there):
        quota.apply(9, 6000, max_connections=0)
    assert [await connect(there) for _ in range(5)] == [True] * 5


async def test_a_key_whose_connections_are_bounded_from_now_on_has_no_place_before_it_is_given_one(
    reference: ReferenceServer,
) -> None:
    (leases,) = await joined(reference, 1)
    quota = Side(leases, 9, 6000, scope=Scope("host", 0, 2)).quota
    reference.up = False

    quota.apply(9, 6000, max_connections=4)

    assert quota.slots is not None
    assert quota.slots.limit == 0

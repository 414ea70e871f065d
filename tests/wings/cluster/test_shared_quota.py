"""The limits of a key over several instances."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from aioserver.errors import ConcurrencyExceeded, InvalidApiKey, RateLimitExceeded
from aioserver.wings.cluster.shared_quota import PATIENCE, SharedQuota
from tests.support.reference_server import ReferenceServer
from tests.support.waiting import until

pytestmark = pytest.mark.virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.wings.cluster.leases import Leases


@pytest.fixture
async def reference() -> AsyncIterator[ReferenceServer]:
    reference = ReferenceServer()
    yield reference
    reference.close()


async def joined(reference: ReferenceServer, count: int) -> list[Leases]:
    """*count* instances that know each other, each with a fixed share."""
    instances = [reference.join(f"i{number}", fixed=(number, count)) for number in range(count)]
    # Longer than the grace period of a new epoch; polling would stop the time from jumping.
    await asyncio.sleep(6)
    assert all(len(each.members) == count and not each.standing.grace for each in instances)
    return instances


def quota(leases: Leases, most: int = 4, per_minute: int = 6000) -> SharedQuota:
    loop = asyncio.get_running_loop()
    return SharedQuota(most, per_minute, loop.time, leases=leases, name="web")


async def take(quota: SharedQuota) -> bool:
    """Whether an answer may begin; one that may not is given back."""
    try:
        undecided = quota.take()
    except (ConcurrencyExceeded, RateLimitExceeded):
        return False
    if undecided is not None:
        try:
            await undecided
        except (ConcurrencyExceeded, RateLimitExceeded):
            quota.give_back()
            return False
    return True


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
        only.take()


async def test_an_answer_whose_client_leaves_undecided_takes_nothing(
    reference: ReferenceServer,
) -> None:
    first, second = [quota(leases, most=2) for leases in await joined(reference, 2)]
    await asyncio.sleep(5)
    assert await take(first)
    assert await take(first)

    undecided = [second.take() for _ in range(2)]
    for decision in undecided:
        assert decision is not None
        decision.cancel()
        second.give_back()
    await asyncio.sleep(2 * PATIENCE)

    assert (second.running, second.answers.inside, second.answers.wanting) == (0, 0, 0)
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
    refused = [here.take() for _ in range(2)]
    await until(lambda: all(each is not None and each.done() for each in refused))

    here.give_back()

    # One of the refused may count as the answer that has ended, until its own end, but no more
    # than one.
    assert here.answers.inside <= 2
    for _ in range(3):
        here.give_back()
    assert here.answers.inside == here.running == 0


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
                await side.count()
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
        only.take()

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

    assert only.take() is None


async def test_a_revoked_key_ends_what_is_undecided(reference: ReferenceServer) -> None:
    first, second = [quota(leases, most=1) for leases in await joined(reference, 2)]
    await asyncio.sleep(5)
    assert await take(first)
    undecided = second.take()
    assert undecided is not None

    second.revoke()

    with pytest.raises(InvalidApiKey):
        await undecided
    with pytest.raises(InvalidApiKey):
        second.take()

"""The tokens of a key over several instances: each may use an equal part."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aioserver.config.settings import ClientKey
from aioserver.errors import TokensExceeded
from aioserver.limits.budget import PER_DAY, PER_MINUTE
from aioserver.wings.cluster.limits import SharedLimits
from aioserver.wings.cluster.shared_budget import PartOfBudget
from tests.support.reference_server import ReferenceServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.limits.quota import Quota
    from aioserver.wings.cluster.leases import Leases
    from tests.support.clock import FakeClock

KEY = ClientKey(
    name="web",
    sha256="0" * 64,
    max_concurrent=1000,
    requests_per_minute=100_000,
    tokens_per_minute=3000,
    tokens_per_day=9000,
)


@pytest.fixture
async def reference() -> AsyncIterator[ReferenceServer]:
    reference = ReferenceServer()
    yield reference
    reference.close()


def admitted(quota: Quota, tokens: int) -> int:
    """The tokens of those that begin, of requests of *tokens* each."""
    begun = 0
    for _ in range(100):
        try:
            quota.begin(tokens)
        except TokensExceeded:
            return begun
        begun += tokens
    raise AssertionError("there is no limit")


@pytest.mark.virtual_time
async def test_all_instances_together_stay_within_the_budget_as_they_come_and_go(
    reference: ReferenceServer,
) -> None:
    made: list[tuple[Leases, SharedLimits, Quota]] = []
    for number in range(3):
        leases = reference.join(f"i{number}", fixed=(number, 3))
        limits = SharedLimits(leases)
        made.append((leases, limits, limits.make_quota(KEY)))
    await asyncio.sleep(6)

    assert sum(admitted(quota, 100) for _, _, quota in made) == 3000
    for _, limits, quota in made:
        limits.instances_changed()
        state = quota.budgets()[PER_MINUTE]
        assert (state.limit, state.reserved, state.remaining) == (3000, 1000, 2000)


def test_the_part_follows_the_number_of_instances(clock: FakeClock) -> None:
    parts = 1
    budget = PartOfBudget(3000, 9000, lambda: parts, clock, clock)
    assert budget.shortage(3000) is None

    parts = 3
    budget.resize()

    budget.reserve(1000)
    assert budget.shortage(1) is not None
    parts = 1
    budget.resize()
    assert budget.shortage(2000) is None
    assert budget.states()[PER_DAY].limit == 9000


def test_other_limits_and_a_former_key_are_divided_as_well(clock: FakeClock) -> None:
    old = PartOfBudget(3000, 0, lambda: 3, clock, clock)
    old.reserve(1000)
    budget = PartOfBudget(6000, 0, lambda: 3, clock, clock)

    budget.take_over(old)

    assert budget.shortage(1000) is None
    assert budget.shortage(1001) is not None
    budget.apply(9000, 0)
    assert budget.shortage(2000) is None
    assert budget.states()[PER_MINUTE].limit == 9000


def test_a_day_begins_at_a_part_of_what_all_have_used(clock: FakeClock) -> None:
    budget = PartOfBudget(0, 9000, lambda: 3, clock, clock)

    budget.begin_day(6000)

    assert budget.shortage(1000) is None
    assert budget.shortage(1001) is not None

"""The quota of a key: never more than its limits, and nothing is kept of answers that have
ended.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from aioserver.errors import (
    ConcurrencyExceeded,
    InvalidApiKey,
    PermissionDenied,
    RateLimitExceeded,
    TokensExceeded,
)
from aioserver.limits.budget import Budget
from aioserver.limits.quota import MINUTE, Quota
from tests.support.turns import Turn
from tests.support.virtual_loop import run_virtually

if TYPE_CHECKING:
    from aioserver.limits.resource import Grant
    from tests.support.clock import FakeClock


def held(quota: Quota) -> Grant:
    """The grant of an answer that begins."""
    grant = quota.take()
    assert grant is not None
    return grant


def test_so_many_at_once_and_no_more(clock: FakeClock) -> None:
    quota = Quota(2, 1000, clock)
    quota.take()
    taken = held(quota)

    with pytest.raises(ConcurrencyExceeded, match="max_concurrent=2") as caught:
        quota.take()

    assert caught.value.retry_after == 1.0
    assert quota.running == 2
    taken.release()
    quota.take()


def test_a_minutes_worth_after_a_rest_then_evenly(clock: FakeClock) -> None:
    quota = Quota(1000, 6, clock)
    for _ in range(6):
        quota.take()

    with pytest.raises(RateLimitExceeded, match="requests_per_minute=6") as caught:
        quota.take()

    assert caught.value.retry_after == pytest.approx(10.0)
    assert quota.running == 6, "what was refused does not run"
    clock.now += 9.99
    with pytest.raises(RateLimitExceeded) as caught:
        quota.take()
    assert caught.value.retry_after == pytest.approx(0.01)
    clock.now += 0.01
    quota.take()
    with pytest.raises(RateLimitExceeded):
        quota.take()


def test_a_refusal_for_concurrency_spends_nothing_of_the_minute(clock: FakeClock) -> None:
    quota = Quota(1, 2, clock)
    taken = held(quota)
    for _ in range(5):
        with pytest.raises(ConcurrencyExceeded):
            quota.take()

    taken.release()
    quota.take()

    assert quota.running == 1


def test_an_answer_that_never_began_counts_for_nothing(clock: FakeClock) -> None:
    quota = Quota(1, 1, clock)
    for _ in range(3):
        held(quota).cancel()

    quota.take()

    with pytest.raises(ConcurrencyExceeded):
        quota.take()


def test_limits_change_in_place(clock: FakeClock) -> None:
    quota = Quota(3, 3, clock)
    taken = [held(quota) for _ in range(3)]

    quota.apply(4, 3)
    with pytest.raises(RateLimitExceeded):
        quota.take()  # what has begun in this minute counts
    quota.apply(2, 600)
    with pytest.raises(ConcurrencyExceeded):
        quota.take()  # what runs does, too
    assert quota.running == 3
    taken[0].release()
    taken[1].release()
    clock.now += 0.2
    quota.take()

    assert quota.running == 2


@pytest.mark.parametrize("seed", range(20))
def test_in_no_span_begin_more_than_its_share_and_a_minutes(seed: int, clock: FakeClock) -> None:
    chance = random.Random(seed)
    per_minute = chance.choice([1, 7, 60, 300])
    quota = Quota(10**6, per_minute, clock)
    begun: list[float] = []
    for _ in range(2000):
        clock.now += chance.expovariate(per_minute / 20)
        try:
            quota.take()
        except RateLimitExceeded as error:
            if chance.random() < 0.5:
                clock.now += error.retry_after or 0.0
                quota.take()  # who comes when it was said is let in
                begun.append(clock.now)
        else:
            begun.append(clock.now)

    for first in range(0, len(begun), 13):
        for last in range(first, len(begun), 29):
            span = begun[last] - begun[first]
            assert last - first + 1 <= (span / MINUTE + 1) * per_minute + 1e-6


def test_a_revoked_quota_gives_nothing(clock: FakeClock) -> None:
    quota = Quota(5, 5, clock)
    taken = held(quota)

    quota.revoke()

    with pytest.raises(InvalidApiKey):
        quota.take()
    taken.release()
    assert quota.running == 0


async def test_a_revocation_ends_what_is_held_for_the_key() -> None:
    quota, never = Quota(5, 5), asyncio.Event()

    async def answer() -> None:
        async with quota.used():
            await never.wait()

    task = asyncio.ensure_future(answer())
    await asyncio.sleep(0)
    assert quota.running == 1
    quota.revoke()

    with pytest.raises(InvalidApiKey):
        await task
    assert quota.running == 0


async def test_a_caller_demoted_and_revoked_at_once_ends_once() -> None:
    quota, never = Quota(5, 5), asyncio.Event()

    async def watch(*, admin: bool) -> None:
        with quota.held(watcher="a watcher" if admin else None):
            await never.wait()

    watching, other = (asyncio.ensure_future(watch(admin=admin)) for admin in (True, False))
    await asyncio.sleep(0)
    quota.demote()
    quota.revoke()

    with pytest.raises(PermissionDenied):
        await watching
    with pytest.raises(InvalidApiKey):
        await other


async def test_a_client_that_leaves_in_the_same_moment_has_left() -> None:
    quota, never = Quota(5, 5), asyncio.Event()

    async def answer() -> None:
        async with quota.used():
            await never.wait()

    task = asyncio.ensure_future(answer())
    await asyncio.sleep(0)
    quota.revoke()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert quota.running == 0


async def test_places_of_cancelled_and_failed_answers_are_given_back() -> None:
    quota, never = Quota(5, 50), asyncio.Event()

    async def answer(fault: Exception | None) -> None:
        async with quota.used():
            if fault is not None:
                raise fault
            await never.wait()

    task = asyncio.ensure_future(answer(None))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ZeroDivisionError):
        await answer(ZeroDivisionError())

    assert quota.running == 0


# Connections.


def test_connections_are_bounded_and_counted_through_a_change(clock: FakeClock) -> None:
    quota = Quota(5, 5, clock, max_connections=2)
    quota.connect()
    quota.connect()
    with pytest.raises(ConcurrencyExceeded, match="max_connections=2") as caught:
        quota.connect()
    assert (quota.connections, quota.running, caught.value.retry_after) == (2, 0, 1.0)

    quota.apply(5, 5, 3)
    quota.connect()
    quota.apply(5, 5, 1)
    quota.disconnect()
    quota.disconnect()
    with pytest.raises(ConcurrencyExceeded):
        quota.connect()
    quota.disconnect()
    quota.connect()
    assert quota.connections == 1


def test_without_a_bound_connections_are_only_counted(clock: FakeClock) -> None:
    quota = Quota(1, 1, clock)
    for _ in range(1000):
        quota.connect()

    assert quota.connections == 1000


def test_who_waits_for_tokens_starts_once_they_are_there() -> None:
    async def wait() -> float:
        clock = asyncio.get_running_loop().time
        quota = Quota(9, 9999, clock, queue_size=9, budget=Budget(6000, clock=clock))
        Turn(quota, 6000).end(spent=6000)
        began = clock()

        turn = Turn(quota, 7)
        await turn.begun()

        turn.end()
        return clock() - began

    # The seconds that a client is told are rounded up.
    assert run_virtually(wait()) == pytest.approx(0.07)


@pytest.mark.parametrize("began", [True, False])
def test_only_an_answer_that_never_began_gives_its_start_back_and_each_its_tokens(
    *, began: bool, clock: FakeClock
) -> None:
    quota = Quota(9, 2, clock, budget=Budget(1000, clock=clock))
    grant = quota.take(tokens=600)
    assert grant is not None
    assert (quota.starts[1], quota.budget.reserved) == (1, 600)

    if began:
        grant.release(0, 0)
    else:
        grant.cancel()
    grant.release(1, 500)

    assert (quota.starts[1], quota.budget.reserved) == (1 if began else 2, 0)
    assert quota.budgets()["tokens_per_minute"].remaining == 1000


def test_a_refusal_names_the_tokens_before_the_starts_and_spends_neither(clock: FakeClock) -> None:
    quota = Quota(9, 1, clock, budget=Budget(1000, clock=clock))
    quota.take(tokens=600)

    with pytest.raises(TokensExceeded, match="used 600, requested about 500"):
        quota.take(tokens=500)
    with pytest.raises(RateLimitExceeded, match="requests_per_minute=1"):
        quota.take(tokens=400)

    assert quota.budget.reserved == 600


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 0)])
async def test_a_queue_that_comes_or_goes_leaves_those_alone_that_run_or_wait(
    before: int, after: int
) -> None:
    quota = Quota(1, 99, queue_size=before)
    running = held(quota)
    waiting = [Turn(quota) for _ in range(before)]
    quota.apply(1, 99, queue_size=after)
    waiting += [Turn(quota) for _ in range(after)]

    with pytest.raises(ConcurrencyExceeded):
        quota.take()
    running.release()
    for turn in waiting:
        await turn.begun()
        assert quota.running == 1
        turn.end()

    assert (quota.running, quota.resource.slots) == (0, 0)

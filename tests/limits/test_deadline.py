"""Deadlines in virtual time: what a guard ends, and what it leaves alone."""

from __future__ import annotations

import asyncio

import pytest

from aioserver.errors import (
    AioserverError,
    AnswerTooLate,
    ConcurrencyExceeded,
    DeadlineExceeded,
    RateLimitExceeded,
)
from aioserver.limits.deadline import Deadline, Guard, Wait
from aioserver.protocol.request_headers import NO_REQUEST_OPTIONS, RequestOptions
from aioserver.provider_errors import ProviderError, ProviderPaced, ProviderRateLimited

pytestmark = pytest.mark.virtual_time


def deadline(request_options: RequestOptions) -> Deadline:
    return Deadline(asyncio.get_running_loop().time(), request_options)


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_a_wait_ends_at_the_moment_of_its_deadline() -> None:
    bound, began, counted = (
        deadline(RequestOptions(start_within=2.5)),
        now(),
        list[DeadlineExceeded](),
    )
    bound.queued("primary", 7, 12.4)

    with pytest.raises(DeadlineExceeded) as refused, Guard(bound, counted.append):
        await asyncio.sleep(60)

    assert now() - began == pytest.approx(2.5, abs=0.01)
    error = refused.value
    assert error.message == "could not start within 2.5 s: position 7 at primary"
    assert error.headers() == {"Retry-After": "13", "x-should-retry": "false"}
    assert counted == [error]
    assert (error.bound, bound.cut) == ("start", False)


async def test_what_has_started_in_time_goes_on_until_the_other_deadline() -> None:
    bound, began = deadline(RequestOptions(start_within=1, deadline=5)), now()

    async def answer() -> None:
        with Guard(bound, lambda _error: None):
            await asyncio.sleep(0.5)
            bound.start("primary")
            await asyncio.sleep(60)

    with pytest.raises(AnswerTooLate) as cut:
        await answer()

    assert now() - began == pytest.approx(5, abs=0.01)
    assert cut.value.message == "the answer had not ended after 5 s: primary was answering"
    assert cut.value.headers() == {"x-should-retry": "false"}
    assert bound.cut


async def test_an_attempt_that_would_be_too_late_is_not_sent() -> None:
    bound = deadline(RequestOptions(start_within=1))
    await asyncio.sleep(1.001)

    with pytest.raises(DeadlineExceeded):
        bound.start("primary")
    assert not bound.started


async def test_a_wait_that_begins_too_late_does_not_begin() -> None:
    bound = deadline(RequestOptions(deadline=1))
    await asyncio.sleep(2)

    with pytest.raises(DeadlineExceeded) as refused, Guard(bound, lambda _error: None):
        raise AssertionError("it has begun")

    assert refused.value.bound == "whole"


async def test_what_is_over_is_not_ended() -> None:
    over = False
    bound = deadline(RequestOptions(deadline=1))

    with Guard(bound, lambda _error: None, lambda: over):
        over = True
        await asyncio.sleep(5)


async def test_another_cancellation_stays_one() -> None:
    async def wait() -> None:
        with Guard(deadline(RequestOptions(deadline=5)), lambda _error: None):
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    # And one that comes in the same moment as the deadline.
    task = asyncio.create_task(wait())
    asyncio.get_running_loop().call_later(5, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_refusals_are_those_of_the_deadline_where_nothing_starts_before_it() -> None:
    bound = deadline(RequestOptions(start_within=10))

    def told(error: AioserverError) -> type[AioserverError]:
        try:
            with Guard(bound, lambda _error: None):
                raise error
        except AioserverError as exc:
            return type(exc)

    assert told(RateLimitExceeded("slow", retry_after=11)) is DeadlineExceeded
    assert told(ProviderPaced("slow", retry_after=11)) is DeadlineExceeded
    assert told(RateLimitExceeded("slow", retry_after=9)) is RateLimitExceeded
    # An estimate, and a provider's own word.
    assert told(ConcurrencyExceeded("full", retry_after=11)) is ConcurrencyExceeded
    assert told(ProviderRateLimited("slow", retry_after=11)) is ProviderRateLimited
    fault = ProviderError("broken")
    assert told(fault) is ProviderError
    fault.backoff = 4.0
    assert told(fault) is DeadlineExceeded


async def test_terms_of_several_places_add_up() -> None:
    assert RequestOptions(2, 8).joined(RequestOptions(4, 6, batch=True)) == RequestOptions(
        2, 6, batch=True
    )
    assert (
        RequestOptions(2).joined(NO_REQUEST_OPTIONS)
        == NO_REQUEST_OPTIONS.joined(RequestOptions(2))
        == RequestOptions(2)
    )
    assert NO_REQUEST_OPTIONS.joined(NO_REQUEST_OPTIONS) is NO_REQUEST_OPTIONS


async def test_what_it_waits_for_is_told_while_others_are_told_as_well() -> None:
    heard: list[tuple[int, float]] = []
    bound = deadline(RequestOptions(start_within=1))

    bound.telling("its key", lambda position, eta: heard.append((position, eta)))(3, 4.5)

    assert bound.wait == Wait("position 3 at its key", 4.5)
    assert heard == [(3, 4.5)]

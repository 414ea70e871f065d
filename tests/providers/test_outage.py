"""How long requests wait for a provider that is away, how many do, and who is tried next."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.provider_errors import ConnectTimeout, ProviderFault, ProviderQueueFull
from aioserver.providers.breaker import MAX_TRIALS, TRIAL_INTERVAL
from tests.support.failing import kill
from tests.support.outage import FAILURE, JSON, ScriptedExchange, ask
from tests.support.routers import router_of
from tests.support.scripted_provider import LIMITS
from tests.support.virtual_loop import run_virtually
from tests.support.waiting import until

if TYPE_CHECKING:
    from aioserver.gateway.router import Router
    from aioserver.providers.attempt import Attempt

QUEUE_TIMEOUT, ATTEMPT = 60.0, 10.0  # seconds
QUEUE_SIZE = 5
# Seconds until an answer begins, and until it ends.
FIRST_EVENT, WHOLE_ANSWER = 2.0, 600.0


def away(
    provider: type[ScriptedExchange] = ScriptedExchange, **limits: Any
) -> tuple[ScriptedExchange, Router]:
    """A provider that cannot be reached, and for which requests wait, and its router."""
    http_client = replace(LIMITS, queue_timeout=QUEUE_TIMEOUT, backoff_factor=0.5, **limits)
    far = provider("far", http_client, random.Random(1), when_down="wait")
    far.rate, far.unreachable = 1.0, True
    return far, router_of({"far": far}, "far", random_number=lambda: 0.5)


class SlowAnswers(ScriptedExchange):
    """A provider whose answers begin late and take long; they fail instead of beginning where
    `rate` is 1.
    """

    async def exchange(self, attempt: Attempt) -> None:
        self.sent(attempt)
        sink = attempt.head_received(200, JSON)
        await asyncio.sleep(FIRST_EVENT)
        if self.rate:
            raise ConnectTimeout("it fails")
        attempt.first_event()
        await asyncio.sleep(WHOLE_ANSWER)
        sink.feed(b"{}")


class SlowFailures(ScriptedExchange):
    """A provider that is not there, which takes long to find out."""

    async def exchange(self, attempt: Attempt) -> None:
        self.sent(attempt)
        await asyncio.sleep(ATTEMPT)
        raise ConnectTimeout("nobody answers")


def test_trials_that_fail_slowly_use_up_the_queue_timeout() -> None:
    async def outage() -> None:
        loop = asyncio.get_running_loop()
        far, router = away(SlowFailures)
        kill(far.health.breaker, unreachable=True, clock=loop.time)
        began = loop.time()

        with pytest.raises(ConnectTimeout):
            await ask(router)

        assert len(far.attempts) == QUEUE_TIMEOUT // ATTEMPT
        assert QUEUE_TIMEOUT <= loop.time() - began < QUEUE_TIMEOUT + ATTEMPT
        await far.close()

    run_virtually(outage())


def test_requests_that_rest_before_a_retry_have_no_room_in_the_queue() -> None:
    async def outage() -> int:
        loop = asyncio.get_running_loop()
        far, router = away(queue_size=1, concurrent_requests=2, max_connections=2, max_retries=2)
        asked, most = [], 0
        end = loop.time() + 60.0
        while loop.time() < end:
            # Away, or failing, or well: each for a moment.
            far.unreachable, far.rate = random_number() < 0.5, random_number()
            asked.append(asyncio.create_task(ask(router)))
            for _ in range(10):
                await asyncio.sleep(0.005)
                most = max(most, far.stats().queue.waiting)
        await asyncio.gather(*asked, return_exceptions=True)
        await far.close()
        return most

    random_number = random.Random(1).random
    assert run_virtually(outage()) == 1


@pytest.mark.parametrize("known", [False, True])
def test_requests_parked_queued_and_tried_again_share_the_bound_of_the_queue(
    *, known: bool
) -> None:
    async def outage() -> None:
        loop = asyncio.get_running_loop()
        far, router = away(queue_size=QUEUE_SIZE, concurrent_requests=25, max_connections=25)
        if known:
            kill(far.health.breaker, unreachable=True, clock=loop.time)
        refused: list[ProviderQueueFull] = []

        async def answered() -> bool:
            began = loop.time()
            try:
                await ask(router)
            except ProviderQueueFull as refusal:
                assert loop.time() - began < 2 * FAILURE, "it did not wait"
                refused.append(refusal)
                return False
            return True

        first = [asyncio.create_task(answered()) for _ in range(20)]
        later, most = [], 0
        began = loop.time()
        while loop.time() < began + 20.0:
            later.append(asyncio.create_task(answered()))
            for _ in range(10):
                await asyncio.sleep(0.01)
                most = max(most, far.stats().queue.waiting)
        assert far.stats().state == "dead"
        far.rate = 0.0

        assert (await asyncio.gather(*first)).count(True) == QUEUE_SIZE, "who waits keeps its room"
        await asyncio.gather(*later)
        assert most == QUEUE_SIZE
        assert far.stats().queue.refused == len(refused) > 0
        assert all((refusal.retry_after or 0.0) >= 1.0 for refusal in refused)
        attempts = {0} if known else {0, 1}
        outcomes = [refusal.request_outcome for refusal in refused]
        assert {outcome.attempts for outcome in outcomes if outcome} == attempts
        assert {outcome and outcome.provider for outcome in outcomes} == {"far"}
        await far.close()

    run_virtually(outage())


def test_a_trial_that_came_from_the_queue_and_fails_otherwise_waits_on() -> None:
    async def outage() -> None:
        far, router = away(max_retries=0)
        kill(far.health.breaker, unreachable=True, clock=asyncio.get_running_loop().time)
        far.unreachable = False
        asking = asyncio.create_task(ask(router))
        await until(lambda: len(far.attempts) == 3)
        far.rate = 0.0

        assert (await asking).outcome.attempts == 4
        assert far.stats().budget.used == 0
        await far.close()

    run_virtually(outage())


def test_the_oldest_wait_goes_on_while_a_request_is_parked_and_is_tried_again() -> None:
    async def outage() -> None:
        far, router = away()
        asking = asyncio.create_task(ask(router))
        await asyncio.sleep(2 * FAILURE)
        pausing = far.stats().queue
        kill(far.health.breaker, unreachable=True, clock=asyncio.get_running_loop().time)
        await asyncio.sleep(20.0)
        await until(lambda: far.stats().queue.waiting == 1)
        queueing = far.stats().queue
        asking.cancel()
        await asyncio.wait((asking,))

        assert (pausing.waiting, queueing.waiting) == (1, 1)
        assert 0.0 < pausing.oldest_wait < 2 * FAILURE
        assert 20.0 < queueing.oldest_wait < 21.0
        await far.close()

    run_virtually(outage())


@pytest.mark.parametrize("new_address", [False, True])
@pytest.mark.parametrize("end", ["answers", "fails", "leaves"])
def test_whichever_way_a_trial_of_former_settings_ends_the_next_one_starts(
    end: str, *, new_address: bool
) -> None:
    async def reload() -> None:
        loop = asyncio.get_running_loop()
        far, router = away(SlowAnswers, concurrent_requests=25, max_connections=25)
        far.rate = 0.0 if end == "answers" else 1.0
        kill(far.health.breaker, unreachable=True, clock=loop.time)
        asking = [asyncio.create_task(ask(router)) for _ in range(MAX_TRIALS + 2)]
        await asyncio.sleep(MAX_TRIALS * TRIAL_INTERVAL + 0.1)
        assert len(far.attempts) == MAX_TRIALS

        url = "http://127.0.0.1:10/v1" if new_address else far.settings.base_url
        limits = replace(far.settings.http_client, keepalive_expiry=1.0)
        changed = replace(far.settings, base_url=url, http_client=limits)
        far.prepare(changed, url, max_response_bytes=1000)()
        if new_address:
            # Nothing was known of it.
            kill(far.health.breaker, unreachable=True, clock=loop.time)
        if end == "leaves":
            asking[0].cancel()
        await asyncio.sleep(FIRST_EVENT)

        assert len(far.attempts) > MAX_TRIALS
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        await far.close()

    run_virtually(reload())


@pytest.mark.parametrize("tried_by", ["pinned", "others", "waiting"])
def test_the_next_try_that_is_shown_is_that_of_the_requests_that_come(tried_by: str) -> None:
    async def outage() -> None:
        loop = asyncio.get_running_loop()
        first, second = (
            ScriptedExchange(name, LIMITS, random.Random(1), when_down="wait") for name in "ab"
        )
        router = router_of({"a": first, "b": second}, "a", ["b"])
        first.rate, first.unreachable = 1.0, tried_by == "waiting"
        kill(first.health.breaker, unreachable=first.unreachable, clock=loop.time)

        async def asking(provider: str | None) -> None:
            with contextlib.suppress(ProviderFault):
                await ask(router, provider)

        tasks = []
        if tried_by == "waiting":
            tasks.append(asyncio.create_task(asking("a")))
        shown: list[float] = []
        while len(first.attempts) < 6:
            tasks.append(asyncio.create_task(asking("a" if tried_by == "pinned" else None)))
            await asyncio.sleep(0.05)
            # Not while a trial is under way: it is tried now.
            if next_try := first.stats().next_try:
                shown.append(loop.time() + next_try)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

        assert shown
        assert all(
            any(at - 0.01 < attempt < at + 0.1 for attempt in first.attempts) for at in shown
        )
        await first.close()
        await second.close()

    run_virtually(outage())

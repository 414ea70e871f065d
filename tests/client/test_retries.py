"""Which fault is asked again, and when."""

from __future__ import annotations

import random

import pytest

from aioserver.client import faults
from aioserver.client.faults import FULL, UNPAID, Fault, Reconnection, Retries

SEEDS = range(60)
CODES = sorted(FULL | UNPAID | {"server_shutdown", "read_timeout", "internal_error", "a new one"})


def a_fault(dice: random.Random) -> Fault:
    retry_after = dice.choice((None, 0.0, 0.2, 3.0, 119.0))
    return Fault(dice.choice(CODES), "m", dice.random() < 0.8, retry_after)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wait_is_never_shorter_than_the_server_asks_nor_beyond_its_span(seed: int) -> None:
    dice = random.Random(seed)
    answer = Retries(dice.random)
    for count in range(30):
        fault = a_fault(dice)
        wait = (
            answer.after_refusal(fault)
            if dice.random() < 0.5
            else answer.after_end(fault, shown=dice.random() < 0.2, began=dice.random() < 0.5)
        )
        if wait is None:
            continue
        assert fault.retryable
        least = max(1.0, fault.retry_after or 0.0)
        most = max(10.0, least + min(faults.MAX_BUSY_SPAN, 2.0**count))
        assert least <= wait <= most


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_that_was_paid_for_is_asked_again(seed: int) -> None:
    dice = random.Random(seed)
    answer = Retries(dice.random)
    unpaid = 0
    for _ in range(30):
        fault = a_fault(dice)
        shown, began = dice.random() < 0.3, dice.random() < 0.5
        if answer.after_end(fault, shown=shown, began=began) is None:
            continue
        assert not shown
        assert fault.retryable
        assert fault.code in FULL | UNPAID or (fault.code == "server_shutdown" and not began)
        unpaid += fault.code in UNPAID
    assert unpaid <= faults.MAX_UNPAID


def test_what_the_page_for_client_writers_calls_not_now_is_asked_again() -> None:
    for code in FULL | {"server_shutdown"}:
        answer = Retries(random.random)
        for _ in range(20):
            assert answer.after_refusal(Fault(code, "m", retryable=True)) is not None
            assert answer.after_refusal(Fault(code, "m", retryable=False)) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_reconnection_is_at_once_after_progress_and_then_by_chance(seed: int) -> None:
    dice = random.Random(seed)
    reconnection = Reconnection(dice.random)
    failures = 0
    for _ in range(40):
        code = dice.choice((None, None, 1006, 1008, 1011, 1012, 1013))
        retry_after = dice.choice((None, None, None, 0.5, 20.0))
        wait = reconnection.after_loss(code, retry_after)
        if code == 1012:
            assert max(1.0, retry_after or 0.0) <= wait <= max(10.0, retry_after or 0.0)
        elif code in {1008, 1013} or retry_after is not None:
            least = max(1.0, retry_after or 0.0)
            assert least <= wait <= least + min(faults.MAX_BUSY_SPAN, 2.0**failures)
        elif not failures:
            assert wait == 0.0
        else:
            assert 0.0 <= wait <= min(30.0, 0.5 * 2.0 ** (failures - 1))
        failures += 1
        if dice.random() < 0.3:
            reconnection.progressed()
            failures = 0


def test_waits_spread_over_their_whole_span() -> None:
    """Clients that were lost together must not come back together."""
    dice = random.Random(1)

    def sixth_wait() -> float:
        reconnection = Reconnection(dice.random)
        for _ in range(5):
            reconnection.after_loss()
        return reconnection.after_loss()

    waits = sorted(sixth_wait() for _ in range(1000))

    assert waits[100] < 1.2  # of 8 s
    assert waits[900] > 6.8


def test_an_address_where_nothing_was_ever_reached_is_given_up_soon() -> None:
    reconnection = Reconnection(lambda: 1.0)
    waits = []
    while not reconnection.hopeless:
        waits.append(reconnection.after_loss())

    assert sum(waits) < 2.0
    reconnection.reached = True
    assert not reconnection.hopeless

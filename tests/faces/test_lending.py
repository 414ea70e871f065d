"""The place of a client that waits at its key, which others use meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.errors import ConcurrencyExceeded, ServerAtCapacity, ServerShutdown
from aioserver.faces.admission import Admission, Visit
from aioserver.limits.scheduler import Scheduler
from aioserver.telemetry.metrics import Metrics
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from aioserver.config.settings import Concurrency

FAR = 1e9


@pytest.fixture
async def admission() -> Admission:
    """A door with one place."""
    limits: Concurrency = SimpleNamespace(  # type: ignore[assignment]
        max_connections=1, connection_queue_size=4, queue_timeout=30.0, max_body_bytes=1000
    )
    return Admission(limits, Metrics({}), 5.0, Scheduler(asyncio.get_running_loop()))


def visit_of(admission: Admission) -> Visit:
    """A client that has the free place, and whose key lets it wait."""
    quota: Any = SimpleNamespace(queue_size=9, disconnect=lambda: None)
    meter = admission.metrics.faces["openai"]
    visit = Visit(admission, admission.now(), meter=meter, name="web", quota=quota)
    place = admission.try_enter()
    assert place is not None
    visit.enter(place)
    return visit


def nothing_held(admission: Admission) -> bool:
    gate = admission.gate
    return not (gate.inside or gate.waiting or gate.slots or admission.scheduler.waiting)


async def test_a_place_that_is_lent_comes_back_though_nobody_waits_for_it(
    admission: Admission,
) -> None:
    with visit_of(admission) as visit:
        assert visit.loan is visit
        visit.lend()
        visit.lend()
        assert admission.lent == 1
        with visit_of(admission):
            back = visit.regain(FAR)
            again = visit.regain(FAR)
            assert back is not None
            assert again is not None
            back.cancel()
            await ticks()
        await asyncio.wait_for(again, 5)
        assert visit.regain(FAR) is None
        assert (admission.gate.inside, admission.lent) == (1, 0)
    assert visit.loan is None
    assert nothing_held(admission)


async def test_a_free_place_is_had_again_at_once(admission: Admission) -> None:
    with visit_of(admission) as visit:
        visit.lend()
        assert visit.regain(FAR) is None
        assert admission.gate.inside == 1
    assert nothing_held(admission)


@pytest.mark.parametrize("returns", [False, True])
async def test_a_client_that_leaves_while_its_place_is_lent_leaves_nothing(
    admission: Admission, *, returns: bool
) -> None:
    with visit_of(admission) as visit, visit_of_lender(admission, visit):
        if returns:
            assert visit.regain(FAR) is not None
    await ticks()
    assert nothing_held(admission)


async def test_a_client_that_leaves_in_the_turn_in_which_its_place_is_back_leaves_nothing(
    admission: Admission,
) -> None:
    with visit_of(admission) as visit:
        with visit_of_lender(admission, visit):
            assert visit.regain(FAR) is not None
            await ticks()
        assert admission.gate.inside == 1
    await ticks()
    assert nothing_held(admission)


async def test_a_place_that_comes_too_late_is_a_refusal(admission: Admission) -> None:
    with visit_of(admission) as visit, visit_of_lender(admission, visit):
        back = visit.regain(admission.now() + 0.01)
        assert back is not None
        with pytest.raises(ServerAtCapacity):
            await back
    assert nothing_held(admission)


async def test_a_stop_ends_a_return_and_lets_none_begin(admission: Admission) -> None:
    with visit_of(admission) as visit, visit_of_lender(admission, visit):
        back = visit.regain(FAR)
        assert back is not None
        admission.close(lambda: ServerShutdown("the end"))
        with pytest.raises(ServerShutdown):
            await back
        with pytest.raises(ServerShutdown):
            visit.regain(FAR)
    assert nothing_held(admission)


async def test_half_of_the_queue_is_for_those_that_lend(admission: Admission) -> None:
    with visit_of(admission) as first:
        first.lend()
        with visit_of(admission) as second:
            second.lend()
            with visit_of(admission) as third:
                with pytest.raises(ConcurrencyExceeded, match="2 requests wait at their keys"):
                    third.lend()
                assert (admission.lent, admission.gate.inside) == (2, 1)
    assert nothing_held(admission)


def visit_of_lender(admission: Admission, visit: Visit) -> Visit:
    """Another client that uses the place of *visit*."""
    visit.lend()
    return visit_of(admission)

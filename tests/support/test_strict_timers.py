"""The loops of the tests have timers as uvloop has them: brief ones whose time nobody knows,
others that may be early.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from tests.simulation.loop import SimulatedLoop
from tests.simulation.network import Network
from tests.support.jumping_loop import JumpingLoop
from tests.support.virtual_loop import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "jumping": JumpingLoop,
    "virtual": VirtualLoop,
    "simulated": lambda: SimulatedLoop(Network(random.Random(0))),
}
# Seconds that a loop takes for some turns.
TURNS = 2e-4


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[None, None, None]], None]:
    def run(main: Coroutine[None, None, None]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(main)

    return run


@pytest.mark.parametrize("delay", [-1.0, 0.0, 0.0003, 0.0004])
def test_nobody_can_ask_a_brief_timer_for_its_time(
    run: Callable[[Coroutine[None, None, None]], None], delay: float
) -> None:
    async def ask() -> None:
        loop = asyncio.get_running_loop()
        timers = [loop.call_later(delay, print), loop.call_at(loop.time() + delay, print)]
        for timer in timers:
            with pytest.raises(AttributeError):
                timer.when()
            timer.cancel()
            assert timer.cancelled()

    run(ask())


def test_a_brief_timer_fires_at_its_time(
    run: Callable[[Coroutine[None, None, None]], None],
) -> None:
    async def wait() -> None:
        loop = asyncio.get_running_loop()
        fired = loop.create_future()
        began = loop.time()
        loop.call_later(0.0003, fired.set_result, None)
        await fired
        assert 0.0003 - 1e-8 <= loop.time() - began < 0.0003 + TURNS

    run(wait())


def test_a_longer_timer_knows_its_time_and_is_early_but_never_late(
    run: Callable[[Coroutine[None, None, None]], None],
) -> None:
    async def wait() -> None:
        loop = asyncio.get_running_loop()
        for delay, whole in ((0.0074, 0.007), (0.0076, 0.0076), (3.0004, 3.0)):
            began = loop.time()
            fired = loop.create_future()
            timer = loop.call_later(delay, fired.set_result, None)
            assert timer.when() == pytest.approx(began + whole, abs=1e-9)
            await fired
            assert whole - 1e-8 <= loop.time() - began < whole + TURNS

    run(wait())

"""A provider that is dead, or sick, without the time that it takes to become so."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aioserver.providers.breaker import FEW, LONG_PATIENCE, MAX_TRIALS, MIN_ATTEMPTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aioserver.providers.breaker import Breaker


def kill(
    breaker: Breaker, *, unreachable: bool = False, clock: Callable[[], float] = time.monotonic
) -> None:
    """Let a few attempts fail that began long ago, so that the provider is dead by them.

    What it has answered before is forgotten.
    """
    breaker.reset()
    for _ in range(FEW):
        breaker.failed(clock() - LONG_PATIENCE, trial=False, unreachable=unreachable)
    assert breaker.dead


@contextmanager
def left_alone(*breakers: Breaker, unreachable: bool = False) -> Iterator[None]:
    """Kill the providers, and let no trial start until the end of the block, however slow the
    machine is.
    """
    for breaker in breakers:
        kill(breaker, unreachable=unreachable)
        for _ in range(MAX_TRIALS):
            breaker.start()
    try:
        yield
    finally:
        for breaker in breakers:
            for _ in range(MAX_TRIALS):
                breaker.unsure(trial=True)


def sicken(breaker: Breaker, clock: Callable[[], float] = time.monotonic) -> None:
    """Let two of three attempts fail, so that the provider is sick by them."""
    for number in range(MIN_ATTEMPTS):
        if number % 3:
            breaker.failed(clock(), trial=False)
        else:
            breaker.succeeded(0.0, trial=False)
    assert breaker.state == "sick"

"""A provider that is dead, or sick, without the time that it takes to become so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aioserver.providers.breaker import FEW, LONG_PATIENCE, MIN_ATTEMPTS

if TYPE_CHECKING:
    from collections.abc import Callable

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


def sicken(breaker: Breaker, clock: Callable[[], float] = time.monotonic) -> None:
    """Let two of three attempts fail, so that the provider is sick by them."""
    for number in range(MIN_ATTEMPTS):
        if number % 3:
            breaker.failed(clock(), trial=False)
        else:
            breaker.succeeded(0.0, trial=False)
    assert breaker.state == "sick"

"""How long a request waits for a provider that is away, whichever way its attempts fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from aioserver.provider_errors import ConnectTimeout
from aioserver.providers.absence import Absence
from tests.support.clock import FakeClock

QUEUE_TIMEOUT, ATTEMPT = 60.0, 10.0  # seconds


async def test_trials_that_fail_slowly_use_up_the_queue_timeout() -> None:
    clock = FakeClock()
    provider: Any = SimpleNamespace(
        when_down="wait", http_client=SimpleNamespace(queue_timeout=QUEUE_TIMEOUT)
    )
    health: Any = SimpleNamespace(breaker=SimpleNamespace(dead=True, unreachable=True))
    gate: Any = None  # a request that meets a dead provider does not pause
    absence = Absence(provider, health, gate, clock)
    attempt: Any = SimpleNamespace(
        fallback=False, stream=None, waited=0.0, rejoin=False, began=0.0
    )

    trials, again = 0, True
    while again and trials < 100:
        attempt.began = clock()
        clock.now += ATTEMPT
        trials += 1
        again = await absence.wait(attempt, ConnectTimeout("nobody answers"), 0.5)

    assert trials == QUEUE_TIMEOUT // ATTEMPT

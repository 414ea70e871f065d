"""Whether a provider is asked, as several instances tell each other."""

from __future__ import annotations

import time

from aioserver.provider_errors import ProviderError
from aioserver.providers.breaker import FEW, LONG_PATIENCE
from aioserver.providers.health import Health
from aioserver.telemetry.metrics import ProviderMeter


def test_a_death_and_its_end_are_told_once_and_only_where_they_were_found() -> None:
    found, other = Health("groq", ProviderMeter()), Health("groq", ProviderMeter())
    told: list[bool] = []
    heard: list[bool] = []
    found.on_death, other.on_death = told.append, heard.append

    long_ago = time.monotonic() - LONG_PATIENCE
    for _ in range(2 * FEW):
        found.attempt_failed(ProviderError("503"), long_ago, trial=False, answered=False)
    other.breaker.told_dead(unreachable=False)
    other.answered(0.1, trial=False)
    other.answered(0.1, trial=False)
    found.breaker.told_alive()
    found.answered(0.1, trial=False)

    assert told == [True]
    assert heard == [False]

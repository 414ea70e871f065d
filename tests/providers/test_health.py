"""Whether a provider is asked, as several instances tell each other."""

from __future__ import annotations

import time

from aioserver.provider_errors import ProviderError
from aioserver.providers.breaker import FEW, LONG_PATIENCE
from aioserver.providers.health import Health, ProviderObserver
from aioserver.telemetry.metrics import ProviderMeter


class Announcements(ProviderObserver):
    """Writes down what it hears: deaths as true, their ends as false."""

    def __init__(self) -> None:
        self.deaths: list[bool] = []

    def died(self, *, unreachable: bool) -> None:
        assert not unreachable
        self.deaths.append(True)

    def revived(self) -> None:
        self.deaths.append(False)


def test_a_death_and_its_end_are_reported_once_and_only_where_they_were_found() -> None:
    deaths, heard = Announcements(), Announcements()
    health = Health("groq", ProviderMeter(), observer=deaths)
    other = Health("groq", ProviderMeter(), observer=heard)

    long_ago = time.monotonic() - LONG_PATIENCE
    for _ in range(2 * FEW):
        health.attempt_failed(ProviderError("503"), long_ago, trial=False, answered=False)
    other.breaker.told_dead(unreachable=False)
    other.answered(0.1, trial=False)
    other.answered(0.1, trial=False)
    health.breaker.told_alive()
    health.answered(0.1, trial=False)

    assert deaths.deaths == [True]
    assert heard.deaths == [False]

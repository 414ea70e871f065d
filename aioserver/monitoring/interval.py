"""The interval between two ticks: the growth of each total, the lag of the event loop, the CPU
time.

Rates and incidents are made from an interval. Totals are read from the metrics and never reset: the
growth is the difference of two readings.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from aioserver.telemetry.metrics import CONTINUED, OK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.telemetry.loop_lag import LoopLag
    from aioserver.telemetry.metrics import Metrics

# Seconds between two ticks.
TICK = 1.0
# Ticks of the last minute.
MINUTE = 60
# Ticks between two counts of the event loop's tasks, whose cost grows with their number.
TASK_TICKS = 10
# The continued answers of a tick without any: see `_continued`.
NONE: Mapping[str, float] = MappingProxyType({})
# Seconds that rates divide by at least, so that a very short interval gives no absurd rate.
MIN_SECONDS = 1e-3

# Kinds of totals. The details are an error code for REJECTIONS, an outcome for ATTEMPTS, a place
# in the code for BUGS, and the code of the fault for SEAMS.
REJECTIONS = "rejections"
REQUESTS = "requests"
DENIED = "denied"
SLOW_CLIENTS = "slow_clients"
EVENTS = "events"
KEY_REFUSED = "key_refused"
ATTEMPTS = "attempts"
ANSWERED = "answered"
FAILED = "failed"
BUGS = "bugs"
SEAMS, RESCUED = "seams", "rescued"


class Total(NamedTuple):
    """The name of a number that only grows; *provider* is None if it belongs to no provider."""

    kind: str
    detail: str = ""
    provider: str | None = None


@dataclass
class Interval:
    """The measurements of one interval.

    *growth* has only the totals that have grown. *rates* are per second, by kind and provider.
    *lag* (a mean) and *lag_max* are in seconds. *cpu* is the share of one core. *tasks* may be
    TASK_TICKS old. *bugs* are the requests that met a bug in the last MINUTE ticks. *continued* are
    the answers that each provider has continued in these ticks.
    """

    growth: dict[Total, float]
    rates: dict[tuple[str, str | None], float]
    lag: float
    lag_max: float
    cpu: float
    tasks: int
    bugs: int = 0
    continued: dict[str, int] = field(default_factory=dict)

    def rate(self, kind: str, provider: str | None = None) -> float:
        """Return the growth per second of the totals of *kind*, of all providers or of one."""
        return round(self.rates.get((kind, provider), 0.0), 1)


class IntervalMeter:
    """Measures one interval after another, without a gap between them."""

    def __init__(self, metrics: Metrics, lag: LoopLag) -> None:
        self._metrics = metrics
        self._lag = lag
        self._totals = totals(metrics)
        self._ended = time.monotonic()
        self._cpu = time.process_time()
        self._number = 0
        self._tasks = 0
        # The number of requests that had met a bug, at the end of each of the last intervals.
        self._bugs = deque((metrics.bugs.value,), maxlen=MINUTE + 1)
        # The number of continued answers by provider, at the end of each of the last intervals.
        self._continued: deque[Mapping[str, float]] = deque(maxlen=MINUTE + 1)
        self._continued.append(_continued(metrics))

    def measure(self) -> Interval:
        """End the interval that began at the last call of this method, and return it."""
        now, cpu, new_totals = time.monotonic(), time.process_time(), totals(self._metrics)
        seconds = max(now - self._ended, MIN_SECONDS)
        growth = {
            total: number - before
            for total, number in new_totals.items()
            if number > (before := self._totals.get(total, 0.0))
        }
        rates: defaultdict[tuple[str, str | None], float] = defaultdict(float)
        for total, number in growth.items():
            for provider in {None, total.provider}:
                rates[total.kind, provider] += number / seconds
        if self._number % TASK_TICKS == 0:
            self._tasks = len(asyncio.all_tasks())
        self._bugs.append(self._metrics.bugs.value)
        bugs = int(self._bugs[-1] - self._bugs[0])
        self._continued.append(_continued(self._metrics))
        minute_ago = self._continued[0]
        continued = {
            name: int(number - minute_ago.get(name, 0.0))
            for name, number in self._continued[-1].items()
        }
        cpu_share = round((cpu - self._cpu) / seconds, 3)
        self._number += 1
        self._totals, self._ended, self._cpu = new_totals, now, cpu
        lags = self._lag.take()
        return Interval(growth, rates, *lags, cpu_share, self._tasks, bugs, continued)


def _continued(metrics: Metrics) -> Mapping[str, float]:
    """Return the number of continued answers so far, by the provider that has continued them.

    Without any it returns the same object each time. An object that lives for a minute would
    otherwise stand between those of many requests, and keep their memory from the system.
    """
    meters = metrics.providers.items()
    return {
        name: number for name, meter in meters if (number := meter.continuations[CONTINUED].value)
    } or NONE


def totals(metrics: Metrics) -> dict[Total, float]:
    """Read every total, also those of providers that have left the configuration."""
    numbers = {
        Total(REJECTIONS, code): counter.value for code, counter in metrics.rejections.items()
    }
    numbers[Total(REQUESTS)] = sum(counter.value for counter in metrics.outcomes.values())
    # An answer counts as soon as its first content has come: its end may be an hour away.
    numbers[Total(ANSWERED)] = metrics.outcomes[OK].value + sum(
        sum(meter.first_token.counts) for meter in metrics.providers.values()
    )
    numbers[Total(FAILED)] = metrics.outcomes["provider_error"].value
    numbers[Total(DENIED)] = sum(counter.value for counter in metrics.auth_failures.values())
    numbers[Total(SLOW_CLIENTS)] = metrics.slow_clients.value
    numbers |= {Total(BUGS, place): number for place, number in metrics.bugs.places.items()}
    for provider, meter in metrics.providers.items():
        numbers[Total(EVENTS, provider=provider)] = meter.events
        numbers[Total(KEY_REFUSED, provider=provider)] = meter.key_refused.value
        for outcome, counter in meter.attempts.items():
            numbers[Total(ATTEMPTS, outcome, provider)] = counter.value
        for code, counter in meter.seams.items():
            numbers[Total(SEAMS, code, provider)] = counter.value
        for code, counter in meter.rescued.items():
            numbers[Total(RESCUED, code, provider)] = counter.value
    return numbers

"""Incidents: what has happened that an operator should know, found in the difference of two ticks.

A breaker that opens or closes is an incident at once. Everything else is gathered: the first incident is
reported at once, and after it a quiet time begins, in which numbers are added up for the next incident
of the same kind, detail and provider.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from aioserver.monitoring.interval import (
    ATTEMPTS,
    DENIED,
    KEY_REFUSED,
    REJECTIONS,
    SLOW_CLIENTS,
    Total,
)
from aioserver.providers.breaker import CLOSED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aioserver.monitoring.interval import Interval
    from aioserver.monitoring.snapshot import ProviderState

# Seconds after an incident in which more of the same is gathered.
QUIET = 10.0
# Seconds by which the event loop may be late.
LAG_LIMIT = 0.1
# Requests denied in so many ticks that are an incident: more than a person mistypes.
DENIED_BURST, DENIED_TICKS = 10, 10
# Outcomes of an attempt that are an incident. A 4xx is none: the fault is the request's, or our key's, which
# has an incident of its own. Nor is a stale connection, which is replaced at once.
FAULTS = frozenset(
    ("connect_error", "timeout", "http_429", "http_5xx", "tls", "disconnected", "bad_response")
)
# Totals that are gathered, and the kind of incident that they become.
GATHERED = {
    REJECTIONS: "rejections",
    SLOW_CLIENTS: "slow_client",
    KEY_REFUSED: "provider_auth",
    ATTEMPTS: "provider_faults",
}
TEXTS = {
    "rejections": "{number} refused: {detail}",
    "auth": "{number} requests denied: a missing or wrong key, or a host or origin not allowed",
    "slow_client": "slow clients dropped, which did not read what was sent: {number}",
    "provider_auth": "{provider} refuses our key, or its quota is used up ({number})",
    "provider_faults": "{provider}: {number} x {detail}",
    "loop_lag": "the event loop was {number} ms late",
}
# Kinds and details whose severity is "error"; of the others it is "warning".
SEVERE = frozenset(("connect_error", "tls", "provider_auth", "loop_lag"))


class Incident(TypedDict):
    """The data of an `incident` event; *time* is Unix time in seconds."""

    time: float
    kind: str
    severity: str
    text: str
    provider: str | None


def incident(kind: str, text: str, severity: str, provider: str | None = None) -> Incident:
    """Return an incident that happens now; *severity*: `info`, `warning` or `error`."""
    return {
        "time": round(time.time(), 3),
        "kind": kind,
        "severity": severity,
        "text": text,
        "provider": provider,
    }


class Subject(NamedTuple):
    """The subject of an incident; between incidents of one subject there is a quiet time."""

    kind: str
    detail: str = ""
    provider: str | None = None


class Detector:
    """Finds incidents, tick by tick.

    Always: QUIET seconds or more pass between two gathered incidents of one subject.
    """

    def __init__(self) -> None:
        self._gathered: dict[Subject, int] = {}
        self._quiet_until: dict[Subject, float] = {}
        self._denied: deque[int] = deque(maxlen=DENIED_TICKS)
        self._breakers: dict[str, str] = {}

    def detect(
        self, now: float, interval: Interval, providers: Mapping[str, ProviderState]
    ) -> list[Incident]:
        """Return the incidents of the tick at *now*, a monotonic time, which ends *interval*."""
        self._gather(interval)
        return [*self._breaker_changes(providers), *self._due(now)]

    def _gather(self, interval: Interval) -> None:
        gathered = self._gathered
        for total, number in interval.growth.items():
            if total.kind in GATHERED and (total.kind != ATTEMPTS or total.detail in FAULTS):
                subject = Subject(GATHERED[total.kind], total.detail, total.provider)
                gathered[subject] = gathered.get(subject, 0) + int(number)
        self._denied.append(int(interval.growth.get(Total(DENIED), 0)))
        if (denied := sum(self._denied)) >= DENIED_BURST:
            subject = Subject("auth")
            gathered[subject] = gathered.get(subject, 0) + denied
            self._denied.clear()
        if interval.lag_max > LAG_LIMIT:
            subject = Subject("loop_lag")
            gathered[subject] = max(gathered.get(subject, 0), round(interval.lag_max * 1000))

    def _breaker_changes(self, providers: Mapping[str, ProviderState]) -> Iterator[Incident]:
        before = self._breakers
        self._breakers = {name: provider["breaker"] for name, provider in providers.items()}
        for name, breaker in self._breakers.items():
            was_closed = before.get(name, CLOSED) == CLOSED
            if was_closed and breaker != CLOSED:
                yield incident("breaker", f"{name} fails: its breaker has opened", "error", name)
            elif not was_closed and breaker == CLOSED:
                yield incident("breaker", f"{name} answers again", "info", name)

    def _due(self, now: float) -> Iterator[Incident]:
        """Yield an incident for each subject that was gathered and is not in its quiet time."""
        due = [subject for subject in self._gathered if self._quiet_until.get(subject, 0.0) <= now]
        for subject in due:
            number = self._gathered.pop(subject)
            self._quiet_until[subject] = now + QUIET
            kind, detail, provider = subject
            text = TEXTS[kind].format(number=number, detail=detail, provider=provider)
            severity = "error" if kind in SEVERE or detail in SEVERE else "warning"
            yield incident(kind, text, severity, provider)

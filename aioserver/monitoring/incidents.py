"""Incidents: what has happened that an operator should know, found in the difference of two ticks.

Everything that is counted is gathered, and told in the past, since it may be over: the first
incident is reported at once, and after it a quiet time begins, in which numbers are added up for
the next incident of the same kind, detail and provider. A trouble of a provider, or of a section,
is an incident when it begins and when it ends; a trouble that comes back in its quiet time is
reported after that, if it still lasts. So is a member that is out of its groups, and back. The
words are those of troubles.py, so that the log and the verdict say the same.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from aioserver.monitoring.groups import OFF, OUT, closed, listing, several
from aioserver.monitoring.interval import (
    ANSWERED,
    ATTEMPTS,
    BUGS,
    DENIED,
    KEY_REFUSED,
    REJECTIONS,
    SEAMS,
    SLOW_CLIENTS,
    TICK,
    Total,
)
from aioserver.monitoring.troubles import (
    FAULTS,
    OF_A_BUG,
    OF_A_REFUSED_KEY,
    OF_FAULTS,
    PAST_FAULTS,
    SILENT,
    count,
    met_a_bug,
    most,
    of_rejections,
    span,
    were,
)
from aioserver.providers.breaker import DEAD, SICK
from aioserver.telemetry.metrics import OK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from aioserver.monitoring.interval import Interval
    from aioserver.monitoring.section import Section
    from aioserver.monitoring.state import GroupState, Incident, ProviderState

# Seconds after an incident in which more of the same is gathered.
QUIET = 10.0
# Seconds by which the event loop may be late.
LAG_LIMIT = 0.1
# Requests denied in so many ticks that are an incident: more than a person mistypes.
DENIED_BURST, DENIED_TICKS = 10, 10
# Totals that are gathered, and the kind of incident that they become.
GATHERED = {
    REJECTIONS: "rejections",
    SLOW_CLIENTS: "slow_client",
    KEY_REFUSED: "provider_auth",
    ATTEMPTS: "provider_faults",
    BUGS: "bug",
    SEAMS: "seams",
}
TEXTS = {
    "rejections": "{rejected} in {span}: {detail}",
    "auth": "{denied}: a missing or wrong key, or a host or origin not allowed",
    "slow_client": "slow clients dropped, which did not read what was sent: {number}",
    "provider_auth": "{provider} refused our key, or its quota was used up ({number})",
    "provider_faults": "{provider} {detail}: {attempts} failed in {span}",
    "bug": "{bugs}: {detail}",
    "seams": "{provider} broke off {answers} in {span}, continued by another attempt: {detail}",
    "loop_lag": "the event loop was {number} ms late",
}
# Kinds of troubles that are kinds of incidents too, and the text when the trouble ends.
TROUBLES = {
    DEAD: "{provider} answers again",
    SICK: "{provider} is well again",
    SILENT: "{provider} speaks again",
}
# Kinds and details whose severity is always "error".
SEVERE = frozenset(("tls", "loop", "provider_auth", "no_provider", "bug"))
# Rejections and faults are an error, too, if there are as many as this, and more than what went
# well meanwhile.
MANY_REJECTED, MANY_FAILED = 10, 5
# Rejections with these codes are never an error: they are about one caller's limits, a stop, or no
# answer at all.
HARMLESS = frozenset(
    ("rate_limit_exceeded", "concurrency_exceeded", "server_shutdown", "history_unavailable")
)
NO_GROUPS: Mapping[str, GroupState] = MappingProxyType({})
# Milliseconds by which a late loop is an error: clients see that everything stands still.
SEVERE_LAG = 1000


def incident(
    kind: str, text: str, severity: str, provider: str | None = None, remedy: str = ""
) -> Incident:
    """Return an incident that happens now; *severity*: `info`, `warning` or `error`."""
    return {
        "time": round(time.time(), 3),
        "kind": kind,
        "severity": severity,
        "text": text,
        "provider": provider,
        "advice": remedy,
    }


class Subject(NamedTuple):
    """The subject of an incident; between incidents of one subject there is a quiet time."""

    kind: str
    detail: str = ""
    provider: str | None = None


class Gathered(msgspec.Struct):
    """The count of one subject since the tick *since*; *well* is what went well meanwhile."""

    since: float
    number: int = 0
    well: int = 0


class Detector:
    """Finds incidents, tick by tick.

    Always: QUIET seconds or more pass between two gathered incidents of one subject.
    """

    def __init__(self) -> None:
        self._gathered: dict[Subject, Gathered] = {}
        self._quiet_until: dict[Subject, float] = {}
        self._denied: deque[int] = deque(maxlen=DENIED_TICKS)
        # By provider: the kind of the trouble that was reported and is not over.
        self._troubles: dict[str, str] = {}
        # The same by key of a section.
        self._section_troubles: dict[str, str] = {}
        # The members that are out of their groups, as was reported.
        self._out: set[str] = set()

    def detect(
        self,
        now: float,
        interval: Interval,
        providers: Mapping[str, ProviderState],
        sections: Iterable[tuple[Section[Any], Any]] = (),
        groups: Mapping[str, GroupState] = NO_GROUPS,
    ) -> list[Incident]:
        """Return the incidents of the tick at *now*, a monotonic time, which ends *interval*;
        *sections* with their states.
        """
        self._gather(now, interval)
        return [
            *self._trouble_changes(now, providers),
            *self._group_changes(now, groups),
            *self._section_changes(now, sections),
            *self._due(now),
        ]

    def _section_changes(
        self, now: float, sections: Iterable[tuple[Section[Any], Any]]
    ) -> Iterator[Incident]:
        reported = self._section_troubles
        for section, state in sections:
            key, trouble = section.key, section.trouble(state)
            if trouble is None:
                if reported.pop(key, None):
                    yield incident(key, section.recovery(state), "info")
            elif trouble.kind != reported.get(key):
                subject = Subject(key, trouble.kind)
                if self._quiet_until.get(subject, 0.0) <= now:
                    self._quiet_until[subject] = now + QUIET
                    reported[key] = trouble.kind
                    yield incident(key, trouble.text, "error", None, trouble.advice)

    def _gather(self, now: float, interval: Interval) -> None:
        gathered = self._gathered
        for total, number in interval.growth.items():
            if total.kind in GATHERED and (total.kind != ATTEMPTS or total.detail in FAULTS):
                subject = Subject(GATHERED[total.kind], total.detail, total.provider)
                gathered.setdefault(subject, Gathered(now)).number += int(number)
        self._denied.append(int(interval.growth.get(Total(DENIED), 0)))
        if (denied := sum(self._denied)) >= DENIED_BURST:
            subject = Subject("auth")
            gathered.setdefault(subject, Gathered(now)).number += denied
            self._denied.clear()
        if interval.lag_max > LAG_LIMIT:
            subject = Subject("loop_lag")
            lag = gathered.setdefault(subject, Gathered(now))
            lag.number = max(lag.number, round(interval.lag_max * 1000))
        for subject, counted in gathered.items():
            name = subject.provider
            total = Total(ANSWERED) if name is None else Total(ATTEMPTS, OK, name)
            counted.well += int(interval.growth.get(total, 0))

    def _trouble_changes(
        self, now: float, providers: Mapping[str, ProviderState]
    ) -> Iterator[Incident]:
        reported = self._troubles
        self._troubles = {name: kind for name, kind in reported.items() if name in providers}
        for name, provider in providers.items():
            trouble, before = provider["trouble"], reported.get(name)
            kind = trouble["kind"] if trouble is not None else None
            if kind not in TROUBLES:
                if before is not None:
                    del self._troubles[name]
                    text = TROUBLES[before].format(provider=name)
                    yield incident(before, text, "info", name)
            elif kind != before:
                assert trouble is not None, "it has a kind"
                subject = Subject(trouble["kind"], provider=name)
                if self._quiet_until.get(subject, 0.0) <= now:
                    self._quiet_until[subject] = now + QUIET
                    self._troubles[name] = trouble["kind"]
                    yield incident(
                        trouble["kind"],
                        trouble["text"],
                        trouble["severity"],
                        name,
                        trouble["advice"],
                    )

    def _group_changes(self, now: float, groups: Mapping[str, GroupState]) -> Iterator[Incident]:
        """Yield an incident for each member that is out of its groups now, or is back."""
        states: dict[str, str] = {}
        names: defaultdict[str, list[str]] = defaultdict(list)
        for name, group in groups.items():
            if several(group):
                for member in group["members"]:
                    states[member["provider"]] = member["state"]
                    names[member["provider"]].append(name)
        # One that is in no group any more has not come back.
        self._out &= states.keys()
        for provider, state in states.items():
            if state not in OUT or state == OFF:
                if provider in self._out:
                    self._out.remove(provider)
                    text = f"{provider} is back in {listing(dict.fromkeys(names[provider]))}"
                    yield incident("group_restored", text, "info", provider)
            elif provider not in self._out:
                subject = Subject("group_degraded", provider=provider)
                if self._quiet_until.get(subject, 0.0) <= now:
                    self._quiet_until[subject] = now + QUIET
                    self._out.add(provider)
                    yield _degraded(provider, state, dict.fromkeys(names[provider]), groups)

    def _due(self, now: float) -> Iterator[Incident]:
        """Yield an incident for each subject that was gathered and is not in its quiet time."""
        due = [subject for subject in self._gathered if self._quiet_until.get(subject, 0.0) <= now]
        for subject in due:
            gathered = self._gathered.pop(subject)
            self._quiet_until[subject] = now + QUIET
            detail, remedy = _words(subject)
            seconds = span(round(now - gathered.since + TICK))
            text = TEXTS[subject.kind].format(
                number=gathered.number,
                rejected=were(gathered.number, "rejected"),
                denied=were(gathered.number, "denied"),
                attempts=count(gathered.number, "attempt"),
                answers=count(gathered.number, "answer"),
                bugs=met_a_bug(gathered.number, f"in {seconds}"),
                span=seconds,
                detail=detail,
                provider=subject.provider,
            )
            severity = _severity(subject, gathered)
            yield incident(subject.kind, text, severity, subject.provider, remedy)


def _degraded(
    provider: str, state: str, names: Iterable[str], groups: Mapping[str, GroupState]
) -> Incident:
    """Return the incident that *provider*, a member of the groups *names*, is out."""
    shut = [name for name in names if closed(groups[name])]
    go_on = [name for name in names if name not in shut]
    parts = (
        [f"{listing(go_on)} {'go' if len(go_on) > 1 else 'goes'} on without it"] if go_on else []
    )
    if shut:
        parts.append(f"no member of {listing(shut)} can start anything now")
    text = f"{provider} {OUT[state]}: {', and '.join(parts)}"
    return incident("group_degraded", text, "error" if shut else "warning", provider)


def _words(subject: Subject) -> tuple[str, str]:
    """Return the detail of *subject* in words, and what to do about it."""
    kind, detail, provider = subject
    if kind == "rejections":
        return of_rejections(detail)
    if kind == "provider_faults":
        return PAST_FAULTS[detail], OF_FAULTS[detail].format(name=provider)
    if kind == "provider_auth":
        return detail, OF_A_REFUSED_KEY.format(name=provider)
    return detail, OF_A_BUG if kind == "bug" else ""


def _severity(subject: Subject, gathered: Gathered) -> str:
    """Return "error" for what most clients notice, such as that they are rejected; else
    "warning".
    """
    kind, detail, _ = subject
    total = gathered.number + gathered.well
    worst = detail not in HARMLESS and most(gathered.number, total) == "error"
    if (
        kind in SEVERE
        or detail in SEVERE
        or (kind == "rejections" and worst and gathered.number >= MANY_REJECTED)
        or (kind == "provider_faults" and worst and gathered.number >= MANY_FAILED)
        or (kind == "loop_lag" and gathered.number >= SEVERE_LAG)
    ):
        return "error"
    return "warning"

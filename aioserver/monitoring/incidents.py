"""Incidents: events that an operator should know of, found in the difference between two ticks.

There are two sorts of incidents. Some are counted, such as rejected requests. The first of them is
reported at once, and starts a quiet time; the next incident of the same subject then has the sum of
that time. Its text is in the past tense, since the fault may be over.

Others have a beginning and an end, such as the alert of a provider or the trouble of a section.
Both are reported. A fault that comes back in its quiet time is reported after that time, if it
still lasts.

The words come from the table of findings, so that the log and the verdict say the same.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.monitoring.alerts import count, most, of_rejections, span
from aioserver.monitoring.findings import (
    BY_SHARE,
    ERROR,
    FAULTS,
    FINDINGS,
    OF_PROVIDERS,
    REJECTED,
    WARNING,
)
from aioserver.monitoring.groups import OFF, OUT, closed, listing, several
from aioserver.monitoring.interval import (
    ANSWERED,
    ATTEMPTS,
    BUGS,
    DENIED,
    KEY_REFUSED,
    REJECTIONS,
    RESCUED,
    SEAMS,
    SLOW_CLIENTS,
    TICK,
    Total,
)
from aioserver.telemetry.metrics import OK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from aioserver.monitoring.interval import Interval
    from aioserver.monitoring.section import Section
    from aioserver.monitoring.state import GroupState, Incident, ProviderState

# Seconds of the quiet time after an incident.
QUIET = 10.0
# Seconds by which the event loop may be late without an incident.
LAG_LIMIT = 0.1
# Denied requests that are an incident, and the ticks in which they come: a person who mistypes a
# key makes fewer.
DENIED_BURST, DENIED_TICKS = 10, 10
# Kinds of totals that are gathered, each with the finding under which it is reported.
GATHERED = {
    REJECTIONS: "rejections",
    SLOW_CLIENTS: "slow_client",
    KEY_REFUSED: "provider_auth",
    ATTEMPTS: "provider_faults",
    BUGS: "bug",
    SEAMS: "seams",
    RESCUED: "rescued",
}
# A finding whose severity is BY_SHARE is an error only if there are at least so many.
MANY_REJECTED, MANY_FAILED = 10, 5
AT_LEAST = {"rejections": MANY_REJECTED, "provider_faults": MANY_FAILED}
# The tables that have a row for each detail of these findings.
DETAILS = {"rejections": REJECTED, "provider_faults": FAULTS}
NO_GROUPS: Mapping[str, GroupState] = MappingProxyType({})
# Milliseconds from which on a late event loop is an error: clients see that everything stops.
SEVERE_LAG = 1000


def incident(
    kind: str, text: str, severity: str, provider: str | None = None, remedy: str = ""
) -> Incident:
    """Return an incident that happens now. *severity* is `info`, `warning` or `error`."""
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


@dataclass
class Gathered:
    """The count of one subject since the tick *since*; *well* counts the successes meanwhile."""

    since: float
    number: int = 0
    well: int = 0


class Standing(NamedTuple):
    """A fault with a beginning and an end, as it is at one tick.

    *about* identifies it from tick to tick. *now* is None if the fault is not there now, else its
    subject, and the incident of its beginning; after it there is a quiet time for the subject.
    *ends* makes the incident of the end, from the subject that was reported.
    """

    about: tuple[str, str]
    ends: Callable[[Subject], Incident]
    now: tuple[Subject, Incident] | None = None


class Detector:
    """Finds incidents, tick by tick.

    Always: QUIET seconds or more pass between two gathered incidents of one subject.
    """

    def __init__(self) -> None:
        self._gathered: dict[Subject, Gathered] = {}
        self._quiet_until: dict[Subject, float] = {}
        self._denied: deque[int] = deque(maxlen=DENIED_TICKS)
        # The faults that were reported and have not ended, by their subjects.
        self._reported: dict[tuple[str, str], Subject] = {}

    def detect(
        self,
        now: float,
        interval: Interval,
        providers: Mapping[str, ProviderState],
        sections: Iterable[tuple[Section[Any], Any]] = (),
        groups: Mapping[str, GroupState] = NO_GROUPS,
    ) -> list[Incident]:
        """Return the incidents of the tick that ends *interval*.

        *now* is a monotonic time. *sections* come with their states.
        """
        self._gather(now, interval)
        standing = (*_alerts(providers), *_members(groups), *_troubles(sections))
        return [*self._changes(now, standing), *self._due(now)]

    def _changes(self, now: float, standing: Iterable[Standing]) -> Iterator[Incident]:
        """Yield the incidents of faults that have begun or ended.

        A fault does not end because the provider or the section that it is about is gone.
        """
        before, self._reported = self._reported, {}
        for about, ends, fault in standing:
            reported = before.get(about)
            if fault is None:
                if reported is not None:
                    yield ends(reported)
                continue
            subject, begins = fault
            if subject != reported and self._quiet_until.get(subject, 0.0) <= now:
                self._quiet_until[subject] = now + QUIET
                reported = subject
                yield begins
            if reported is not None:
                self._reported[about] = reported

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

    def _due(self, now: float) -> Iterator[Incident]:
        """Yield an incident for each subject that was gathered and is not in its quiet time."""
        due = [subject for subject in self._gathered if self._quiet_until.get(subject, 0.0) <= now]
        for subject in due:
            gathered = self._gathered.pop(subject)
            self._quiet_until[subject] = now + QUIET
            detail, remedy = _words(subject)
            number = gathered.number
            text = FINDINGS[subject.kind].past.format(
                name=subject.provider,
                detail=detail,
                span=span(round(now - gathered.since + TICK)),
                count=number,
                requests=count(number, "request"),
                were="was" if number == 1 else "were",
                attempts=count(number, "attempt"),
                answers=count(number, "answer"),
            )
            severity = _severity(subject, gathered)
            yield incident(subject.kind, text, severity, subject.provider, remedy)


def _alerts(providers: Mapping[str, ProviderState]) -> Iterator[Standing]:
    """Yield the alert of each provider. A kind without a text for its end is not an incident."""
    for name, provider in providers.items():
        about, ends, alert = ("provider", name), partial(_ended, name), provider["trouble"]
        if alert is None or not OF_PROVIDERS[alert["kind"]].past:
            yield Standing(about, ends)
        else:
            kind = alert["kind"]
            begins = incident(kind, alert["text"], alert["severity"], name, alert["advice"])
            yield Standing(about, ends, (Subject(kind, provider=name), begins))


def _ended(name: str, subject: Subject) -> Incident:
    past = OF_PROVIDERS[subject.kind].past
    return incident(subject.kind, past.format(name=name), "info", name)


def _troubles(sections: Iterable[tuple[Section[Any], Any]]) -> Iterator[Standing]:
    """Yield the trouble of each section."""
    for section, state in sections:
        key, trouble = section.key, section.trouble(state)
        about, ends = ("section", key), partial(_recovered, section, state)
        if trouble is None:
            yield Standing(about, ends)
        else:
            begins = incident(key, trouble.text, ERROR, None, trouble.advice)
            yield Standing(about, ends, (Subject(key, trouble.kind), begins))


def _recovered(section: Section[Any], state: Any, _subject: Subject) -> Incident:
    return incident(section.key, section.recovery(state), "info")


def _members(groups: Mapping[str, GroupState]) -> Iterator[Standing]:
    """Yield for each member of groups whether it is unable to start requests."""
    states: dict[str, str] = {}
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, group in groups.items():
        for member in group["members"] if several(group) else ():
            states[member["provider"]] = member["state"]
            if name not in names[member["provider"]]:
                names[member["provider"]].append(name)
    for provider, state in states.items():
        about, ends = ("member", provider), partial(_restored, provider, names[provider])
        if state not in OUT or state == OFF:
            yield Standing(about, ends)
        else:
            subject = Subject("group_degraded", provider=provider)
            begins = _degraded(provider, state, names[provider], groups)
            yield Standing(about, ends, (subject, begins))


def _restored(provider: str, names: Iterable[str], _subject: Subject) -> Incident:
    return incident("group_restored", f"{provider} is back in {listing(names)}", "info", provider)


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
        parts.append(f"{FINDINGS['group_out'].text.format(name=listing(shut))} now")
    text = f"{provider} {OUT[state]}: {', and '.join(parts)}"
    return incident("group_degraded", text, ERROR if shut else WARNING, provider)


def _words(subject: Subject) -> tuple[str, str]:
    """Return the detail of *subject* in words, and the remedy."""
    kind, detail, provider = subject
    if kind == "rejections":
        return of_rejections(detail)
    row = FINDINGS[kind]
    if kind == "provider_faults":
        row = FAULTS[detail]
        detail = row.past
    return detail, row.remedy.format(name=provider)


def _severity(subject: Subject, gathered: Gathered) -> str:
    """Return "error" if most clients notice the incident, such as rejections; else "warning"."""
    kind, number = subject.kind, gathered.number
    if kind == "loop_lag":
        return ERROR if number >= SEVERE_LAG else WARNING
    row = DETAILS.get(kind, {}).get(subject.detail, FINDINGS[kind])
    if row.severity != BY_SHARE:
        return row.severity
    many = number >= AT_LEAST[kind]
    return ERROR if many and most(number, number + gathered.well) == ERROR else WARNING

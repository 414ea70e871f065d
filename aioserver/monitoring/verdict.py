"""The verdict on the whole server: one word, one sentence, details, and advice.

It is made once a tick and is part of the snapshot, so that the dashboard, `top` and `/stats` say
the same. If several findings are true, the verdict is the worst of them. Each number in its texts
comes from the snapshot, or was counted in the last RECENT ticks.

This file is long, but it is one concept: all findings stand in one order, the worst first.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.errors import ServerAtCapacity
from aioserver.monitoring.alerts import count, met_a_bug, most, of_rejections, span
from aioserver.monitoring.findings import ERROR, FINDINGS, OF_PROVIDERS, REJECTED, WARNING
from aioserver.monitoring.groups import COOLING, OUT, closed, covering, listing, several
from aioserver.monitoring.incidents import MANY_REJECTED
from aioserver.monitoring.interval import ANSWERED, FAILED, REJECTIONS, Total

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from aioserver.monitoring.interval import Interval
    from aioserver.monitoring.section import Section
    from aioserver.monitoring.state import (
        GroupState,
        Percentiles,
        ProviderState,
        Snapshot,
        Verdict,
    )

# Ticks for which rejections, failed answers and a late event loop stay in the verdict.
RECENT = 10
# Seconds of lag of the event loop that clients notice.
NOTICEABLE_LAG = 0.25
# The shares of the allowed open files, and of the places, from which on few are left.
FEW_FILES, FEW_PLACES = 0.9, 0.9


class Lately(NamedTuple):
    """The events of the last RECENT ticks: rejections by code, answers that began and that failed,
    and the largest lag in seconds.
    """

    rejected: Mapping[str, int]
    answered: int
    failed: int
    lag: float


class Verdicts:
    """Makes the verdict on one snapshot after another. Each snapshot must have its alerts, and the
    states of all *sections*.
    """

    def __init__(self, sections: Sequence[Section[Any]] = ()) -> None:
        self._sections = sections
        # The events of each tick: rejections by code, answers that began, answers that failed.
        self._ticks: deque[Counter[str]] = deque(maxlen=RECENT)
        self._lags: deque[float] = deque(maxlen=RECENT)

    def observe(self, snapshot: Snapshot, interval: Interval) -> Verdict:
        """Return the verdict on *snapshot*, at whose tick *interval* ended."""
        tick: Counter[str] = Counter()
        for total, number in interval.growth.items():
            if total.kind == REJECTIONS:
                tick[total.detail] += int(number)
        tick[ANSWERED] = int(interval.growth.get(Total(ANSWERED), 0))
        tick[FAILED] = int(interval.growth.get(Total(FAILED), 0))
        self._ticks.append(tick)
        self._lags.append(interval.lag_max)
        return judge(snapshot, self.lately(), self._sections)

    def lately(self) -> Lately:
        """Return the events of the last ticks."""
        counts: Counter[str] = sum(self._ticks, Counter())
        answered, failed = counts.pop(ANSWERED, 0), counts.pop(FAILED, 0)
        return Lately(counts, answered, failed, max(self._lags, default=0.0))


def judge(snapshot: Snapshot, lately: Lately, sections: Sequence[Section[Any]] = ()) -> Verdict:
    """Return the verdict on *snapshot*, which has the states of *sections*.

    *lately* has the events before it.
    """
    return next(_Judge(snapshot, lately, sections).findings())


class _Judge:
    """Finds what is true of one snapshot and of the events before it."""

    def __init__(
        self, snapshot: Snapshot, lately: Lately, sections: Sequence[Section[Any]]
    ) -> None:
        self._snapshot = snapshot
        self._sections = sections
        self._covered = covering(snapshot)
        self._lately = lately
        self._rejected = Counter(lately.rejected)

    def findings(self) -> Iterator[Verdict]:
        """Yield every finding, the worst first; the last one is always true."""
        yield from self._not_ready()
        yield from self._bugs()
        yield from self._closed_groups(active=True)
        yield from self._trouble(active=True)
        yield from self._rejecting()
        yield from self._closed_groups(active=False)
        yield from self._trouble(active=False)
        yield from self._resources()
        yield from self._section_troubles()
        yield from self._waiting()
        yield from self._busy()
        yield self._calm("open", self._room())

    def _not_ready(self) -> Iterator[Verdict]:
        snapshot = self._snapshot
        if not snapshot["ready"]:
            if any(provider["usable"] for provider in snapshot["providers"].values()):
                text, advice = "Starting or stopping: new requests are rejected", ""
            else:
                text, advice = "No provider is usable: nobody gets an answer", None
            detail = _sentences(*self._met_bugs())
            yield _verdict("not_ready", "closed", text, detail=detail, advice=advice)

    def _met_bugs(self) -> Iterator[str]:
        if number := self._snapshot["bugs"]["last_minute"]:
            yield met_a_bug(number)

    def _bugs(self) -> Iterator[Verdict]:
        for text in self._met_bugs():
            detail = _sentences(*self._other_troubles(), *self._rejections(), self._places())
            yield _verdict("bug", "trouble", text, detail=detail, about="bug")

    def _closed_groups(self, *, active: bool) -> Iterator[Verdict]:
        """Yield a finding for each group without a member that can start requests.

        *active* chooses the active group, or all others.
        """
        for name, group in self._snapshot["groups"].items():
            if (name == self._snapshot["active_group"]) != active or not several(group):
                continue
            if not closed(group):
                continue
            cooling = any(member["state"] == COOLING for member in group["members"])
            waiting = _queue(group["waiting"], "request", name, group["oldest_wait"])
            text = _capital(FINDINGS["group_out"].text.format(name=name))
            yield _verdict(
                "group_out",
                "rejecting" if self._rejections() else "trouble",
                f"{text}: {listing(self._reasons(group))}",
                detail=_sentences(waiting if group["waiting"] else "", *self._rejections()),
                level=ERROR if active and not cooling else WARNING,
                advice="" if cooling else None,
                about=name,
            )

    def _reasons(self, group: GroupState) -> Iterable[str]:
        """Return for each provider of *group* why it cannot start requests."""
        reasons = {}
        for member in group["members"]:
            name, state = member["provider"], member["state"]
            reasons[name] = f"{name} {OUT[state]}"
            if state == COOLING:
                pace = self._snapshot["providers"][name]["pace"]
                reasons[name] += f" for {span(pace['cooling'])} more"
        return reasons.values()

    def _trouble(self, *, active: bool) -> Iterator[Verdict]:
        """Yield the worst trouble of the active provider, or of the others."""
        troubles = [
            (name, provider, trouble)
            for name, provider in self._snapshot["providers"].items()
            if self._needed(name) == active and (trouble := provider["trouble"]) is not None
        ]
        troubles.sort(key=lambda row: [*OF_PROVIDERS].index(row[2]["kind"]))
        for name, provider, trouble in troubles[:1]:
            rejected = self._rejections()
            level = trouble["severity"]
            if active and rejected and self._rejected_most():
                level = ERROR
            elif name in self._covered:
                level = WARNING
            yield _verdict(
                trouble["kind"],
                "rejecting" if rejected else "trouble",
                trouble["text"],
                level=level,
                detail=_sentences(trouble["detail"], "; ".join(self._effects(name, provider))),
                advice=trouble["advice"],
                about=name,
            )

    def _needed(self, name: str) -> bool:
        """Return whether requests that name no model come to the provider *name* alone."""
        active = self._snapshot["providers"][name]["active"]
        return active and name not in self._covered

    def _effects(self, name: str, provider: ProviderState) -> Iterator[str]:
        """Yield the effects on clients of the trouble of the provider *name*."""
        if provider["waiting"]:
            yield _queue(provider["waiting"], "request", name, provider["oldest_wait"])
        if self._lately.failed:
            yield f"{count(self._lately.failed, 'answer')} failed in {RECENT} s"
        yield from self._rejections()

    def _rejections(self) -> list[str]:
        """Return a phrase that says how many requests were rejected and why; [] without any."""
        number = self._rejected.total()
        if not number:
            return []
        code, most_often = self._rejected.most_common(1)[0]
        part = f", {most_often:,} of them since" if most_often < number else ":"
        were = f"{count(number, 'request')} {'was' if number == 1 else 'were'} rejected"
        return [f"{were} in {RECENT} s{part} {of_rejections(code)[0]}"]

    def _rejected_most(self) -> bool:
        """Return whether more requests were rejected than answered, by the rule by which such an
        incident is an error.
        """
        number = sum(
            each
            for code, each in self._rejected.items()
            if code not in REJECTED or REJECTED[code].severity != WARNING
        )
        return number >= MANY_REJECTED and most(number, number + self._lately.answered) == ERROR

    def _rejecting(self) -> Iterator[Verdict]:
        if rejections := self._rejections():
            code = self._rejected.most_common(1)[0][0]
            others = [*self._busiest(), *self._other_troubles()]
            yield _verdict(
                "rejections",
                "rejecting",
                rejections[0],
                level=ERROR if self._rejected_most() else WARNING,
                detail=_sentences(self._places(), *others),
                advice=self._advice(code),
                about=code,
            )

    def _other_troubles(self) -> Iterator[str]:
        for provider in self._snapshot["providers"].values():
            if provider["trouble"] is not None:
                yield provider["trouble"]["text"]

    def _resources(self) -> Iterator[Verdict]:
        for name, provider in self._snapshot["providers"].items():
            if provider["active"] and not provider["usable"]:
                text = FINDINGS["not_usable"].text.format(name=name)
                yield _verdict("not_usable", "trouble", _capital(text), about=name)
        process = self._snapshot["process"]
        files, max_files = process["open_fds"], process["max_fds"]
        if files and max_files and files > FEW_FILES * max_files:
            text = f"{files:,} of {max_files:,} file descriptors are open"
            yield _verdict("files", "trouble", text)

    def _section_troubles(self) -> Iterator[Verdict]:
        for section in self._sections:
            trouble = section.trouble(section.of(self._snapshot))
            if trouble is not None:
                yield _verdict(
                    "section",
                    "trouble",
                    _capital(trouble.text),
                    detail=_sentences(trouble.detail, self._places()),
                    advice=trouble.advice,
                    about=section.key,
                    word=trouble.word,
                )

    def _waiting(self) -> Iterator[Verdict]:
        connections = self._snapshot["connections"]
        limit, active = connections["limit"], connections["active"]
        text = ""
        if waiting := connections["waiting"]:
            text = _queue(waiting, "connection", "a place", connections["oldest_wait"])
            text = f"{text}; all {limit:,} are taken"
        elif active >= limit:
            text = f"All {limit:,} places are taken, and nobody waits yet"
        if text:
            advice = self._advice(ServerAtCapacity.code)
            detail = _sentences(*self._busiest(), self._latency())
            yield _verdict("full", "full", text, detail=detail, advice=advice)

    def _busy(self) -> Iterator[Verdict]:
        room = self._room()
        for name, provider in self._snapshot["providers"].items():
            if cooling := provider["pace"]["cooling"]:
                text = f"{room}, but {name} cools down for {span(cooling)} more, as it asked"
                yield self._calm("busy", text, about=name)
        if self._lately.lag >= NOTICEABLE_LAG:
            late = FINDINGS["loop_lag"].past.format(count=f"{round(self._lately.lag * 1000):,}")
            yield self._calm("loop_lag", f"{room}, but {late}", about="loop")
        for reason, name in self._limits():
            yield self._calm("busy", f"{room}, but {reason}", about=name)
        connections = self._snapshot["connections"]
        if connections["active"] >= FEW_PLACES * connections["limit"]:
            yield self._calm("nearly_full", room)

    def _limits(self) -> Iterator[tuple[str, str]]:
        """Yield how providers limit the server, with their names, the most serious first."""
        providers = self._snapshot["providers"]
        for name in sorted(providers, key=lambda name: -providers[name]["waiting"]):
            provider = providers[name]
            if provider["waiting"]:
                reason = _queue(provider["waiting"], "request", name, provider["oldest_wait"])
                yield reason, name
            elif number := provider["pool"]["waiting"]:
                verb = "waits" if number == 1 else "wait"
                yield f"{count(number, 'request')} {verb} for a connection to {name}", name
        for name, provider in providers.items():
            if 0 < provider["limit"] <= provider["in_flight"]:
                yield f"all {provider['limit']:,} places of {name} are taken", name

    def _advice(self, code: str) -> str:
        """Return the advice for rejections with *code*, or for connections that wait."""
        name, provider = self._busiest_provider()
        if code == ServerAtCapacity.code and provider["waiting"]:
            return FINDINGS["full"].remedy.format(name=name)
        return of_rejections(code)[1]

    def _busiest_provider(self) -> tuple[str, ProviderState]:
        providers = self._snapshot["providers"].items()
        return max(providers, key=lambda item: item[1]["waiting"])

    def _busiest(self) -> Iterator[str]:
        """Yield how full the provider with the longest queue is; nothing if no request waits."""
        name, provider = self._busiest_provider()
        if provider["waiting"]:
            queue = _queue(provider["waiting"], "request", name, provider["oldest_wait"])
            if provider["pace"]["left"] == 0 and provider["in_flight"] < provider["limit"]:
                why = f"its pace of {provider['pace']['per_minute']:,} a minute is used up"
            else:
                why = f"{provider['in_flight']:,} of its {provider['limit']:,} places are taken"
            yield f"{queue}; {why}"

    def _calm(self, name: str, text: str, about: str = "") -> Verdict:
        state, level = ("open", "ok") if name == "open" else ("busy", WARNING)
        detail = _sentences(self._places(), self._latency())
        return _verdict(name, state, text, level=level, detail=detail, advice="", about=about)

    def _room(self) -> str:
        connections = self._snapshot["connections"]
        free = max(0, connections["limit"] - connections["active"])
        return f"Room for {free:,} more" if free else "No room left"

    def _places(self) -> str:
        connections, running = self._snapshot["connections"], self._snapshot["requests"]["running"]
        places = f"{connections['active']:,} of {connections['limit']:,} places are taken"
        return f"{places}, {count(running, 'answer')} under way"

    def _latency(self) -> str:
        """Return how soon answers begin; "" if none has begun recently."""
        first: Percentiles | None = self._snapshot["first_token"]
        if first is None or first["age"] > RECENT:
            return ""
        return (
            f"Half of the answers begin within {_time(first['p50'])},"
            f" 95 % within {_time(first['p95'])}"
        )


def unknown() -> Verdict:
    """Return the verdict before the first tick."""
    text = "Nothing is known yet"
    return _verdict("busy", "busy", text, word="Starting")


def _verdict(
    name: str,
    state: str,
    text: str,
    *,
    level: str = "",
    word: str = "",
    detail: str = "",
    advice: str | None = None,
    about: str = "",
) -> Verdict:
    """Return the verdict of the finding *name*. Its row gives the values that are not passed."""
    row = FINDINGS[name]
    return {
        "level": level or row.severity,
        "state": state,
        "word": word or row.word,
        "text": text,
        "detail": detail,
        "advice": row.remedy if advice is None else advice,
        "about": about,
    }


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _sentences(*texts: str) -> str:
    return " ".join(f"{text}." for text in texts if text)


def _queue(waiting: int, noun: str, for_what: str, oldest: float) -> str:
    verb = "waits" if waiting == 1 else "wait"
    return f"{count(waiting, noun)} {verb} for {for_what}, the longest for {_time(oldest)}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{round(seconds * 1000)} ms"
    return f"{seconds:.1f} s" if seconds < 10 else span(seconds)

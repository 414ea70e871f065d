"""Alerts: the present fault of a provider and its beginning, in words that every display shows.

`/stats`, the dashboard, `top` and the log show the same texts, which are made here from the table
of findings. An alert is the `trouble` of a provider in `/stats`. Its *text* is a whole sentence,
"groq has said nothing for 6 s in 25 answers". Its *detail* says when the trouble began, when the
provider is tried next, and which fallback is asked instead. If several findings are true of a
provider, the alert is the worst of them. The *advice* says what an operator can do. The *severity*
says whether displays show the alert as an `error` or as a `warning`.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import Counter
from typing import TYPE_CHECKING

from aioserver.monitoring.findings import (
    BY_SHARE,
    FAILING,
    FAULTS,
    FLAGGED,
    NO_KEY,
    OF_PROVIDERS,
    REJECTED,
    SILENT,
)
from aioserver.monitoring.groups import covering, listing
from aioserver.monitoring.interval import ATTEMPTS
from aioserver.providers.breaker import DEAD, SICK, WELL
from aioserver.telemetry.metrics import OK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aioserver.monitoring.interval import Interval
    from aioserver.monitoring.state import Alert, ProviderState, SilenceState, Snapshot

# Kinds of alert that may turn into each other: the alert then keeps the time at which it began.
FAILURES = frozenset((DEAD, SICK, FAILING))
# Ticks for which a fault counts, although an attempt has succeeded since.
PRESENT = 10
# A provider fails if at least FEW attempts of the last WINDOW ticks have failed, and this share of
# them.
WINDOW = 60
FEW, SHARE = 3, 0.1
INSTEAD = "For now, name another provider in llm.fallbacks or llm.active, and reload (SIGHUP)."


class Alerts:
    """The alert of each provider, snapshot by snapshot.

    Always: an alert that lasts keeps the time at which it began. When a provider is well again, its
    alert ends and its earlier faults are forgotten.
    """

    def __init__(self) -> None:
        # The alerts at the last snapshot, by provider.
        self.now: dict[str, Alert] = {}
        # The providers that were dead, sick or flagged at the last snapshot.
        self._ill: set[str] = set()
        # The fault for which each flagged provider was flagged; empty if it has refused our key.
        self._flagged: dict[str, str] = {}
        # By provider and outcome: the attempts of each of the last WINDOW ticks. They are kept in
        # arrays for the reason that history.py gives.
        self._attempts: dict[str, dict[str, array[int]]] = {}

    def observe(self, snapshot: Snapshot, interval: Interval) -> None:
        """Find the alerts at *snapshot*, at whose tick *interval* ended, and set them there."""
        self._count(interval)
        before, self.now = self.now, {}
        groups = covering(snapshot)
        for name, provider in snapshot["providers"].items():
            if provider["flagged"] or provider["state"] != WELL:
                self._ill.add(name)
            elif name in self._ill:
                self._ill.remove(name)
                self._attempts.pop(name, None)
            alert = self._alert(name, provider, snapshot, groups.get(name, ()), before.get(name))
            provider["trouble"] = alert
            if alert is not None:
                self.now[name] = alert

    def _alert(
        self,
        name: str,
        provider: ProviderState,
        snapshot: Snapshot,
        groups: Sequence[str],
        before: Alert | None,
    ) -> Alert | None:
        """Return the alert of the provider *name*, or None.

        *groups* are the groups whose other members still answer. *before* is the alert of this
        provider at the last snapshot.
        """
        faults, attempts = self._lately(name)
        failed = sum(faults.values())
        now = snapshot["time"]
        fault = None
        if failed and self._fails(name):
            fault = FAULTS[faults.most_common(1)[0][0]]
        if not provider["flagged"]:
            self._flagged.pop(name, None)
        often = f": {failed} of {attempts} attempts failed in the last minute"
        if provider["flagged"]:
            kind, often = FLAGGED, ""
            newest = next((cause for cause in NO_KEY if faults[cause]), "")
            fault = FAULTS.get(self._flagged.setdefault(name, newest))
        elif provider["state"] == DEAD:
            kind, often = DEAD, f"{often}; it is left alone"
        elif stalled(provider["silent"]):
            kind, fault = SILENT, None
        elif provider["state"] == SICK:
            kind = SICK
        elif fault is not None and failed >= FEW and failed >= SHARE * attempts:
            kind = FAILING
        else:
            return None
        row = OF_PROVIDERS[kind]
        text, remedy = row.text, row.remedy
        if fault is not None:
            text, remedy = f"{{name}} {fault.text}{often}", fault.remedy
        longest = provider["silent"]["longest"] if kind == SILENT else 0.0
        since = round(now - longest, 3)
        if before is not None and (before["kind"] == kind or {before["kind"], kind} <= FAILURES):
            since = before["since"]
        others = snapshot["fallbacks"]
        remedies = [remedy.format(name=name)]
        if provider["active"] and not (others or groups):
            remedies.append(INSTEAD)
        detail = [f"It began {span(now - since)} ago", *_next_try(provider)]
        if groups:
            detail.append(f"the other members of {listing(groups)} are asked instead")
        elif provider["active"] and kind != SILENT:
            detail.append(f"its fallback is {others[0]}" if others else "no fallback is set")
        return {
            "kind": kind,
            "word": row.word,
            "since": since,
            "text": text.format(name=name, silence=silence(provider["silent"])),
            "detail": "; ".join(detail),
            "advice": " ".join(remedies),
            "severity": most(failed, attempts) if row.severity == BY_SHARE else row.severity,
        }

    def _count(self, interval: Interval) -> None:
        """Take the attempts of a tick into the last WINDOW ticks."""
        for outcomes in self._attempts.values():
            for ticks in outcomes.values():
                del ticks[0]
                ticks.append(0)
        for total, number in interval.growth.items():
            if total.kind == ATTEMPTS and total.provider is not None:
                outcomes = self._attempts.setdefault(total.provider, {})
                if total.detail not in outcomes:
                    outcomes[total.detail] = array("Q", [0]) * WINDOW
                outcomes[total.detail][-1] += int(number)

    def _fails(self, name: str) -> bool:
        """Return whether the last fault of the provider *name* still counts: it came in the last
        PRESENT ticks, or no attempt has succeeded since.
        """
        attempts, succeeded = self._attempts[name], False
        for age in range(1, WINDOW + 1):
            if any(ticks[-age] for outcome, ticks in attempts.items() if outcome in FAULTS):
                return age <= PRESENT or not succeeded
            succeeded = succeeded or (OK in attempts and attempts[OK][-age] > 0)
        return False

    def _lately(self, name: str) -> tuple[Counter[str], int]:
        """Return the faults of the last WINDOW ticks by outcome, and the number of attempts."""
        numbers = {outcome: sum(ticks) for outcome, ticks in self._attempts.get(name, {}).items()}
        faults = Counter(
            {
                outcome: number
                for outcome, number in numbers.items()
                if number and outcome in FAULTS
            }
        )
        return faults, numbers.get(OK, 0) + faults.total()


def _next_try(provider: ProviderState) -> Iterator[str]:
    """Yield the phrase that says when a dead provider is tried again; nothing for any other."""
    seconds = provider["next_try"]
    if seconds is not None:
        yield f"it is tried again in {span(math.ceil(seconds))}" if seconds else "it is tried now"


def most(failed: int, total: int) -> str:
    """Return "error" if *failed* is more than half of *total*, otherwise "warning"."""
    return "error" if 2 * failed > total else "warning"


def stalled(silent: SilenceState) -> bool:
    """Return whether a provider is silent in at least half of its answers under way."""
    number = silent["stalled"] + silent["unanswered"]
    return number > 0 and 2 * number >= silent["under_way"]


def silence(silent: SilenceState) -> str:
    """Return how long a provider has been silent, and in how many answers, as a phrase."""
    answers, requests = silent["stalled"], silent["unanswered"]
    places = [f"in {count(answers, 'answer')}"] if answers else []
    if requests:
        places.append(f"to {count(requests, 'request')}")
    return f"{span(silent['longest'])} {' and '.join(places)}"


def span(seconds: float) -> str:
    """Return a number of seconds in a short form: 6 s, 3 min, 2 h."""
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"


def count(number: int, noun: str) -> str:
    """Return a number of things: 1 answer, 1,200 answers."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def still_run(answers: int, longest: float, processes: int, until: float) -> str:
    """Return what runs in *processes* former processes: *answers*, the *longest* for so many
    seconds, *until* a Unix time at the latest.
    """
    runs = f"{count(answers, 'answer')} still run{'s' * (answers == 1)}"
    where = f"{processes} former process{'es' * (processes != 1)}"
    at = time.strftime("%H:%M", time.localtime(until))
    return f"{runs} in {where}, longest {span(longest)}, until {at} at the latest"


def met_a_bug(number: int) -> str:
    """Return a sentence that says how many requests met a bug."""
    return f"{count(number, 'request')} met a bug of the server in the last minute"


def of_rejections(code: str) -> tuple[str, str]:
    """Return the reason for which requests were rejected with *code*, and the remedy."""
    row = REJECTED.get(code)
    return (code, "") if row is None else (f"{row.text} ({code})", row.remedy)

"""What callers have spent: tokens by caller, provider and model, today and yesterday, in memory.

They are what `GET /usage` shows, and the metrics by caller. They are counted whether there is a
ledger or not, and begin at 0 with the process.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypedDict

from aioserver.telemetry.counters import Counter
from aioserver.telemetry.ledger_reader import COLUMNS, Sums
from aioserver.telemetry.outcome import ESTIMATE, MIXED, NOBODY

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

    from aioserver.telemetry.outcome import Part

# Rows of a day, and of these those of one caller with models that nobody has configured: their
# names come from clients. Beyond, the model of a row is OTHER.
MAX_ROWS, MAX_UNKNOWN = 10_000, 100
# Children of the metric by caller; beyond, the caller of a child is OTHER.
MAX_CHILDREN = 10_000
# Characters of a model's name.
MAX_NAME = 200
OTHER = "other"
KINDS = ("input", "cached", "cache_write", "output", "reasoning", "audio")
SECONDS_OF_A_DAY = 86_400


class Day(TypedDict):
    """The rows of one *day*, `2026-11-28` (UTC)."""

    day: str
    rows: list[dict[str, str | int]]


class _Account:
    """What one caller has spent at one provider for one model: on *day*, and on the one before."""

    __slots__ = ("before", "counters", "day", "row")

    def __init__(self, day: int) -> None:
        self.day = day
        self.row, self.before = Sums(), Sums()
        # By kind; None until something is counted.
        self.counters: list[Counter | None] = [None] * len(KINDS)

    def turn_to(self, day: int) -> None:
        """Begin *day*."""
        self.before = self.row if day == self.day + 1 else Sums()
        self.row, self.day = Sums(), day


class _Total:
    """All tokens of one caller on *day*."""

    __slots__ = ("day", "estimated", "tokens", "unknown")

    def __init__(self, day: int) -> None:
        self.day = day
        self.tokens = 0
        self.estimated = Counter()
        # Its rows with models that nobody has configured.
        self.unknown = 0


class CallerSums:
    """Counts what attempts have cost.

    Always: at most MAX_ROWS rows and as many callers' totals, and MAX_CHILDREN children of the
    metric, besides those of OTHER. A day never goes back, though the clock may.

    *configured* has the pairs of a provider and a model that the settings name.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._day = 0
        self.configured: Container[tuple[str, str]] = frozenset()
        self._accounts: dict[tuple[str, str, str], _Account] = {}
        self._totals: dict[str, _Total] = {}
        # The children of the metrics: by caller, provider, model and kind; and by caller.
        self.tokens: dict[tuple[str, ...], Counter] = {}
        self.estimated: dict[str, Counter] = {}

    def add(self, caller: str, part: Part, *, anew: bool) -> None:
        """Count *part* of a request of *caller*; *anew*: the first that it has at this provider,
        for this model.
        """
        day = self._turn()
        total = self._totals.get(caller)
        if total is None or total.day != day:
            total = self._total(caller, day)
        model = part.model[:MAX_NAME]
        account = self._accounts.get((caller, part.provider, model))
        if account is None or account.day != day:
            account = self._account(caller, part.provider, model, day, total)
        row = account.row
        row.requests += anew
        row.attempts += 1
        source, tokens = part.source, part.tokens
        if source == NOBODY:
            return
        asked, answered = part.tokens_in, part.tokens_out
        cached, audio = tokens.cached or 0, tokens.audio_in + tokens.audio_out
        total.tokens += asked + answered
        row.input_tokens += asked
        row.cached_tokens += cached
        row.cache_write_tokens += tokens.cache_write
        row.output_tokens += answered
        row.reasoning_tokens += tokens.reasoning
        row.audio_tokens += audio
        unconfirmed = 0
        if source == ESTIMATE:
            unconfirmed = asked + answered
        elif source == MIXED:
            unconfirmed = answered
        if unconfirmed:
            row.estimated_tokens += unconfirmed
            total.estimated.value += unconfirmed
        counts = asked, cached, tokens.cache_write, answered, tokens.reasoning, audio
        counters = account.counters
        for index, count in enumerate(counts):
            if count:
                counter = counters[index]
                if counter is None:
                    counter = self._child(caller, part.provider, model, KINDS[index])
                    counters[index] = counter
                counter.value += count

    def today(self, caller: str) -> int:
        """Return all tokens of *caller* on this day."""
        total = self._totals.get(caller)
        return total.tokens if total is not None and total.day == self._turn() else 0

    def days(self, caller: str | None = None) -> list[Day]:
        """Return the rows of today and of yesterday, of all callers or of *caller* alone."""
        day = self._turn()
        rows: tuple[list[dict[str, str | int]], ...] = [], []
        for (owner, provider, model), account in sorted(self._accounts.items()):
            if caller is not None and owner != caller:
                continue
            names: dict[str, str | int] = {"caller": owner, "provider": provider, "model": model}
            ages = {account.day: account.row, account.day - 1: account.before}
            for age, shown in enumerate(rows):
                sums = ages.get(day - age)
                if sums is not None and sums.attempts:
                    shown.append(names | {name: getattr(sums, name) for name in COLUMNS})
        return [{"day": _name(day - age), "rows": shown} for age, shown in enumerate(rows)]

    def _turn(self) -> int:
        day = int(self._wall() // SECONDS_OF_A_DAY)
        if day > self._day:
            self._day = day
            # What is older than yesterday is shown nowhere. The children of the metric stay.
            self._accounts = {
                name: account for name, account in self._accounts.items() if account.day >= day - 1
            }
            self._totals = {
                name: total for name, total in self._totals.items() if total.day >= day - 1
            }
        return self._day

    def _total(self, caller: str, day: int) -> _Total:
        total = self._totals.get(caller)
        if total is None:
            total = self._totals[caller] = _Total(day)
            total.estimated = self.estimated.setdefault(caller, total.estimated)
        total.day, total.tokens, total.unknown = day, 0, 0
        return total

    def _account(
        self, caller: str, provider: str, model: str, day: int, total: _Total
    ) -> _Account:
        """Return the row of *day* for these names, or for the model OTHER."""
        account = self._accounts.get((caller, provider, model))
        if account is None:
            unknown = (provider, model) not in self.configured
            if model != OTHER and (
                len(self._accounts) >= MAX_ROWS or (unknown and total.unknown >= MAX_UNKNOWN)
            ):
                other = self._accounts.get((caller, provider, OTHER))
                if other is not None and other.day == day:
                    return other
                return self._account(caller, provider, OTHER, day, total)
            total.unknown += unknown
            account = self._accounts[caller, provider, model] = _Account(day)
        elif account.day != day:
            account.turn_to(day)
        return account

    def _child(self, caller: str, provider: str, model: str, kind: str) -> Counter:
        """Return the child of the metric, which is made now, unless there are too many."""
        if (provider, model) not in self.configured:
            model = OTHER
        labels = caller, provider, model, kind
        if labels not in self.tokens and len(self.tokens) >= MAX_CHILDREN:
            labels = OTHER, provider, model, kind
        return self.tokens.setdefault(labels, Counter())


def together(several: Iterable[Sequence[Day]]) -> list[Day]:
    """Return the two newest days of those that several instances show, with their rows added
    up.
    """
    days: dict[str, dict[tuple[str, str, str], dict[str, str | int]]] = {}
    for each in several:
        for day in each:
            rows = days.setdefault(day["day"], {})
            for row in day["rows"]:
                name = str(row["caller"]), str(row["provider"]), str(row["model"])
                known = rows.get(name)
                if known is None:
                    rows[name] = dict(row)
                else:
                    known |= {each: int(known[each]) + int(row[each]) for each in COLUMNS}
    newest = sorted(days, reverse=True)[:2]
    return [
        {"day": day, "rows": [days[day][name] for name in sorted(days[day])]} for day in newest
    ]


def _name(day: int) -> str:
    return datetime.fromtimestamp(day * SECONDS_OF_A_DAY, UTC).strftime("%Y-%m-%d")

"""The callers' spending: tokens by caller, provider and model, today and yesterday, in memory.

`GET /usage` and the metrics of tokens show these sums. They are counted with or without a ledger,
and begin at 0 with the process.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypedDict

from aioserver.telemetry.counters import Counter
from aioserver.telemetry.outcome import ESTIMATE, NOBODY, PROVIDER
from aioserver.usage.ledger_reader import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence

    from aioserver.config import settings
    from aioserver.telemetry.outcome import AttemptCost

# Rows of a day; and among them, rows of one caller with models that are not configured: such names
# come from clients. Beyond these bounds, the model of a row is OTHER.
MAX_ROWS, MAX_UNKNOWN = 10_000, 100
# Children of the metric by caller; beyond, the caller of a child is OTHER.
MAX_CHILDREN = 10_000
# Days whose rows are kept: today, yesterday, and a wrong day that a clock has shown for a moment.
MAX_DAYS = 3
# Characters of a model's name.
MAX_NAME = 200
OTHER = "other"
KINDS = ("input", "cached", "cache_write", "output", "reasoning", "audio")
# Types and sources of the metric by provider.
OF_PROVIDERS = (
    *((kind, PROVIDER) for kind in ("input", "cached", "output")),
    *((kind, ESTIMATE) for kind in ("input", "output")),
)
SECONDS_OF_A_DAY = 86_400


class Day(TypedDict):
    """The rows of one *day*, `2026-11-28` (UTC)."""

    day: str
    rows: list[dict[str, str | int]]


class _Row:
    """The spending of one caller at one provider for one model on one day.

    The prompt and answer tokens that are estimated are counted as well. *reported* is the part of
    `counts` that the children of the metrics already include; their caller is *label*.
    """

    __slots__ = (
        *("requests", "repeats", "asked", "cached", "cache_write", "answered", "reasoning"),
        *("audio", "estimated_asked", "estimated_answered", "reported", "label"),
    )

    def __init__(self, label: str) -> None:
        self.label = label
        # Attempts: the first of each request, and all others.
        self.requests = self.repeats = 0
        self.asked = self.cached = self.cache_write = 0
        self.answered = self.reasoning = self.audio = 0
        self.estimated_asked = self.estimated_answered = 0
        self.reported = (0,) * (len(KINDS) + 2)

    @property
    def kinds(self) -> tuple[int, ...]:
        """Its tokens, in the order of KINDS."""
        return (
            *(self.asked, self.cached, self.cache_write),
            *(self.answered, self.reasoning, self.audio),
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """Its tokens by kind, and the estimated ones."""
        return *self.kinds, self.estimated_asked, self.estimated_answered

    @property
    def columns(self) -> tuple[int, ...]:
        """Its values in the order of COLUMNS."""
        estimated = self.estimated_asked + self.estimated_answered
        return self.requests, self.requests + self.repeats, *self.kinds, estimated


@dataclass
class _Total:
    """All rows of one caller on the present day, and the number of rows for models that are not
    configured.
    """

    rows: list[_Row] = field(default_factory=list)
    unknown: int = 0


_NOTHING: tuple[dict[tuple[str, str, str], _Row], dict[str, object]] = {}, {}


class CallerSums:
    """Counts the costs of attempts.

    Always: each day has at most MAX_ROWS rows, and the metric by caller has at most MAX_CHILDREN
    children, besides those of OTHER. If the clock goes to another day and comes back, each day
    keeps its counts.

    An attempt changes only its row: the children of the metrics are updated when the metrics are
    read.

    *configured* has the pairs of a provider and a model that the settings name. A provider that is
    no longer among them keeps its numbers.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        # The day by its number, and the times at which the clock began and will cease to show it.
        self._day, self._began, self._midnight = 0, 0, 0
        self.configured: Container[tuple[str, str]] = frozenset()
        # The rows and the callers of today, and of the days that were shown last.
        self._rows: dict[tuple[str, str, str], _Row] = {}
        self._totals: dict[str, _Total] = {}
        self._days = {self._day: (self._rows, self._totals)}
        # The children of the metrics: by caller, provider, model and kind; of estimated tokens by
        # caller; and by provider, model, type and source.
        self._tokens: dict[tuple[str, ...], Counter] = {}
        self._estimated: dict[str, Counter] = {}
        self._of_providers: dict[tuple[str, ...], Counter] = {}

    def add(self, caller: str, cost: AttemptCost, label: str | None = None, *, anew: bool) -> None:
        """Add *cost* of a request of *caller*; *anew*: its first at this provider, for this model.
        *label*: the caller's name in metrics, if it differs.
        """
        if not self._began <= self._wall() < self._midnight:
            self._turn()
        row = self._rows.get((caller, cost.provider, cost.model))
        if row is None:
            name = caller if label is None else label
            row = self._row(caller, name, cost.provider, cost.model[:MAX_NAME])
        if anew:
            row.requests += 1
        else:
            row.repeats += 1
        if cost.source != PROVIDER:
            if cost.source == NOBODY:
                return
            row.estimated_answered += cost.tokens_out
            if cost.source == ESTIMATE:
                row.estimated_asked += cost.tokens_in
        row.asked += cost.tokens_in
        row.answered += cost.tokens_out
        tokens = cost.tokens
        if tokens.cached:
            row.cached += tokens.cached
        if tokens.reasoning or tokens.cache_write or tokens.audio_in or tokens.audio_out:
            row.cache_write += tokens.cache_write
            row.reasoning += tokens.reasoning
            row.audio += tokens.audio_in + tokens.audio_out

    @property
    def tokens(self) -> dict[tuple[str, ...], Counter]:
        """The children of the metric by caller, provider, model and kind."""
        self._update_metrics()
        return self._tokens

    @property
    def estimated(self) -> dict[str, Counter]:
        """The children of the metric of estimated tokens, by caller."""
        self._update_metrics()
        return self._estimated

    @property
    def of_providers(self) -> dict[tuple[str, ...], Counter]:
        """The children of the metric by provider, model, type and source."""
        self._update_metrics()
        return self._of_providers

    def apply(
        self, providers: Mapping[str, settings.Provider], groups: Mapping[str, settings.Group]
    ) -> None:
        """Apply the models of *providers* and *groups*, by their names."""
        self.configured = configured_models(providers, groups)
        for name, provider in providers.items():
            for model in dict.fromkeys((provider.model, *provider.models, OTHER)):
                for kind, source in OF_PROVIDERS:
                    self._of_providers.setdefault((name, model, kind, source), Counter())

    def today(self, caller: str) -> int:
        """Return all tokens of *caller* today."""
        self._turn()
        total = self._totals.get(caller)
        return 0 if total is None else sum(row.asked + row.answered for row in total.rows)

    def days(self, caller: str | None = None) -> list[Day]:
        """Return the rows of today and of yesterday, of all callers or of *caller* alone."""
        self._turn()
        return [
            {
                "day": _name(day),
                "rows": [
                    {
                        "caller": owner,
                        "provider": provider,
                        "model": model,
                        **dict(zip(COLUMNS, row.columns, strict=True)),
                    }
                    for (owner, provider, model), row in sorted(rows.items(), key=_by_name)
                    if caller is None or owner == caller
                ],
            }
            for day in (self._day, self._day - 1)
            for rows, _totals in (self._days.get(day, _NOTHING),)
        ]

    def _turn(self) -> None:
        """Turn to the current day, if it has changed."""
        now = self._wall()
        if self._began <= now < self._midnight:
            return
        self._update_metrics()
        self._day = day = int(now // SECONDS_OF_A_DAY)
        self._rows, self._totals = self._days[day] = self._days.pop(day, ({}, {}))
        # The children of the metric stay.
        while len(self._days) > MAX_DAYS:
            del self._days[next(iter(self._days))]
        self._began, self._midnight = day * SECONDS_OF_A_DAY, (day + 1) * SECONDS_OF_A_DAY

    def _row(self, caller: str, label: str, provider: str, model: str) -> _Row:
        """Return the row of today for these names, or for the model OTHER.

        If there are too many rows, a new caller with a token shares those of its role.
        """
        if label != caller and caller not in self._totals and len(self._rows) >= MAX_ROWS:
            caller = label
        total = self._totals.get(caller)
        if total is None:
            total = self._totals[caller] = _Total()
            self._estimated.setdefault(label, Counter())
        row = self._rows.get((caller, provider, model))
        if row is None:
            unknown = (provider, model) not in self.configured
            if model != OTHER and (
                len(self._rows) >= MAX_ROWS or (unknown and total.unknown >= MAX_UNKNOWN)
            ):
                return self._row(caller, label, provider, OTHER)
            total.unknown += unknown
            row = self._rows[caller, provider, model] = _Row(label)
            total.rows.append(row)
        return row

    def _update_metrics(self) -> None:
        """Update the children of the metrics to the counts of today's rows."""
        for (_, provider, model), row in self._rows.items():
            counts = row.counts
            if counts == row.reported:
                continue
            *more, asked, answered = [
                count - before for count, before in zip(counts, row.reported, strict=True)
            ]
            row.reported = counts
            for kind, count in zip(KINDS, more, strict=True):
                if count:
                    self._child(row.label, provider, model, kind).value += count
            self._estimated[row.label].value += asked + answered
            known = (provider, model, "output", PROVIDER) in self._of_providers
            for kind, source, count in (
                ("input", PROVIDER, more[0] - asked),
                ("input", ESTIMATE, asked),
                ("cached", PROVIDER, more[1]),
                ("output", PROVIDER, more[3] - answered),
                ("output", ESTIMATE, answered),
            ):
                labels = provider, model if known else OTHER, kind, source
                if count:
                    self._of_providers.setdefault(labels, Counter()).value += count

    def _child(self, caller: str, provider: str, model: str, kind: str) -> Counter:
        """Return the child of the metric, made now if needed, unless there are too many."""
        if (provider, model) not in self.configured:
            model = OTHER
        labels = caller, provider, model, kind
        if labels not in self._tokens and len(self._tokens) >= MAX_CHILDREN:
            labels = OTHER, provider, model, kind
        return self._tokens.setdefault(labels, Counter())


def configured_models(
    providers: Mapping[str, settings.Provider], groups: Mapping[str, settings.Group]
) -> set[tuple[str, str]]:
    """Return the names of *providers*, each with a model that it or a member of *groups* names."""
    return {
        (name, model)
        for name, provider in providers.items()
        for model in (provider.model, *provider.models)
    } | {
        (member.provider, model)
        for group in groups.values()
        for member in group.members
        if (model := member.model) is not None
    }


def together(several: Iterable[Sequence[Day]]) -> list[Day]:
    """Return the two newest days of *several* instances, with their rows added up."""
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


def _by_name(item: tuple[tuple[str, str, str], _Row]) -> tuple[str, str, str]:
    return item[0]

"""Troubles: what is wrong with a provider and since when, in words that every display shows.

`/stats`, the dashboard, `top` and the log say the same, since each says this. A trouble has a *text*
that stands alone, "groq has said nothing for 6 s in 25 answers", and a *detail*: when it began, and
what happens next. Of several the worst is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.monitoring.snapshot import ProviderState, SilenceState, Snapshot, Trouble

# Kinds of troubles.
SILENT = "silent"


class Troubles:
    """What is wrong with each provider, snapshot by snapshot.

    Always: a trouble that lasts keeps the time at which it began.
    """

    def __init__(self) -> None:
        self._now: dict[str, Trouble] = {}

    @property
    def now(self) -> Mapping[str, Trouble]:
        """What was wrong at the last snapshot, by provider."""
        return self._now

    def look(self, snapshot: Snapshot) -> None:
        """Find what is wrong in *snapshot*, and write it there."""
        before, self._now = self._now, {}
        for name, provider in snapshot["providers"].items():
            trouble = _trouble(name, provider, snapshot["time"], before.get(name))
            provider["trouble"] = trouble
            if trouble is not None:
                self._now[name] = trouble


def _trouble(
    name: str, provider: ProviderState, now: float, before: Trouble | None
) -> Trouble | None:
    """Return the worst trouble of the provider *name*, which had the trouble *before*."""
    silent = provider["silent"]
    if stalled(silent):
        since = _since(SILENT, before, now - silent["longest"])
        detail = f"It began {span(now - since)} ago"
        return {"kind": SILENT, "since": since, "text": silence(name, silent), "detail": detail}
    return None


def stalled(silent: SilenceState) -> bool:
    """Whether the provider itself has stalled: half of the answers under way, or more."""
    number = silent["stalled"] + silent["unanswered"]
    return number > 0 and 2 * number >= silent["under_way"]


def silence(name: str, silent: SilenceState) -> str:
    """Say how long the provider *name* has been silent, and where."""
    in_answers, before = silent["stalled"], silent["unanswered"]
    where = [f"in {_count(in_answers, 'answer')}"] if in_answers else []
    if before:
        where.append(f"to {_count(before, 'request')}")
    return f"{name} has said nothing for {span(silent['longest'])} {' and '.join(where)}"


def span(seconds: float) -> str:
    """Say a number of seconds as people do: 6 s, 3 min, 2 h."""
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _since(kind: str, before: Trouble | None, began: float) -> float:
    """Return when a trouble of this kind began: *began*, unless it was there before."""
    return before["since"] if before is not None and before["kind"] == kind else round(began, 3)

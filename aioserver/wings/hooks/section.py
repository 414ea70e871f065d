"""The state of the hooks for operators."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, TypedDict

from aioserver.monitoring.section import Section
from aioserver.monitoring.state import COUNTS, SUM

if TYPE_CHECKING:
    from aioserver.telemetry.metrics import Metrics
    from aioserver.wings.hooks.hook_set import HookSet


class HookState(TypedDict):
    """One hook: the calls that are open, and the outcomes of the others since the start."""

    open: Annotated[int, SUM]
    outcomes: Annotated[dict[str, int], COUNTS]


class HooksState(TypedDict):
    """The hooks by name, and the bytes of answers that they have not taken yet."""

    behind_bytes: Annotated[int, SUM]
    by_name: dict[str, HookState]


class HooksSection(Section[HooksState]):
    """The state of *hooks* for operators; *metrics* count their calls."""

    key = "hooks"
    shape = HooksState

    def __init__(self, hooks: HookSet, metrics: Metrics) -> None:
        self._hooks, self._metrics = hooks, metrics

    def state(self) -> HooksState:
        """Return the state of the configured hooks."""
        calls = self._hooks.calls()
        outcomes: dict[str, Counter[str]] = {name: Counter() for name in calls}
        for (name, _event, outcome), counter in self._metrics.hook_calls.items():
            if name in outcomes:
                outcomes[name][outcome] += int(counter.value)
        return {
            "behind_bytes": self._hooks.stats().behind,
            "by_name": {
                name: {"open": calls[name], "outcomes": dict(counts)}
                for name, counts in outcomes.items()
            },
        }

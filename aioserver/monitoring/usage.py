"""The section of the ledger: the key `usage` of `/stats`, a gauge, and its troubles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypedDict

from aioserver.monitoring.alerts import count
from aioserver.monitoring.findings import FINDINGS
from aioserver.monitoring.section import Gauge, Section, SectionTrouble
from aioserver.monitoring.state import ANY, OWN, SUM
from aioserver.usage.ledger import MAX_LINES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.usage.accounting import Usage


def _first(values: Sequence[str | None]) -> str | None:
    return next((value for value in values if value is not None), None)


class UsageState(TypedDict):
    """The ledger: whether there is one, how many lines were written, were lost and wait, and the
    reason if it cannot be written now.
    """

    ledger: Annotated[bool, ANY]
    path: Annotated[str | None, OWN]
    lines: Annotated[int, SUM]
    lost: Annotated[int, SUM]
    queue: Annotated[int, SUM]
    trouble: Annotated[str | None, _first]


class UsageSection(Section[UsageState]):
    """The state of the ledger of *usage*."""

    key = "usage"
    shape = UsageState
    gauges = (
        Gauge("usage_queue", lambda state: state["queue"], "Lines of the ledger to be written"),
    )

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    def state(self) -> UsageState:
        """Return the state of the ledger."""
        usage = self._usage
        lines, lost, queue = usage.lines
        error = None if usage.ledger is None else usage.ledger.trouble
        trouble = None if error is None else error.strerror or str(error)
        if trouble is None and queue >= MAX_LINES:
            trouble = "its disk is slower than the answers"
        return {
            "ledger": usage.ledger is not None,
            "path": usage.path,
            "lines": lines,
            "lost": lost,
            "queue": queue,
            "trouble": trouble,
        }

    def trouble(self, state: UsageState) -> SectionTrouble | None:
        """Return why the ledger is not written."""
        if state["trouble"] is None:
            return None
        waiting, lost = count(state["queue"], "line"), state["lost"]
        gone = f", {count(lost, 'line')} lost so far" if lost else ""
        return SectionTrouble(
            "ledger",
            "No ledger",
            f"the ledger in {state['path']} cannot be written: {state['trouble']}",
            f"Answers go on; {waiting} to be written{gone}",
            FINDINGS["ledger"].remedy,
        )

    def recovery(self, state: UsageState) -> str:
        """Return that the ledger is written again, and how many lines were lost."""
        lost = f"; {count(state['lost'], 'line')} lost" if state["lost"] else ""
        return f"the ledger is written again{lost}"

"""The state of the storage of conversations for operators: the key `history` of `/stats`, two
gauges, and its troubles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypedDict

from aioserver.monitoring.alerts import count
from aioserver.monitoring.section import Gauge, Section, SectionTrouble
from aioserver.monitoring.state import OWN, SUM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.wings.conversations.history import History


class HistoryTrouble(TypedDict):
    """A fault of the storage of conversations, its beginning (Unix time), and its remedy."""

    kind: str
    since: float
    text: str
    advice: str


def _oldest(troubles: Sequence[HistoryTrouble | None]) -> HistoryTrouble | None:
    known = [trouble for trouble in troubles if trouble is not None]
    return min(known, key=lambda trouble: trouble["since"], default=None)


class HistoryState(TypedDict):
    """The storage of conversations: `memory`, `sql` or `redis`; and the numbers of waiting,
    written and lost turns.
    """

    storage: Annotated[str, OWN]
    waiting: Annotated[int, SUM]
    written: Annotated[int, SUM]
    lost: Annotated[int, SUM]
    trouble: Annotated[HistoryTrouble | None, _oldest]


class HistorySection(Section[HistoryState]):
    """The state of *history*."""

    key = "history"
    shape = HistoryState
    gauges = (
        Gauge(
            "history_trouble",
            lambda state: state["trouble"] is not None,
            "Whether conversations are not kept as the settings ask for",
        ),
        Gauge(
            "history_waiting",
            lambda state: state["waiting"],
            "Turns of conversations that wait to be written",
        ),
    )

    def __init__(self, history: History) -> None:
        self._history = history

    def state(self) -> HistoryState:
        """Return the state of the storage."""
        stats = self._history.stats()
        trouble = stats.trouble
        return {
            "storage": stats.storage,
            "waiting": stats.waiting,
            "written": stats.written,
            "lost": stats.lost,
            "trouble": None
            if trouble is None
            else {
                "kind": trouble.kind,
                "since": round(stats.since, 3),
                "text": trouble.text,
                "advice": trouble.advice,
            },
        }

    def trouble(self, state: HistoryState) -> SectionTrouble | None:
        """Return a trouble if conversations are not kept as the settings demand."""
        trouble = state["trouble"]
        if trouble is None:
            return None
        detail = "Chats continue with the turns in memory alone"
        return SectionTrouble(
            trouble["kind"], "Not kept", trouble["text"], detail, trouble["advice"]
        )

    def recovery(self, state: HistoryState) -> str:
        """Return that conversations are kept again, and how many turns were lost."""
        lost = f"; {count(state['lost'], 'turn')} lost" if state["lost"] else ""
        return f"conversations are kept again{lost}"

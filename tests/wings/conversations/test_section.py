"""What operators see of the storage of conversations, of one instance and of several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.config.settings import Context
from aioserver.monitoring.fold import fold, rules_of
from aioserver.monitoring.incidents import QUIET, Detector
from aioserver.monitoring.interval import Interval
from aioserver.wings.conversations.history import History
from aioserver.wings.conversations.memory import Conversations
from aioserver.wings.conversations.section import HistorySection, HistoryState
from tests.support.history import policy

if TYPE_CHECKING:
    from aioserver.wings.conversations.section import HistoryTrouble

NOTHING = Interval({}, {}, lag=0.0, lag_max=0.0, cpu=0.0, tasks=0)


def trouble(kind: str, since: float) -> HistoryTrouble:
    return {"kind": kind, "since": since, "text": f"{kind} text", "advice": f"{kind} advice"}


def state(waiting: int = 0, lost: int = 0, why: HistoryTrouble | None = None) -> HistoryState:
    return {"storage": "sql", "waiting": waiting, "written": 5, "lost": lost, "trouble": why}


def section() -> HistorySection:
    return HistorySection(History(Conversations(Context(), policy())))


def test_turns_are_added_up_and_the_oldest_trouble_is_shown() -> None:
    later, sooner = trouble("full", 9.0), trouble("missing", 8.0)

    total = fold(rules_of(HistoryState), [state(1, 2), state(3, 0, later), state(0, 1, sooner)])

    assert total == {
        "storage": "sql",
        "waiting": 4,
        "written": 15,
        "lost": 3,
        "trouble": sooner,
    }


def test_a_trouble_is_an_incident_when_it_begins_and_when_it_ends() -> None:
    detector, history = Detector(), section()
    full = state(why=trouble("full", 1.0))

    def tick(now: float, state: HistoryState) -> list[tuple[str, str, str]]:
        incidents = detector.detect(now, NOTHING, {}, [(history, state)])
        return [(each["kind"], each["severity"], each["text"]) for each in incidents]

    assert tick(1.0, full) == [("history", "error", "full text")]
    assert tick(2.0, full) == []
    assert tick(3.0, state(lost=2)) == [
        ("history", "info", "conversations are kept again; 2 turns lost")
    ]
    assert tick(4.0, full) == [], "in its quiet time"
    assert tick(1.0 + QUIET, full) == [("history", "error", "full text")]
    assert tick(2.0 + QUIET, state()) == [("history", "info", "conversations are kept again")]


def test_a_storage_in_memory_has_no_trouble() -> None:
    history = section()

    assert history.state() == {
        "storage": "memory",
        "waiting": 0,
        "written": 0,
        "lost": 0,
        "trouble": None,
    }
    assert history.trouble(history.state()) is None

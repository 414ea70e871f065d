"""The soak test itself, half an hour long; and that its claims notice what they are for."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.soak import claims
from tests.soak.answers import Answer, Violation
from tests.soak.plot import draw
from tests.soak.run import soak

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))


@pytest.mark.soak
@pytest.mark.timeout(60 * MINUTES + 600)
def test_a_server_is_at_the_end_as_it_was_at_the_start(tmp_path: Path) -> None:
    # The test is not asynchronous, since the server chooses its own loop.
    run = asyncio.run(soak(MINUTES, tmp_path / "soak.jsonl"))

    assert not [*claims.broken(run)]


# The claims.

STATE = dict.fromkeys(claims.COUNTS, 0) | {"tasks": 3, "fds": 20}
END = {**STATE, "asked": 10, "violations": [], "exit_code": 0, "tracebacks": 0}


def run_of(
    *, rss: tuple[int, ...] = (50,) * 30, late_p50: float = 0.06, late_p99: float = 0.1, **end: Any
) -> list[claims.Line]:
    """The lines of a run; *rss* is in MiB, *end* is put over its last line."""
    samples = [
        {"kind": "sample", "t": 5.0 * n, "rss": size * claims.MIB, "kept": 0, "asked": n}
        | {"running": 1}
        for n, size in enumerate(rss)
    ]
    windows = [
        {"kind": "window", "t": 60.0 * n, "requests": 9, "ok": 9}
        | {"first_token_p50": late_p50 if n > 5 else 0.06, "direct_p50": 0.05}
        | {"first_token_p99": late_p99 if n > 5 else 0.1, "direct_p99": 0.08}
        for n in range(9)
    ]
    return [
        {"kind": "start", "t": 0.0, **STATE},
        *samples,
        *windows,
        {"kind": "end", "t": 600.0, **END, **end},
    ]


def test_a_good_run_breaks_no_claim() -> None:
    run = run_of(rss=(20,) * 10 + (50,) * 10 + (52,) * 10)

    assert [*claims.broken(run)] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rss": (*range(30, 90, 2),)}, "memory grew from 59.0 to 79.0 MiB"),
        ({"late_p50": 0.1}, "p50 of what is added grew from 10.0 to 50.0 ms"),
        ({"late_p99": 0.3}, "p99 of what is added grew from 20.0 to 220.0 ms"),
        ({"kept": 1}, "1 kept are left"),
        ({"pool": 2}, "2 pool are left"),
        ({"fds": 21}, "21 fds are left, 20 were there at the start"),
        ({"tasks": 4}, "4 tasks are left"),
        ({"violations": ["sse: wrong"]}, "sse: wrong"),
        ({"exit_code": 1}, "the server ended with 1"),
        ({"tracebacks": 1}, "1 tracebacks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_claim_that_does_not_hold_is_reported(changes: dict[str, Any], words: str) -> None:
    faults = [*claims.broken(run_of(**changes))]

    assert len(faults) == 1
    assert words in faults[0]


@pytest.mark.parametrize(
    ("fault", "does", "words"),
    [
        ("", lambda answer: answer.number(2), "event 2 follows event 0"),
        ("", lambda answer: answer.add("Hex"), "not in the answer"),
        ("", lambda answer: answer.finish("complete"), "complete with 0 of 5 characters"),
        ("cut-3", lambda answer: answer.finish("complete"), "though the provider failed by cut-3"),
        ("cut-3", lambda answer: [answer.finish("error"), answer.finish("error")], "ends twice"),
    ],
    ids=["a gap", "another text", "half an answer", "a good end of a bad answer", "two ends"],
)
def test_a_client_notices_what_is_wrong(
    fault: str, does: Callable[[Answer], object], words: str
) -> None:
    with pytest.raises(Violation, match=words):
        does(Answer("Hello", fault))


def test_a_client_takes_what_is_right() -> None:
    answer = Answer("Hello", "")

    answer.number(1)
    answer.add("Hel")
    answer.number(2)
    answer.add("lo")
    answer.finish("complete")

    assert answer.end == "complete"


def test_a_picture_has_every_curve() -> None:
    picture = draw(run_of())

    assert picture.count("<polyline") == 7
    assert picture.startswith("<svg")

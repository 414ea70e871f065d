"""A ledger as it is read: each attempt once, whatever has become of its lines."""

from __future__ import annotations

import io
import json
from random import Random
from typing import TYPE_CHECKING, Any

from aioserver.usage.ledger_reader import MAX_LINE, Reading, files_of, spent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NOON = 20_785.5 * 86_400
# 2026-11-28, counted from 1970-01-01.
TODAY = 20_785


def entry(number: int = 1, attempt: int = 1, outcome: str = "ok", **changes: Any) -> bytes:
    fields = {
        "ts": "2026-11-28T11:00:00.000Z",
        "id": f"9f3c2a71-{number:x}",
        "attempt": attempt,
        "caller": "web",
        "provider": "p",
        "model": "m",
        "outcome": outcome,
        "in": 10,
        "out": 1,
        "source": "provider",
    }
    return json.dumps(fields | changes).encode() + b"\n"


def read(*lines: bytes, by: Sequence[str] = ("caller",), **span: str) -> Reading:
    reading = Reading(by, **span)
    reading.read(io.BytesIO(b"".join(lines)))
    reading.finish(NOON)
    return reading


def test_an_attempt_is_counted_once() -> None:
    reading = read(entry(), entry(), entry(2))

    assert (reading.total.requests, reading.total.attempts) == (2, 2)
    assert reading.total.input_tokens == 20


def test_a_later_line_replaces_one_that_says_running_wherever_it_stands() -> None:
    running = entry(outcome="running", out=500, source="estimate")

    for lines in ((running, entry()), (entry(), running), (running, running, entry())):
        total = read(*lines).total
        assert (total.attempts, total.output_tokens, total.estimated_tokens) == (1, 1, 0)


def test_what_has_no_other_line_is_lost_and_counts_its_newest_estimate() -> None:
    lines = [
        entry(
            outcome="running", ts=f"2026-11-28T11:00:{second}.000Z", out=second, source="estimate"
        )
        for second in (30, 59, 31)
    ]

    reading = read(*lines, by=("outcome",))

    assert list(reading.rows) == [("lost",)]
    assert reading.total.output_tokens == 59
    assert reading.total.estimated_tokens == 69


def test_what_runs_now_is_not_lost() -> None:
    reading = read(entry(outcome="running", ts="2026-11-28T11:59:40.000Z"), by=("outcome",))

    assert list(reading.rows) == [("running",)]


def test_a_refused_attempt_takes_its_line_back() -> None:
    running, refused = entry(outcome="running"), entry(outcome="refused", source="none")

    assert read(running, refused).total.attempts == 0
    assert read(refused, running).total.attempts == 0


def test_lines_that_are_torn_or_none_of_ours_are_skipped_and_counted() -> None:
    reading = read(
        entry()[:40] + b"\n",
        b"\n",
        b"[]\n",
        b'{"ts":"2026"}\n',
        entry(id="9f3c2a71-xyz"),
        b"x" * (3 * MAX_LINE) + b"\n",
        b'{"ts":"2026-11-28T11:00:00.000Z","lost":17}\n',
        entry(),
        entry(2)[:30],
    )

    assert reading.total.attempts == 1
    assert reading.skipped == 6
    assert reading.lost == 17


def test_a_request_counts_once_in_each_row_where_it_has_attempts() -> None:
    lines = [entry(1, 1, provider="a"), entry(1, 2, provider="b"), entry(1, 3, provider="a")]
    lines += [entry(2, 2, provider="b"), entry(3, 1, provider="b"), entry(3, 2, provider="b")]

    for seed in range(30):
        Random(seed).shuffle(lines)
        reading = read(*lines, by=("provider",))
        assert reading.total.requests == 3, seed
        assert {name: row.requests for name, row in reading.rows.items()} == {
            ("a",): 1,
            ("b",): 3,
        }, seed


def test_an_attempt_belongs_to_the_moment_of_its_end() -> None:
    lines = [
        entry(1, 1, "running", ts="2026-11-28T23:59:40.000Z", source="estimate"),
        entry(1, 1, "ok", ts="2026-11-29T00:00:10.000Z"),
    ]

    assert read(*lines, since="2026-11-28", until="2026-11-29").total.attempts == 0
    assert read(*lines, since="2026-11-29").total.attempts == 1


def test_what_was_spent_on_a_day_is_the_sum_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "usage-2026-11-27.jsonl").write_bytes(entry(1, ts="2026-11-27T23:00:00.000Z"))
    (tmp_path / "usage-2026-11-28.jsonl").write_bytes(entry(2) + entry(3, caller="x"))
    (tmp_path / "usage-2026-11-28.w3.jsonl").write_bytes(entry(4, outcome="running"))
    (tmp_path / "notes.txt").write_bytes(entry(5))

    assert spent(tmp_path, {"day": TODAY}, TODAY) == {"web": {"day": 22}, "x": {"day": 11}}
    assert spent(tmp_path / "none", {"day": TODAY}, TODAY) == {}
    assert len(files_of(tmp_path)) == 3


def test_longer_spans_are_counted_beside_the_day_in_one_reading(tmp_path: Path) -> None:
    days = ("2026-10-31", "2026-11-01", "2026-11-22", "2026-11-23", "2026-11-28", "2026-11-29")
    for number, day in enumerate(days):
        line = entry(number, ts=f"{day}T12:00:00.000Z", out=10**number)
        (tmp_path / f"usage-{day}.jsonl").write_bytes(line)

    sums = spent(tmp_path, {"day": TODAY, "week": TODAY - 5, "month": TODAY - 27}, TODAY)

    assert sums == {"web": {"day": 10_010, "week": 11_020, "month": 11_150}}


def test_an_attempt_over_midnight_is_counted_once_in_a_longer_span(tmp_path: Path) -> None:
    running = entry(ts="2026-11-27T23:59:40.000Z", outcome="running", out=500)
    (tmp_path / "usage-2026-11-27.jsonl").write_bytes(running + entry(2, ts="2026-11-27T23:00"))
    (tmp_path / "usage-2026-11-28.jsonl").write_bytes(entry(ts="2026-11-28T00:00:10.000Z"))

    assert spent(tmp_path, {"week": TODAY - 5}, TODAY) == {"web": {"week": 22}}

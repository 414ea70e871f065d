"""The page that lists what was made to fail names files of tests and metrics that exist, and tests
on each line.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/fault-checklist.md").read_text()
MONITORING = (ROOT / "docs/monitoring.md").read_text()
ROWS = [
    re.split(r"\s*\|\s*", line[1:-1].strip())
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| failure", "| ---"))
]


def test_the_page_has_its_lines() -> None:
    assert len(ROWS) >= 40
    assert {len(row) for row in ROWS} == {4}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_line_names_tests_and_metrics_that_exist(row: list[str]) -> None:
    failure, result, metrics, tests = row
    named = re.findall(r"`([^`]+)`", tests)

    missing = [name for name in named if not (ROOT / "tests" / name).exists()]
    unknown = [
        name for name in re.findall(r"`(\w+)`", metrics) if not re.search(f"`{name}`", MONITORING)
    ]

    assert failure
    assert result
    assert named
    assert missing == unknown == []

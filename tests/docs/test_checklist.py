"""The page that lists what was made to fail names tests and metrics that exist, and a test on each
line.
"""

from __future__ import annotations

import ast
import functools
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
LATER = "not yet: "


@functools.cache
def named_in(file: str) -> frozenset[str]:
    """The names of the tests in *file*."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, functions))


def test_the_page_has_its_lines() -> None:
    assert len(ROWS) >= 49
    assert {len(row) for row in ROWS} == {4}
    assert not any(row[3].startswith(LATER) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_line_names_tests_and_metrics_that_exist(row: list[str]) -> None:
    failure, result, metrics, tests = row
    nodes = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)

    missing = [f"{file}::{name}" for file, name in nodes if name not in named_in(file)]
    unknown = [
        name for name in re.findall(r"`(\w+)`", metrics) if not re.search(f"`{name}`", MONITORING)
    ]

    assert failure
    assert result
    assert missing == unknown == []
    assert len(set(nodes)) == len(nodes) == tests.count("::")
    assert nodes or tests.startswith(LATER)

"""A jump of the wall clock changes no limit, no timeout, no wait: nothing of them looks at it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.package import MODULES

if TYPE_CHECKING:
    from collections.abc import Iterator

WALL = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now"}
WALL |= {"datetime.utcnow", "datetime.today", "date.today"}
CALLED = {clock.rpartition(".")[2] for clock in WALL}
SHOWN = {  # module: why it may know what time people have
    "monitoring.incidents": "the stamps of incidents",
    "monitoring.snapshot": "the stamps of snapshots",
    "faces.ready": "the Date header",
    "wings.tracing.export": "the times of spans",
    "providers.error_mapping": "a Retry-After that is a date",
    "providers.rate_headers": "a reset that is a date, of a provider that sends no Date",
    "wings.simulator.faults": "it sends such a date",
    "auth.keys": "a key expires at a date",
    "auth.sessions": "a session is older than the process",
    "commands.key": "a key that has expired is listed as such",
    "files.certificates": "whether a certificate has expired",
    "server.certificates": "whether a certificate expires soon",
    "server.tls": "whether the certificate of a client has expired since its last handshake",
    "wings.jwt.token_callers": "when a token expires",
    "wings.responses.redis": "the age of responses that another instance has stored",
    "tools.doctor.network": "the days for which a certificate is still valid",
    "tools.doctor.server": "compares the server's Date with the time of this machine",
    "wings.responses.socket": "`created_at` in OpenAI's objects",
    "wings.responses.sinks": "`completed_at` in OpenAI's objects",
    "wings.responses.attempt": "`created_at` in OpenAI's objects",
    "wings.conversations.redis": "the age of turns that another machine has written",
    "gateway.contracts.histories": "when a question was asked, of a turn that is kept for days",
    "wings.conversations.memory": "turns are older than the process, and kept for days",
    "tools.top.screen": "the times of incidents",
    "limits.budget": "a budget of a day, which begins at 00:00 UTC",
    "wings.cluster.limits.shared_budget": "a budget of a day, which begins at 00:00 UTC",
    "server.app": "which day's ledger says what was used today",
    "usage.ledger": "the stamps of lines, and the days of files",
    "usage.ledger_reader": "whether an attempt may still run",
    "usage.sums": "the day that sums belong to",
    "usage.accounting": "the stamps of lines",
    "telemetry.ended_requests": "when a request has ended, as its log line has it",
    "tools.usage": "a time as `7d` ago",
    "wings.anthropic.face": "a reset that is a date, as Anthropic has it",
    "wings.simulator.shapes": "`created` in OpenAI's objects",
    "monitoring.alerts": "the time until which former processes may run",
    "server.runner": "since when another process has taken the place of this one",
    "workers.parent": "the time until which former processes may run",
    "wings.responses.compaction": "`created_at` in OpenAI's objects",
}


def wall_clocks(tree: ast.Module) -> set[str]:
    """The wall clocks that are named in a module."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
    clocks = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            first, rest = node.id, []
        elif isinstance(node, ast.Attribute) and node.attr in CALLED:
            first, *rest = ast.unparse(node).split(".")
        else:
            continue
        whole = ".".join([names.get(first, first), *rest])
        clocks |= {clock for clock in WALL if whole == clock or whole.endswith(f".{clock}")}
    return clocks


def test_only_modules_that_show_the_time_ask_for_it() -> None:
    assert {module for module, tree in MODULES.items() if wall_clocks(tree)} == SHOWN.keys()


@pytest.mark.parametrize(
    "text",
    [
        "import time\ntime.time()",
        "from time import time\ntime()",
        "import time as t\nx = t.time",
        "from datetime import datetime\ndatetime.now()",
        "import datetime\ndatetime.datetime.now()",
    ],
)
def test_a_wall_clock_is_found_by_any_name(text: str) -> None:
    assert wall_clocks(ast.parse(text))
    assert not wall_clocks(ast.parse("from time import monotonic\nmonotonic()"))


TESTS = Path(__file__).parent
# Seconds that a busy machine may take for anything.
BUSY = 30.0
VIRTUAL = {"virtual_time", "virtually", "world_test"}
SPAN = re.compile(r"(time|monotonic|perf_counter)\(\) - ")


def clocks_of_tests(text: str) -> Iterator[str]:
    """What tests in a module assert to be less than some seconds of the machine's time."""
    for test in ast.parse(text).body if SPAN.search(text) else ():
        if not isinstance(test, ast.AsyncFunctionDef):
            continue
        if VIRTUAL & {part for mark in test.decorator_list for part in _names(mark)}:
            continue
        spans = {
            name
            for node in ast.walk(test)
            if isinstance(node, ast.Assign) and _span(node.value, set())
            for target in node.targets
            for name in _names(target)
        }
        for check in ast.walk(test):
            for comparison in ast.walk(check) if isinstance(check, ast.Assert) else ():
                if isinstance(comparison, ast.Compare) and _bounded(comparison, spans):
                    yield f"{test.name}: {ast.unparse(comparison)}"


def _names(node: ast.AST) -> set[str]:
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return names | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def _span(node: ast.AST, spans: set[str]) -> bool:
    """Whether *node* is a span of time, or one of *spans*."""
    if isinstance(node, ast.Name):
        return node.id in spans
    clocks = {"time", "monotonic", "perf_counter"}
    minus = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)
    return minus and bool(clocks & _names(node))


def _bounded(comparison: ast.Compare, spans: set[str]) -> bool:
    """Whether a span has to be less than something below BUSY."""
    sides = [comparison.left, *comparison.comparators]
    for left, operator, right in zip(sides, comparison.ops, sides[1:], strict=False):
        less = isinstance(operator, ast.Lt | ast.LtE)
        small, large = (left, right) if less else (right, left)
        if isinstance(operator, ast.Gt | ast.GtE | ast.Lt | ast.LtE) and _span(small, spans):
            numbers = (each.value for each in ast.walk(large) if isinstance(each, ast.Constant))
            return max((n for n in numbers if isinstance(n, int | float)), default=0.0) < BUSY
    return False


def test_no_test_asserts_that_the_machine_is_quick() -> None:
    """`within` of support/waiting.py says it of a time that jumps."""
    found = {
        str(path.relative_to(TESTS)): [*clocks_of_tests(path.read_text())]
        for path in TESTS.rglob("test_*.py")
    }
    assert {path: checks for path, checks in found.items() if checks} == {}

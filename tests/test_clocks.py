"""A jump of the wall clock changes no limit, no timeout, no wait: nothing of them looks at it."""

from __future__ import annotations

import ast

import pytest

from tests.support.package import MODULES

WALL = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now"}
WALL |= {"datetime.utcnow", "datetime.today", "date.today"}
SHOWN = {  # module: why it may know what time people have
    "monitoring.incidents": "the stamps of incidents",
    "monitoring.snapshot": "the stamps of snapshots",
    "faces.ready": "the Date header",
    "wings.tracing.export": "the times of spans",
    "providers.error_mapping": "a Retry-After that is a date",
    "providers.rate_headers": "a reset that is a date, of a provider that sends no Date",
    "wings.simulator.refusals": "it sends such a date",
    "auth.keys": "a session is older than the process",
    "wings.responses.redis": "the age of responses that another instance has stored",
    "tools.doctor.arrivals": "compares the stamps of events with the time of this machine",
    "tools.doctor.network": "the days for which a certificate is still valid",
    "tools.doctor.server": "compares the server's Date with the time of this machine",
    "wings.responses.socket": "`created_at` in OpenAI's objects",
    "wings.responses.sinks": "`completed_at` in OpenAI's objects",
    "wings.responses.attempt": "`created_at` in OpenAI's objects",
    "wings.conversations.redis": "the age of turns that another machine has written",
    "gateway.histories": "when a question was asked, of a turn that is kept for days",
    "wings.conversations.memory": "turns are older than the process, and kept for days",
    "tools.top.screen": "the times of incidents",
    "wings.simulator.shapes": "`created` in OpenAI's objects",
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
        if isinstance(node, ast.Name | ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            whole = ".".join([names.get(first, first), *rest])
            clocks |= {clock for clock in WALL if whole == clock or whole.endswith(f".{clock}")}
    return clocks


@pytest.mark.parametrize("module", MODULES)
def test_only_modules_that_show_the_time_ask_for_it(module: str) -> None:
    assert bool(wall_clocks(MODULES[module])) == (module in SHOWN)


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

"""Ledgers: lines to put into one, and those that its files have."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioserver.protocol.tokens import Tokens
from aioserver.telemetry.outcome import AttemptCost
from aioserver.usage.ledger import Line

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.server import RunningServer

DAY = 86_400
# 2026-11-28T12:00:00Z.
NOON = 20_785.5 * DAY
PART = AttemptCost(
    *("openai", "gpt", "ok", 1200, 340, "provider"),
    Tokens(1200, 1024, 340, 0, 128),
    *(0.0121, 0.31, 2.2),
)


def line(number: int = 1, when: float = NOON, cost: AttemptCost = PART, **changes: Any) -> Line:
    """The first attempt of the request *number*."""
    whole = Line(when, number, 1, "r", "web", "openai", "chat/completions", False, "ok", cost)
    return whole._replace(**changes)


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for a thread, or for another process."""
    end = time.monotonic() + 30.0
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def lines_of(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of each file in *directory*."""
    return {
        path.name: [json.loads(text) for text in path.read_bytes().splitlines()]
        for path in sorted(directory.iterdir())
    }


def entries_of(directory: Path) -> list[dict[str, Any]]:
    """The last line of each attempt in *directory*, in the order of their first lines."""
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    for lines in lines_of(directory).values():
        for each in lines:
            if "id" in each:
                newest[each["id"], each["attempt"]] = each
    return list(newest.values())


def written(server: RunningServer) -> list[dict[str, Any]]:
    """The last line of each attempt of *server*, once all are written."""
    usage = server.context.usage
    # Of the machine's time, not of the loop's, which may jump.
    wait_until(lambda: not usage.lines[2])
    assert usage.path is not None
    return entries_of(Path(usage.path))

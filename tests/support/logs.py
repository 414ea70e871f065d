"""What a log says of the server, and not of a busy machine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

# A machine with other work makes the loop late, which is an error in the log of a server.
LATE = "the event loop was "


def errors(records: Iterable[logging.LogRecord]) -> list[logging.LogRecord]:
    """Return those of *records* that are errors, but for a loop that was late."""
    return [
        record
        for record in records
        if record.levelno >= logging.ERROR and LATE not in record.getMessage()
    ]


def without_lateness(log: str, *expected: str) -> str:
    """Return the lines of *log* that say nothing of a loop that was late, nor have *expected*
    words.
    """
    lines = log.splitlines()
    return "\n".join(
        line for line in lines if not any(words in line for words in (LATE, *expected))
    )


def fields_of(
    caplog: pytest.LogCaptureFixture, event: str = "request finished"
) -> list[dict[str, Any]]:
    """Return the fields of each line of *event*."""
    lines = [record for record in caplog.records if record.getMessage() == event]
    return [record.__dict__.get("fields", {}) for record in lines]

"""Logs: one JSON object a line for machines, plain lines for people. Never a key, never chat text."""

from __future__ import annotations

import logging
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.settings import Logging

MAX_TEXT = 2000  # characters of a message


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, service: str, version: str) -> None:
        super().__init__()
        self._service = {"service": service} | ({"version": version} if version else {})

    def format(self, record: logging.LogRecord) -> str:
        """The line of *record*; its `fields`, if it has any, are fields of the object."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "ts": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage()[:MAX_TEXT],
            **self._service,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class ConsoleFormatter(logging.Formatter):
    """A line for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The line, with the fields behind it."""
        text = super().format(record)
        fields = getattr(record, "fields", None)
        if fields:
            text += "  " + " ".join(f"{name}={value}" for name, value in fields.items())
        return text


class RateLimit:
    """At most *per_second* lines of one kind a second; those left out are counted."""

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._kinds: dict[tuple[str, ...], list[int]] = {}  # kind: [second, lines, left out]

    def allow(self, *kind: str) -> int:
        """How many lines of *kind* were left out since the last one; -1: leave this one out, too."""
        second = int(self._clock())
        state = self._kinds.setdefault(kind, [second, 0, 0])
        if state[0] != second:
            state[0], state[1] = second, 0
        if state[1] >= self._per_second:
            state[2] += 1
            return -1
        state[1] += 1
        suppressed, state[2] = state[2], 0
        return suppressed


def set_up(given: Logging) -> None:
    """Send all logs to stderr in the configured format."""
    handler = logging.StreamHandler(sys.stderr)
    if given.format == "json":
        handler.setFormatter(JsonFormatter(given.service_name, given.service_version))
    else:
        handler.setFormatter(ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(given.level)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # aiohttp writes a traceback for each malformed request: our own answer and log say it better.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)

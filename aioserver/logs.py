"""Logs: one JSON object a line for machines, plain lines for people. Never a key, never chat text."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
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

"""Logs: one JSON object a line for machines, plain lines for people. Never a key, never chat text.

Lines are written by a thread of their own, from a bounded queue: a terminal that is stopped, a pipe
that nobody reads or a disk that is full never blocks the event loop. What does not fit is counted.
An error that repeats is written once in ten seconds, with the number of those left out.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

import orjson

from aioserver.telemetry.counters import Counter

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.config.settings import Logging

MAX_TEXT = 2000  # characters of a message
MAX_LINES = 10_000  # that wait to be written
MAX_KINDS = 1000  # of lines that are limited
SAME_ERROR = 10.0  # seconds
FAREWELL = 1.0  # seconds for what waits, at the end
DROPPED = Counter()  # lines that were not written


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
    """At most *lines* of one kind in *seconds*; those left out are counted."""

    def __init__(
        self, lines: int, seconds: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = lines
        self._seconds = seconds
        self._clock = clock
        self._kinds: dict[tuple[str, ...], list[int]] = {}  # kind: [period, lines, left out]

    def allow(self, *kind: str) -> int:
        """How many lines of *kind* were left out since the last one; -1: leave this one out, too."""
        if len(self._kinds) > MAX_KINDS:
            self._kinds.clear()
        period = int(self._clock() / self._seconds)
        state = self._kinds.setdefault(kind, [period, 0, 0])
        if state[0] != period:
            state[0], state[1] = period, 0
        if state[1] >= self._most:
            state[2] += 1
            return -1
        state[1] += 1
        suppressed, state[2] = state[2], 0
        return suppressed


class Lines(logging.Handler):
    """Writes to *stream* in a thread of its own, and waits for it at the end only."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._queue: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self._errors = RateLimit(1, SAME_ERROR)
        self._thread = threading.Thread(target=self._write, name="logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Let the line of *record* be written; it is counted and forgotten where too many wait."""
        if record.levelno >= logging.ERROR:
            left_out = self._errors.allow(record.name, record.pathname, str(record.lineno))
            if left_out < 0:
                return
            if left_out:
                record.fields = {**getattr(record, "fields", {}), "suppressed": left_out}
        try:
            self._queue.put_nowait(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - full, or it cannot be written: whoever logs goes on
            DROPPED.value += 1

    def close(self) -> None:
        """Write what waits, for FAREWELL seconds at most."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=FAREWELL)
            self._thread.join(FAREWELL)
        super().close()

    def _write(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._stream.write(line)
                if self._queue.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # closed, or nobody reads it
                DROPPED.value += 1


def set_up(given: Logging) -> None:
    """Send all logs to stderr in the configured format."""
    logging.getLogger().handlers[:] = [Lines(sys.stderr)]
    apply(given)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # aiohttp writes a traceback for each malformed request: our own answer and log say it better.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)


def apply(given: Logging) -> None:
    """Write in another format, and from another level on."""
    root = logging.getLogger()
    root.setLevel(given.level)
    for handler in root.handlers:
        if not isinstance(handler, Lines):
            continue
        if given.format == "json":
            handler.setFormatter(JsonFormatter(given.service_name, given.service_version))
        else:
            handler.setFormatter(ConsoleFormatter())

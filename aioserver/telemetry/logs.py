"""Logs: one JSON object a line for machines, or plain lines for people; never a key, never chat
text.

A thread writes the lines, from a bounded queue: a stopped terminal, a pipe without a reader or a
full disk never blocks the event loop. Lines for which there is no room are dropped and counted. An
error that repeats is written once in ten seconds, with the number of lines left out, unless its
record has an attribute `thinned`: its logger has left lines out already.

Names and paths in a line come from clients. Characters that are not printable are escaped in both
formats, so that no client can begin a line of its own, or control the terminal that shows the line
(CWE-117, CWE-150).
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
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

# Characters of a message in a JSON line.
MAX_TEXT = 2000
# Lines that may wait to be written.
MAX_LINES = 10_000
# The most kinds of lines that a rate limit distinguishes; at one more, it forgets all kinds and
# begins anew.
MAX_KINDS = 1000
# Seconds in which the same error is written once.
SAME_ERROR = 10.0
# Seconds for the lines that still wait when the handler is closed.
CLOSE_TIMEOUT = 1.0
# Bytes that a pipe takes from one of several writers in one piece (PIPE_BUF; pipe(7)).
MAX_WHOLE = 4096
# Characters that remain of a field if a line must be shortened.
MAX_FIELD = 100
# Python's names for a caller that it cannot find. Our lines do not show them; those of a program
# that embeds the server may.
UNKNOWN_FILE, UNKNOWN_FUNCTION = "(unknown file)", "(unknown function)"


class JsonFormatter(logging.Formatter):
    """One JSON object a line.

    *worker*: the slot of this process among those that share the log; None if it is the only one.
    """

    def __init__(self, service: str, version: str, worker: int | None = None) -> None:
        super().__init__()
        self._service: dict[str, Any] = {"service": service}
        if version:
            self._service["version"] = version
        if worker is not None:
            self._service["worker"] = worker

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of *record*.

        The items of its `fields` attribute, if any, are added to it.
        """
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
        text = _as_json(line)
        if "worker" in self._service:
            while (excess := len(text.encode()) + 1 - MAX_WHOLE) > 0:
                _shorten(line, excess)
                text = _as_json(line)
        return text


class ConsoleFormatter(logging.Formatter):
    """A line for people: time, level, message, and the fields behind them.

    A traceback follows in lines of its own, which are indented: no record begins with a space.

    *worker*: the slot of this process among those that share the log; None if it is the only one.
    """

    def __init__(self, worker: int | None = None) -> None:
        name = "" if worker is None else f"worker {worker}: "
        super().__init__(f"%(asctime)s %(levelname)-7s {name}%(message)s", "%H:%M:%S")
        self._shared = worker is not None

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of *record*."""
        record.message = record.getMessage()
        record.asctime = self.formatTime(record, self.datefmt)
        text = printable(self.formatMessage(record))
        fields = getattr(record, "fields", None)
        if fields:
            text += "  " + " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        if record.exc_info:
            traceback = self.formatException(record.exc_info).split("\n")
            lines = [f"\n    {printable(line)}" for line in traceback]
            if self._shared:
                room = MAX_WHOLE - 1 - len(text.encode())
                while len(lines) > 1 and sum(len(line.encode()) for line in lines) > room:
                    del lines[0]
            text += "".join(lines)
        return whole(text) if self._shared else text


def _as_json(line: dict[str, Any]) -> str:
    try:
        text = orjson.dumps(line, default=str).decode()
    # A lone surrogate cannot be encoded as UTF-8.
    except TypeError:
        text = json.dumps(line, default=str)
    # Outside of its strings JSON has nothing that needs an escape.
    return text if text.isprintable() else "".join(map(_json_escaped, text))


def _shorten(line: dict[str, Any], excess: int) -> None:
    """Take *excess* bytes or more out of *line*, if possible: the beginning of a traceback,
    otherwise a part of all texts.
    """
    traceback = line.get("traceback", "")
    if len(traceback) > MAX_FIELD:
        # A character may have become six bytes; the next turn removes what is still too much.
        line["traceback"] = "…" + traceback[max(16, excess // 6) :]
        return
    longest = max(line, key=lambda name: len(str(line[name])))
    value = str(line[longest])
    line[longest] = f"{value[: len(value) // 2]}…" if len(value) > MAX_FIELD else "…"


def whole(text: str) -> str:
    """Return *text*, cut to the length that several processes can write to one pipe in one piece,
    with a line end.
    """
    data = text.encode(errors="backslashreplace")
    if len(data) < MAX_WHOLE:
        return text
    return data[: MAX_WHOLE - 4].decode(errors="ignore") + "…"


def printable(text: str) -> str:
    r"""Return *text* with `\n`, `\x1b` or `\u202e` in place of characters that are not
    printable.
    """
    if text.isprintable():
        return text
    # Not the codec `unicode_escape`: its first use imports it, which fails if no descriptor is
    # free.
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _shown(value: object) -> str:
    """Return the value of a field, in quotes if it could be read as several fields."""
    text = printable(str(value))
    if " " in text or "=" in text or '"' in text:
        text = text.replace('"', '\\"')
        return f'"{text}"'
    return text


def _json_escaped(char: str) -> str:
    return (
        char if char.isprintable() else json.dumps(char)[1:-1] if ord(char) != 0x7F else "\\u007f"
    )


class RateLimit:
    """At most *limit* lines of one kind in each period of *seconds*; the others are counted.

    Always: at most MAX_KINDS + 1 kinds are kept.
    """

    def __init__(
        self, limit: int, seconds: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._seconds = seconds
        self._clock = clock
        # kind: [period, lines written in it, lines left out since the last one written]
        self._kinds: dict[tuple[str, ...], list[int]] = {}

    def allow(self, *kind: str) -> dict[str, int] | None:
        """Count a line of *kind*; return its field for the lines that were left out before it.

        None: this line must be left out itself.
        """
        period = int(self._clock() / self._seconds)
        state = self._kinds.get(kind)
        if state is None:
            if len(self._kinds) > MAX_KINDS:
                self._kinds.clear()
            state = self._kinds[kind] = [period, 0, 0]
        elif state[0] != period:
            state[0], state[1] = period, 0
        if state[1] >= self._limit:
            state[2] += 1
            return None
        state[1] += 1
        left_out, state[2] = state[2], 0
        return {"suppressed": left_out} if left_out else {}


class BackgroundHandler(logging.Handler):
    """Writes lines to *stream* in a thread; logging a line never waits for the stream.

    The thread ends with `close`, and does not keep the process alive.

    *worker*: the slot of this process among those that write to the stream; each line has it.
    """

    worker: int | None = None

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        # Lines that could not be written.
        self.dropped = 0
        self._stream = stream
        # Not `queue.Queue`, whose bound costs locks and conditions for each line.
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors = RateLimit(1, SAME_ERROR, clock)
        self._thread = threading.Thread(target=self._write, name="logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line of *record*, or drop and count it if the queue is full."""
        if record.levelno >= logging.ERROR and not hasattr(record, "thinned"):
            left_out = self._errors.allow(record.name, record.pathname, str(record.lineno))
            if left_out is None:
                return
            if left_out:
                record.fields = {**getattr(record, "fields", {}), **left_out}
        if self._queue.qsize() >= MAX_LINES:
            self.dropped += 1
            return
        try:
            self._queue.put(self.format(record) + "\n")
        # The record cannot be formatted: the code that logs must go on.
        except Exception:  # noqa: BLE001
            self.dropped += 1

    def close(self) -> None:
        """Write the waiting lines, for CLOSE_TIMEOUT seconds at most, and end the thread."""
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT)
        super().close()

    def _write(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._stream.write(line)
                if self._queue.empty():
                    self._stream.flush()
            # The stream is closed (ValueError), or has no reader.
            except (OSError, ValueError):
                self.dropped += 1


class DirectHandler(logging.Handler):
    """Writes lines to *descriptor* at once, for a process that may have no thread because it
    forks.

    Always: a line has at most MAX_WHOLE bytes, and is dropped if it would have to wait.
    """

    worker = None

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.dropped = 0
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of *record*, or drop and count it."""
        try:
            data = whole(self.format(record)).encode(errors="backslashreplace") + b"\n"
            if select.select([], [self._descriptor], [], 0)[1]:
                os.write(self._descriptor, data)
            else:
                self.dropped += 1
        # The stream is closed or has no reader, or the record cannot be formatted.
        except Exception:  # noqa: BLE001
            self.dropped += 1


def set_up(settings: Logging, worker: int | None = None) -> None:
    """Send all logs of the process to stderr in the configured format.

    *worker*: the slot of this process among those that share stderr. Its lines have it, and are at
    most MAX_WHOLE bytes.
    """
    handler = BackgroundHandler(sys.stderr)
    handler.worker = worker
    _set_up(handler, settings)


def set_up_without_thread(settings: Logging) -> None:
    """Do the same as `set_up` for a process that forks, and has no event loop."""
    _set_up(DirectHandler(sys.stderr.fileno()), settings)


def _set_up(handler: BackgroundHandler | DirectHandler, settings: Logging) -> None:
    _format_a_traceback()
    # No line shows these, and each record would compute them (Python's "Logging HOWTO").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if sys.version_info >= (3, 12):
        logging.logAsyncioTasks = False
    logging.getLogger().handlers[:] = [handler]
    apply(settings)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # aiohttp writes a traceback for each malformed request; our answer and log line say more.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)


def _format_a_traceback() -> None:
    """Load what the formatting of tracebacks needs: Python 3.15 does so for the first one, when no
    descriptor may be free.
    """
    try:
        int("x")
    except ValueError:
        logging.Formatter().formatException(sys.exc_info())


def apply(settings: Logging) -> None:
    """Change the format and the level of the logs that `set_up` has begun."""
    logging.getLogger().setLevel(settings.level)
    for handler in _handlers():
        if settings.format == "json":
            service, version = settings.service_name, settings.service_version
            handler.setFormatter(JsonFormatter(service, version, handler.worker))
        else:
            handler.setFormatter(ConsoleFormatter(handler.worker))


def write(logger: logging.Logger, level: int, message: str, fields: dict[str, Any]) -> None:
    """Log *message* with *fields*, as `Logger.log`, but without searching the stack for the
    caller, which our lines do not show.
    """
    if logger.isEnabledFor(level):
        file, function, extra = UNKNOWN_FILE, UNKNOWN_FUNCTION, {"fields": fields}
        logger.handle(
            logger.makeRecord(logger.name, level, file, 0, message, (), None, function, extra)
        )


def dropped() -> Counter:
    """Return the number of lines that could not be written since `set_up`."""
    counter = Counter()
    counter.value = sum(handler.dropped for handler in _handlers())
    return counter


def _handlers() -> list[BackgroundHandler | DirectHandler]:
    handlers = logging.getLogger().handlers
    return [
        handler for handler in handlers if isinstance(handler, BackgroundHandler | DirectHandler)
    ]

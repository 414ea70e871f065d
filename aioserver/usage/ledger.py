"""The ledger: one line of JSON for each attempt that may have cost something, in files by day.

    usage-2026-11-28.jsonl         lines whose `ts` is of that day (UTC)
    usage-2026-11-28.w1.jsonl      the same of worker 1, if several share the directory

A thread writes the lines, from a bounded queue, so that no answer waits for a disk. The thread
gathers lines for a moment, makes the JSON, and appends all of it by one `write`; it calls `fsync`
once a second at most. So kill -9 loses the attempts that have ended in the last moment, and a loss
of power those of the last second or so.

A write that fails is tried again while there is room for new lines. Beyond, lines are lost and
counted, and the file records that once it can be written again: `{"ts":…,"lost":17}`. A file
without a line end at its end, since a process was killed, gets one before the first new line.
Nothing here deletes a file, or reads one.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import orjson

from aioserver.telemetry.outcome import NOBODY, AttemptCost, CacheLoss

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Lines that may wait to be written.
MAX_LINES = 20_000
# Characters of a name, which may come from a client.
MAX_NAME = 200
# Encoded names that are cached; usually they come from the settings.
MAX_NAMES = 1000
# Seconds in which lines are gathered for one write, between two calls of `fsync`, and between two
# tries after a failed write.
GATHER, SYNC, RETRY = 0.1, 1.0, 0.5
# Lines whose JSON is made in one piece: the thread must not hold the interpreter for long.
CHUNK = 500
# Seconds for the waiting lines when the server ends, and when a reload has named another
# directory.
CLOSE_TIMEOUT, LEAVE_TIMEOUT = 1.0, 30.0
# No other user may read the lines, since they show the requests of each caller.
FILE_MODE, DIRECTORY_MODE = 0o600, 0o700
SECONDS_OF_A_DAY = 86_400


class Line(NamedTuple):
    """One line: the cost of the attempt *attempt* of the request *number*, at *time* (Unix), and
    what its provider's cache has *lost*, if that is known.
    """

    time: float
    number: int
    attempt: int
    request_id: str
    caller: str
    face: str
    path: str
    batch: bool
    outcome: str
    cost: AttemptCost
    lost: CacheLoss | None = None


class _Piece(NamedTuple):
    """The bytes of a line of *day*; *lost*: the number of lost lines that it reports."""

    day: int
    data: bytes
    lost: int = 0


class Ledger:
    """Appends lines to the files of *directory*.

    Always: at most MAX_LINES lines wait, and CHUNK more are being written; each line that was put
    is written, waits, or is lost. `put` never waits.

    *process* is the prefix of ids, which no other process has. *worker* is the number of this
    process among those that share the directory; None if it is the only one. *wall* returns the
    Unix time.

    Raises:
        OSError: the directory cannot be made, or today's file cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        process: str,
        worker: int | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self._process = process
        self._suffix = ".jsonl" if worker is None else f".w{worker}.jsonl"
        self._wall = wall
        # Only the thread writes it.
        self.written = 0
        # Lines that could not be written, and the lost lines that the file has recorded.
        self._unwritten = self._recorded = 0
        # The error of the last write; None if it has succeeded.
        self.trouble: OSError | None = None
        # Lines for which there was no room: only `put` counts them.
        self._refused = 0
        self._lines: deque[Line] = deque()
        self._pieces: deque[_Piece] = deque()
        self._wake, self._ending = threading.Event(), threading.Event()
        self._give_up_at = 0.0
        self._day = self._file = -1
        self._synced_at = 0.0
        self._unsynced = False
        # The common parts of lines, as JSON; and the newest second, as a text.
        self._names: dict[tuple[str | bool, ...], str] = {}
        self._second, self._second_text = -1, ""
        self._open(_day_of(wall()))
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """The number of lost lines."""
        return self._refused + self._unwritten

    @property
    def waiting(self) -> int:
        """The number of lines that wait to be written."""
        return len(self._lines) + len(self._pieces)

    def put(self, line: Line) -> None:
        """Have *line* written, or count it as lost."""
        if len(self._lines) >= MAX_LINES:
            self._refused += 1
            return
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()

    def end(self, timeout: float = LEAVE_TIMEOUT) -> None:
        """Write the waiting lines, and close the file, within *timeout* seconds; return at once."""
        self._give_up_at = time.monotonic() + timeout
        self._ending.set()
        self._wake.set()

    def close(self) -> None:
        """Write the waiting lines, and close the file, within CLOSE_TIMEOUT seconds. It blocks."""
        self.end(CLOSE_TIMEOUT)
        self._thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        while True:
            self._wait()
            ending = self._ending.is_set()
            self._wake.clear()
            self._write_all()
            now = time.monotonic()
            if self._unsynced and (ending or now >= self._synced_at + SYNC):
                self._sync()
            if ending and (not self.waiting or now >= self._give_up_at):
                break
        self._unwritten += self.waiting
        self._lines.clear()
        self._pieces.clear()
        self._close_file()

    def _wait(self) -> None:
        """Wait until there is something to do."""
        if self._ending.is_set():
            if self.trouble is not None:
                time.sleep(GATHER)
        elif self.trouble is not None:
            self._ending.wait(RETRY)
        else:
            due = self._synced_at + SYNC - time.monotonic() if self._unsynced else None
            if self._wake.wait(None if due is None else max(0.0, due)):
                self._ending.wait(GATHER)

    def _write_all(self) -> None:
        """Write all waiting lines, or as many as can be written."""
        while True:
            if not self._pieces:
                self._prepare()
                if not self._pieces:
                    return
            try:
                self._write_some()
            except OSError as error:
                self.trouble = error
                self._close_file()
                return
            self.trouble = None

    def _prepare(self) -> None:
        """Make the bytes of the next lines, and of a line that reports how many are lost."""
        if lost := self.lost - self._recorded:
            now = self._wall()
            data = b'{"ts":"%b","lost":%d}\n' % (self._moment(now).encode(), lost)
            self._pieces.append(_Piece(_day_of(now), data, lost))
        for _ in range(min(CHUNK, len(self._lines))):
            line = self._lines.popleft()
            self._pieces.append(_Piece(_day_of(line.time), self._bytes(line)))

    def _write_some(self) -> None:
        """Append the next lines, those of one day, by one `write`.

        Raises:
            OSError: not all of it could be written. Written lines are not written again.
        """
        pieces = self._pieces
        day = pieces[0].day
        if day != self._day or not self._in_place():
            self._open(day)
        data = [piece.data for piece in pieces if piece.day == day]
        if len(data) < len(pieces):
            # The lines up to the first of another day.
            data = []
            for piece in pieces:
                if piece.day != day:
                    break
                data.append(piece.data)
        start = b"" if self._ends_well() else b"\n"
        whole = start + b"".join(data)
        written = os.write(self._file, whole) - len(start)
        self._unsynced = True
        for each in data:
            if written < len(each):
                break
            written -= len(each)
            piece = pieces.popleft()
            self._recorded += piece.lost
            self.written += not piece.lost
        else:
            return
        # The rest of a line that was cut is not a line.
        raise OSError("only a part could be written")

    def _in_place(self) -> bool:
        """Return whether the open file still has its name: it may have been moved away."""
        try:
            there = os.stat(self._path(self._day))  # noqa: PTH116
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self._file))

    def _ends_well(self) -> bool:
        size = os.fstat(self._file).st_size
        return not size or os.pread(self._file, 1, size - 1) == b"\n"

    def _open(self, day: int) -> None:
        self._close_file()
        path = self._path(day)
        if not os.path.lexists(path):
            self.directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        self._day = day

    def _path(self, day: int) -> str:
        name = datetime.fromtimestamp(day * SECONDS_OF_A_DAY, UTC).strftime("%Y-%m-%d")
        return str(self.directory / f"usage-{name}{self._suffix}")

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            self.trouble = error
        self._unsynced = False
        self._synced_at = time.monotonic()

    def _close_file(self) -> None:
        if self._file < 0:
            return
        if self._unsynced:
            self._sync()
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = self._day = -1

    def _bytes(self, line: Line) -> bytes:
        """Return *line* as JSON, written by hand, since each attempt makes one."""
        cost, tokens = line.cost, line.cost.tokens
        path, model = line.path[:MAX_NAME], cost.model[:MAX_NAME]
        names = line.caller, line.face, path, cost.provider, model
        key = *names, line.batch, line.outcome
        known = self._names.get(key)
        if known is None:
            if len(self._names) >= MAX_NAMES:
                self._names.clear()
            labels = "caller", "face", "path", "provider", "model"
            texts = [f'"{label}":{_text(name)}' for label, name in zip(labels, names, strict=True)]
            texts.append(f'"class":"{"batch" if line.batch else "interactive"}"')
            known = self._names[key] = ",".join([*texts, f'"outcome":"{line.outcome}"'])
        counts = first = ""
        if cost.source != NOBODY:
            counts = (
                f'"in":{cost.tokens_in},"cached":{tokens.cached or 0},'
                f'"cache_write":{tokens.cache_write},"out":{cost.tokens_out},'
                f'"reasoning":{tokens.reasoning},"audio_in":{tokens.audio_in},'
                f'"audio_out":{tokens.audio_out},'
            )
            for lifetime, written in tokens.lifetimes:
                counts += f'"cache_write_{lifetime}":{written},'
        if cost.tier:
            counts += f'"service_tier":{_text(cost.tier)},'
        if line.lost is not None:
            counts += f'"cache_lost":"{line.lost.verdict}","cache_lost_tokens":{line.lost.tokens},'
        if cost.first:
            first = f'"first_ms":{_ms(cost.first)},'
        text = (
            f'{{"ts":"{self._moment(line.time)}","id":"{self._process}-{line.number:x}",'
            f'"attempt":{line.attempt},"request_id":{_text(line.request_id)},{known},'
            f'{counts}"source":"{cost.source}","wait_ms":{_ms(cost.wait)},{first}'
            f'"ms":{_ms(cost.duration)}}}\n'
        )
        return text.encode()

    def _moment(self, seconds: float) -> str:
        """Return a Unix time in the form of RFC 3339, in UTC; the last second is cached."""
        second = int(seconds)
        if second != self._second:
            self._second = second
            self._second_text = f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%S}"
        return f"{self._second_text}.{int((seconds - second) * 1e3 + 1e-6):03}Z"


def _text(name: str) -> str:
    """Return *name*, cut to MAX_NAME characters, as JSON."""
    name = name[:MAX_NAME]
    if name.isascii() and name.isprintable() and '"' not in name and "\\" not in name:
        return f'"{name}"'
    try:
        return orjson.dumps(name).decode()
    # A lone surrogate cannot be encoded as UTF-8.
    except TypeError:
        return json.dumps(name)


def _day_of(seconds: float) -> int:
    return int(seconds // SECONDS_OF_A_DAY)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)

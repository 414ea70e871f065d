"""Reading the ledger: the cost of each attempt, counted once.

`(id, attempt)` is unique. A `running` line has the cost of an attempt so far, and any other line
of the same attempt replaces it, wherever that stands. An attempt without another line is `lost`:
its process was killed. A `refused` line withdraws the `running` line of an attempt, which has cost
nothing in the end. Lines that are torn, or not JSON, are skipped and counted.

Files are read as a stream: of a line that was counted, only its number stays in memory.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, BinaryIO

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# The fates of an attempt, beside "ok", "cut", "cancelled" and "failed".
RUNNING, REFUSED, LOST = "running", "refused", "lost"
# Seconds after its newest line within which an attempt may still run: it writes one each 30.
STILL_RUNNING = 60.0
# The most bytes of a line; a longer one is not ours.
MAX_LINE = 1 << 16
# The bits by which an attempt's number is shifted in a key, and the attempts that fit below.
ATTEMPT_BITS = 8


class Entry(msgspec.Struct, gc=False):
    """A line, as far as it is added up; missing names and counts are empty."""

    ts: str
    id: str = ""
    attempt: int = 0
    caller: str = ""
    face: str = ""
    path: str = ""
    provider: str = ""
    model: str = ""
    class_: str = msgspec.field(default="", name="class")
    outcome: str = ""
    source: str = "none"
    in_: int = msgspec.field(default=0, name="in")
    cached: int = 0
    cache_write: int = 0
    cache_write_5m: int = 0
    cache_write_30m: int = 0
    cache_write_1h: int = 0
    cache_write_12h: int = 0
    out: int = 0
    reasoning: int = 0
    audio_in: int = 0
    audio_out: int = 0
    service_tier: str = ""
    cache_lost: str = ""
    cache_lost_tokens: int = 0
    lost: int = 0

    @property
    def day(self) -> str:
        """Its day (UTC)."""
        return self.ts[:10]


class Sums:
    """The costs of the attempts of one row."""

    __slots__ = (
        *("requests", "attempts", "input_tokens", "cached_tokens", "cache_write_tokens"),
        *("output_tokens", "reasoning_tokens", "audio_tokens", "estimated_tokens"),
        "cache_lost_tokens",
        *("cache_write_5m_tokens", "cache_write_30m_tokens"),
        *("cache_write_1h_tokens", "cache_write_12h_tokens"),
    )

    def __init__(self) -> None:
        self.requests = self.attempts = self.input_tokens = self.cached_tokens = 0
        self.cache_write_tokens = self.output_tokens = self.reasoning_tokens = 0
        self.audio_tokens = self.estimated_tokens = self.cache_lost_tokens = 0
        self.cache_write_5m_tokens = self.cache_write_30m_tokens = 0
        self.cache_write_1h_tokens = self.cache_write_12h_tokens = 0

    def add(self, entry: Entry) -> None:
        """Count an attempt."""
        self.attempts += 1
        self.input_tokens += entry.in_
        self.cached_tokens += entry.cached
        if entry.cache_write:
            self.cache_write_tokens += entry.cache_write
            self.cache_write_5m_tokens += entry.cache_write_5m
            self.cache_write_30m_tokens += entry.cache_write_30m
            self.cache_write_1h_tokens += entry.cache_write_1h
            self.cache_write_12h_tokens += entry.cache_write_12h
        self.output_tokens += entry.out
        self.reasoning_tokens += entry.reasoning
        self.audio_tokens += entry.audio_in + entry.audio_out
        self.cache_lost_tokens += entry.cache_lost_tokens
        if entry.source == "estimate":
            self.estimated_tokens += entry.in_ + entry.out
        elif entry.source == "mixed":
            self.estimated_tokens += entry.out


# The columns of each row; one that only a table of lost caches has; and those of the parts of
# `cache_write_tokens` by their lifetimes, which only providers with such caches report.
*COLUMNS, CACHE_LOST_TOKENS = Sums.__slots__[:-4]
LIFETIME_COLUMNS = Sums.__slots__[-4:]


class Reading:
    """Adds up the lines of files by the fields *by* (attributes of `Entry`), from the time *since*
    to before the time *until*, both in the form of `ts`.

    Always: each attempt is counted once, in one row.
    """

    def __init__(self, by: Sequence[str], since: str = "", until: str = "") -> None:
        self.rows: dict[tuple[str, ...], Sums] = {}
        self.total = Sums()
        # Lines that were not entries; and entries that the server could not write.
        self.skipped = self.lost = 0
        self._since, self._until = since, until or "~"
        self._key = attrgetter(*by)
        self._one = len(by) == 1
        self._decoder = msgspec.json.Decoder(Entry)
        # By process: each attempt that was counted, and its row; None: it is not to be counted.
        self._known: dict[str, dict[int, Sums | None]] = {}
        # The rows of requests with several attempts.
        self._several: dict[tuple[str, int], list[Sums | None]] = {}
        # The newest line of each attempt that has only `running` lines.
        self._running: dict[tuple[str, int], Entry] = {}

    def read(self, file: BinaryIO) -> None:
        """Count the lines of *file*."""
        decode, count = self._decoder.decode, self._count
        rest = False
        while line := file.readline(MAX_LINE):
            whole = line[-1:] == b"\n"
            if rest or (not whole and len(line) == MAX_LINE):
                # A part of a line that is too long.
                self.skipped += not rest
                rest = not whole
                continue
            try:
                count(decode(line))
            except (msgspec.MsgspecError, ValueError):
                self.skipped += bool(line.strip())

    def forget(self) -> None:
        """Forget the numbers of the attempts that were counted, since there are no further lines of
        theirs: each file of a later day has those that end later.
        """
        self._known.clear()
        self._several.clear()

    def finish(self, now: float | None = None) -> None:
        """Count the attempts that have not ended: they are lost, or still run at *now*."""
        newest = (time.time() if now is None else now) - STILL_RUNNING
        recent = datetime.fromtimestamp(newest, UTC).isoformat()[:19]
        for (process, key), entry in self._running.items():
            if entry.ts < recent:
                entry.outcome = LOST
            self._add(entry, process, key, self._known.setdefault(process, {}))
        self._running.clear()

    def _count(self, entry: Entry) -> None:
        process, _, number = entry.id.partition("-")
        if not number:
            if not entry.lost:
                raise ValueError(entry.id)
            if self._since <= entry.ts < self._until:
                self.lost += entry.lost
            return
        key = _key(int(number, 16), entry.attempt)
        known = self._known.get(process)
        if known is None:
            known = self._known[process] = {}
        if key in known:
            return
        if entry.outcome == RUNNING:
            earlier = self._running.get((process, key))
            if earlier is None or earlier.ts <= entry.ts:
                self._running[process, key] = entry
            return
        if self._running:
            self._running.pop((process, key), None)
        self._add(entry, process, key, known)

    def _add(self, entry: Entry, process: str, key: int, known: dict[int, Sums | None]) -> None:
        if entry.outcome == REFUSED or not self._since <= entry.ts < self._until:
            known[key] = None
            return
        name = self._key(entry)
        if self._one:
            name = (name,)
        row = self.rows.get(name)
        if row is None:
            row = self.rows[name] = Sums()
        known[key] = row
        row.add(entry)
        self.total.add(entry)
        if entry.attempt == 1 and not self._several:
            row.requests += 1
            self.total.requests += 1
            return
        request = process, _request(key)
        rows = self._several.get(request)
        if rows is None:
            if entry.attempt == 1:
                row.requests += 1
                self.total.requests += 1
                return
            first = known.get(_key(request[1], 1))
            rows = self._several[request] = [] if first is None else [first]
        row.requests += row not in rows
        self.total.requests += not rows
        rows.append(row)


def _key(number: int, attempt: int) -> int:
    """Return a number for each pair of a request and an attempt."""
    if 0 < attempt < 1 << ATTEMPT_BITS:
        return number << ATTEMPT_BITS | attempt
    return -((number << 64 | abs(attempt)) + 1)


def _request(key: int) -> int:
    return key >> ATTEMPT_BITS if key >= 0 else (-key - 1) >> 64


def files_of(directory: Path, first: str = "", last: str = "~") -> list[Path]:
    """Return the files of *directory* for the days *first* to *last*, by their names."""
    found = directory.glob("usage-????-??-??*.jsonl")
    return sorted(path for path in found if first <= path.name[6:16] <= last)


def spent(directory: Path, since: Mapping[str, int], until: int) -> dict[str, dict[str, int]]:
    """Return the tokens of each caller from the ledger in *directory*: for each name in *since* those
    from this day to the day *until*. Days are numbers, counted from 1970-01-01.

    Running attempts count with their estimates. A file that cannot be read counts nothing.
    """
    days = {name: _date(day) for name, day in since.items()}
    first, last = min(days.values()), _date(until)
    reading = Reading(["caller", "day"], since=first, until=f"{last}~")
    for _, files in groupby(files_of(directory, first, last), lambda path: path.name[6:16]):
        for path in files:
            try:
                with path.open("rb") as file:
                    reading.read(file)
            except OSError:
                continue
        reading.forget()
    reading.finish()
    callers: dict[str, dict[str, int]] = {}
    for (caller, day), sums in reading.rows.items():
        tokens = callers.setdefault(caller, dict.fromkeys(days, 0))
        for name, begin in days.items():
            if day >= begin:
                tokens[name] += sums.input_tokens + sums.output_tokens
    return callers


def _date(day: int) -> str:
    return (datetime.fromtimestamp(0, UTC) + timedelta(days=day)).strftime("%Y-%m-%d")

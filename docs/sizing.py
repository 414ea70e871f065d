"""Sizes for so many clients: the table of `scaling.md`, and one for numbers of your own.

python docs/sizing.py                      write the table into scaling.md
python docs/sizing.py --check              exit with 1 if it is stale
python docs/sizing.py 20000 30 400 60      20,000 clients, each of whom asks 30 times an hour; 400
                                           tokens, 60 a second

Arrivals are a Poisson process, and the places of the provider are the servers of a queue (M/M/c;
Erlang, 1917). The number of places is the smallest for which one answer in a hundred waits.
`tests/docs/test_sizing.py` plays the same queue event by event.
"""

from __future__ import annotations

import sys
from math import ceil, floor, log10, sqrt
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).with_name("scaling.md")
BEGIN, END = "<!-- made by `python docs/sizing.py` -->\n", "<!-- end -->\n"
# What is asked of the table: questions an hour, tokens of an answer, tokens a second.
ASKED = (20, 300, 50)
CLIENTS = (10**2, 10**3, 10**4, 10**5, 10**6)
# The part of answers that wait for a place at the provider.
WAITING = 0.01
# Seconds for which a person waits for a first word (`queue_timeout` of a provider), and for which
# an answer is kept.
PATIENCE, RESUME_WINDOW = 20.0, 30.0

# What it costs, from benchmarks/README.md, where nothing else says so: CPU of a worker in seconds
# for an event, for what is around an answer, and for an idle WebSocket in each second.
EVENT, ANSWER, IDLE = 40e-6, 400e-6, 2.5e-6
# A core is full at this load on average, so that the event loop is not late.
FULL = 0.5
# Bytes of an idle WebSocket, of a running stream beside its log, of a worker; docs/limits.md.
SOCKET, STREAM, WORKER = 16 * 1024, 40 * 1024, 60e6
# Bytes of the log of an answer, and of an event in it.
LOG, LOGGED = 4096, 50
# CPU of the Redis server in seconds for an answer with an id of its own, where several instances
# share it.
SHARED = 200e-6


class Size(NamedTuple):
    """What to set, and what to provide, for so many clients."""

    # Answers that begin in a second, and that run at once; no settings.
    rate: float
    running: float

    requests_per_minute: int
    concurrent_requests: int
    queue_size: int
    max_connections: int
    max_kept_bytes: float
    workers: int
    memory: float
    redis: float


def size(clients: int, asked: float, tokens: float, speed: float) -> Size:
    """Return the size for *clients*, each of whom asks *asked* times an hour for *tokens* that
    come at *speed* a second.
    """
    rate, seconds = clients * asked / 3600, tokens / speed
    running = rate * seconds
    places = places_for(running)
    cores = rate * (ANSWER + tokens * EVENT) + clients * IDLE
    workers = max(1, ceil(cores / FULL))
    kept = 2 * (running + rate * RESUME_WINDOW) * (LOG + LOGGED * tokens)
    return Size(
        rate,
        running,
        # Three standard deviations above the mean of a minute.
        requests_per_minute=upwards(60 * rate + 3 * sqrt(60 * rate)),
        concurrent_requests=upwards(places),
        queue_size=upwards(places * PATIENCE / seconds),
        max_connections=upwards(1.1 * clients),
        max_kept_bytes=kept,
        workers=workers,
        memory=clients * SOCKET + running * STREAM + workers * WORKER + kept,
        redis=rate * SHARED if workers > 1 else 0.0,
    )


def waiting(running: float, places: int) -> float:
    """Return the part of answers that find no place free (Erlang C)."""
    blocked = 1.0
    for number in range(1, places + 1):
        blocked = running * blocked / (number + running * blocked)
    return blocked / (1 - running / places * (1 - blocked))


def places_for(running: float) -> int:
    """Return the smallest number of places with which at most WAITING of the answers wait."""
    places, blocked = 0, 1.0
    while True:
        places += 1
        blocked = running * blocked / (places + running * blocked)
        if places > running and blocked / (1 - running / places * (1 - blocked)) <= WAITING:
            return places


def upwards(number: float) -> int:
    """Return *number*, rounded up to two digits."""
    step: int = 10 ** max(0, floor(log10(number)) - 1)
    return ceil(number / step) * step


def rounded(number: float) -> str:
    """Return *number* with a digit behind the point, if it is small."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def in_bytes(number: float) -> str:
    """Return *number* bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{upwards(number / factor):,} {unit}"
    return "1 MB"


def table(rows: list[tuple[int, Size]]) -> str:
    """Return *rows* as a table."""
    lines = [
        (
            "| clients | answers/s | at once | 1 `requests_per_minute` | 2 `concurrent_requests` "
            "| 3 `queue_size` | 4 `max_connections` | 5 `max_kept_bytes` | 6 `workers` | 7 memory "
            "| 8 Redis, of a core |"
        ),
        "| ---: " * 11 + "|",
    ]
    for clients, each in rows:
        lines.append(
            f"| {clients:,} | {rounded(each.rate)} | {each.running:,.0f} | "
            f"{each.requests_per_minute:,} | {each.concurrent_requests:,} | {each.queue_size:,} | "
            f"{each.max_connections:,} | {in_bytes(each.max_kept_bytes)} | {each.workers} | "
            f"{in_bytes(each.memory)} | {f'{each.redis:.1%}' if each.redis else 'none'} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Do what the head of this file says. Returns the exit code."""
    if len(arguments) == 4:
        clients, asked, tokens, speed = (float(word) for word in arguments)
        sys.stdout.write(table([(int(clients), size(int(clients), asked, tokens, speed))]))
        return 0
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    stale, _, after = rest.partition(END)
    made = table([(clients, size(clients, *ASKED)) for clients in CLIENTS])
    if arguments == ["--check"]:
        return int(stale != made)
    PAGE.write_text(f"{before}{BEGIN}{made}{END}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What must hold of a run, each with its tolerance."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Line = dict[str, Any]
MIB = 1 << 20
# Between the middle and the last third of a run the median of the memory grows by no more than
# this share, and a few MiB for what the allocator does with its pages.
MEMORY_SHARE, MEMORY_BYTES = 0.05, 4 * MIB
# What the server adds to the first token of a direct request, in the last third of a run, is at
# most so many times that of the first third, and 20 or 100 ms: a minute has few samples above its
# p99, and other programs run.
ADDED = {"p50": (1.5, 0.020), "p99": (2.0, 0.100)}
# What is counted at the start and at the end. Connections that a provider's pool keeps have been
# closed by then.
COUNTS = (
    *("connections", "waiting", "running", "kept", "stored", "detached", "in_flight", "queued"),
    *("grouped", "pool"),
)


def lines(run: Sequence[Line], kind: str) -> list[Line]:
    """Return the lines of *kind*."""
    return [line for line in run if line["kind"] == kind]


def thirds(lines: Sequence[Line]) -> tuple[Sequence[Line], Sequence[Line], Sequence[Line]]:
    """Return three equal parts of *lines*, in their order."""
    size = max(1, len(lines) // 3)
    return lines[:size], lines[size:-size], lines[-size:]


def memory(run: Sequence[Line]) -> tuple[float, float]:
    """Return the medians of the memory in the middle and in the last third, in bytes."""
    _, middle, last = thirds(lines(run, "sample"))
    return median(line["rss"] for line in middle), median(line["rss"] for line in last)


def added(run: Sequence[Line], percentile: str) -> tuple[float, float]:
    """Return what the server adds to a first token: medians of the windows of the first and of the
    last third, in seconds.
    """
    first, _, last = thirds(lines(run, "window"))
    return _added(first, percentile), _added(last, percentile)


def _added(windows: Sequence[Line], percentile: str) -> float:
    seconds: float = median(
        max(0.0, line[f"first_token_{percentile}"] - line[f"direct_{percentile}"])
        for line in windows
    )
    return seconds


def broken(run: Sequence[Line]) -> Iterator[str]:
    """Yield what does not hold of *run*, all of whose lines are there."""
    before, after = memory(run)
    if after > before * (1 + MEMORY_SHARE) + MEMORY_BYTES:
        yield f"memory grew from {before / MIB:.1f} to {after / MIB:.1f} MiB"
    for percentile, (factor, seconds) in ADDED.items():
        first, last = added(run, percentile)
        if last > first * factor + seconds:
            yield (
                f"{percentile} of what is added grew from "
                f"{1000 * first:.1f} to {1000 * last:.1f} ms"
            )
    for window in lines(run, "window"):
        if window["ok"] != window["requests"]:
            yield f"a probe got no whole answer: {window}"
    (start,), (end,) = lines(run, "start"), lines(run, "end")
    for name in COUNTS:
        if end[name]:
            yield f"{end[name]} {name} are left"
    for name in ("tasks", "fds"):
        if end[name] > start[name]:
            yield f"{end[name]} {name} are left, {start[name]} were there at the start"
    yield from end["violations"]
    if end["exit_code"] or end["tracebacks"]:
        yield f"the server ended with {end['exit_code']} and {end['tracebacks']} tracebacks"

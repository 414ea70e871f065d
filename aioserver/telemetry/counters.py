"""Counters and histograms: plain objects of a few numbers, held by the objects that count.

A request touches about a dozen of them. The children of prometheus-client would cost a lock and a
microsecond each; here a count is one attribute. One event loop owns them.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import Counter as Tally
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Upper bounds of histograms, in seconds: for latencies, and for times that are short by nature,
# such as our own work or the time between two events.
LATENCY_BOUNDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
SHORT_BOUNDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
RECENT_SECONDS = 60.0
RECENT_VALUES = 1000
# Entries in a block of a deque.
BLOCK = 64
# The seconds of one slice in a recent share.
SLICE_SECONDS = 5.0
# Buckets of recent values in each doubling: the middle of a bucket is within 2.2 % of its values.
PER_DOUBLING = 16
# The seconds at which the first bucket begins; shorter values are in it, too.
SHORTEST = 1e-6


class Counter:
    """A number that grows. A counter that serves as a gauge goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Histogram:
    """The number of observations in each bucket, and the sum of all.

    Always: `counts[i]` observations were at most `bounds[i]` and above the bound before it; the
    last of `counts` has those above every bound.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = LATENCY_BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_none(self) -> None:
        """Count one observation of 0.0."""
        self.counts[0] += 1

    def include(self, other: Histogram) -> None:
        """Count the observations of *other*, whose bounds are the same."""
        self.counts = [
            ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.sum += other.sum

    def quantile(self, share: float) -> float:
        """Return the least bound that *share* of the observations do not exceed; 0.0 without any.

        Observations above every bound count as the highest bound.
        """
        rank, seen = share * sum(self.counts), 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            if seen >= rank:
                return bound if seen else 0.0
        return self.bounds[-1]


class RecentValues:
    """The observations of the last minute, the newest thousand at most, for percentiles.

    Those before the last read are in arrays. An object for each, made under a load and kept for a
    minute, would keep the memory around it from being returned to the system, a megabyte at a
    time.

    Always: there are at most RECENT_VALUES since the last read.
    """

    def __init__(self) -> None:
        self._new: deque[tuple[float, float]] = deque(maxlen=RECENT_VALUES)
        self._times, self._values = array("d"), array("d")

    def add(self, now: float, value: float) -> None:
        """Keep *value*, observed at *now*; times never go back."""
        self._new.append((now, value))

    def percentiles(self, now: float) -> dict[str, float] | None:
        """Return `p50`, `p95`, `p99` (nearest rank), `count` and `age`, the seconds since the
        newest.

        None if there are no values.
        """
        times = self._times
        self._take_new()
        old = max(len(times) - RECENT_VALUES, bisect_left(times, now - RECENT_SECONDS))
        if old > 0:
            del times[:old], self._values[:old]
        if not times:
            return None
        ordered = sorted(self._values)
        last = len(ordered) - 1
        ranks = {f"p{n}": ordered[min(last, len(ordered) * n // 100)] for n in (50, 95, 99)}
        return {**ranks, "count": len(ordered), "age": round(now - times[-1], 3)}

    def buckets(self, now: float) -> RecentBuckets | None:
        """Return the values as counts in buckets, which can be added to those of others.

        None without any.
        """
        percentiles = self.percentiles(now)
        if percentiles is None:
            return None
        counts: Tally[int] = Tally()
        for value in self._values:
            counts[round(math.log2(max(value, SHORTEST) / SHORTEST) * PER_DOUBLING)] += 1
        return RecentBuckets(dict(counts), percentiles["age"])

    def _take_new(self) -> None:
        if self._new:
            times, values = zip(*self._new, strict=True)
            self._times.extend(times)
            self._values.extend(values)
            if len(times) > BLOCK:
                # A deque that is cleared keeps 16 of its blocks, which lie between the objects of
                # a load.
                self._new = deque(maxlen=RECENT_VALUES)
            else:
                self._new.clear()


class RecentShare:
    """The share of a part in a whole over the last minute, in slices of some seconds.

    A part may be unknown: its whole counts as soon as another part is known.
    """

    def __init__(self) -> None:
        # For each: its beginning, the sums of the parts and the wholes, and the number of known
        # parts.
        self._slices: deque[tuple[float, int, int, int]] = deque()

    def add(self, now: float, part: int | None, whole: int) -> None:
        """Count *part* of *whole* at *now*; times never go back."""
        began, parts, wholes, known = now, 0, 0, 0
        if self._slices and now < self._slices[-1][0] + SLICE_SECONDS:
            began, parts, wholes, known = self._slices.pop()
        else:
            self._drop_old(now)
        known += part is not None
        self._slices.append((began, parts + (part or 0), wholes + whole, known))

    def sums(self, now: float) -> Share | None:
        """Return the sums of the last minute; None if no part is known."""
        self._drop_old(now)
        if not any(known for _, _, _, known in self._slices):
            return None
        return Share(
            sum(parts for _, parts, _, _ in self._slices),
            sum(wholes for _, _, wholes, _ in self._slices),
        )

    def _drop_old(self, now: float) -> None:
        while self._slices and self._slices[0][0] < now - RECENT_SECONDS:
            self._slices.popleft()


class Share(NamedTuple):
    """A *part* of a *whole*."""

    part: int
    whole: int


def sum_of(shares: Iterable[Share | None]) -> Share | None:
    """Return the sums of those of *shares* that are known; None if none is."""
    known = [share for share in shares if share is not None]
    if not known:
        return None
    return Share(sum(share.part for share in known), sum(share.whole for share in known))


def quotient_of(share: Share | None) -> float | None:
    """Return the quotient of part and whole; None if there is none."""
    return round(share.part / share.whole, 3) if share is not None and share.whole else None


class RecentBuckets(NamedTuple):
    """Recent values of one source: *counts* by bucket, and the *age* of the newest in seconds."""

    counts: Mapping[int, int]
    age: float


def percentiles_of(sources: Iterable[RecentBuckets]) -> dict[str, float] | None:
    """Return the same as `RecentValues.percentiles`, for the values of all *sources* together.

    They are never computed from percentiles, whose mean is not a percentile. A percentile is the
    middle of its bucket.
    """
    counts: Tally[int] = Tally()
    age = math.inf
    for source in sources:
        counts.update(source.counts)
        age = min(age, source.age)
    total = counts.total()
    if not total:
        return None
    result: dict[str, float] = {}
    for percent in (50, 95, 99):
        rank, seen = min(total - 1, total * percent // 100), 0
        for bucket in sorted(counts):
            seen += counts[bucket]
            if seen > rank:
                result[f"p{percent}"] = round(SHORTEST * 2 ** (bucket / PER_DOUBLING), 7)
                break
    return {**result, "count": total, "age": age}

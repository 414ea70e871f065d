"""The verdict on one turn: what its provider's cache has lost since the last turn, and why.

The cached part was *expected* to have the regions that are equal to the last turn's, wherever they
stand now. Their tokens are estimated from their bytes, at the last turn's ratio, and are at most
the tokens that the provider has kept of it. Where fewer were cached, by more than a tenth and by
more than LEAST, the first row that fits counts:

    unknown     the provider does not say what was cached
    changed     a region differs, and most of the loss stands behind it
    reordered   the same, and all regions of the last turn are still there, in another order
    moved       the last turn went to another provider or model
    unknown     this provider has never been seen to keep a prompt
    expired     the pause was longer than any after which this provider has still had a prompt, and
                longer than SHORTEST
    evicted     what is left

Nothing here has a clock or a socket. This file is one concept: a turn as it is kept, its
comparison with the next one, and the result.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from aioserver.protocol.regions import HEAD, PIECE_BYTES
from aioserver.telemetry.outcome import CacheLoss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.protocol.regions import Regions

CHANGED, REORDERED, MOVED, EXPIRED, EVICTED, UNKNOWN = VERDICTS = (
    *("changed", "reordered", "moved", "expired", "evicted", "unknown"),
)
# Tokens, and the part of what was expected, by which the cached part may fall short: engines and
# vendors cache in blocks, and the estimate is one.
LEAST, SHARE = 1024, 0.1
# A change is the cause if what stands behind it is at least one part in so many of the loss: the
# ratio of tokens to bytes differs from region to region.
WEIGHT = 4
# The seconds for which every provider keeps a prompt that it has room for.
SHORTEST = 60.0
# The most regions, and pieces of long ones, that are kept of a turn: a conversation takes 4 KB at
# most. If there are more, those in the middle become one.
MAX_REGIONS = 200
# The packed forms of `Sent` without its provider, and of the shape of its regions: their number in
# each part of the head, and where the fold begins and ends.
_SENT, _SHAPE = struct.Struct("<dQQI"), struct.Struct("<3HII")
_MOST = (1 << 16) - 1


class Sent(NamedTuple):
    """A turn that has ended, at a monotonic time: the provider and model that have answered it, the
    tokens of its prompt, and those of them that the provider has kept at most.
    """

    ended_at: float
    provider: str
    model: int
    prompt: int
    kept: int


class LastTurn(NamedTuple):
    """The last turn of a conversation: its regions, of which long ones at the beginning are pieces,
    and the *fold* is one.
    """

    sent: Sent
    counts: tuple[int, ...]
    fold: tuple[int, int]
    digests: Sequence[int]
    lengths: Sequence[int]


class Difference(NamedTuple):
    """The bytes of the last turn that are *equal* in the new one, and those of them *before* the
    first difference. That is the region *at*, which begins with *byte*; "" if nothing differs.
    """

    equal: int
    before: int
    at: str = ""
    byte: int = 0
    reordered: bool = False


def packed(sent: Sent, regions: bytes) -> bytes:
    """Return a turn as it is kept; *regions* are packed already."""
    at, provider, model, prompt, kept = sent
    name = provider.encode()[:255]
    head = _SENT.pack(at, prompt, kept, model)
    return b"%b%c%b%b" % (head, len(name), name, regions)


def packed_regions(regions: Regions) -> bytes:
    """Return *regions* in the form that is kept."""
    digests, lengths = _split(regions)
    start, end = fold = _fold_of(len(digests))
    digests, lengths = _folded(digests, lengths, fold)
    counts = [min(count, _MOST) for count in regions.counts.values()]
    return b"".join((_SHAPE.pack(*counts, start, end), array("q", digests), array("I", lengths)))


def unpacked(data: bytes) -> LastTurn:
    """Return the turn that was `packed` as *data*."""
    at, prompt, kept, model = _SENT.unpack_from(data)
    end = _SENT.size + 1 + data[_SENT.size]
    provider = data[_SENT.size + 1 : end].decode(errors="replace")
    *counts, start, stop = _SHAPE.unpack_from(data, end)
    rest = data[end + _SHAPE.size :]
    # Eight bytes of each region are its digest, and four its length.
    size = len(rest) // 12 * 8
    digests, lengths = array("q", rest[:size]), array("I", rest[size:])
    sent = Sent(at, provider, model, prompt, kept)
    return LastTurn(sent, tuple(counts), (start, stop), digests, lengths)


def ended_at(data: bytes) -> float:
    """Return when the turn that was `packed` as *data* has ended."""
    at: float = _SENT.unpack_from(data)[0]
    return at


def _fold_of(number: int) -> tuple[int, int]:
    """Return the first of *number* regions that are folded, and the first behind them."""
    if number <= MAX_REGIONS:
        return 0, 0
    start = MAX_REGIONS // 2
    return start, number - (MAX_REGIONS - start - 1)


def _split(regions: Regions) -> tuple[Sequence[int], Sequence[int]]:
    """Return the digests and the lengths of *regions*, of which long ones in front of the first
    answer are as many as they have pieces: where one byte of a system prompt has changed, the rest
    of it is equal.
    """
    digests, lengths = [*regions.digests], [*regions.lengths]
    last = regions.start if regions.user is None else regions.user
    for index in sorted(regions.pieces, reverse=True):
        if index <= last:
            pieces, length = regions.pieces[index], lengths[index]
            digests[index : index + 1] = pieces
            whole = len(pieces) - 1
            lengths[index : index + 1] = [*[PIECE_BYTES] * whole, length - whole * PIECE_BYTES]
    return digests, lengths


def _folded(
    digests: Sequence[int], lengths: Sequence[int], fold: tuple[int, int]
) -> tuple[Sequence[int], Sequence[int]]:
    """Return *digests* and *lengths*, of which the *fold* is one."""
    start, end = fold
    if not end or len(digests) <= start:
        return digests, lengths
    return (
        [*digests[:start], hash(tuple(digests[start:end])), *digests[end:]],
        [*lengths[:start], sum(lengths[start:end]), *lengths[end:]],
    )


def compare(last: LastTurn, regions: Regions) -> Difference:
    """Return how *regions* differ from those of the *last* turn. More of them at the end are no
    difference, nor are fewer: that is how a conversation goes on, or goes back.
    """
    digests, _ = _folded(*_split(regions), last.fold)
    first = 0
    for one, other in zip(last.digests, digests, strict=False):
        if one != other:
            break
        first += 1
    before = sum(last.lengths[:first])
    if first in (len(last.digests), len(digests)):
        return Difference(before, before)
    there = Counter(digests[first:])
    equal, missing = before, 0
    for digest, length in zip(last.digests[first:], last.lengths[first:], strict=True):
        if there[digest]:
            there[digest] -= 1
            equal += length
        else:
            missing += 1
    reordered = False
    if not missing:
        # What was only inserted leaves the others in their order.
        behind = iter(digests[first:])
        reordered = not all(digest in behind for digest in last.digests[first:])
    at, byte = _place(first, last, regions)
    return Difference(equal, before, at, byte, reordered)


def _place(first: int, last: LastTurn, regions: Regions) -> tuple[str, int]:
    """Return the name of the region with the piece *first*, the first that differs, and the byte
    with which the region begins.
    """
    (start, end), number = last.fold, 1
    position = _region_at(first if not end or first <= start else first + end - start - 1, regions)
    if end and first == start:
        number = _region_at(end, regions) - position
    byte, name, index = sum(regions.lengths[:position]), regions.talk, position
    for part, one, other in zip(HEAD, last.counts, regions.counts.values(), strict=True):
        # A region that is only in one of them stands behind the others of its part.
        if index < max(one, other):
            name = part
            break
        index -= other
    if number == 1:
        return f"{name}[{index}]", byte
    return f"{name}[{index}:{index + number}]", byte


def _region_at(first: int, regions: Regions) -> int:
    """Return the position of the region with the piece *first*."""
    last = regions.start if regions.user is None else regions.user
    for index in sorted(regions.pieces):
        if index > last or first <= index:
            break
        first = max(index, first - len(regions.pieces[index]) + 1)
    return first


def expected(last: LastTurn, difference: Difference) -> tuple[float, float]:
    """Return the tokens of what is equal, and of what of it stands before the first difference."""
    ratio = last.sent.prompt / max(1, sum(last.lengths))
    most = last.sent.kept
    return min(most, ratio * difference.equal), min(most, ratio * difference.before)


def judge(
    last: LastTurn,
    difference: Difference,
    sent: Sent,
    cached: int | None,
    pause: float,
    longest: float | None,
    why: str = "",
) -> CacheLoss | None:
    """Return what the turn has lost that was *sent* after a *pause* in seconds, and of which so many
    tokens were *cached*, None if that is not known; None if it has lost nothing.

    *longest* is the longest pause after which its provider has still had a prompt, None if it has
    never been seen to have one. *why* says why a turn has moved.
    """
    equal, before = expected(last, difference)
    equal, before = min(equal, sent.prompt), min(before, sent.prompt)
    if equal <= LEAST:
        return None
    if cached is None:
        return CacheLoss(UNKNOWN)
    if difference.at and cached >= before:
        # All before the difference is cached: the other tokens are those of the other bytes.
        ratio = (last.sent.kept - cached) / (sum(last.lengths) - difference.before)
        before, equal = cached, cached + ratio * (difference.equal - difference.before)
    lost = equal - cached
    if lost <= max(LEAST, SHARE * equal):
        return None
    tokens = round(lost)
    if difference.at and WEIGHT * (equal - before) >= lost:
        verdict = REORDERED if difference.reordered else CHANGED
        return CacheLoss(verdict, difference.at, difference.byte, tokens)
    if (last.sent.provider, last.sent.model) != (sent.provider, sent.model):
        return CacheLoss(MOVED, why, None, tokens)
    if longest is None:
        return CacheLoss(UNKNOWN, "", None, tokens)
    return CacheLoss(EXPIRED if pause > max(longest, SHORTEST) else EVICTED, "", None, tokens)

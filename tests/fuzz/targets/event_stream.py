"""The parser of event streams, against the standard written down plainly, in any pieces."""

from __future__ import annotations

from aioserver.protocol.eventstream import EventTooLong, Splitter
from tests.fuzz.inputs import parts
from tests.support.event_streams import check

# A bound that inputs of a few hundred bytes meet.
SMALL = 24


def run(data: bytes) -> None:
    """Check that events, and the bound of one, do not depend on the reads."""
    case = parts(data)
    whole, *_ = ways = case.reads()
    for reads in ways:
        check(case.content, reads)
        assert _fits(reads) == _fits(whole), "the bound depends on the reads"


def _fits(reads: list[bytes]) -> bool:
    splitter = Splitter(SMALL)
    try:
        for read in reads:
            splitter.feed(read)
            assert len(splitter.pending) <= SMALL + 4, "more is kept than an event may have"
    except EventTooLong:
        return False
    return True

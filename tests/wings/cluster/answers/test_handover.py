"""Finished logs that are handed over when their instance stops: which ones, and as what."""

from __future__ import annotations

import pytest

from aioserver.auth.callers import Caller
from aioserver.errors import ResumeGap, ServerShutdown, StreamNotFound
from aioserver.gateway.contracts.instances import Start
from aioserver.streams.entries import CHUNK, COMPLETE
from aioserver.streams.stream import Stream
from aioserver.wings.cluster.answers import handover

CALLER = Caller("somebody")


def finished(
    request_id: str, size: int = 10, window: float = 30.0, caller: Caller = CALLER
) -> Stream:
    stream = Stream(request_id, caller, window=window, max_bytes=1 << 30)
    for _ in range(3):
        stream.append(CHUNK, [b'"%b"' % (b"x" * size)])
    stream.end(COMPLETE, {})
    return stream


def test_the_newest_logs_are_handed_over_up_to_a_bound() -> None:
    newest, large, old = finished("1"), finished("2", handover.MAX_BYTES // 3), finished("3")

    assert [s.request_id for s, _seconds, _log in handover.chosen([newest, old])] == ["1", "3"]
    assert [s.request_id for s, _seconds, _log in handover.chosen([newest, large, old])] == ["1"]


def test_nobody_takes_the_room_of_all_logs_that_are_handed_over() -> None:
    size, other = handover.MAX_BYTES // 9, Caller("other")
    mine = [finished(f"m{number}", size // 3) for number in range(20)]
    theirs = [finished(f"t{number}", size // 6, caller=other) for number in range(3)]

    names = [s.request_id for s, _seconds, _log in handover.chosen([*mine, *theirs])]

    assert [name for name in names if name[0] == "t"] == ["t0", "t1", "t2"]
    assert [name for name in names if name[0] == "m"] == [f"m{number}" for number in range(7)]


def test_what_has_no_window_left_or_was_cut_is_not_handed_over() -> None:
    cut = Stream("1", CALLER, window=30.0, max_bytes=1 << 20)
    cut.fail(ServerShutdown("the server is stopping"))
    running = Stream("2", CALLER, window=30.0, max_bytes=1 << 20)
    running.append(CHUNK, [b'"x"'])
    over = finished("3", window=-1.0)

    assert list(handover.chosen([cut, running, over])) == []


@pytest.mark.parametrize("after", [0, 1, 2, 3])
async def test_a_log_is_filled_in_from_any_event_on(after: int) -> None:
    stream = finished("1")
    mirror = Stream("1", CALLER, window=0.0, max_bytes=1 << 20, private=True)
    accepted: list[bool] = []

    await handover.fill(
        mirror, handover.log_of(stream), Start(after), lambda: accepted.append(True), {}
    )

    frames = [frame for entry in stream.entries for frame in stream.frames(entry)]
    filled = [frame for entry in mirror.entries for frame in mirror.frames(entry)]
    assert filled == frames[after:]
    assert mirror.ended
    assert accepted == [True]


async def test_a_log_has_no_events_beyond_its_end() -> None:
    log = handover.log_of(finished("1"))
    mirror = Stream("1", CALLER, window=0.0, max_bytes=1 << 20, private=True)

    with pytest.raises(ResumeGap):
        await handover.fill(mirror, log, Start(9), lambda: None, {})
    with pytest.raises(StreamNotFound):
        await handover.fill(mirror, log[:-10], Start(), lambda: None, {})
    with pytest.raises(StreamNotFound):
        await handover.fill(mirror, b"\xff" * 50, Start(), lambda: None, {})
    assert not mirror.ended

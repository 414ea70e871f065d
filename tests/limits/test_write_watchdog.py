"""The watch over a socket, on a clock that is moved by hand."""

from __future__ import annotations

import pytest

from aioserver.limits.write_watchdog import WriteWatchdog
from tests.support.clock import FakeClock
from tests.support.transport import FakeTransport

TIMEOUT = 8.0


class Watched:
    def __init__(self, size: int = 100) -> None:
        self.clock = FakeClock()
        self.buffer = FakeTransport(held=size)
        self.alarms: list[float] = []
        self.start = self.clock.now
        self.watch = WriteWatchdog(
            self.clock.loop,
            self.buffer,
            TIMEOUT,
            lambda: self.alarms.append(self.clock.now - self.start),
        )


def test_a_buffer_that_does_not_shrink_gives_one_alarm_in_time() -> None:
    watched = Watched()

    watched.clock.advance(TIMEOUT - 0.1)
    assert watched.alarms == []
    watched.clock.advance(100.0)

    assert watched.alarms == [TIMEOUT]
    assert watched.clock.pending == 0


@pytest.mark.parametrize("stalled_at", [0.1, 1.9, 2.1, 7.9, 30.0])
def test_the_alarm_is_at_most_a_quarter_late(stalled_at: float) -> None:
    watched = Watched(1_000_000)
    while watched.clock.now - watched.start < stalled_at:
        watched.buffer.held -= 1
        watched.clock.advance(0.05)
    stalled = watched.clock.now - watched.start

    watched.clock.advance(100.0)

    (alarm,) = watched.alarms
    assert stalled + TIMEOUT * 0.74 <= alarm <= stalled + TIMEOUT * 1.25 + 0.05


def test_a_byte_now_and_then_is_progress() -> None:
    watched = Watched(1000)

    for _ in range(100):
        watched.clock.advance(TIMEOUT * 0.7)
        watched.buffer.held -= 1

    assert watched.alarms == []


def test_an_empty_buffer_ends_the_watch() -> None:
    watched = Watched()
    watched.buffer.held = 0

    watched.clock.advance(TIMEOUT)
    watched.buffer.held = 100  # somebody else's
    watched.clock.advance(100.0)

    assert watched.alarms == []
    assert watched.clock.pending == 0


def test_a_stopped_watch_gives_no_alarm() -> None:
    watched = Watched()

    watched.watch.stop()
    watched.watch.stop()
    watched.clock.advance(100.0)

    assert watched.alarms == []
    assert watched.clock.pending == 0


def test_an_alarm_may_stop_its_own_watch() -> None:
    watched = Watched()
    watch = WriteWatchdog(watched.clock.loop, watched.buffer, TIMEOUT / 2, lambda: watch.stop())

    watched.clock.advance(100.0)

    assert watched.clock.pending == 0

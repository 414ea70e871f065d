"""The slot of one worker among several: its gate, who accepts, and the beat by which both follow
the page.

A beat every BEAT says that this worker's loop turns, and looks what the siblings need. Where
something is to come, a place for a client that waits or the turn to accept again, the next beat is
after SOON. Where nothing happens here, and every worker has PLENTY of places, it is after REST: an
idle server wakes up for little else.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from aioserver.workers.balance import Balance
from aioserver.workers.fixed_shares import share
from aioserver.workers.key_counts import KeyCounts
from aioserver.workers.places import SharedGate
from aioserver.workers.shared_page import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.limits.gate import Gate
    from aioserver.workers.shared_page import SharedPage

# Seconds between two beats. A worker counts as blocked three beats later (`shared_page.LATE`).
BEAT = 0.025
SOON = 0.005
# A client waits for a place of a resting worker for that long at most; `places.GRACE` is longer.
REST = 0.25
# Free places of each worker: a burst of more clients that all come to one worker has to wait for
# the others' places.
PLENTY = 16


class Slot:
    """The slot of this worker on *page*. There are *workers* processes that serve.

    Always: from `start` to `close` one timer runs, for the next beat.
    """

    def __init__(self, page: SharedPage, workers: int) -> None:
        self.page = page
        self._workers = workers
        self._rank = page.slot % workers
        self.balance = Balance(page, self._hurry)
        self.key_counts = KeyCounts(page)
        self._gate: SharedGate | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        # When the next beat is due, in the loop's time.
        self._due = 0.0
        self.beats = 0
        # Called with each instance of the cluster whose process has ended; see `SharedPage.gone`.
        self.on_gone: Callable[[int], None] = lambda _instance: None
        self._gone = page.gone()
        # What had happened here at the last beat.
        self._events = -1

    def gate(self, limit: int, **bounds: Any) -> Gate:
        """Return the gate of this slot; the arguments are those of `Gate`."""
        part = partial(share, rank=self._rank, workers=self._workers)
        self._gate = SharedGate(self.page, part, self._hurry, limit, **bounds)
        return self._gate

    def start(self) -> None:
        """Begin to beat: this worker serves."""
        self._beat()

    def close(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self) -> None:
        gate = self._gate
        assert gate is not None, "`gate` makes it"
        if gate.closed:
            state = State.LEAVING
        else:
            state = State.SERVING if self.balance.able else State.DRAINING
        self.beats += 1
        if (gone := self.page.gone()) != self._gone:
            for instance in set(gone).difference(self._gone):
                self.on_gone(instance)
            self._gone = gone
        starving = gate.move()
        waits = self.balance.beat()
        events = gate.entered + self.balance.events
        if starving or waits or gate.waiting:
            after = SOON
        elif events != self._events or gate.free < PLENTY or self.page.wanted(PLENTY):
            after = BEAT
        else:
            after = REST
        self._events = events
        self.page.beat(state, after)
        self._beat_in(after)

    def _hurry(self) -> None:
        """Let the next beat be soon."""
        if self._timer is not None and self._due > self._loop.time() + SOON:
            self._timer.cancel()
            self._beat_in(SOON)

    def _beat_in(self, delay: float) -> None:
        self._due = self._loop.time() + delay
        self._timer = self._loop.call_later(delay, self._beat)

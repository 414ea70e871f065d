"""The twin of the shared server in the test's event loop: calls of `Shares` are answered without any socket."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from aioserver.wings.cluster.lease_messages import SECOND
from aioserver.wings.cluster.leases import Shares
from tests.support.settle_model import Model, Stale

if TYPE_CHECKING:
    from typing import Any

# Seconds that a message takes.
DELAY = 0.001


class Twin:
    """A server, and the instances that have joined it. *up*: calls are answered; otherwise they fail at once."""

    def __init__(self) -> None:
        self.model = Model()
        self.up = True
        self.calls = 0
        self._loop = asyncio.get_running_loop()
        self._shares: dict[str, Shares] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def join(self, name: str, **options: Any) -> Shares:
        """Return the shares of a new instance."""
        shares = Shares(name, clock=self._loop.time, **options)
        self._shares[name] = shares
        shares.on_due = partial(self._arm, shares)
        self._arm(shares)
        return shares

    def close(self) -> None:
        """Answer nothing more."""
        for timer in self._timers.values():
            timer.cancel()
        self._shares.clear()

    def _arm(self, shares: Shares) -> None:
        if (timer := self._timers.pop(shares.instance, None)) is not None:
            timer.cancel()
        wait = max(0.0, shares.due - self._loop.time())
        if wait < 1e6 and not shares.left:
            self._timers[shares.instance] = self._loop.call_later(wait, self._call, shares)

    def _call(self, shares: Shares) -> None:
        if shares.busy or shares.left:
            return
        self.calls += 1
        request = shares.request("run")
        self._loop.call_later(DELAY, self._arrive, shares, request)

    def _arrive(self, shares: Shares, request: bytes) -> None:
        if shares.instance not in self._shares:
            return
        try:
            if not self.up:
                raise Stale("down")
            answer, wakes = self.model.settle(request, round(self._loop.time() * SECOND))
        except Stale as error:
            self._loop.call_later(DELAY, shares.failed, str(error))
            return
        for name, words in wakes.items():
            if (other := self._shares.get(name)) is not None:
                self._loop.call_later(DELAY, other.woken, words)
        self._loop.call_later(DELAY, shares.answered, answer)

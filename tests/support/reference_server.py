"""The shared server's script in the test's event loop: calls of `Leases` are answered without any
socket.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from aioserver.wings.cluster.limits.lease_messages import SECOND
from aioserver.wings.cluster.limits.leases import Leases
from tests.support.renew_script import Script, Stale

if TYPE_CHECKING:
    from typing import Any

    from aioserver.wings.cluster.limits.shared_budget import SharedBudget

# Seconds that a message takes.
DELAY = 0.001


class ReferenceServer:
    """A server, and the instances that have joined it. *up*: calls are answered; otherwise they
    fail at once.
    """

    def __init__(self) -> None:
        self.script = Script()
        self.up = True
        self.calls = 0
        self._loop = asyncio.get_running_loop()
        self._leases: dict[str, Leases] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def join(self, name: str, **options: Any) -> Leases:
        """Return the shares of a new instance."""
        leases = Leases(
            name,
            clock=self._loop.time,
            on_due=lambda: self._arm(leases),
            ask=self._ask,
            later=self._loop.call_later,
            **options,
        )
        self._leases[name] = leases
        self._arm(leases)
        return leases

    def close(self) -> None:
        """Answer nothing more."""
        for timer in self._timers.values():
            timer.cancel()
        self._leases.clear()

    def _arm(self, leases: Leases) -> None:
        if (timer := self._timers.pop(leases.instance, None)) is not None:
            timer.cancel()
        wait = max(0.0, leases.due - self._loop.time())
        if wait < 1e6 and not leases.left:
            self._timers[leases.instance] = self._loop.call_later(wait, self._call, leases)

    def _ask(self, budget: SharedBudget) -> None:
        self._loop.call_soon(self._question, budget)

    def _question(self, budget: SharedBudget) -> None:
        self.calls += 1
        self._loop.call_later(DELAY, self._answer, budget, budget.question("run"))

    def _answer(self, budget: SharedBudget, question: bytes) -> None:
        answer: bytes | None = None
        if self.up:
            with suppress(Stale):
                now = round(self._loop.time() * SECOND)
                answer = self.script.call("budget.lua", question, now)
        self._loop.call_later(DELAY, budget.answered, answer)

    def _call(self, leases: Leases) -> None:
        if leases.busy or leases.left:
            return
        self.calls += 1
        request = leases.request("run")
        self._loop.call_later(DELAY, self._arrive, leases, request)

    def _arrive(self, leases: Leases, request: bytes) -> None:
        if leases.instance not in self._leases:
            return
        try:
            if not self.up:
                raise Stale("down")
            answer, wakes = self.script.renew(request, round(self._loop.time() * SECOND))
        except Stale as error:
            self._loop.call_later(DELAY, leases.failed, str(error))
            return
        for name, words in wakes.items():
            if (other := self._leases.get(name)) is not None:
                self._loop.call_later(DELAY, other.woken, words)
        self._loop.call_later(DELAY, leases.answered, answer)

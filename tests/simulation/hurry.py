"""Deadlines that clients set: nothing starts after one, and nothing runs on after one.

Looked at from two sides: each request that is sent to a provider, to its end, and each wait and
each answer that a deadline guards, wherever it is.
"""

# ruff: noqa: SLF001 - no snapshot shows the waits

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from aioserver.limits.deadline import Guard
from aioserver.protocol.request_headers import BATCH, CLASS, DEADLINE, START_WITHIN
from aioserver.providers.attempt import Attempt
from aioserver.providers.exchange import Exchange
from aioserver.providers.passthrough import PassedAttempt
from aioserver.wings.conversations.sqlite import COMMIT_TIMEOUT
from tests.simulation.clock import Clock
from tests.simulation.network import INSTANCE
from tests.simulation.noting import noted, together

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from aioserver.limits.deadline import Deadline
    from aioserver.streams.contracts import Source

# Seconds by which the end of an answer may be later than its deadline, and by which a start may: a
# timer fires at once.
LATE, ROUNDING = 0.1, 1e-6
# How a client is told.
CODE = "deadline_exceeded"


def draw_terms(seed: int, number: int, share: float) -> dict[str, str]:
    """Draw the headers of client *number*, of which a *share* is in a hurry."""
    dice = random.Random(f"terms {seed} {number}")
    if dice.random() >= share:
        return {}
    request_options = {
        START_WITHIN: dice.choice(("0.05", "0.5", "3", "20")),
        DEADLINE: dice.choice(("0.3", "2", "10", "60")),
        CLASS: BATCH,
    }
    return {name: value for name, value in request_options.items() if dice.random() < 0.6}


class Hurry:
    """Follows all that has a deadline, and calls *broken* with what comes too late.

    *alive* returns the numbers of the instances that run.
    """

    def __init__(self, broken: Callable[[str], None], alive: Callable[[], set[int]]) -> None:
        self._broken = broken
        self._alive = alive
        self._sent: dict[Exchange, Deadline] = {}
        # The instance of each.
        self._guards: dict[Guard, int] = {}
        self._started: set[Deadline] = set()

    def look(self) -> None:
        """Look at what is under way."""
        now, alive = Clock.now, self._alive()
        for exchange, deadline in list(self._sent.items()):
            transport: Any = exchange.protocol.transport
            # Where all is said, the last chunk may still be to come.
            over = exchange.protocol.exchange is not exchange or exchange._done.done()
            if over or transport.owner not in alive:
                del self._sent[exchange]
            elif now > deadline.deadline + LATE:
                del self._sent[exchange]
                self._broken(f"an answer runs {now - deadline.deadline:.3f} s too long")
        for guard, instance in list(self._guards.items()):
            deadline = guard._deadline
            if instance not in alive:
                del self._guards[guard]
                continue
            # What was said so far may first be written down.
            bound = LATE if guard._error is None else LATE + COMMIT_TIMEOUT
            if now > deadline.next + bound and not (guard._over() or guard._task.done()):
                del self._guards[guard]
                late = now - deadline.next
                self._broken(f"{deadline.wait} goes on for {late:.3f} s after its deadline")

    def sending(self, attempt: Attempt, exchange: Source | None = None) -> None:
        """Note that *attempt* is sent."""
        deadline = attempt.request.bound
        if deadline is None:
            return
        late = Clock.now - deadline.start_by
        if deadline not in self._started and late > ROUNDING:
            self._broken(f"a request starts {late:.3f} s after its deadline")
        self._started.add(deadline)
        if Clock.now > deadline.deadline + ROUNDING:
            self._broken("an attempt starts after the deadline of its request")
        assert isinstance(exchange, Exchange)
        self._sent[exchange] = deadline

    def patches(self) -> ExitStack:
        """Let all of that be noted, in the block."""
        guards = self._guards
        return together(
            *(noted(kind, "sending", before=self.sending) for kind in (Attempt, PassedAttempt)),
            noted(Guard, "__enter__", before=lambda guard: guards.update({guard: INSTANCE.get()})),
            noted(Guard, "__exit__", before=lambda guard, *_: guards.pop(guard, None)),
        )

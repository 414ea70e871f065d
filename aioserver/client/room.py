"""The answers of one client for which the server had no room.

Each of them asks again after a time. But when another answer of the same client ends and gives its
place back, this client is the first to know: one of the waiting answers then asks at once. So a
client with more questions than the server has places keeps these places in use.
"""

from __future__ import annotations

import asyncio
from itertools import count


class Room:
    """The waiting answers.

    Always: a place that was given back lets the waiting answer ask that came first, if there is
    one.
    """

    def __init__(self) -> None:
        self._tickets = count()
        # Futures by ticket: each has the result True when its answer may ask.
        self._waiting: dict[int, asyncio.Future[bool]] = {}

    def ticket(self) -> int:
        """Return a ticket for one more waiting answer."""
        return next(self._tickets)

    def give_back(self) -> None:
        """Let the first waiting answer ask, since there is a place again."""
        waiting = [ticket for ticket, asked in self._waiting.items() if not asked.done()]
        if waiting:
            self._waiting[min(waiting)].set_result(True)

    async def wait(self, ticket: int, seconds: float) -> bool:
        """Wait for a place, *seconds* at most; return whether there is one. Cancelling is safe."""
        loop = asyncio.get_running_loop()
        asked: asyncio.Future[bool] = loop.create_future()
        self._waiting[ticket] = asked
        timer = loop.call_later(max(0.0, seconds), _give_up, asked)
        try:
            return await asked
        except asyncio.CancelledError:
            if asked.done() and not asked.cancelled() and asked.result():
                self.give_back()
            raise
        finally:
            timer.cancel()
            del self._waiting[ticket]


def _give_up(asked: asyncio.Future[bool]) -> None:
    if not asked.done():
        asked.set_result(False)

"""A hook that is as sick as a hook can be: it stalls, raises, and says what is no decision.

Where it is open, nothing of it may be seen: no request is refused, and no event of an answer comes
later or in another order, for which the other invariants stand. Where it is closed, no request
passes that it has not decided about (doors.py).
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aioserver.hook import Call

# Seconds for which it is waited for.
PATIENCE = 0.05
ENTRY: dict[str, Any] = {
    "name": "sick",
    "python": f"{__name__}:SickHook",
    "on": ["request", "answer"],
    "timeout": PATIENCE,
    "fail": "open",
}
CLOSED: dict[str, Any] = {
    **ENTRY,
    "name": "closed",
    "python": f"{__name__}:ClosedHook",
    "on": ["request"],
    "fail": "closed",
}
# The bodies of the requests that a closed hook has let pass in this run.
PASSED: list[bytes] = []


class SickHook:
    """Does nothing as it should."""

    def __init__(self) -> None:
        self._dice = random.Random(7)

    async def request(self, call: Call) -> Any:
        """Pass the request, stall, raise, or return what is no decision."""
        match self._dice.randrange(5):
            case 0:
                await asyncio.sleep(1e6)
            case 1:
                raise ValueError(call.id)
            case 2:
                return 5
            case 3:
                # The same body, as bytes of its own.
                return bytes(bytearray(call.body))
        return None

    def event(self, _call: Call, data: bytes) -> Any:
        """Pass the event, or raise."""
        if self._dice.random() < 0.02:
            raise ValueError(data[:9])
        return "no decision" if self._dice.random() < 0.01 else None


class ClosedHook(SickHook):
    """The same, but notes what it has decided."""

    async def request(self, call: Call) -> Any:
        """Pass the request, stall, raise, or return what is no decision."""
        said = await super().request(call)
        if said is None or isinstance(said, bytes):
            PASSED.append(call.body)
        return said

"""Rates that instances share: slots in hand.

A slot is a moment at which a request may start. The server gives slots by GCRA (limits/gcra.py), and only those that
begin within the horizon, so that an instance that vanishes takes little with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aioserver.cluster.holding import State
    from aioserver.cluster.messages import PaceOp, Slots


class PaceUser(Protocol):
    """Whoever takes slots of a pace; its name is that of the pace."""

    name: str

    def op(self) -> PaceOp | None:
        """Return what to ask for in a call that is sent now; None: nothing."""

    def answered(self, slots: Slots | None, sent: float) -> None:
        """Take in the answer to what was asked for at *sent*; None: the call failed."""

    def stand(self, state: State, instances: int) -> None:
        """Take in that this instance is in *state*, and one of so many if it is alone; 0: of an unknown number."""

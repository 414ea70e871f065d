"""The tokens of one key, of which each instance may use an equal part.

All instances together stay within the budget, as far as they know how many they are; but what one
does not use of its part, another one does not get. What is used counts where it was used: while
instances come and go, a day may have been used in larger parts before.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aioserver.limits.budget import PER_DAY, PER_MINUTE, Budget

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.limits.budget import BudgetState


class PartOfBudget(Budget):
    """The part of a budget that this instance may use, one of as many as *parts* returns.

    Always: its limits are those of `apply`, divided by the number that `resize` has seen last; what
    it shows are the whole limits.
    """

    def __init__(
        self,
        per_minute: int,
        per_day: int,
        parts: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._parts = parts
        self._whole = per_minute, per_day
        super().__init__(per_minute, per_day, clock, wall_clock)

    def apply(self, per_minute: int, per_day: int) -> None:
        """Use other limits from now on, those of all instances together."""
        self._whole = per_minute, per_day
        super().apply(self._part(per_minute), self._part(per_day))

    def resize(self) -> None:
        """Take in how many instances there are now."""
        self.apply(*self._whole)

    def take_over(self, old: Budget) -> None:
        """Go on with what *old* counts, by our own limits."""
        whole = self._whole
        super().take_over(old)
        self.apply(*whole)

    def begin_day(self, used: int) -> None:
        """Count a part of the *used* tokens of today, which all instances have used."""
        super().begin_day(used // max(1, self._parts()))

    def states(self) -> dict[str, BudgetState]:
        """Return the budgets as they are, with the limits of all together."""
        whole = dict(zip((PER_MINUTE, PER_DAY), self._whole, strict=True))
        return {
            name: state._replace(
                limit=whole[name], remaining=max(0, whole[name] - state.used - state.reserved)
            )
            for name, state in super().states().items()
        }

    def _part(self, limit: int) -> int:
        return max(1, limit // max(1, self._parts())) if limit else 0

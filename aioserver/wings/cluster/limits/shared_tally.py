"""What an instance knows of the tokens of a key at the server: the bucket of the minute and the
count of the day, of all instances together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.limits.budget import DAY, MINUTE
from aioserver.wings.cluster.limits.lease_messages import SECOND

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.wings.cluster.limits.lease_messages import Tokens


class Bucket:
    """The bucket of the minute (renew.lua), as it was at the last answer and has drained since.

    A token stands at its number among all that have come into the bucket. `limit` is the budget;
    0: there is none. `held` are in the hands of others. `kept` have never come into it, though those
    that came behind them were counted as if they had: here they count as given back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.limit = self.held = self.kept = 0
        self._clock = clock
        self._charged = self._drained = self._returned = 0.0
        # The answer was given at this moment or later.
        self._at = clock()

    def _out(self) -> float:
        """Return how many tokens have drained, at most."""
        return self._drained + (self._clock() - self._at) * self.limit / MINUTE

    @property
    def level(self) -> float:
        """How many tokens are in it."""
        return max(0.0, self._charged - self._out())

    @property
    def last(self) -> float:
        """Where the last token stands that the server has given."""
        return self.comes(0)

    def comes(self, tokens: int) -> float:
        """Return where the last one of *tokens* stands that come into it now, at least."""
        return self._charged + tokens + self._returned + self.kept

    def left(self, tokens: int, stood: float) -> int:
        """Return how many are left of *tokens*, the last of which *stood* there."""
        # What was taken out since may have stood in front of it.
        return max(0, min(tokens, int(stood - self._returned - self.kept - self._out())))

    def answered(self, answer: Tokens, sent: float) -> None:
        """Take in the *answer* to what was said at *sent*."""
        self._charged, self._drained = answer.charged, answer.drained
        self._returned, self.held = answer.returned, answer.held
        self._at = sent


class DayCount:
    """The count of the day, as it was at the last answer, and what this instance has had since.

    `limit` is the budget; 0: there is none. `mine` is what this instance has used, reserved and in
    hand, and `was` what that was at the last answer; `count` is what all instances had then, and
    `known` what they had when the server was last sure of it. The day ends as the server has said;
    before it has, as the wall clock does.
    """

    def __init__(self, clock: Callable[[], float], wall_clock: Callable[[], float]) -> None:
        self.limit = self.count = self.known = self.mine = self.was = 0
        self._clock = clock
        number, gone = divmod(wall_clock(), DAY)
        self.number = int(number)
        self._ends = clock() + DAY - gone

    def turn(self) -> bool:
        """Begin another day if it has come; return whether it has."""
        turned = False
        while self._clock() >= self._ends:
            self._begin(self.number + 1, self._ends + DAY)
            turned = True
        return turned

    def _begin(self, number: int, ends: float) -> None:
        self.number, self._ends = number, ends
        self.count = self.known = self.mine = self.was = 0

    def begin(self, used: int) -> None:
        """Count at least *used* tokens, which are known by other means."""
        self.turn()
        self.count, self.known = max(self.count, used), max(self.known, used)

    @property
    def rest(self) -> float:
        """The seconds until the next day."""
        return min(float(DAY), self._ends - self._clock())

    @property
    def total(self) -> int:
        """What all instances have used, reserved and in hand, as far as is known."""
        return max(0, self.count + self.mine - self.was)

    def answered(self, answer: Tokens, mine: int, tokens: int) -> bool:
        """Take in the *answer*, which has brought *tokens*, to a call that said what was *mine*.

        Returns whether another day has begun by it.
        """
        # It is the server's clock that counts.
        turned = answer.day != self.number
        if turned:
            self._begin(answer.day, 0.0)
        self._ends = self._clock() + answer.left / SECOND
        self.was = tokens if turned else mine + tokens
        self.count = answer.counted
        if not answer.closed:
            self.known = answer.counted
        self.mine += tokens
        return turned

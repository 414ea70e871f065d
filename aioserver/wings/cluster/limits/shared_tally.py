"""The knowledge of an instance about the tokens of a key: the bucket of the minute and the count of
the day, of all instances together, at the server.
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

    The position of a token is its number among all tokens that have come into the bucket. `limit` is
    the budget; 0: there is none. `held` are the prefetched tokens of other instances. `kept` tokens
    never came into the bucket, although the positions behind them were counted as if they had; here
    they count as given back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.limit = self.held = self.kept = 0
        self._clock = clock
        self._charged = self._drained = self._returned = 0.0
        # The answer was given at this moment or later.
        self._at = clock()

    def _out(self) -> float:
        """Return the most tokens that can have drained."""
        return self._drained + (self._clock() - self._at) * self.limit / MINUTE

    @property
    def level(self) -> float:
        """The number of tokens in the bucket."""
        return max(0.0, self._charged - self._out())

    @property
    def last(self) -> float:
        """The position of the last token that the server has granted."""
        return self.comes(0)

    def comes(self, tokens: int) -> float:
        """Return the least position of the last of *tokens* that come into the bucket now."""
        return self._charged + tokens + self._returned + self.kept

    def left(self, tokens: int, stood: float) -> int:
        """Return how many of *tokens* have not drained, if the last of them is at *stood*."""
        # Tokens that were taken out since may have been in front of them.
        return max(0, min(tokens, int(stood - self._returned - self.kept - self._out())))

    def answered(self, answer: Tokens, sent: float) -> None:
        """Take in the *answer* to a call that was sent at *sent*."""
        self._charged, self._drained = answer.charged, answer.drained
        self._returned, self.held = answer.returned, answer.held
        self._at = sent


class DayCount:
    """The count of the day at the last answer, and the tokens of this instance since.

    `limit` is the budget; 0: there is none. `mine` are the tokens that this instance has used,
    reserved or prefetched, and `was` is the same number at the last answer. `count` is the number of
    all instances at that time, and `known` their number when the server last knew it for certain.
    The day ends by the server's clock, or by the wall clock before the first answer.
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
        """The tokens that all instances have used, reserved or prefetched, as far as is known."""
        return max(0, self.count + self.mine - self.was)

    def answered(self, answer: Tokens, mine: int, tokens: int) -> bool:
        """Take in the *answer*, which has brought *tokens*, to a call with the number *mine*.

        Return whether another day has begun by it.
        """
        # The server's clock decides.
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

"""Counts the requests that have met a bug of the server, by the bugs' places in the code."""

from __future__ import annotations

from aioserver.telemetry.counters import Counter
from aioserver.tracebacks import last_line

# Lines of code that are distinguished, far more than have a bug at once; and the name of all
# others.
MAX_PLACES, ELSEWHERE = 100, "other bugs"


class Bugs(Counter):
    """The requests that have met a bug; *places* counts them by the last line of its traceback.

    Always: `value` is the sum of `places`, which has MAX_PLACES + 1 items at most.
    """

    __slots__ = ("places",)

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, int] = {}

    def note(self, bug: BaseException) -> None:
        """Count a request that has met *bug*, which still has its traceback.

        The caller logs it.
        """
        place = last_line(bug)
        if place not in self.places and len(self.places) >= MAX_PLACES:
            place = ELSEWHERE
        self.places[place] = self.places.get(place, 0) + 1
        self.value += 1

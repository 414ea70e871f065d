"""The responses that connections hold: the latest one of each of their lanes, whatever `store` says.

Only the connection that holds a response finds it. Such a response takes as much room as a stored one, and a
client gets it for nothing (`generate: false`), so it is dropped like a stored one where the room is needed: first the one
that has been held longest. A client that continues it afterwards is told so, and sends the conversation again.
"""

from __future__ import annotations

from collections import OrderedDict
from math import inf
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable


class Counted(Protocol):
    """A response, which is kept as long as something refers to it."""

    def retain(self) -> None:
        """Refer to it, until `release`."""

    def release(self) -> None:
        """Refer to it no longer."""


R = TypeVar("R", bound=Counted)


class HeldResponses(Generic[R]):
    """The responses that connections hold: at most one for each holder, a lane.

    Always: each response in it is referred to once for each of its holders.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # With the times since when they are held: the oldest first.
        self._held: OrderedDict[Hashable, tuple[float, R]] = OrderedDict()

    def get(self, holder: Hashable) -> R | None:
        """Return what *holder* holds; None if it holds nothing, or that was dropped."""
        held = self._held.get(holder)
        return None if held is None else held[1]

    def hold(self, holder: Hashable, response: R) -> None:
        """Let *holder* hold *response*, instead of what it has held."""
        response.retain()
        self.drop(holder)
        self._held[holder] = self._clock(), response

    def drop(self, holder: Hashable) -> None:
        """Let *holder* hold nothing."""
        if (held := self._held.pop(holder, None)) is not None:
            held[1].release()

    def oldest(self) -> float:
        """Return since when the oldest is held; infinity if there is none."""
        return next((since for since, _response in self._held.values()), inf)

    def drop_oldest(self) -> None:
        """Drop the oldest, to make room."""
        self.drop(next(iter(self._held)))

"""The announcements of instances about providers: one is dead, answers again, or cools down, for
so many seconds.

An announcement is not counted: each instance applies it to its own breaker and pace. The server
keeps announcements for instances that join later, and an answer carries all of them whenever one
has changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.wings.cluster.limits.lease_messages import SECOND, Answer, Tell

if TYPE_CHECKING:
    from collections.abc import Callable


class Announcements:
    """The announcements to be sent with the next call, and those received.

    *on_announced* is called with the provider, the word and the seconds that it holds for; 0.0: no
    more.
    """

    def __init__(
        self, call_soon: Callable[[], None], on_announced: Callable[[str, str, float], None]
    ) -> None:
        self._call_soon = call_soon
        self._on_announced = on_announced
        self._tells: list[Tell] = []
        # The number of them in the call under way; if it fails they are sent again.
        self._said = 0
        self._known: set[tuple[str, str]] = set()
        self.version = 0

    @property
    def pending(self) -> bool:
        """Whether an announcement is to be sent."""
        return bool(self._tells)

    def announce(self, name: str, word: str, seconds: float) -> None:
        """Announce to all instances that *word* holds of the provider *name* for *seconds*.

        0: it holds no longer.
        """
        self._tells.append(Tell(name, word, round(seconds * SECOND)))
        self._call_soon()

    def take(self) -> list[Tell]:
        """Return the announcements for a call that is sent now."""
        self._said = len(self._tells)
        return self._tells[:]

    def answered(self, answer: Answer) -> None:
        """Handle the answer to that call."""
        del self._tells[: self._said]
        if answer.version == self.version:
            return
        self.version = answer.version
        announced = {(name, word): length / SECOND for name, word, length in answer.told}
        # A server that has lost its state ends no announcement.
        for name, word in () if answer.anew else self._known - announced.keys():
            self._on_announced(name, word, 0.0)
        self._known = set(announced)
        for (name, word), seconds in announced.items():
            self._on_announced(name, word, seconds)

"""What instances tell each other of providers: that one is dead, answers again, or cools down, for
so many seconds.

It is told and not counted: each instance applies it to its own breaker and pace. The server keeps
it for those that come later, and an answer brings all of it whenever it has changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.wings.cluster.lease_messages import SECOND, Answer, Tell

if TYPE_CHECKING:
    from collections.abc import Callable


class Announcements:
    """The words to be told with the next call, and those that were heard.

    *on_told* is called with the provider, the word and the seconds that it holds for; 0.0: no
    more.
    """

    def __init__(
        self, call_soon: Callable[[], None], on_told: Callable[[str, str, float], None]
    ) -> None:
        self._call_soon = call_soon
        self._on_told = on_told
        self._tells: list[Tell] = []
        # How many of them are in the call under way; if it fails they are told again.
        self._said = 0
        self._heard: set[tuple[str, str]] = set()
        self.version = 0

    @property
    def pending(self) -> bool:
        """Whether something is to be said."""
        return bool(self._tells)

    def tell(self, name: str, word: str, seconds: float) -> None:
        """Tell all instances that *word* holds of the provider *name* for *seconds*.

        0: no more.
        """
        self._tells.append(Tell(name, word, round(seconds * SECOND)))
        self._call_soon()

    def say(self) -> list[Tell]:
        """Return what goes with a call that is sent now."""
        self._said = len(self._tells)
        return self._tells[:]

    def answered(self, answer: Answer) -> None:
        """Take in the answer to that call."""
        del self._tells[: self._said]
        if answer.version == self.version:
            return
        self.version = answer.version
        told = {(name, word): length / SECOND for name, word, length in answer.told}
        # A server that has lost its state does not say that anything has ended.
        for name, word in () if answer.anew else self._heard - told.keys():
            self._on_told(name, word, 0.0)
        self._heard = set(told)
        for (name, word), seconds in told.items():
            self._on_told(name, word, seconds)

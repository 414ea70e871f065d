"""The ledger of a server in a run: lines that nobody writes, and what must hold of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.usage.ledger_reader import REFUSED, RUNNING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from aioserver.usage.ledger import Line


class Book:
    """Takes the lines of one server, and calls *broken* with what is wrong of them.

    *callers* has the names that a line may have.
    """

    trouble = None
    lost = waiting = 0

    def __init__(self, broken: Callable[[str], None], callers: Collection[str]) -> None:
        # Those that are no attempt's last are not among them.
        self.lines: list[Line] = []
        self._broken = broken
        self._callers = callers
        self._over: set[tuple[int, int]] = set()
        self._running: set[tuple[int, int]] = set()

    @property
    def written(self) -> int:
        """How many attempts have ended."""
        return len(self.lines)

    def put(self, line: Line) -> None:
        """Look at *line*."""
        key = line.number, line.attempt
        if key in self._over:
            self._broken(f"an attempt has two last lines, or runs after the last: {line}")
        if line.caller not in self._callers:
            self._broken(f"a line of nobody: {line}")
        if line.outcome == RUNNING:
            self._running.add(key)
            return
        if line.outcome == REFUSED and key not in self._running:
            self._broken(f"a line that takes none back: {line}")
        self._over.add(key)
        self._running.discard(key)
        self.lines.append(line)

    def end(self) -> None:
        """Look at what is left: every answer has ended."""
        if self._running:
            self._broken(f"attempts without a last line: {self._running}")

    close = end

"""The results of checks, and their texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Self, get_args

from aioserver.tools.remote import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

Level = Literal["ok", "warn", "fail", "skip"]
LEVELS: tuple[Level, ...] = get_args(Level)
# The width of the first column, which has the level.
INDENT = 6


@dataclass(frozen=True, slots=True)
class Result:
    """A result of a check. If *subject* is empty, it is the subject of the check's row.

    The level `warn` means that some clients fail or are slow, `fail` that answers fail, and `skip`
    that nothing was checked. *hint* says what to do. *seconds* is the time that a step took, if it
    says something.
    """

    level: Level
    text: str
    hint: str = ""
    seconds: float | None = None
    subject: str = ""

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" ({1000 * self.seconds:.0f} ms)"
        line = f"{self.level:<{INDENT}}{self.subject}: {self.text}{took}"
        return f"{line}\n{'':{INDENT}}  {self.hint}" if self.hint else line

    def shown(self, subject: str, remedy: str) -> Self:
        """Return it with *subject* and *remedy* in place of its own if these are empty, and without
        control characters: a text may be that of a server.
        """
        hint = self.hint or (remedy if self.level in {"warn", "fail"} else "")
        return replace(
            self,
            text=printable(self.text),
            hint=printable(hint),
            seconds=None if self.seconds is None else round(self.seconds, 6),
            subject=printable(self.subject or subject),
        )


ok, warn, fail, skip = (partial(Result, level) for level in LEVELS)


def summary(results: Iterable[Result]) -> str:
    """Return the number of *results* of each level, as a line."""
    counts = Counter(result.level for result in results)
    return ", ".join(f"{counts[level]} {level}" for level in LEVELS if counts[level])

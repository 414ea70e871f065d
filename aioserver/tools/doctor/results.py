"""The results of checks, the report, and their texts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from aioserver.tools.remote import printable

if TYPE_CHECKING:
    from collections.abc import Callable

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


ok, warn, fail, skip = (partial(Result, level) for level in LEVELS)


@dataclass
class Report:
    """The results so far; *tell* is called with each new result.

    Always: no text in it has a control character, not even a text of a server.
    """

    tell: Callable[[Result], None]
    results: list[Result] = field(default_factory=list)

    def add(self, result: Result, subject: str, remedy: str = "") -> None:
        """Add *result*, with *subject* and *remedy* in place of its own if these are empty."""
        hint = result.hint or (remedy if result.level in {"warn", "fail"} else "")
        shown = Result(
            result.level,
            printable(result.text),
            printable(hint),
            None if result.seconds is None else round(result.seconds, 6),
            printable(result.subject or subject),
        )
        self.results.append(shown)
        self.tell(shown)

    @property
    def failed(self) -> bool:
        """Whether a result has the level `fail`."""
        return any(result.level == "fail" for result in self.results)

    def summary(self) -> str:
        """Return the number of results of each level, as a line."""
        counts = Counter(result.level for result in self.results)
        return ", ".join(f"{counts[level]} {level}" for level in LEVELS if counts[level])

    def plain(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"failed": self.failed, "findings": [*map(dataclasses.asdict, self.results)]}

"""The results of checks, the report of them, and how they look."""

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
# Columns of a level, and of what is below it.
INDENT = 6


@dataclass(frozen=True, slots=True)
class Result:
    """What a check has found out about *subject*; empty: that of its row. *seconds* is the time
    that it took, where that means something.

    `warn` costs speed or some clients, `fail` costs answers, and `skip` was not looked at. *hint*
    says what to do.
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
    """The results so far; *tell* is called with each as it is made.

    Always: no text in it has a control character, whoever has said it.
    """

    tell: Callable[[Result], None]
    results: list[Result] = field(default_factory=list)

    def add(self, result: Result, subject: str, remedy: str = "") -> None:
        """Add *result* of a check of *subject* with this *remedy*, where it has none itself."""
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
        """Whether anything costs answers."""
        return any(result.level == "fail" for result in self.results)

    def summary(self) -> str:
        """Return the number of results of each level, as a line."""
        counts = Counter(result.level for result in self.results)
        return ", ".join(f"{counts[level]} {level}" for level in LEVELS if counts[level])

    def plain(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"failed": self.failed, "findings": [*map(dataclasses.asdict, self.results)]}

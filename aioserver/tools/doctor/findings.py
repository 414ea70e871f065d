"""The findings of a doctor, and how they look."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from aioserver.tools.remote import printable

if TYPE_CHECKING:
    from collections.abc import Callable

Level = Literal["ok", "warn", "fail", "skip"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "fail", "skip")
# Columns of a level, and of what is below it.
INDENT = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something found out about *subject*. *seconds* is the time that it took, where that means
    something.

    `warn` costs speed or some clients, `fail` costs answers, and `skip` was not looked at. *hint*
    says what to do.
    """

    level: Level
    subject: str
    text: str
    hint: str = ""
    seconds: float | None = None

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" ({1000 * self.seconds:.0f} ms)"
        line = f"{self.level:<{INDENT}}{self.subject}: {self.text}{took}"
        return f"{line}\n{'':{INDENT}}  {self.hint}" if self.hint else line


class Report:
    """The findings so far; *tell* is called with each as it is made.

    Always: no text in it has a control character, whoever has said it.
    """

    def __init__(self, tell: Callable[[Finding], None]) -> None:
        self._findings: list[Finding] = []
        self._tell = tell

    def ok(self, subject: str, text: str, seconds: float | None = None) -> None:
        """Note that something is well."""
        self._add("ok", subject, text, "", seconds)

    def warn(self, subject: str, text: str, hint: str = "") -> None:
        """Note what costs speed, or some clients."""
        self._add("warn", subject, text, hint)

    def fail(self, subject: str, text: str, hint: str = "") -> None:
        """Note what costs answers."""
        self._add("fail", subject, text, hint)

    def skip(self, subject: str, text: str, hint: str = "") -> None:
        """Note what was not looked at."""
        self._add("skip", subject, text, hint)

    def weigh(self, subject: str, good: bool, text: str, hint: str) -> None:
        """Note *text*, which is well or costs speed; *hint* says what to do then."""
        if good:
            self.ok(subject, text)
        else:
            self.warn(subject, text, hint)

    def _add(
        self, level: Level, subject: str, text: str, hint: str, seconds: float | None = None
    ) -> None:
        finding = Finding(
            level=level,
            subject=printable(subject),
            text=printable(text),
            hint=printable(hint),
            seconds=None if seconds is None else round(seconds, 6),
        )
        self._findings.append(finding)
        self._tell(finding)

    @property
    def failed(self) -> bool:
        """Whether anything costs answers."""
        return any(finding.level == "fail" for finding in self._findings)

    def summary(self) -> str:
        """Return the number of findings of each level, as a line."""
        counts = Counter(finding.level for finding in self._findings)
        return ", ".join(f"{counts[level]} {level}" for level in LEVELS if counts[level])

    def plain(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "failed": self.failed,
            "findings": [dataclasses.asdict(finding) for finding in self._findings],
        }

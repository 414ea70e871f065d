"""A doctor in the test's own event loop, and what it tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioserver.tools.doctor.checks import examine
from aioserver.tools.doctor.results import Facts

if TYPE_CHECKING:
    from aioserver.tools.doctor.results import Result


class Examined:
    """The report on a question, and the exit code."""

    def __init__(self, results: list[Result], code: int) -> None:
        self.results, self.code = results, code

    def of(self, level: str, about: str = "") -> list[str]:
        """The results of one level, `subject: text`, whose subject begins like this."""
        return [
            f"{result.subject}: {result.text}"
            for result in self.results
            if result.level == level and result.subject.startswith(about)
        ]

    def hint(self, text: str) -> str:
        """What to do about the one result that has *text*."""
        (hint,) = (result.hint for result in self.results if text in result.text)
        return hint

    def __str__(self) -> str:
        return "\n".join(map(str, self.results))


async def examined(**question: Any) -> Examined:
    """Ask the doctor a question: see `Facts`."""
    results: list[Result] = []
    code = await examine(Facts(**question), results.append)
    return Examined(results, code)

"""What a client of a soak test reads of an answer, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from aioserver.protocol.eventstream import Splitter, parse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GONE = (aiohttp.ClientError, ConnectionError, EOFError)
# Faults after which no answer may end well, without the number of a name.
NEVER_WHOLE = frozenset(
    {
        *("cut", "cut-mid", "bad-chunk", "end", "error-event", "error-chunk", "error-first"),
        *("stall", "half-line", "comments-stall", "comments-endless", "head-only", "silent"),
        *("drop", "not-http", "html", "empty", "redirect", "gzip", "long-line", "endless-line"),
        *("status", "capacity", "quota", "credits", "slow-down", "day-over", "retry-after"),
    }
)


# Faults after which an answer ends well, but is shorter than its text.
SHORT = ("early-done", "slices")


class Violation(AssertionError):
    """The server has broken a promise."""


class Left(Exception):
    """The client has left, as it wanted to."""


@dataclass(slots=True)
class Answer:
    """What a client has read of an answer, whose whole text is *truth*.

    Always, or `Violation` is raised: events are numbered without a gap, the text is the beginning
    of the truth, and all of it where the answer is said to be complete.
    """

    truth: str
    fault: str
    last: int = 0
    text: str = ""
    end: str = ""

    def number(self, event: int) -> None:
        """Note the number of an event."""
        if event != self.last + 1:
            raise Violation(f"event {event} follows event {self.last}")
        self.last = event

    def add(self, text: str) -> None:
        """Note a piece of the text."""
        self.text += text
        if not self.truth.startswith(self.text):
            raise Violation(f"read {self.text[-40:]!r}, which is not in the answer")

    def finish(self, end: str) -> None:
        """Note the end: `complete`, or another one."""
        if self.end:
            raise Violation(f"the answer ends twice: {self.end}, {end}")
        self.end = end
        if end == "complete":
            if self.fault.rstrip("-0123456789") in NEVER_WHOLE:
                raise Violation(f"complete, though the provider failed by {self.fault}")
            if self.text != self.truth and not self.fault.startswith(SHORT):
                raise Violation(f"complete with {len(self.text)} of {len(self.truth)} characters")


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """Yield the data of each event of an event stream."""
    splitter = Splitter(1 << 24)
    async for data in response.content.iter_any():
        for event in parse(splitter.feed(data)):
            yield event.data.decode()

"""The options of a request: its deadlines, and its class.

    x-aioserver-start-within: 2       seconds until the first attempt is sent
    x-aioserver-deadline: 30.5        seconds until the answer has ended
    x-aioserver-class: batch          the request uses what others leave

Our own faces have fields of a payload for the same: `start_within`, `deadline`, `class`. Seconds
count from the arrival of the request. An option can only shorten a wait, and only lower a class,
so options from several places combine: the smaller number holds, and batch holds.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import msgspec
from multidict import istr

from aioserver.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

# In the form in which multidict looks for them: nearly all requests have none of these headers.
START_WITHIN: str = istr("x-aioserver-start-within")
DEADLINE: str = istr("x-aioserver-deadline")
CLASS: str = istr("x-aioserver-class")
INTERACTIVE, BATCH = CLASSES = ("interactive", "batch")
# The most seconds of a bound: a day.
MAX_SECONDS = 86_400.0
# The most characters of a number of seconds.
MAX_CHARACTERS = 32
_NAMES = (START_WITHIN, DEADLINE, CLASS)


class RequestOptions(msgspec.Struct, frozen=True):
    """*start_within* and *deadline* are seconds from the arrival, inf without such a bound."""

    start_within: float = inf
    deadline: float = inf
    batch: bool = False

    def joined(self, other: RequestOptions) -> RequestOptions:
        """Return the combination of both."""
        if other is NO_REQUEST_OPTIONS or self is NO_REQUEST_OPTIONS:
            return self if other is NO_REQUEST_OPTIONS else other
        return RequestOptions(
            min(self.start_within, other.start_within),
            min(self.deadline, other.deadline),
            self.batch or other.batch,
        )


NO_REQUEST_OPTIONS = RequestOptions()


def request_options_of(headers: Mapping[str, str]) -> RequestOptions:
    """Return the options in the *headers* of a request.

    Raises:
        InvalidRequest: an option is not valid; its name is the `param`.
    """
    if headers.keys().isdisjoint(_NAMES):
        return NO_REQUEST_OPTIONS
    start, deadline, name = map(headers.get, _NAMES)
    return RequestOptions(
        seconds(start, START_WITHIN), seconds(deadline, DEADLINE), batch(name, CLASS)
    )


def seconds(value: str | None, param: str) -> float:
    """Return the decimal number *value*; inf if there is none.

    Raises:
        InvalidRequest: it is not a number, or out of range.
    """
    if value is None:
        return inf
    whole, _, part = value.partition(".")
    number = 0.0
    if len(value) <= MAX_CHARACTERS and value.isascii() and (whole + part).isdigit():
        number = float(value)
    if not 0 < number <= MAX_SECONDS:
        raise InvalidRequest(
            f"{param} must be a decimal number of seconds, above 0 and at most {MAX_SECONDS:g}",
            param=param,
        )
    return number


def batch(value: str | None, param: str) -> bool:
    """Return whether the class *value* is batch; None: no class was named.

    Raises:
        InvalidRequest: there is no such class.
    """
    if value is None:
        return False
    if value not in CLASSES:
        raise InvalidRequest(f"{param} must be one of {', '.join(CLASSES)}", param=param)
    return value == BATCH

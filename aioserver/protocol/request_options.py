"""The options of a request: its deadlines, its class, and what is held of its answer.

    x-aioserver-start-within: 2       seconds until the first attempt is sent
    x-aioserver-deadline: 30.5        seconds until the answer has ended
    x-aioserver-class: batch          the request uses what others leave
    x-aioserver-hold: calls           `preamble`, `calls` or `turn` (providers/holding.py)

Our own faces have fields of a payload for the same: `start_within`, `deadline`, `class`, `hold`.
Seconds count from the arrival of the request. An option can only shorten a wait, and only lower a
class, so options from several places combine: the smaller number holds, and batch holds. Of two
words for `hold`, that of the payload counts.

Agents name their session, or the agent above them, in headers of their own. With the setting
`agents` these headers decide what is held.
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
HOLD: str = istr("x-aioserver-hold")
# Ids of sessions, which agents send: Claude Code, Codex, opencode; and what says of a request that
# an agent above has begun it.
SESSIONS: tuple[str, ...] = (
    istr("x-claude-code-session-id"),
    istr("session-id"),
    istr("x-session-id"),
)
SUBAGENTS: tuple[str, ...] = (
    istr("x-claude-code-parent-agent-id"),
    istr("x-openai-subagent"),
    istr("x-codex-parent-thread-id"),
    istr("x-parent-session-id"),
)
_NAMES = (START_WITHIN, DEADLINE, CLASS)
_ALL_NAMES = (*_NAMES, HOLD, *SESSIONS, *SUBAGENTS)
# What of a streamed answer is held: what comes before its content; from the first piece of a call
# on, all until the finish; the whole turn. AGENTS stands for one of them, by who asks.
PREAMBLE, CALLS, TURN = HOLDS = ("preamble", "calls", "turn")
AGENTS = "agents"


class RequestOptions(msgspec.Struct, frozen=True):
    """*start_within* and *deadline* are seconds from the arrival, inf without such a bound. *hold*
    is the request's own word for what is held, empty without one; and *agent* is what AGENTS
    stands for, by its headers.
    """

    start_within: float = inf
    deadline: float = inf
    batch: bool = False
    hold: str = ""
    agent: str = PREAMBLE

    @property
    def bounding(self) -> bool:
        """Whether they say when the request must have begun or ended, or its class."""
        return self.batch or self.start_within < inf or self.deadline < inf

    def joined(self, other: RequestOptions) -> RequestOptions:
        """Return the combination of both."""
        if other is NO_REQUEST_OPTIONS or self is NO_REQUEST_OPTIONS:
            return self if other is NO_REQUEST_OPTIONS else other
        return RequestOptions(
            min(self.start_within, other.start_within),
            min(self.deadline, other.deadline),
            self.batch or other.batch,
            other.hold or self.hold,
            self.agent if other.agent == PREAMBLE else other.agent,
        )


NO_REQUEST_OPTIONS = RequestOptions()


def request_options_of(headers: Mapping[str, str]) -> RequestOptions:
    """Return the options in the *headers* of a request.

    Raises:
        InvalidRequest: an option is not valid; its name is the `param`.
    """
    names = headers.keys()
    if names.isdisjoint(_ALL_NAMES):
        return NO_REQUEST_OPTIONS
    start, deadline, name = map(headers.get, _NAMES)
    agent = PREAMBLE
    if any(map(headers.get, SUBAGENTS)):
        agent = TURN
    elif any(map(headers.get, SESSIONS)):
        agent = CALLS
    return RequestOptions(
        seconds(start, START_WITHIN),
        seconds(deadline, DEADLINE),
        one_of(CLASSES, name, CLASS) == BATCH,
        one_of(HOLDS, headers.get(HOLD), HOLD),
        agent,
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


def one_of(names: tuple[str, ...], value: str | None, param: str) -> str:
    """Return *value*, one of *names*; empty if it is None.

    Raises:
        InvalidRequest: there is no such name.
    """
    if value is None:
        return ""
    if value not in names:
        raise InvalidRequest(f"{param} must be one of {', '.join(names)}", param=param)
    return value

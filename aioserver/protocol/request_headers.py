"""The headers of a request: those that go on to the provider, and the options of the request.

A trace goes on, and headers that the configuration names. A trace is W3C's Trace Context, Level 1
(https://www.w3.org/TR/trace-context/):

    traceparent: 00-<32 hex digits: trace>-<16: span>-<2: flags>
    tracestate: <name>=<value>,…                what tracing systems add to it

An invalid `traceparent` is dropped, with the `tracestate` beside it; an invalid `tracestate` is
dropped alone. Valid ones go on as the client sent them, unless this server makes spans of its own
(wings/tracing/tracer.py): then the parent is one of them.

A request to a provider also lists the servers of ours that it has come through, each by an id of
its own (`x-aioserver-hop`). So a server recognizes a request that comes back to it.

No value can end its line, so a client cannot add a header or a body to the request: values are
compared as bytes with what HTTP allows (RFC 9110, 5.5).

The options of a request are its deadlines, its class, and what is held of its answer:

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

This file is one concept: what a request says in its headers, and what becomes of that.
"""

from __future__ import annotations

import itertools
import re
import secrets
from math import inf
from typing import TYPE_CHECKING

import msgspec
from multidict import istr

from aioserver.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from multidict import MultiMapping


# In the form in which multidict looks for them.
TRACEPARENT: str = istr("traceparent")
TRACESTATE: str = istr("tracestate")
TRACE_HEADERS = frozenset({TRACEPARENT, TRACESTATE})
# The ids of the servers of ours that a request has come through; each adds a line of its own.
HOP: str = istr("x-aioserver-hop")
# Headers that go on whatever is configured.
_OF_ITSELF = (TRACEPARENT, HOP)
# A request with so many of them is in a loop, even if no id is known.
MAX_HOPS = 5
_HOP = re.compile("[0-9A-Za-z_-]{1,64}")
# Headers that never go on. Those of a single connection (RFC 9110, 7.6.1):
HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization"),
        *("proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)
# Headers that hold our own keys and sessions, or may:
CREDENTIALS = frozenset(
    {
        *("authorization", "x-api-key", "api-key", "cookie", "set-cookie"),
        *("sec-websocket-protocol", "sec-websocket-key", "sec-websocket-accept"),
        *("sec-websocket-extensions", "sec-websocket-version"),
    }
)
# And headers that describe what we send, and what we can read:
OURS = frozenset(
    {
        *("host", "content-length", "content-type", "content-encoding", "expect"),
        *("accept", "accept-encoding"),
    }
)
NEVER_PASSED = HOP_BY_HOP | CREDENTIALS | OURS

# Version ff is invalid. A later version than 00 may have more parts.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
# The longest `traceparent` of a later version that goes on.
MAX_TRACEPARENT = 256
_MEMBER = re.compile(
    r"[a-z0-9][a-z0-9_*/@-]{0,255}"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
MAX_MEMBERS = 32
# Characters of a `tracestate`: the standard asks for no more. Whole members are dropped from the
# end.
MAX_TRACESTATE = 512
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


# The id of a request for logs.
LOG_ID: str = istr("X-Request-Id")
_LOG_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def _new_ids() -> Iterator[Iterator[str]]:
    # Made at the first use: workers that were forked from one process then have different
    # prefixes.
    yield map(f"{secrets.token_hex(6)}-{{:x}}".format, itertools.count(1))


_ids = itertools.chain.from_iterable(_new_ids())


class ClientHeaders:
    """Some headers of one client's request, or of its handshake.

    Always: no line of them has a character that could end it. *trace_id* is "" without a trace.
    *api_lines* are headers of the API that the request is for: they go on to each provider that is
    asked in this API, unless its settings have one of the name.
    """

    __slots__ = ("_api_lines", "_lines", "trace_id")

    def __init__(
        self,
        lines: Sequence[tuple[str, bytes]] = (),
        trace_id: str = "",
        api_lines: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        self._lines = tuple(lines)
        self._api_lines = tuple(api_lines)
        self.trace_id = trace_id

    def __bool__(self) -> bool:
        return bool(self._lines or self._api_lines)

    @property
    def hops(self) -> bool:
        """Whether the client has listed servers that the request has come through."""
        return any(name == HOP for name, _ in self._lines)

    def trace(self) -> tuple[bytes, bytes]:
        """Return the `traceparent` and the `tracestate`, both empty without a trace."""
        if not self.trace_id:
            return b"", b""
        values = dict(self._lines)
        return values[TRACEPARENT], values.get(TRACESTATE, b"")

    def with_parent(self, parent: bytes, trace_id: str) -> ClientHeaders:
        """Return these headers with another `traceparent`, of a span of this server in the trace
        *trace_id*.
        """
        lines = [(TRACEPARENT, parent)]
        if self._lines:
            lines += [line for line in self._lines if line[0] != TRACEPARENT]
        return ClientHeaders(lines, trace_id, self._api_lines)

    def of_api(self, name: str) -> bytes | None:
        """Return the value of the API's header *name*, in lower case; None if it is not sent."""
        return next((value for each, value in self._api_lines if each == name), None)

    def without_api(self) -> ClientHeaders:
        """Return these headers without those of the request's API."""
        return ClientHeaders(self._lines, self.trace_id) if self._api_lines else self

    def written(self, names: Collection[str], configured: Collection[str] = ()) -> bytes:
        """Return those headers whose name, in lower case, is in *names*, as lines of a request.

        The headers of the API are among them, except those that are in *configured*, or were
        selected by *names*.
        """
        lines = [line for line in self._lines if line[0] in names]
        if self._api_lines:
            lines += [
                line
                for line in self._api_lines
                if line[0] not in names and line[0] not in configured
            ]
        return b"".join([b"%b: %b\r\n" % (name.encode(), value) for name, value in lines])


NO_HEADERS = ClientHeaders()


def log_id_of(headers: Mapping[str, str]) -> str:
    """Return the id for logs of a request with *headers*: its `X-Request-Id` if that is harmless,
    or a new one.
    """
    log_id = headers.get(LOG_ID)
    return next(_ids) if log_id is None or not _LOG_ID.fullmatch(log_id) else log_id


def collect(
    headers: MultiMapping[str], names: Collection[str] = (), api: str = ""
) -> ClientHeaders:
    """Return the headers that go on: the trace, and those in *names*, which are in lower case.

    The names of the headers of the API, if it has any, begin with *api*. Neither a header of
    NEVER_PASSED goes on nor one that the client's `Connection` names.
    """
    if not names and not api and headers.keys().isdisjoint(_OF_ITSELF):
        return NO_HEADERS
    lines: list[tuple[str, bytes]] = []
    api_lines: list[tuple[str, bytes]] = []
    if names or api:
        own = NEVER_PASSED | TRACE_HEADERS | {HOP, *_connection_options(headers)}
        lines = _lines(headers, names, own)
        if api:
            api_names = {name.lower() for name in headers if name.lower().startswith(api)}
            api_lines = _lines(headers, api_names, own)
    trace_id, trace = _trace(headers)
    passed = ",".join(hop for hop in hops(headers) if _HOP.fullmatch(hop))
    if passed:
        lines.append((HOP, passed.encode()))
    return ClientHeaders([*lines, *trace], trace_id, api_lines)


def hops(headers: MultiMapping[str]) -> list[str]:
    """Return the ids of the servers that a request with *headers* has come through."""
    members = ",".join(headers.getall(HOP, ())).split(",")
    return [member.strip(" \t") for member in members if member.strip(" \t")]


def _lines(
    headers: MultiMapping[str], names: Collection[str], own: Collection[str]
) -> list[tuple[str, bytes]]:
    """Return the headers in *names* that have values which HTTP allows, but none in *own*."""
    return [
        (name, value)
        for name in sorted(names)
        if name not in own
        for text in headers.getall(name, ())
        if (value := as_sent(text)) is not None
    ]


def _trace(headers: MultiMapping[str]) -> tuple[str, list[tuple[str, bytes]]]:
    """Return the id of the trace, "" if there is none, and its headers."""
    parents = headers.getall(TRACEPARENT, ())
    parent = parents[0].strip(" \t") if len(parents) == 1 else ""
    match = _TRACEPARENT.fullmatch(parent)
    if (
        match is None
        or (match[1] == "00" and match[3] is not None)
        or len(parent) > MAX_TRACEPARENT
        or not (parent.isascii() and parent.isprintable())
    ):
        return "", []
    lines = [(TRACEPARENT, parent.encode())]
    if state := _state(headers.getall(TRACESTATE, ())):
        lines.append((TRACESTATE, state.encode()))
    return match[2], lines


def _state(values: Sequence[str]) -> str:
    """Return the `tracestate` of these *values*; "" if there is none, or it is invalid."""
    members = [
        member.strip(" \t") for value in values for member in value.split(",", MAX_TRACESTATE)
    ]
    members = [member for member in members if member]
    names = {member.partition("=")[0] for member in members}
    if len(members) > MAX_MEMBERS or len(names) < len(members):
        return ""
    if not all(_MEMBER.fullmatch(member) for member in members):
        return ""
    while len(state := ",".join(members)) > MAX_TRACESTATE:
        members.pop()
    return state


def _connection_options(headers: MultiMapping[str]) -> list[str]:
    options = ",".join(headers.getall("connection", ()))
    return [option.strip().lower() for option in options.split(",")]


def as_sent(text: str) -> bytes | None:
    """Return the bytes of a header's value as the client sent them.

    None if HTTP forbids one of them.
    """
    try:
        # The same encoding as aiohttp's decoding.
        value = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None
    return value if _VALUE.fullmatch(value) else None


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
# The headers in which agents name their session (Claude Code, Codex, opencode); and those that mark
# a request as one of a subagent.
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
# The parts of a streamed answer that can be held: the events before its content; all from the first
# piece of a call to the finish; the whole turn. AGENTS stands for one of them, by who asks.
PREAMBLE, CALLS, TURN = HOLDS = ("preamble", "calls", "turn")
AGENTS = "agents"


class RequestOptions(msgspec.Struct, frozen=True):
    """*start_within* and *deadline* are seconds from the arrival, inf without such a bound. A
    *patient* request waits until these bounds, even where the server's own waits are shorter.

    *hold* is the request's own word for what is held, empty without one. *agent* is what AGENTS
    stands for, by the headers; *session* is the id of the agent's session, "" without one.
    """

    start_within: float = inf
    deadline: float = inf
    batch: bool = False
    hold: str = ""
    agent: str = PREAMBLE
    session: str = ""
    patient: bool = False

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
            other.session or self.session,
            self.patient or other.patient,
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
    agent, session = PREAMBLE, next(filter(None, map(headers.get, SESSIONS)), "")
    if any(map(headers.get, SUBAGENTS)):
        agent = TURN
    elif session:
        agent = CALLS
    return RequestOptions(
        seconds(start, START_WITHIN),
        seconds(deadline, DEADLINE),
        one_of(CLASSES, name, CLASS) == BATCH,
        one_of(HOLDS, headers.get(HOLD), HOLD),
        agent,
        session,
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

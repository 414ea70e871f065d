"""The simulated provider as tests have it: it counts, keeps what it got, and has more moods.

async with Simulator(Behaviour(ttft=0, interval=0)) as simulator:
    ...
    await simulator.until(lambda stats: stats.aborted == 1)
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aioserver.wings.simulator import exchange, model, server
from aioserver.wings.simulator.model import BadRequest
from aioserver.wings.simulator.tools import COUNT_TOKENS, MESSAGES
from tests.support.waiting import LATE, patience

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from aioserver.wings.simulator.model import ParsedRequest

NO_PREFILL = "Assistant response prefill is incompatible with enable_thinking."
# What a model says that takes the wish for the rest for a new question.
_NEW_TURN = "Certainly! Here is the rest of my answer: "
# Characters after which a model deviates that says something else the second time.
_SAME = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour(exchange.Behaviour):
    """How the simulator answers in tests.

    Attributes: ignore_body: read no body, so that a large upload gets stuck; a client that leaves
    then goes unnoticed. forgets: status and message with which a request that continues a response
    is refused; None: none is. messages and counts: whether there is a /v1/messages and its
    /count_tokens. prefill: what becomes of a request that has the beginning of its answer: "": it
    gets the rest; "refuses": it is refused; "repeats": the beginning is said again; "anew":
    something like it, and then something else; "turn": a new turn begins. usage: whether a stream
    has a usage: "asked", if the request asks for it, "always" or "never". cached, reasoning: the
    tokens of a prompt that come from a cache, and those of an answer that are thought, at most, as
    it reports them. refuses: members of a body for which it is refused by a 400.
    """

    ignore_body: bool = False
    forgets: tuple[int, str] | None = None
    messages: bool = True
    counts: bool = True
    prefill: str = ""
    usage: str = "asked"
    cached: int = 0
    reasoning: int = 0
    refuses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorStats:
    """The counters at one moment.

    Always: `requests == completed + aborted + active`, until `close()` cuts active requests, which
    are then counted in none of the three.
    """

    # Every POST to a known endpoint, also with a faulty body.
    requests: int = 0
    # Requests among them with "stream": true.
    streams: int = 0
    # Requests that the simulator has ended, also by a fault.
    completed: int = 0
    # Requests whose client left before the end.
    aborted: int = 0
    open_connections: int = 0
    peak_connections: int = 0
    connections_accepted: int = 0
    # Requests that are being answered.
    active: int = 0
    peak_active: int = 0
    tokens_sent: int = 0


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A request as it came; only the header names are made lower case."""

    path: str
    headers: dict[str, str]
    body: bytes
    query: str = ""


class Simulator(server.Simulator):
    """A simulator that keeps the last *keep* requests, in `requests` as they came and in `bodies`
    parsed.
    """

    behaviour: Behaviour

    def __init__(
        self,
        behaviour: Behaviour = Behaviour(),
        *,
        seed: int | None = None,
        keep: int = 100,
    ) -> None:
        super().__init__(behaviour, seed=seed)
        self.bodies: deque[Any] = deque(maxlen=keep)
        self.requests: deque[ReceivedRequest] = deque(maxlen=keep)
        self._stats = dict.fromkeys((f.name for f in dataclasses.fields(SimulatorStats)), 0)
        # Exists while `until()` waits.
        self._changed: asyncio.Event | None = None

    def note_response(self, parsed: ParsedRequest, ident: str) -> None:
        """Do nothing: it continues every response, as one that it has made for another server."""

    def stats(self) -> SimulatorStats:
        """Return the counters as they are now."""
        return SimulatorStats(**self._stats)

    async def until(
        self, reached: Callable[[SimulatorStats], bool], within: float = LATE
    ) -> SimulatorStats:
        """Wait until *reached* is true of the counters, and return them.

        Raises:
            TimeoutError: *reached* was not true *within* so many seconds.
        """
        async with asyncio.timeout(patience(within)):
            while not reached(stats := self.stats()):
                self._changed = self._changed or asyncio.Event()
                await self._changed.wait()
        return stats

    def _count(self, name: str, step: int = 1, peak: str = "") -> None:
        self._stats[name] += step
        if peak:
            self._stats[peak] = max(self._stats[peak], self._stats[name])
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def count_token(self) -> None:
        self._count("tokens_sent")

    def connection_changed(self, transport: asyncio.Transport, made: bool) -> None:
        super().connection_changed(transport, made)
        if made:
            self._count("connections_accepted")
            self._count("open_connections", 1, "peak_connections")
        else:
            self._count("open_connections", -1)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        lacking = {
            *([] if self.behaviour.messages else [f"/v1/{MESSAGES}"]),
            *([] if self.behaviour.counts else [f"/v1/{COUNT_TOKENS}"]),
        }
        if request.path in lacking:
            return server.unknown(request)
        return await super().handle(request)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self._count("requests")
        self._count("active", 1, "peak_active")
        try:
            response = await super().answer(request)
        except (asyncio.CancelledError, ConnectionError):
            if self.open:
                self._count("aborted")
            raise
        else:
            self._count("completed")
            return response
        finally:
            self._count("active", -1)

    async def read(self, request: web.BaseRequest) -> bytes:
        if self.behaviour.ignore_body:
            await asyncio.get_running_loop().create_future()
        body = await super().read(request)
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append(ReceivedRequest(request.path, headers, body, request.query_string))
        return body

    def adapt(self, request: ParsedRequest) -> ParsedRequest:
        mood = self.behaviour
        self.bodies.append(request.body)
        if request.stream:
            self._count("streams")
        if refused := [name for name in mood.refuses if name in request.body]:
            raise BadRequest(f"Unrecognized request argument supplied: {refused[0]}")
        if mood.forgets is not None and request.body.get("previous_response_id"):
            status, message = mood.forgets
            raise BadRequest(message, status=status)
        if request.said and mood.prefill == "refuses":
            raise BadRequest(NO_PREFILL)
        if request.said and mood.prefill and request.words is None and request.call is None:
            request = dataclasses.replace(request, words=_said_otherwise(request, mood.prefill))
        if mood.usage != "asked":
            request = dataclasses.replace(request, include_usage=mood.usage == "always")
        if mood.cached or mood.reasoning:
            request = dataclasses.replace(
                request,
                cached_tokens=min(mood.cached, request.prompt_tokens),
                reasoning_tokens=mood.reasoning,
            )
        return request


def _said_otherwise(request: ParsedRequest, prefill: str) -> str:
    """Return what is said by a model that does not say the rest of its answer."""
    text = model.whole(model.speech(request.text, request.turn), request.said)
    if prefill == "repeats":
        return text
    if prefill == "anew":
        return f"{text[:_SAME]} (or something like it) {text[_SAME:]}"
    return _NEW_TURN + text[len(request.said) :]

"""The simulated OpenAI-compatible provider: its listening socket, its routes, its counters.

It speaks HTTP/1.1 over real sockets. Below `/v1` it has POST `chat/completions`, `completions`,
`responses`, `messages` (each streamed or not), `embeddings` and `messages/count_tokens`, and GET
`models` and `models/{id}`. It answers for any model, but a model whose name begins with `fault-`
fails in the way that the name says; `faults` opens with the table of these names.

    async with Simulator(Behaviour(ttft=0, interval=0)) as simulator:
        simulator.base_url                      # http://127.0.0.1:40123/v1
        simulator.behaviour = Behaviour(fail_rate=1.0)
        await simulator.until(lambda stats: stats.aborted == 1)

This file is one concept: each request is counted from its first byte to its end, in one place.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import orjson
from aiohttp import web

from aioserver.wings.simulator import anthropic, faults, model, shapes
from aioserver.wings.simulator.broken import cut, stall
from aioserver.wings.simulator.engine import Engine, count_tokens
from aioserver.wings.simulator.exchange import Behaviour, Exchange, RawResponse, reset
from aioserver.wings.simulator.model import BadRequest
from aioserver.wings.simulator.refusals import as_json, refusal
from aioserver.wings.simulator.tools import COUNT_TOKENS, MESSAGES, MESSAGES_ENDPOINTS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from aiohttp.web_protocol import RequestHandler

    from aioserver.wings.simulator.engine import EngineOptions
    from aioserver.wings.simulator.model import ParsedRequest

    Play = Callable[[Exchange], Awaitable[web.StreamResponse]]

_ENDPOINTS = {
    f"/v1/{name}": name
    for name in (
        model.CHAT,
        model.COMPLETIONS,
        model.RESPONSES,
        model.EMBEDDINGS,
        MESSAGES,
        COUNT_TOKENS,
    )
}
_MODELS = "/v1/models"
# No answer of theirs is written token by token.
_WITHOUT_ENGINE = frozenset((model.EMBEDDINGS, COUNT_TOKENS))
# Connections; the clients of a load test all connect at once.
_BACKLOG = 2048
# Seconds for handlers to end after they were cancelled.
_CLOSE_TIMEOUT = 1.0
# Seconds; longer than a pool's keepalive_expiry should be.
_KEEPALIVE_TIMEOUT = 300.0


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


class _Server(web.Server):
    """Calls *changed* with each connection, and True when it is made, False when it is lost."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Any],
        changed: Callable[[asyncio.Transport, bool], None],
    ) -> None:
        super().__init__(
            handler,
            # The handler of a client that leaves is cancelled at once.
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=_KEEPALIVE_TIMEOUT,
        )
        self._changed = changed
        self._transports: dict[RequestHandler, asyncio.Transport] = {}

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._transports[handler] = transport
        self._changed(transport, True)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        if transport := self._transports.pop(handler, None):
            self._changed(transport, False)


class Simulator:
    """One listening socket and the answers on it. After `start()`, `close()` must be called.

    *behaviour* may be replaced at any time and applies to the requests that come afterwards. With
    a *seed*, ids and failures are the same in every run. The last *keep* requests are kept for
    tests, in `requests` as they came and in `bodies` parsed; a server that strangers use keeps 0.
    """

    def __init__(
        self,
        behaviour: Behaviour = Behaviour(),  # noqa: B008 - frozen
        *,
        seed: int | None = None,
        keep: int = 100,
    ) -> None:
        self.behaviour = behaviour
        self.bodies: deque[Any] = deque(maxlen=keep)
        self.requests: deque[ReceivedRequest] = deque(maxlen=keep)
        self._random = random.Random(seed)  # noqa: S311 - no secret comes from it
        self._stats = dict.fromkeys((f.name for f in dataclasses.fields(SimulatorStats)), 0)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._connections: set[asyncio.Transport] = set()
        self._reset_next: set[asyncio.Transport] = set()
        self._flaps: dict[int, int] = {}
        self._engine: Engine | None = None
        # Exists while `until()` waits.
        self._changed: asyncio.Event | None = None
        self._runner: web.ServerRunner | None = None
        self._host = ""
        # The port on which the simulator listens.
        self.port = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen, for port 0 on any free one; returns `base_url`.

        Raises:
            OSError: *host* is not an address of this machine, or *port* is taken.
        """
        runner = web.ServerRunner(
            _Server(self._handle, self._connection_changed), shutdown_timeout=_CLOSE_TIMEOUT
        )
        await runner.setup()
        site = web.TCPSite(runner, host, port, backlog=_BACKLOG)
        try:
            await site.start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner, self._host, self.port = runner, host, site.port
        return self.base_url

    async def close(self) -> None:
        """Stop listening and cut the answers that run. A second call does nothing."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in runner.sites:
            await site.stop()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT)
        await runner.cleanup()
        for transport in list(self._connections):
            # A plain close would first wait until the client has read the buffer.
            transport.abort()
        await self.until(lambda stats: not stats.open_connections)

    @property
    def base_url(self) -> str:
        """The value for a provider's `base_url` setting."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/v1"

    def stats(self) -> SimulatorStats:
        """Return the counters as they are now."""
        return SimulatorStats(**self._stats)

    async def until(
        self, reached: Callable[[SimulatorStats], bool], within: float = 30.0
    ) -> SimulatorStats:
        """Wait until *reached* is true of the counters, and return them.

        Raises:
            TimeoutError: *reached* was not true *within* so many seconds.
        """
        async with asyncio.timeout(within):
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

    def _count_token(self) -> None:
        self._count("tokens_sent")

    def _connection_changed(self, transport: asyncio.Transport, made: bool) -> None:
        if made:
            self._connections.add(transport)
            self._count("connections_accepted")
            self._count("open_connections", 1, "peak_connections")
        else:
            self._connections.discard(transport)
            self._reset_next.discard(transport)
            self._count("open_connections", -1)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.transport in self._reset_next:
            reset(request.transport)
            return RawResponse()
        path = request.path
        if request.method == "GET" and path == _MODELS:
            return as_json(200, orjson.dumps(shapes.models(self.behaviour.models)))
        if request.method == "GET" and path.startswith(f"{_MODELS}/"):
            name = path.removeprefix(f"{_MODELS}/")
            return as_json(200, orjson.dumps(shapes.model(name)))
        behaviour = self.behaviour
        lacking = path in {
            *([] if behaviour.responses else [f"/v1/{model.RESPONSES}"]),
            *([] if behaviour.messages else [f"/v1/{MESSAGES}"]),
            *([] if behaviour.counts else [f"/v1/{MESSAGES}/count_tokens"]),
        }
        if path not in _ENDPOINTS or lacking:
            message = f"Invalid URL ({request.method} {path})"
            return as_json(404, model.error(404, message))
        if request.method != "POST":
            message = f"Not allowed to {request.method} on {path} (HINT: use POST)"
            return as_json(405, model.error(405, message), {"Allow": "POST"})
        return await self._counted(request)

    async def _counted(self, request: web.BaseRequest) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._count("requests")
        self._count("active", 1, "peak_active")
        try:
            response = await self._answer(request)
        except asyncio.CancelledError:
            if self._runner is not None:
                self._count("aborted")
            raise
        except ConnectionError:
            # The client left while we wrote.
            if self._runner is not None:
                self._count("aborted")
            return RawResponse()
        else:
            self._count("completed")
            return response
        finally:
            self._tasks.discard(task)
            self._count("active", -1)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await self._openai_answer(request)
        if _ENDPOINTS[request.path] in MESSAGES_ENDPOINTS:
            return anthropic.translated(response)
        return response

    async def _openai_answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer *request*; a refusal has OpenAI's form on all endpoints."""
        behaviour = self.behaviour
        if behaviour.ignore_body:
            await asyncio.get_running_loop().create_future()
        raw = await request.content.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        received = ReceivedRequest(request.path, headers, raw, request.query_string)
        self.requests.append(received)
        try:
            parsed = model.read(_ENDPOINTS[request.path], raw)
            self.bodies.append(parsed.body)
            if parsed.stream:
                self._count("streams")
            if refused := [name for name in behaviour.refuses if name in parsed.body]:
                message = f"Unrecognized request argument supplied: {refused[0]}"
                return as_json(400, model.error(400, message))
            if behaviour.usage != "asked":
                parsed = dataclasses.replace(parsed, include_usage=behaviour.usage == "always")
            if behaviour.cached or behaviour.reasoning:
                parsed = dataclasses.replace(
                    parsed,
                    cached_tokens=min(behaviour.cached, parsed.prompt_tokens),
                    reasoning_tokens=behaviour.reasoning,
                )
            if behaviour.forgets is not None and parsed.body.get("previous_response_id"):
                status, message = behaviour.forgets
                return as_json(status, model.error(status, message))
            if parsed.said and behaviour.prefill:
                if behaviour.prefill == "refuses":
                    return as_json(400, model.error(400, model.NO_PREFILL))
                parsed = dataclasses.replace(parsed, habit=behaviour.prefill)
            failing = behaviour.fail_rate and self._random.random() < behaviour.fail_rate
            if failing and not behaviour.fault:
                return refusal(behaviour.fail_status)
            play = faults.find(faults.PREFIX + behaviour.fault if failing else parsed.model)
            if behaviour.engine is None or parsed.endpoint in _WITHOUT_ENGINE:
                return await self._play(request, parsed, behaviour, play)
            return await self._by_engine(request, parsed, behaviour, play, behaviour.engine)
        except BadRequest as error:
            return as_json(error.status, error.body)
        except RecursionError:
            # In Python 3.11 a `repr` goes less deep than orjson reads.
            return as_json(400, model.error(400, model.NESTED_TOO_DEEPLY))

    async def _by_engine(
        self,
        request: web.BaseRequest,
        parsed: ParsedRequest,
        behaviour: Behaviour,
        play: Play | None,
        options: EngineOptions,
    ) -> web.StreamResponse:
        """Answer *request* in the time of the engine, which reads the prompt first."""
        if self._engine is None or self._engine.options != options:
            self._engine = Engine(options)
        engine, prompt = self._engine, parsed.prompt
        async with engine.read(prompt) as cached:
            parsed = dataclasses.replace(
                parsed, prompt_tokens=count_tokens(prompt), cached_tokens=cached
            )
            interval = 1 / options.decode
            paced = dataclasses.replace(
                behaviour,
                ttft=interval,
                interval=interval,
                # As many as it may have.
                tokens=parsed.max_tokens or behaviour.tokens,
            )
            response = await self._play(request, parsed, paced, play)
        words, _ = shapes.words_of(parsed, paced.tokens)
        said = {"role": "assistant", "content": "".join(words)}
        engine.wrote(prompt + orjson.dumps(said))
        return response

    async def _play(
        self,
        request: web.BaseRequest,
        parsed: ParsedRequest,
        behaviour: Behaviour,
        play: Play | None,
    ) -> web.StreamResponse:
        """Write the answer, or what *play* makes of it.

        Raises:
            BadRequest: there is no answer to such a request.
        """
        ident = f"{self._random.getrandbits(96):024x}"
        messages = parsed.endpoint in MESSAGES_ENDPOINTS
        shape = anthropic.answer if messages else shapes.answer
        answer = shape(parsed, ident, behaviour.tokens)
        exchange = Exchange(
            request,
            answer,
            behaviour,
            count_token=self._count_token,
            reset_next=self._reset_next,
            flaps=self._flaps,
        )
        if play is not None:
            return await play(exchange)
        if behaviour.cut_after is not None:
            return await cut(exchange, behaviour.cut_after)
        if behaviour.stall_after is not None:
            return await stall(exchange, behaviour.stall_after)
        return await exchange.complete()

"""The simulated OpenAI-compatible provider: its listening socket, its routes, its answers.

It speaks HTTP/1.1 over real sockets. Below `/v1` it has POST `chat/completions`, `completions`,
`responses`, `messages` (each streamed or not), `embeddings` and `messages/count_tokens`, and GET
`models` and `models/{id}`. It answers for any model, but a model whose name begins with `fault-`
fails in the way that it names; `faults` opens with the table of these names.

    async with Simulator(Behaviour(ttft=0, interval=0)) as simulator:
        simulator.base_url                      # http://127.0.0.1:40123/v1
        simulator.behaviour = Behaviour(fail_rate=1.0)
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from typing import TYPE_CHECKING, Any, Self

import orjson
from aiohttp import web

from aioserver.wings.simulator import anthropic, faults, model, shapes
from aioserver.wings.simulator.engine import Engine, count_tokens
from aioserver.wings.simulator.exchange import Behaviour, Exchange, RawResponse, reset
from aioserver.wings.simulator.faults import Play, as_json, cut, refusal, stall
from aioserver.wings.simulator.model import BadRequest
from aioserver.wings.simulator.tools import COUNT_TOKENS, MESSAGES, MESSAGES_ENDPOINTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from aiohttp.web_protocol import RequestHandler

    from aioserver.wings.simulator.engine import EngineOptions
    from aioserver.wings.simulator.model import ParsedRequest

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
# Their answers are not written token by token.
_WITHOUT_ENGINE = frozenset((model.EMBEDDINGS, COUNT_TOKENS))
# Responses that can be continued.
_MAX_STORED = 4096
# Connections; the clients of a load test all connect at once.
_BACKLOG = 2048
# Seconds for handlers to end after they were cancelled.
_CLOSE_TIMEOUT = 1.0
# Seconds; longer than a pool's keepalive_expiry should be.
_KEEPALIVE_TIMEOUT = 300.0


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


def unknown(request: web.BaseRequest) -> web.Response:
    """Return the answer to a request for an unknown path."""
    message = f"Invalid URL ({request.method} {request.path})"
    return as_json(404, model.error(404, message))


class Simulator:
    """One listening socket and the answers on it. After `start()`, `close()` must be called.

    *behaviour* may be replaced at any time and applies to later requests. With a *seed*, ids and
    failures are the same in every run. A subclass may extend all members without an underscore.
    """

    def __init__(
        self,
        behaviour: Behaviour = Behaviour(),  # noqa: B008 - frozen
        *,
        seed: int | None = None,
    ) -> None:
        self.behaviour = behaviour
        self._random = random.Random(seed)  # noqa: S311 - no secret comes from it
        self._tasks: set[asyncio.Task[Any]] = set()
        self._connections: set[asyncio.Transport] = set()
        # Set while there is no connection.
        self._unconnected = asyncio.Event()
        self._unconnected.set()
        self._reset_next: set[asyncio.Transport] = set()
        self._flaps: dict[int, int] = {}
        self._engine: Engine | None = None
        # The responses that can be continued, the oldest first: the ids of the calls in each of
        # them and in what it continues.
        self._stored: dict[str, frozenset[str]] = {}
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
        """Listen, for port 0 on any free port, and return `base_url`.

        Raises:
            OSError: *host* is not an address of this machine, or *port* is taken.
        """
        runner = web.ServerRunner(
            _Server(self.handle, self.connection_changed), shutdown_timeout=_CLOSE_TIMEOUT
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
        await asyncio.wait_for(self._unconnected.wait(), _CLOSE_TIMEOUT)

    @property
    def base_url(self) -> str:
        """The value for a provider's `base_url` setting."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/v1"

    @property
    def open(self) -> bool:
        """Whether it has started, and is not being closed."""
        return self._runner is not None

    def connection_changed(self, transport: asyncio.Transport, made: bool) -> None:
        """Note that a connection was *made*, or lost."""
        if made:
            self._connections.add(transport)
            self._unconnected.clear()
        else:
            self._connections.discard(transport)
            self._reset_next.discard(transport)
            if not self._connections:
                self._unconnected.set()

    def count_token(self) -> None:
        """Note that a token was written."""

    def adapt(self, request: ParsedRequest) -> ParsedRequest:
        """Return the request that is answered in place of *request*.

        Raises:
            BadRequest: it is refused.
        """
        return request

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer any request."""
        if request.transport in self._reset_next:
            reset(request.transport)
            return RawResponse()
        path = request.path
        if request.method == "GET" and path == _MODELS:
            return as_json(200, orjson.dumps(shapes.models(self.behaviour.models)))
        if request.method == "GET" and path.startswith(f"{_MODELS}/"):
            name = path.removeprefix(f"{_MODELS}/")
            return as_json(200, orjson.dumps(shapes.model(name)))
        lacking = path == f"/v1/{model.RESPONSES}" and not self.behaviour.responses
        if path not in _ENDPOINTS or lacking:
            return unknown(request)
        if request.method != "POST":
            message = f"Not allowed to {request.method} on {path} (HINT: use POST)"
            return as_json(405, model.error(405, message), {"Allow": "POST"})
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await self.answer(request)
        except ConnectionError:
            # The client left while we wrote.
            return RawResponse()
        finally:
            self._tasks.discard(task)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a POST to an endpoint.

        Raises:
            ConnectionError: the client left.
        """
        endpoint = _ENDPOINTS[request.path]
        response = await self._openai_answer(request, endpoint, await self.read(request))
        return anthropic.translated(response) if endpoint in MESSAGES_ENDPOINTS else response

    async def read(self, request: web.BaseRequest) -> bytes:
        """Return the body of a request."""
        return await request.content.read()

    async def _openai_answer(
        self, request: web.BaseRequest, endpoint: str, raw: bytes
    ) -> web.StreamResponse:
        """Answer *request*; a refusal has OpenAI's form on all endpoints."""
        behaviour = self.behaviour
        try:
            parsed = self.adapt(model.read(endpoint, raw))
            if endpoint in MESSAGES_ENDPOINTS:
                anthropic.check(parsed, request.headers.get(anthropic.VERSION_HEADER))
            failing = behaviour.fail_rate and self._random.random() < behaviour.fail_rate
            if failing and not behaviour.fault:
                return refusal(behaviour.fail_status)
            play = faults.find(faults.PREFIX + behaviour.fault if failing else parsed.model)
            if behaviour.engine is None or endpoint in _WITHOUT_ENGINE:
                return await self.play(request, parsed, behaviour, play)
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
                # The engine writes as many tokens as the request allows.
                tokens=parsed.max_tokens or behaviour.tokens,
            )
            response = await self.play(request, parsed, paced, play)
        words, _ = shapes.words_of(parsed, paced.tokens)
        said = {"role": "assistant", "content": "".join(words)}
        engine.wrote(prompt + orjson.dumps(said))
        return response

    def note_response(self, parsed: ParsedRequest, ident: str) -> None:
        """Note that the response to *parsed* can be continued.

        Raises:
            BadRequest: the response that it continues, or a call whose output it has, is unknown.
        """
        previous, called = parsed.body.get("previous_response_id"), frozenset[str]()
        if previous is not None:
            if (known := self._stored.get(str(previous))) is None:
                raise BadRequest(
                    f"Previous response with id '{previous}' not found.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            called = known
        called = model.calls_of(parsed.body.get("input"), called)
        if parsed.body.get("store", True):
            self._stored[f"resp_{ident}"] = called | {f"call_{ident}"}
            if len(self._stored) > _MAX_STORED:
                del self._stored[next(iter(self._stored))]

    async def play(
        self,
        request: web.BaseRequest,
        parsed: ParsedRequest,
        behaviour: Behaviour,
        play: Play | None,
    ) -> web.StreamResponse:
        """Write the answer, or let *play* write another one.

        Raises:
            BadRequest: there is no answer to such a request.
        """
        ident = f"{self._random.getrandbits(96):024x}"
        if parsed.endpoint == model.RESPONSES:
            self.note_response(parsed, ident)
        messages = parsed.endpoint in MESSAGES_ENDPOINTS
        shape = anthropic.answer if messages else shapes.answer
        answer = shape(parsed, ident, behaviour.tokens)
        exchange = Exchange(
            request,
            answer,
            behaviour,
            count_token=self.count_token,
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

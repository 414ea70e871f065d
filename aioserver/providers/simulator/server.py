"""The simulated OpenAI-compatible provider: the demo, the `provider` command, the tests' double.

It speaks HTTP/1.1 over real sockets. Below `/v1`: POST `chat/completions`, `completions`,
`responses` (each streamed or not) and `embeddings`; GET `models` and `models/{id}`. Any model name
is answered, but one that begins with `fault-` fails in the way it names: the table of faults
opens `faults.py`.

    async with Simulator(Behaviour(ttft=0, interval=0)) as simulator:
        simulator.base_url                      # http://127.0.0.1:40123/v1
        simulator.behaviour = Behaviour(fail_rate=1.0)
        await simulator.until(lambda stats: stats.aborted == 1)
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

from aioserver.providers.simulator import faults, model, shapes
from aioserver.providers.simulator.exchange import Behaviour, Exchange, Raw, reset
from aioserver.providers.simulator.model import BadRequest
from aioserver.providers.simulator.refusals import as_json, refusal

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from aiohttp.web_protocol import RequestHandler

__all__ = ["Behaviour", "SeenRequest", "Simulator", "SimulatorStats"]

_ENDPOINTS = {
    f"/v1/{name}": name
    for name in (
        model.CHAT,
        model.COMPLETIONS,
        model.RESPONSES,
        model.EMBEDDINGS,
    )
}
_MODELS = "/v1/models"
_BACKLOG = 2048  # a load test connects all at once
_CLOSE_TIMEOUT = 1.0  # seconds aiohttp may wait for handlers, which are cancelled before
_KEEPALIVE_TIMEOUT = 300.0  # seconds; longer than any pool's keepalive_expiry should be


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorStats:
    """One look. After all is over `requests == completed + aborted`, but for `close()`."""

    requests: int = 0  # POST to a known endpoint, faulty ones too
    streams: int = 0  # of these, with "stream": true
    completed: int = 0  # ended by the simulator, faults included
    aborted: int = 0  # left by the client before the end
    open_connections: int = 0
    peak_connections: int = 0
    connections_accepted: int = 0
    active: int = 0  # requests being answered
    peak_active: int = 0
    tokens_sent: int = 0


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """What came, as it came; header names are lower case."""

    path: str
    headers: dict[str, str]
    body: bytes


class _Server(web.Server):
    """Tells who comes and who goes."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Any],
        changed: Callable[[asyncio.Transport, bool], None],
    ) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,  # a client that leaves is noticed at once
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
    """One listening socket and the answers on it. Whoever calls `start()` must call `close()`.

    *behaviour* may be replaced at any time and holds for the requests that come after. *seed*
    makes ids and failures repeatable. The last *keep* requests are kept: `requests` as they came,
    `bodies` parsed; 0 where they are nobody's business.
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
        self.requests: deque[SeenRequest] = deque(maxlen=keep)
        self._random = random.Random(seed)  # noqa: S311 - no secret comes from it
        self._stats = dict.fromkeys((f.name for f in dataclasses.fields(SimulatorStats)), 0)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._connections: set[asyncio.Transport] = set()
        self._doomed: set[asyncio.Transport] = set()
        self._turns: dict[int, int] = {}
        self._changed: asyncio.Event | None = None  # somebody waits in `until()`
        self._runner: web.ServerRunner | None = None
        self._host = ""
        self._port = 0

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
        """Listen, on a free port for 0; returns `base_url`. Raises OSError: the port is taken."""
        runner = web.ServerRunner(
            _Server(self._handle, self._connection), shutdown_timeout=_CLOSE_TIMEOUT
        )
        await runner.setup()
        site = web.TCPSite(runner, host, port, backlog=_BACKLOG)
        try:
            await site.start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner, self._host, self._port = runner, host, site.port
        return self.base_url

    async def close(self) -> None:
        """Stop listening and cut what runs. Prompt, and idempotent."""
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
            transport.abort()  # its buffer would wait for a client that does not read
        await self.until(lambda stats: not stats.open_connections)

    @property
    def port(self) -> int:
        """The port that was bound."""
        return self._port

    @property
    def base_url(self) -> str:
        """What a provider's `base_url` setting takes."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/v1"

    def stats(self) -> SimulatorStats:
        """What has happened so far."""
        return SimulatorStats(**self._stats)

    async def until(
        self, reached: Callable[[SimulatorStats], bool], within: float = 5.0
    ) -> SimulatorStats:
        """Wait until the stats are as *reached* wants them. Raises TimeoutError after *within* seconds."""
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

    def _token(self) -> None:
        self._count("tokens_sent")

    def _connection(self, transport: asyncio.Transport, made: bool) -> None:
        if made:
            self._connections.add(transport)
            self._count("connections_accepted")
            self._count("open_connections", 1, "peak_connections")
        else:
            self._connections.discard(transport)
            self._doomed.discard(transport)
            self._count("open_connections", -1)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.transport in self._doomed:
            reset(request.transport)
            return Raw()
        path = request.path
        if request.method == "GET" and path == _MODELS:
            return as_json(200, orjson.dumps(shapes.models()))
        if request.method == "GET" and path.startswith(f"{_MODELS}/"):
            name = path.removeprefix(f"{_MODELS}/")
            return as_json(200, orjson.dumps(shapes.model(name)))
        if path not in _ENDPOINTS:
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
        except ConnectionError:  # the client left while we wrote: nothing to log
            if self._runner is not None:
                self._count("aborted")
            return Raw()
        else:
            self._count("completed")
            return response
        finally:
            self._tasks.discard(task)
            self._count("active", -1)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        behaviour = self.behaviour
        if behaviour.deaf:
            await asyncio.get_running_loop().create_future()
        raw = await request.content.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append(SeenRequest(request.path, headers, raw))
        try:
            asked = model.read(_ENDPOINTS[request.path], raw)
            self.bodies.append(asked.body)
            if asked.stream:
                self._count("streams")
            fails = behaviour.fail_rate and self._random.random() < behaviour.fail_rate
            if fails and not behaviour.fault:
                return refusal(behaviour.fail_status)
            play = faults.find(faults.PREFIX + behaviour.fault if fails else asked.model)
            ident = f"{self._random.getrandbits(96):024x}"
            answer = shapes.answer(asked, ident, behaviour.tokens)
        except BadRequest as exc:
            return as_json(exc.status, exc.body)
        exchange = Exchange(
            request,
            answer,
            behaviour,
            count=self._token,
            doomed=self._doomed,
            turns=self._turns,
        )
        if play is not None:
            return await play(exchange)
        if behaviour.cut_after is not None:
            return await faults.cut(exchange, behaviour.cut_after)
        if behaviour.stall_after is not None:
            return await faults.stall(exchange, behaviour.stall_after)
        return await exchange.whole()

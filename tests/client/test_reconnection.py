"""When a client connects, whatever its server does to it: one handshake at a time, after the wait
that the server asks for, and never without a pause for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import orjson
import pytest
from aiohttp import web

from aioserver.client import AnswerError, Client
from aioserver.protocol import eventstream
from tests.support.scripted_server import answer, frame

if TYPE_CHECKING:
    from types import TracebackType

    from aiohttp import WSMessage

Transport = Literal["websocket", "sse"]

# Of seconds that are not waited for.
pytestmark = [pytest.mark.virtual_time, pytest.mark.timeout(2000)]

WAYS = pytest.mark.parametrize(
    ("transport", "program"),
    [
        *((transport, name) for transport in ("websocket", "sse") for name in ("one", "many")),
        *(("websocket", name) for name in ("impatient", "leaving")),
    ],
)
# Seconds in which a client may not know yet what its server has done.
UNKNOWN = 0.01

HELLO = ("Hel", "lo")
FULL = {"error": "full", "code": "server_at_capacity", "retryable": True}
STOPS = {"error": "stops", "code": "server_shutdown", "retryable": True}


@dataclass(frozen=True)
class Fate:
    """What becomes of a connection: a *status* other than 200 refuses it; else it has so many
    *events* of each answer that it asks for, and ends with the *close* code, 0 for a cut. *early*:
    it ends before anything is asked.

    *wait*: the seconds that the server asks for, told with a remark.
    """

    status: int = 200
    events: int = 0
    close: int | None = None
    early: bool = False
    wait: float | None = None

    @property
    def least(self) -> float:
        """The seconds before which nothing may come back."""
        if self.close == 1012:
            return max(1.0, self.wait or 0.0)
        return 0.0 if self.wait is None else max(1.0, self.wait)


SERVED = Fate(events=4)
ONCE = Fate(events=4, close=1000)


def draw(dice: random.Random) -> Fate:
    """A fate of any kind."""
    wait = dice.choice((None, None, 2.0, 9.0))
    if dice.random() < 0.3:
        return Fate(dice.choice((429, 502, 503, 504)), wait=wait)
    if dice.random() < 0.15:
        return ONCE
    close = dice.choice((0, 0, 1000, 1001, 1011, 1012, 1013, 4000))
    early = dice.random() < 0.6
    return Fate(
        events=0 if early else dice.randint(0, 3),
        close=close,
        early=early,
        wait=wait if close in {1012, 1013} else None,
    )


class FickleServer:
    """A server whose connections have the next of *fates* each, and are served when there is none
    any more.

    Always: `faults` has what no client may do.
    """

    def __init__(self, fates: list[Fate]) -> None:
        self.faults: list[str] = []
        self.url = ""
        self._fates = fates
        self.over = asyncio.Event()
        # When the handshakes began that are under way; since when nothing but losses has come, if
        # it is so; and the losses: when each was, how long nothing may come, and whether only
        # until a place is given back.
        self._open: list[float] = []
        self._down: float | None = None
        self._losses: list[tuple[float, float, bool]] = []
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/ws/chat", self._socket)
        app.router.add_post("/sse/chat", self._response)
        app.router.add_get("/sse/chat/{request_id}", self._response)
        app.router.add_delete("/sse/chat/{request_id}", self._cancelled)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _begin(self, *, together: bool) -> Fate:
        """Return the fate of a handshake, which takes its time; check that it may come.

        *together*: while the server is well several may come at once.
        """
        now = asyncio.get_running_loop().time()
        fate = self._fates.pop(0) if self._fates else SERVED
        if not self._fates:
            self.over.set()
        for lost, until, _full in self._losses:
            if lost < now - UNKNOWN and now < until:
                self.faults.append(f"{until - now:.2f} s too early, before {fate}")
        since = now if together and self._down is None else (self._down or 0.0) + UNKNOWN
        if any(began > since for began in self._open):
            self.faults.append(f"not the only handshake, before {fate}")
        self._open.append(now)
        try:
            await asyncio.sleep(0.05)
        finally:
            self._open.remove(now)
        return fate

    def _lose(self, least: float, *, full: bool = False) -> None:
        now = asyncio.get_running_loop().time()
        self._down = self._down or now
        self._losses.append((now, now + least, full))

    def _refuse(self, fate: Fate) -> web.Response:
        self._lose(fate.least, full=fate.status == 503)
        headers = {} if fate.wait is None else {"Retry-After": f"{fate.wait:.0f}"}
        return web.Response(status=fate.status, headers=headers)

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        fate = await self._begin(together=False)
        if fate.status != 200:
            return self._refuse(fate)
        if fate.close == 0 and fate.early:
            self._lose(0.0)
            _cut(request)
            return web.Response()
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        if not fate.early:
            with contextlib.suppress(ConnectionError):
                async for message in ws:
                    if await self._play(ws, fate, message):
                        break
        if fate.close is not None and not ws.closed:
            self._lose(fate.least)
            if fate.wait is not None:
                await ws.send_json(frame(None, "error", **FULL, retry_after=fate.wait))
            if fate.close:
                await ws.close(code=fate.close)
            else:
                _cut(request)
        return ws

    async def _play(self, ws: web.WebSocketResponse, fate: Fate, message: WSMessage) -> bool:
        """Answer a command; return whether the socket ends now."""
        command = message.json()
        name = command["request_id"]
        if command["action"] == "ping":
            await ws.send_json(frame(name, "pong"))
        if command["action"] not in {"chat", "resume"}:
            return False
        after = command["payload"].get("last_event_id", 0)
        for event in answer(name, *HELLO)[after : fate.events]:
            await ws.send_json(event)
        return fate.close is not None

    async def _response(self, request: web.Request) -> web.StreamResponse:
        fate = await self._begin(together=True)
        # A limit of the caller is refused to one question, and not to all.
        if fate.status not in {200, 429}:
            return self._refuse(fate)
        if fate.status == 429:
            self._down = None
            return web.Response(status=429, headers={"Retry-After": "1"})
        if fate.close == 0 and fate.early:
            self._lose(0.0)
            _cut(request)
            return web.Response()
        name, after = request.match_info.get("request_id"), request.headers.get("Last-Event-ID")
        if name is None:
            name = (await request.json())["request_id"]
        self._down = None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for event in answer(name, *HELLO)[int(after or 0) : fate.events]:
                await response.write(_event(event))
            if fate.events == 4:
                self._losses = [loss for loss in self._losses if not loss[2]]
            elif fate.close is not None:
                self._lose(fate.wait or 0.0, full=fate.wait is not None and fate.close != 1012)
                if fate.wait is not None:
                    remark = STOPS if fate.close == 1012 else FULL
                    refusal = frame(name, "error", **remark, retry_after=fate.wait)
                    await response.write(_event(refusal))
        return response

    async def _cancelled(self, _request: web.Request) -> web.Response:
        return web.Response(status=204)


def _event(data: dict[str, object]) -> bytes:
    return eventstream.write(orjson.dumps(data), event=str(data["status"]))


def _cut(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.close()


async def ask(client: Client, deadline: float) -> str | None:
    """The whole answer, None if there is none in time."""
    try:
        return await client.chat("Hi", deadline=deadline).text()
    except AnswerError:
        return None


async def one(client: Client) -> None:
    """Ask one question after the other, and read its whole answer."""
    while True:
        assert await ask(client, 1e6) == "Hello"


async def many(client: Client) -> None:
    """Ask five at once."""
    await asyncio.gather(*(one(client) for _ in range(5)))


async def impatient(client: Client) -> None:
    """Ask on and on, whatever becomes of it: nobody reads when the server answers."""
    while True:
        await ask(client, 0.03)
        await asyncio.sleep(0.7)


async def leaving(client: Client) -> None:
    """Begin to read, and leave."""
    while True:
        task = asyncio.ensure_future(client.chat("Hi").text())
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.7)


PROGRAMS = {work.__name__: work for work in (one, many, impatient, leaving)}


async def run(transport: Transport, program: str, fates: list[Fate]) -> float:
    """Let a client run *program* until all *fates* have come to it; return how long it took."""
    loop = asyncio.get_running_loop()
    async with (
        # It is known to be a server of ours.
        FickleServer([ONCE, *fates]) as server,
        Client(server.url, transport=transport, deadline=None) as client,
    ):
        assert await client.chat("Hi").text() == "Hello"
        began = loop.time()
        work = asyncio.ensure_future(PROGRAMS[program](client))
        over = asyncio.ensure_future(server.over.wait())
        await asyncio.wait([work, over], return_when=asyncio.FIRST_COMPLETED)
        took = loop.time() - began
        assert not work.done(), work.exception()
        work.cancel()
        await asyncio.wait([work])

    assert server.faults == []
    return took


@pytest.mark.parametrize("seed", range(3))
@WAYS
async def test_handshakes_come_alone_and_not_before_they_may(
    transport: Transport, program: str, seed: int
) -> None:
    dice = random.Random(f"{transport} {program} {seed}")

    await run(transport, program, [draw(dice) for _ in range(30)])


@WAYS
@pytest.mark.parametrize(
    "fate",
    [
        Fate(503),
        Fate(close=0, early=True),
        Fate(close=1000, early=True),
        Fate(close=1012, early=True),
        Fate(close=1013, early=True, wait=2.0),
        Fate(close=0),
    ],
    ids=lambda fate: f"{fate.status} {fate.close} {fate.early} {fate.wait}",
)
async def test_server_that_lets_nobody_in_is_asked_ever_less(
    transport: Transport, program: str, fate: Fate
) -> None:
    """Full jitter doubles: ten handshakes that bring nothing take 40 s on average."""
    # The first ones of an HTTP client come together: it does not know yet.
    together = 5 if (transport, program) == ("sse", "many") else 0

    assert await run(transport, program, [fate] * (10 + together)) > 5.0

"""Requests served past aiohttp's loop: what a client sees is what aiohttp itself would have
sent.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.server.connection import DIRECT, DirectRequestHandler
from tests.support.transport import FakeTransport
from tests.support.virtual_loop import run_virtually
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

# Seconds; no pause ends with one of them.
KEEPALIVE, LINGERING = 10.7, 3.3
silent = logging.getLogger("tests.silent")
silent.setLevel(logging.CRITICAL)


def get(path: str, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"GET {path} HTTP/{version}", "Host: a.test", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a.test", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def chunked(path: str, *pieces: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


REQUESTS = (
    *(get(f"/{name}") for name in ("read", "wait", "stream", "fail", "forbidden", "nothing")),
    *(get(f"/{name}") for name in ("last", "cancelled", "timed_out", "left")),
    get("/read", "Connection: close"),
    get("/read", version="1.0"),
    get("/read", "Connection: keep-alive", version="1.0"),
    get("/read", "Upgrade: websocket", "Connection: upgrade", "Sec-WebSocket-Version: 13"),
    get("/read", "Upgrade: h2c", "Connection: upgrade"),
    *(post(f"/{name}", b"a body") for name in ("read", "ignore", "wait", "fail")),
    *(post(f"/{name}", b"b" * 5000) for name in ("read", "ignore")),
    post("/read", b"c", "Expect: 100-continue"),
    post("/ignore", b"c", "Expect: 100-continue"),
    *(chunked(f"/{name}", b"one", b"two") for name in ("read", "ignore", "wait")),
    b"POST /ignore HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /read HTTP/1.1\r\nHost: a.test\r\nContent-Length: 100\r\n\r\nnot all of it",
    b"GET / HTTP/9.9 what\r\n\r\n",
    b"\r\n",
    get("/read", "X: " + "y" * 9000),
)


async def handle(request: web.BaseRequest) -> web.StreamResponse:
    match request.path:
        case "/wait":
            await asyncio.sleep(1)
        case "/stream":
            stream = web.StreamResponse()
            await stream.prepare(request)
            for _ in range(3):
                await stream.write(b"piece")
                await asyncio.sleep(0.1)
            return stream
        case "/fail":
            raise RuntimeError("a bug")
        case "/forbidden":
            raise web.HTTPForbidden
        case "/nothing":
            return None  # type: ignore[return-value]
        case "/last":
            response = web.Response(text="the last one")
            response.force_close()
            return response
        case "/cancelled":
            raise asyncio.CancelledError
        case "/timed_out":
            raise TimeoutError
        case "/left":
            raise ConnectionResetError
        case "/ignore":
            return web.Response(text="not read")
    body = await request.read()
    return web.Response(text=f"{request.method} {len(body)}")


class Wire(FakeTransport):
    """A client's socket in memory, whose protocol hears of its end."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.reading = True
        protocol.connection_made(self)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        # As asyncio's: what is written after the end is lost.
        if not self.closing:
            super().write(data)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def lose(self) -> None:
        if not self.closing:
            self.closing = True
            gone = ConnectionResetError()
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, gone)


async def connected(kind: type[RequestHandler], handler: Any = handle) -> tuple[web.Server, Wire]:
    server = web.Server(handler, handler_cancellation=True)
    protocol = kind(
        server,
        loop=asyncio.get_running_loop(),
        keepalive_timeout=KEEPALIVE,
        lingering_time=LINGERING,
        logger=silent,
        access_log=None,  # type: ignore[arg-type]
    )
    wire = Wire(protocol)
    await ticks()
    return server, wire


class Seen(NamedTuple):
    """What the client got, whether the connection had ended before and after KEEPALIVE seconds,
    and how many tasks there were.
    """

    written: bytes
    closed: bool
    ended: bool
    tasks: int


async def seen(
    kind: type[RequestHandler], steps: Sequence[bytes | float], *, shut_down: bool = False
) -> Seen:
    """Play *steps*: bytes that come, or seconds that pass (below 0: the client leaves)."""
    server, wire = await connected(kind)
    for step in steps:
        if isinstance(step, bytes):
            if not wire.closing:
                wire.protocol.data_received(step)
            continue
        if step < 0:
            # aiohttp begins with a request some turns of the loop later.
            await ticks(8)
            wire.lose()
        await asyncio.sleep(max(0.0, step))
    if shut_down:
        await ticks(8)
        server.pre_shutdown()
        await server.shutdown(2.0)
    await ticks(10)
    closed = wire.closing
    await asyncio.sleep(3 * KEEPALIVE)
    written = re.sub(rb"(?m)^(Date|Server): .*\r\n", b"", wire.written)
    ended = wire.closing
    tasks = len(asyncio.all_tasks())
    wire.lose()
    await ticks(8)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left"
    return Seen(written, closed, ended, tasks)


PAUSES = st.sampled_from((0.0, 0.0, 0.05, 0.05, 0.5, 2.0, 9.0, 11.0, -1.0))


@st.composite
def scripts(draw: st.DrawFn) -> list[bytes | float]:
    """Requests, cut anywhere, with pauses."""
    data = b"".join(draw(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=4)))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    steps: list[bytes | float] = []
    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        if begin != end:
            steps.append(data[begin:end])
            steps.append(draw(PAUSES))
    return steps


@settings(max_examples=100)
@given(steps=scripts(), shut_down=st.booleans())
def test_a_client_sees_what_aiohttp_itself_would_send(
    steps: list[bytes | float], shut_down: bool
) -> None:
    ours, theirs = (
        run_virtually(seen(kind, steps, shut_down=shut_down))
        for kind in (DirectRequestHandler, RequestHandler)
    )
    assert ours == theirs


@pytest.mark.parametrize("request_bytes", REQUESTS)
@pytest.mark.parametrize("pause", [0.0, 0.05, 2.0])
def test_each_request_alone_and_twice_is_answered_as_by_aiohttp(
    request_bytes: bytes, pause: float
) -> None:
    middle = len(request_bytes) - 3
    scripts: list[list[bytes | float]] = [
        [request_bytes, pause],
        [request_bytes, pause, request_bytes, pause],
        [request_bytes + request_bytes, pause],
        [request_bytes[:middle], pause, request_bytes[middle:], pause],
        [request_bytes, pause, -1.0],
    ]
    for steps in scripts:
        ours, theirs = (
            run_virtually(seen(kind, steps)) for kind in (DirectRequestHandler, RequestHandler)
        )
        assert ours == theirs, steps


async def test_an_ordinary_request_is_served_in_its_own_task_without_the_loop() -> None:
    assert DIRECT, "this aiohttp has other private names"
    tasks = []

    async def handler(request: web.BaseRequest) -> web.Response:
        tasks.append((request.task, asyncio.current_task()))
        return web.Response(body=await request.read())

    _, wire = await connected(DirectRequestHandler, handler)
    loop_task = wire.protocol._task_handler  # type: ignore[attr-defined]  # noqa: SLF001
    for data in (get("/"), post("/", b"a body"), post("/", b"a body")[:-4], b"body"):
        wire.protocol.data_received(data)
        await ticks()
    assert [task is current for task, current in tasks] == [True, True, True]
    # What comes together is left to the loop.
    wire.protocol.data_received(get("/") + get("/"))
    await ticks(8)
    assert [task is loop_task for task, _ in tasks] == [False] * 3 + [True] * 2
    wire.protocol.data_received(get("/"))
    await ticks()
    assert [task is loop_task for task, _ in tasks][5:] == [False]
    assert wire.written.count(b"HTTP/1.1 200 OK") == 6
    wire.lose()
    await ticks()


async def test_a_request_that_comes_before_the_last_one_has_ended_needs_no_loop_either() -> None:
    answers, tasks = [asyncio.Event(), asyncio.Event()], []

    async def handler(request: web.BaseRequest) -> web.Response:
        tasks.append((request.task, asyncio.current_task()))
        await answers[len(tasks) - 1].wait()
        return web.Response(text=request.path)

    _, wire = await connected(DirectRequestHandler, handler)
    loop_task = wire.protocol._task_handler  # type: ignore[attr-defined]  # noqa: SLF001
    wire.protocol.data_received(get("/one"))
    await ticks()
    wire.protocol.data_received(get("/two"))
    await ticks()
    assert len(tasks) == 1

    for answer in answers:
        answer.set()
        await ticks(8)

    (first, _), (second, current) = tasks
    assert second is current
    assert second not in {first, loop_task}
    assert wire.written.index(b"/one") < wire.written.index(b"/two")
    wire.lose()
    await ticks()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("kind", [DirectRequestHandler, RequestHandler])
async def test_a_connection_that_is_closed_in_a_request_ends_with_its_response(
    kind: type[RequestHandler],
) -> None:
    answer = asyncio.Event()

    async def handler(_request: web.BaseRequest) -> web.Response:
        await answer.wait()
        return web.Response(text="the last one")

    _, wire = await connected(kind, handler)
    wire.protocol.data_received(get("/"))
    await ticks()
    wire.protocol.close()  # type: ignore[attr-defined]
    await ticks()
    assert not wire.closing
    answer.set()
    await ticks(8)
    assert wire.closing
    assert wire.written.endswith(b"the last one")
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_nothing_is_parsed_again_for_a_body_whose_reading_was_never_paused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fed = []
    receive = RequestHandler.data_received

    def data_received(self: RequestHandler, data: bytes) -> None:
        fed.append(data)
        receive(self, data)

    monkeypatch.setattr(RequestHandler, "data_received", data_received)
    _, wire = await connected(DirectRequestHandler)
    wire.protocol.data_received(post("/read", b"a body"))
    await ticks()
    assert fed == [post("/read", b"a body")]
    assert wire.written.endswith(b"POST 6")
    wire.lose()
    await ticks()

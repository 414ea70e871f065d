"""Answers whose bytes are made by hand say what aiohttp's say."""

from __future__ import annotations

import asyncio
import re
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp.test_utils import make_mocked_request

from aioserver.faces import ready, whole
from aioserver.faces.http import Request
from aioserver.streams.outbox import Outbox
from tests.support.chat import CHAT, STREAMED
from tests.support.raw import Raw
from tests.support.simulator import Behaviour
from tests.support.transport import FakeTransport

if TYPE_CHECKING:
    from tests.support.server import RunningServer

PATH = "/v1/chat/completions"
CORS = {
    "access-control-allow-credentials",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "vary",
}
CHANGES = {"date", "x-request-id", "content-length"}


@pytest.mark.parametrize("body", [CHAT, STREAMED], ids=["whole", "streamed"])
async def test_the_head_is_the_one_that_aiohttp_writes(
    server: RunningServer, body: object
) -> None:
    server.simulator.behaviour = Behaviour(
        ttft=0, interval=0, headers=(("x-ratelimit-remaining-requests", "7"),)
    )
    async with Raw(server) as raw:
        await raw.post(PATH, body, "X-Request-Id: mine")
        ours = await raw.answer()
        await raw.post(PATH, body, "Origin: http://page.example")
        theirs = await raw.answer()  # on the same connection

    assert (ours.version, ours.status) == (theirs.version, theirs.status) == ("HTTP/1.1", 200)
    assert ours.headers["x-request-id"] == "mine"
    assert ours.headers["x-ratelimit-remaining-requests"] == "7"
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", ours.headers["date"])
    parsedate_to_datetime(ours.headers["date"])
    kept = ours.headers.keys() - CHANGES
    assert kept == theirs.headers.keys() - CORS - CHANGES
    assert {name: ours.headers[name] for name in kept} == {
        name: theirs.headers[name] for name in kept
    }


@pytest.mark.parametrize("body", [CHAT, STREAMED], ids=["whole", "streamed"])
async def test_an_answer_after_which_the_connection_ends_says_so(
    server: RunningServer, body: object
) -> None:
    async with Raw(server) as raw:
        await raw.post(PATH, body, "Connection: close")
        answer = await raw.answer()

        assert answer.headers["connection"] == "close"
        assert await raw.to_the_end() == b""


class Waits:
    """aiohttp's writer, of which only the waiting is used."""

    drained = 0

    async def drain(self) -> None:
        self.drained += 1


class Leaving:
    """The connection of a client that leaves once it has the first bytes of its answer."""

    def __init__(self, transport: FakeTransport) -> None:
        self.transport = transport
        self._outbox = Outbox(asyncio.get_running_loop())

    def send(self, data: bytes) -> asyncio.Future[None]:
        return self._outbox.send(self, data)

    def write(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.lose()

    def abort(self) -> None:
        self.transport.abort()


def request_of(transport: FakeTransport, writer: Waits) -> Any:
    request: Any = make_mocked_request("POST", PATH, transport=transport, writer=writer)
    request.__class__ = Request
    return request


@pytest.mark.parametrize(("held", "drained"), [(0, 0), (ready.HIGH_WATER, 0), (1 << 20, 1)])
async def test_a_client_that_takes_nothing_is_waited_for(held: int, drained: int) -> None:
    transport, writer = FakeTransport(held=held), Waits()

    await ready.ReadyResponse(b"body", {"a": "b"}).prepare(request_of(transport, writer))

    assert len(transport.writes) == 1, "head and body are one write"
    assert transport.writes[0].endswith(b"a: b\r\nContent-Length: 4\r\n\r\nbody")
    assert writer.drained == drained


async def test_a_client_that_has_left_gets_nothing() -> None:
    transport = FakeTransport()
    transport.closing = True

    with pytest.raises(ConnectionResetError):
        await ready.ReadyResponse(b"body", {}).prepare(request_of(transport, Waits()))

    assert transport.writes == []


async def test_of_a_large_answer_nothing_is_written_once_its_client_has_left() -> None:
    transport, dropped = FakeTransport(), list[str]()
    request = request_of(transport, Waits())
    request._protocol = Leaving(transport)  # noqa: SLF001 - aiohttp gives no other way
    answer = ready.ReadyResponse(b"x" * (10 * ready.HIGH_WATER), {})

    # Were more written, asyncio would log a warning for each piece, and this transport asserts.
    await whole.write(request, answer, 5.0, lambda *drop: dropped.extend(drop), "openai")

    assert len(transport.writes) == 1
    assert not dropped

"""What is no aioserver, or has gone mad: one clear error for each, soon, and no memory filled."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Literal

import pytest

from aioserver.client import AnswerError, Client
from tests.support.scripted_provider import ScriptedProvider
from tests.support.scripted_server import ScriptedServer, answer, frame, saying
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from tests.support.scripted_provider import Peer
    from tests.support.scripted_server import ResponsePeer, SocketPeer

Transport = Literal["websocket", "sse"]

HELLO = answer("", "Hel", "lo")
BAD_FRAMES = {
    "not JSON": b"{",
    "not UTF-8": b'{"request_id":"\xff","status":"chunk","chunk":{}}',
    "a list": b"[1]",
    "nested deeply": b'{"a":' + b"[" * 100_000,
    "no chunk": b'{"request_id":"r1","event_id":1,"status":"processing"}',
    "a text for a number": b'{"request_id":"r1","event_id":"1","status":"processing","chunk":{}}',
    "a fraction": b'{"request_id":"r1","event_id":1.5,"status":"processing","chunk":{}}',
    "event 0": b'{"request_id":"r1","event_id":0,"status":"processing","chunk":{}}',
    "a large number": b'{"request_id":"r1","event_id":1%b,"status":"x","chunk":{}}' % (b"0" * 400),
    "a negative wait": b'{"request_id":"r1","status":"error","chunk":{"retry_after":-1}}',
    "an infinite wait": b'{"request_id":"r1","status":"error","chunk":{"retry_after":1e999}}',
    "a text that is none": (
        b'{"request_id":"r1","event_id":1,"status":"chunk","chunk":{"type":"text","data":7}}'
    ),
    "calls that are none": (
        b'{"request_id":"r1","event_id":1,"status":"chunk",'
        b'"chunk":{"type":"tool_calls","data":[7]}}'
    ),
    "a provider that is none": (
        b'{"request_id":"r1","event_id":1,"status":"processing","chunk":{"metadata":{"model":[]}}}'
    ),
    "usage that is none": (
        b'{"request_id":"r1","event_id":1,"status":"complete","chunk":{"metadata":{"usage":[1]}}}'
    ),
}
BOTH = pytest.mark.parametrize("transport", ["websocket", "sse"])


async def failure(url: str, transport: Transport, deadline: float = 20.0) -> AnswerError:
    """Ask, and return the error."""
    async with Client(url, transport=transport, deadline=deadline) as client:
        with pytest.raises(AnswerError) as caught:
            await client.chat("Hi", request_id="r1").text()
    return caught.value


@BOTH
@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_frame_that_is_none_is_an_error(transport: Transport, name: str) -> None:
    data = BAD_FRAMES[name]

    async def play(peer: SocketPeer | ResponsePeer, _command: dict[str, Any]) -> None:
        if transport == "websocket":
            await peer.write(b"\x81\x7f" + len(data).to_bytes(8, "big") + data)
        else:
            await peer.write(b"data: " + data + b"\n\n")

    async with ScriptedServer(answers=[play]) as server:
        error = await failure(server.url, transport)

    assert error.code == "protocol_error"
    assert len(error.message) < 500


@BOTH
@pytest.mark.parametrize(
    "numbers", [[2], [1, 3], [1, 1], [1, 2, 2], [1, 2, 1], [1, 2, 2**62], [2, 1]]
)
async def test_numbers_that_jump_or_come_twice_are_an_error(
    transport: Transport, numbers: list[int]
) -> None:
    frames = [{**HELLO[min(number, 3) - 1], "event_id": number} for number in numbers]
    async with ScriptedServer(answers=[saying(*frames)]) as server:
        error = await failure(server.url, transport)

    assert error.code == "protocol_error"
    assert "came after event" in error.message


@BOTH
async def test_text_before_a_fault_is_read_first(transport: Transport) -> None:
    frames = [*HELLO[:3], {**HELLO[3], "event_id": 9}]
    pieces: list[str] = []
    async with (
        ScriptedServer(answers=[saying(*frames)]) as server,
        Client(server.url, transport=transport) as client,
    ):

        async def read() -> None:
            async for piece in client.chat("Hi"):
                pieces.append(piece)  # noqa: PERF401 - what has come before the error

        with pytest.raises(AnswerError) as caught:
            await read()

    assert pieces == ["Hel", "lo"]
    assert caught.value.text == "Hello"


@BOTH
async def test_frame_that_would_fill_the_memory_is_an_error(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aioserver.client import event_source, socket

    for module in (event_source, socket):
        monkeypatch.setattr(module, "MAX_FRAME_BYTES", 10_000)

    async def play(peer: SocketPeer | ResponsePeer, _command: dict[str, Any]) -> None:
        if transport == "websocket":
            await peer.write(b"\x81\x7f" + (1 << 40).to_bytes(8, "big") + b"x" * 20_000)
        else:
            await peer.write(b"data: " + b"x" * 20_000)

    async with ScriptedServer(answers=[play]) as server:
        error = await failure(server.url, transport)

    assert error.code == "protocol_error"


@BOTH
async def test_frames_of_another_answer_are_not_taken_for_ours(transport: Transport) -> None:
    async def play(peer: SocketPeer | ResponsePeer, command: dict[str, Any]) -> None:
        await peer.send(frame("another", "chunk", 1, type="text", data="x"))
        await saying(*HELLO)(peer, command)

    async with ScriptedServer(answers=[play]) as server:
        if transport == "sse":
            assert (await failure(server.url, transport)).code == "protocol_error"
            return
        # A socket may still have what was cancelled.
        async with Client(server.url, transport=transport) as client:
            assert await client.chat("Hi").text() == "Hello"


async def http(peer: Peer, answer: bytes) -> None:
    # A handshake follows a redirection, here for ever.
    while True:
        await peer.head()
        await peer.send(answer)


@BOTH
@pytest.mark.parametrize(
    "raw_answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nHello",
        b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 418 I'm a teapot\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 4\r\n\r\n[{}]",
    ],
)
async def test_server_that_is_no_aioserver_is_an_error(
    transport: Transport, raw_answer: bytes
) -> None:
    async with ScriptedProvider(lambda peer: http(peer, raw_answer)) as server:
        error = await failure(f"http://127.0.0.1:{server.port}", transport)

    assert error.code == "protocol_error"
    assert server.accepted == 1


@BOTH
async def test_error_that_comes_in_pieces_is_read_whole(transport: Transport) -> None:
    body = b'{"error":{"code":"model_not_found","message":"no such model"}}'
    head = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def play(peer: Peer) -> None:
        while True:
            await peer.head()
            for piece in (head + body[:20], body[20:]):
                await peer.send(piece)
                await ticks()

    async with ScriptedProvider(play) as server:
        error = await failure(f"http://127.0.0.1:{server.port}", transport)

    assert error.code == "model_not_found"


@BOTH
@pytest.mark.parametrize(
    "raw_answer",
    [b"SSH-2.0-OpenSSH_9.6\r\n", b"\0" * 100, b"HTTP/1.1 200\r\n: :\r\n\r\n"],
    ids=["ssh", "zeros", "header"],
)
async def test_bytes_that_are_no_http_are_an_error(
    transport: Transport, raw_answer: bytes
) -> None:
    async with ScriptedProvider(lambda peer: http(peer, raw_answer)) as server:
        error = await failure(f"http://127.0.0.1:{server.port}", transport)

    assert error.code in {"connect_error", "protocol_error"}


@BOTH
async def test_head_that_never_ends_is_an_error(transport: Transport) -> None:
    sent = 0

    async def play(peer: Peer) -> None:
        nonlocal sent
        await peer.head()
        peer.write(b"HTTP/1.1 200 OK\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                peer.write(b"x-%d: %b\r\n" % (sent, b"y" * 1000))
                await peer.writer.drain()
                sent += 1000

    async with ScriptedProvider(play) as server:
        error = await failure(f"http://127.0.0.1:{server.port}", transport, 5.0)

    assert error.code in {"connect_error", "protocol_error", "deadline_exceeded"}
    assert sent < 100_000_000


@pytest.mark.parametrize(
    "first", [b"\x82\x01x", b"\x83\x00", b"\xc1\x00", b"\x81\x81aaaax", b"\x09\x00"]
)
async def test_socket_that_breaks_rfc_6455_is_an_error(first: bytes) -> None:
    async def play(peer: SocketPeer) -> None:
        await peer.command()
        await peer.write(first)
        await peer.command()

    async with ScriptedServer(sockets=[play]) as server:
        error = await failure(server.url, "websocket")

    assert error.code == "protocol_error"


@pytest.mark.virtual_time
@BOTH
async def test_server_that_says_nothing_ends_at_the_deadline(transport: Transport) -> None:
    async def play(peer: Peer) -> None:
        await peer.left()

    async with ScriptedProvider(play) as server:
        error = await failure(f"http://127.0.0.1:{server.port}", transport, 25.0)

    assert error.code == "deadline_exceeded"


@pytest.mark.virtual_time
@BOTH
async def test_server_that_cuts_each_answer_is_not_asked_without_a_pause(
    transport: Transport,
) -> None:
    async def play(peer: SocketPeer | ResponsePeer, command: dict[str, Any]) -> None:
        if command["action"] == "chat":
            await saying(HELLO[0])(peer, command)
        peer.cut()

    async with ScriptedServer(answers=[play]) as server:
        start = asyncio.get_running_loop().time()
        error = await failure(server.url, transport, 40.0)

        assert 5.0 < asyncio.get_running_loop().time() - start <= 41.0
    assert error.code == "connect_error"
    assert len(server.seen) < 30


@BOTH
async def test_key_is_not_sent_where_a_server_redirects_to(transport: Transport) -> None:
    heads: list[bytes] = []

    async def elsewhere(peer: Peer) -> None:
        heads.append(await peer.head())
        await peer.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    async with ScriptedProvider(elsewhere) as other:
        target = f"http://127.0.0.1:{other.port}/ws/chat"
        redirect = f"HTTP/1.1 307 T\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()
        async with (
            ScriptedProvider(lambda peer: http(peer, redirect)) as server,
            Client(f"http://127.0.0.1:{server.port}", transport=transport, key="secret") as client,
        ):
            with pytest.raises(AnswerError):
                await client.chat("Hi").text()

    assert len(heads) == (transport == "websocket")
    assert not any(b"secret" in head for head in heads)

"""TLS of the listener, over real sockets: both loops do the same."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.server import tls
from aioserver.server.connection import ConnectionServer
from aioserver.server.tls import (
    LINES_PER_SECOND,
    MAX_UNFINISHED,
    PIECE,
    RECORD,
    TIMEOUT,
    TlsTransport,
)
from aioserver.telemetry.metrics import HANDSHAKES
from tests.support import chat as frames
from tests.support.raw import Raw
from tests.support.server import PACED, QUICK, RunningServer
from tests.support.simulator import Behaviour
from tests.support.tls import TLS, TlsClient, pair, trusting
from tests.support.transport import FakeTransport
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer

pytestmark = pytest.mark.both_loops

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CLOSE = GET + b"Connection: close\r\n\r\n"
GET += b"\r\n"


@pytest.fixture
async def secure(make_server: MakeServer, tmp_path: Path) -> RunningServer:
    """A server over TLS whose provider answers at once."""
    return await make_server(QUICK, **{TLS: pair(tmp_path)})


def outcomes(server: RunningServer) -> dict[str, int]:
    """What has become of handshakes, without zeros."""
    counters = server.context.metrics.handshakes
    return {name: int(counters[name].value) for name in HANDSHAKES if counters[name].value}


async def noted(server: RunningServer, **counts: int) -> None:
    """Wait until handshakes have come to *counts*."""
    await until(lambda: outcomes(server) == counts, 30.0, lambda: outcomes(server))


def unfinished(server: RunningServer) -> int:
    assert server.owners.tls is not None
    return len(server.owners.tls.handshakes)


def transports(server: RunningServer) -> list[TlsTransport]:
    found = [connection.transport for connection in server.http_server.connections]
    return [transport for transport in found if isinstance(transport, TlsTransport)]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}


# What a client sees.


async def test_every_face_answers_over_tls(secure: RunningServer) -> None:
    async with secure.session.get(secure.base + "/health") as response:
        assert response.status == 200
    async with secure.session.post(secure.v1 + "/chat/completions", json=chat()) as response:
        assert (await response.json())["choices"]
    streamed = chat(stream=True)
    async with secure.session.post(secure.v1 + "/chat/completions", json=streamed) as response:
        assert (await response.text()).endswith("data: [DONE]\n\n")
    frame = {"request_id": "s", "text": "hi"}
    async with secure.session.post(secure.sse, json=frame) as response:
        assert "event: complete" in await response.text()
    async with secure.connect() as ws:
        await ws.send_json(frames.chat("r"))
        assert (await frames.to_end(ws))[-1]["status"] == "complete"


async def test_events_larger_than_a_record_arrive_whole(secure: RunningServer) -> None:
    question = {"request_id": "s", **frames.big(5 * RECORD, 3)}
    async with secure.session.post(secure.sse, json=question) as response:
        events = await frames.read_frames(response)

    assert max(len(json.dumps(event)) for event in events) > 5 * RECORD
    assert frames.numbers(events) == list(range(1, len(events) + 1))


async def test_paced_answers_arrive_whole_while_others_do(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(PACED, **{TLS: pair(tmp_path)})

    async def ask() -> str:
        body = chat(stream=True)
        async with server.session.post(server.v1 + "/chat/completions", json=body) as response:
            return await response.text()

    texts = await asyncio.gather(*(ask() for _ in range(8)))

    assert all(text.count("data: ") >= PACED.tokens for text in texts)
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)


async def test_bodies_of_every_size_pass_both_ways(
    make_server: MakeServer, tmp_path: Path
) -> None:
    """An upload, whose length the provider's answer shows; and a large answer."""
    behaviour = Behaviour(ttft=0, interval=0, tokens=50_000)
    server = await make_server(behaviour, **{TLS: pair(tmp_path)})
    for size in (1, RECORD - 1, RECORD, RECORD + 1, PIECE, PIECE + 1, 900_000):
        body = {"model": "m", "messages": [{"role": "user", "content": "x" * size}]}
        tokens = {} if size == PIECE else {"max_tokens": 1}

        async with server.session.post(
            server.v1 + "/chat/completions", json=body | tokens
        ) as response:
            answer = await response.json()

        assert response.status == 200, answer
        assert answer["usage"]["prompt_tokens"] >= size // 5
        assert answer["usage"]["completion_tokens"] == (1 if tokens else 50_000)


async def test_requests_in_one_record_and_records_in_pieces_are_served_in_order(
    secure: RunningServer,
) -> None:
    async with TlsClient(secure.port) as client:
        await client.send(GET * 3)
        data = b""
        while data.count(b"200 OK") < 3:
            data += await client.receive()
        client.tls.write(CLOSE)
        for byte in client.outgoing.read():
            await client.raw(bytes([byte]))
        assert b"200 OK" in await client.to_the_end()


async def test_request_behind_the_end_of_the_handshake_is_served(secure: RunningServer) -> None:
    """Both come in one segment: a client need not wait."""
    async with AsyncExitStack() as stack:
        client = TlsClient(secure.port)
        stack.callback(client.socket.close)
        await client.connect()
        with pytest.raises(ssl.SSLWantReadError):
            client.tls.do_handshake()
        await client.flush()
        while True:
            await client.more()
            try:
                client.tls.do_handshake()
            except ssl.SSLWantReadError:
                continue
            break
        client.tls.write(CLOSE)
        await client.flush()
        assert b"200 OK" in await client.to_the_end()


async def test_server_is_told_that_the_connection_is_secure(secure: RunningServer) -> None:
    async with TlsClient(secure.port):
        await until(lambda: len(transports(secure)) == 1)
        (transport,) = transports(secure)

        assert isinstance(transport.get_extra_info("sslcontext"), ssl.SSLContext)
        assert transport.get_extra_info("ssl_object").version() == "TLSv1.3"
        assert transport.get_extra_info("peername")[0] == "127.0.0.1"
        assert transport.get_extra_info("socket").family == socket.AF_INET
        assert transport.get_extra_info("nothing", 7) == 7


# What TLS is spoken.


async def test_protocol_is_http_1_1(secure: RunningServer) -> None:
    context = trusting()
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with TlsClient(secure.port, context) as client:
        assert client.tls.selected_alpn_protocol() == "http/1.1"
        assert client.tls.compression() is None


async def test_tls_1_2_is_spoken_and_not_renegotiated(secure: RunningServer) -> None:
    context = trusting(maximum_version=ssl.TLSVersion.TLSv1_2)
    async with TlsClient(secure.port, context) as client:
        assert client.tls.version() == "TLSv1.2"
        await client.send(GET)
        await client.until(b"200 OK")
        # Python cannot ask for it; the server says by this option that it refuses.
        assert secure.owners.tls is not None
        assert secure.owners.tls.loaded.context.options & ssl.OP_NO_RENEGOTIATION


async def test_tls_1_1_is_refused(secure: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")

    with pytest.raises(ssl.SSLError):
        async with TlsClient(secure.port, context):
            pass

    await noted(secure, failed=1)
    (record,) = [record for record in caplog.records if record.name == "aioserver.tls"]
    assert record.fields == {  # type: ignore[attr-defined]
        "address": "127.0.0.1",
        "outcome": "failed",
        "reason": "unsupported protocol",
    }


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_second_connection_resumes(secure: RunningServer, version: ssl.TLSVersion) -> None:
    context = trusting(maximum_version=version)
    async with TlsClient(secure.port, context) as client:
        await client.send(CLOSE)
        await client.to_the_end()
        session = client.tls.session

    async with TlsClient(secure.port, context, session=session) as client:
        assert client.tls.session_reused

    await noted(secure, done=1, resumed=1)


async def test_broken_record_is_answered_with_an_alert(secure: RunningServer) -> None:
    """What a read leaves to be written is sent: alerts, and answers to key updates."""
    async with TlsClient(secure.port) as client:
        await client.send(GET)
        await client.until(b"200 OK")
        await client.raw(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):
            await client.to_the_end()
    await until(lambda: not secure.http_server.connections)


# Ends.


async def test_server_says_that_it_closes(secure: RunningServer) -> None:
    async with TlsClient(secure.port) as client:
        await client.send(CLOSE)
        # Without `close_notify` this raises.
        assert (await client.to_the_end()).startswith(b"HTTP/1.1 200 OK")


async def test_close_waits_for_nothing(secure: RunningServer) -> None:
    """The client says nothing of its end, and the connection is gone at once."""
    async with TlsClient(secure.port) as client:
        await client.send(CLOSE)
        await until(lambda: not secure.http_server.connections, 5.0)


@pytest.mark.parametrize("way", ["close_notify", "fin", "both", "reset"])
async def test_client_that_leaves_ends_its_request(
    make_server: MakeServer, tmp_path: Path, way: str
) -> None:
    server = await make_server(PACED, **{TLS: pair(tmp_path)})
    body = json.dumps(chat(stream=True)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    async with TlsClient(server.port) as client:
        await client.send(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        await client.until(b"data: ")
        if way in {"close_notify", "both"}:
            # It waits for the server's, or has more of the answer to read.
            with pytest.raises(ssl.SSLError):
                client.tls.unwrap()
            await client.flush()
        if way in {"fin", "both"}:
            client.socket.shutdown(socket.SHUT_WR)
        if way == "reset":
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.socket.close()
        await until(lambda: not server.http_server.connections)
    await server.nothing_held()


async def test_reader_that_stops_is_seen_by_the_write_watchdog(
    make_server: MakeServer, tmp_path: Path
) -> None:
    """What waits below is counted: a loop's own TLS would hide it."""
    behaviour = Behaviour(ttft=0, interval=0, tokens=500_000)
    server = await make_server(
        behaviour, **{TLS: pair(tmp_path), "chat.streams.send_timeout": 0.5}
    )
    body = json.dumps(chat(stream=True)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    async with TlsClient(server.port, receive_buffer=4096) as client:
        await client.send(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        await client.until(b"data: ")
        await until(lambda: server.context.metrics.slow_clients.value == 1, 60.0)
    await server.nothing_held()


async def test_paused_reading_passes_nothing_on_and_loses_nothing(
    secure: RunningServer,
) -> None:
    """Reading pauses while decrypted bytes are still inside; they come before all that follow."""
    async with TlsClient(secure.port) as client:
        await until(lambda: len(transports(secure)) == 1)
        (transport,) = transports(secure)
        connection, taker = transport.get_protocol(), _Taker(transport)
        transport.set_protocol(taker)
        for number in range(40):
            client.tls.write(bytes([number]) * 1000)
        await client.flush()
        await until(lambda: len(taker.parts) == 1)
        await client.send(b"x" * 1000)
        assert not transport.is_reading()

        for count in range(2, 42):
            transport.resume_reading()
            await until(lambda count=count: len(taker.parts) == count)  # type: ignore[misc]

        assert b"".join(taker.parts) == b"".join(
            [*(bytes([number]) * 1000 for number in range(40)), b"x" * 1000]
        )
        transport.resume_reading()
        client.socket.shutdown(socket.SHUT_WR)
        await until(lambda: taker.ended)
        transport.set_protocol(connection)


class _Taker(asyncio.Protocol):
    """Pauses reading after each part."""

    def __init__(self, transport: TlsTransport) -> None:
        self.transport = transport
        self.parts: list[bytes] = []
        self.ended = False

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        self.transport.pause_reading()

    def eof_received(self) -> bool:
        self.ended = True
        return False


# Handshakes that come to nothing.


async def test_plain_request_is_told_to_speak_tls(
    secure: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with Raw(secure) as raw:
        await raw.send(GET)
        answer = await raw.answer()
        assert (answer.status, answer.code) == (400, "invalid_request")
        assert answer.json()["error"]["message"] == tls.SPEAK_TLS
        assert answer.headers["connection"] == "close"
        assert await raw.to_the_end() == b""
    await noted(secure, plain=1)
    assert "tls handshake failed" in caplog.messages


async def test_large_plain_request_has_its_answer(secure: RunningServer) -> None:
    """It is read to its end, so that no reset overtakes the answer."""
    async with Raw(secure) as raw:
        await raw.send(
            b"POST /v1/files HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + bytes(10**6)
        )
        raw.half_close()
        assert (await raw.answer()).status == 400


@pytest.mark.parametrize(
    "first", [b"\x00", b"\x80\x2e", b"\x16\x03\x01\x00\x05hello", b"\xff" * 9]
)
async def test_what_is_no_tls_is_refused(secure: RunningServer, first: bytes) -> None:
    async with Raw(secure) as raw:
        await raw.send(first)
        await raw.to_the_end()
    await noted(secure, failed=1)


async def test_client_that_does_not_trust_us_is_counted(
    secure: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        async with TlsClient(secure.port, trusting("others")):
            pass
    await noted(secure, failed=1)
    assert unfinished(secure) == 0


async def test_probe_that_sends_nothing_is_no_news(
    secure: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Load balancers connect and close, each second."""
    async with Raw(secure):
        await until(lambda: unfinished(secure) == 1)
    await noted(secure, failed=1)
    assert "tls handshake failed" not in caplog.messages


async def test_handshakes_that_fail_are_logged_some_times_a_second(
    secure: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(3 * LINES_PER_SECOND):
        async with Raw(secure) as raw:
            await raw.send(GET)
            await raw.to_the_end()
    await noted(secure, plain=3 * LINES_PER_SECOND)
    assert 1 <= caplog.messages.count("tls handshake failed") < 3 * LINES_PER_SECOND


@pytest.mark.virtual_time
async def test_handshake_has_its_time_and_no_more(secure: RunningServer) -> None:
    loop = asyncio.get_running_loop()
    async with Raw(secure) as silent, Raw(secure) as slow:
        began = loop.time()
        await slow.send(b"\x16\x03\x01")
        await silent.to_the_end()
        await slow.to_the_end()
        assert TIMEOUT - 1 < loop.time() - began < TIMEOUT + 1
    await noted(secure, timeout=2)
    assert unfinished(secure) == 0


async def test_silent_sockets_lock_nobody_out(secure: RunningServer) -> None:
    """One more displaces the oldest."""
    assert secure.owners.tls is not None
    handshakes, http_server = secure.owners.tls.handshakes, secure.http_server
    assert isinstance(http_server, ConnectionServer)
    silent = []
    for _ in range(MAX_UNFINISHED):
        # A socket without a descriptor.
        silent.append(FakeTransport())
        handshakes.make(http_server).connection_made(silent[-1])
    assert unfinished(secure) == MAX_UNFINISHED

    async with secure.session.get(secure.base + "/health") as response:
        assert response.status == 200

    await noted(secure, done=1, displaced=1)
    assert [transport.closing for transport in silent[:2]] == [True, False]
    assert unfinished(secure) == MAX_UNFINISHED - 1

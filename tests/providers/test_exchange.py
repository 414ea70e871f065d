"""The wire: byte transcripts over real sockets, aiohttp's own client as the oracle."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import TYPE_CHECKING

import aiohttp
import pytest

from aioserver.provider_errors import (
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderFault,
    ReadTimeout,
    StaleConnection,
    WriteTimeout,
)
from aioserver.providers import exchange as exchange_module
from aioserver.providers.backpressure import Backpressure
from tests.support.scripted_provider import (
    DONE,
    OK,
    Got,
    Peer,
    ScriptedProvider,
    answering,
    ask,
    chunk,
    closing,
    exchange,
    pooled,
    request,
    stalling,
)
from tests.support.waiting import patience, ticks, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


GOOD = {
    "a length": b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 11\r\n\r\nhello world",
    "a length of 0": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "chunks": CHUNKED + chunk(b"data: 1\n\n") + chunk(b"data: 2\n\n" + DONE) + b"0\r\n\r\n",
    "chunk extensions": CHUNKED + b'5;a=b\r\nhello\r\n6;c="d"\r\n world\r\n0;last\r\n\r\n',
    "trailers": CHUNKED + chunk(b"hello") + b"0\r\nX-Sum: 1\r\nContent-Type: b/c\r\n\r\n",
    "sizes in capitals and zeros": CHUNKED + b"000A\r\n0123456789\r\n00000\r\n\r\n",
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
    "100, 102 and 103": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nX: y\r\n\r\n"
    b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK,
    "no reason": b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok",
    "204": b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n",
    "an error": b"HTTP/1.1 429 Slow down\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}",
    "an offer of h2c": b"HTTP/1.1 200 OK\r\nUpgrade: h2,h2c\r\nConnection: Upgrade, Keep-Alive\r\n"
    b"Content-Length: 2\r\n\r\nok",
    "HTTP/1.0 kept": b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
}
ENDED_BY_CLOSE = {
    "no length": b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\n\r\nuntil the end",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Type: a/b\r\n\r\nuntil the end",
    "identity": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end",
}
NOT_KEPT = {
    "Connection: close": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    "close in chunks": CHUNKED[:-2] + b"Connection: close\r\n\r\n" + chunk(b"ok") + b"0\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "another answer behind it": OK + OK,
    "garbage behind it": OK + b"garbage",
    "half an answer behind it": OK + b"HTTP/1.1 408 Request Tim",
}
BROKEN = {
    "not HTTP": b"220 mail.example ESMTP ready\r\n",
    "a length and chunks": CHUNKED[:-2]
    + b"Content-Length: 5\r\n\r\n"
    + chunk(b"hello")
    + b"0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
    "a length with a sign": b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
    "a length beyond 64 bits": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "a chunk size that is none": CHUNKED + chunk(b"hello") + b"zz\r\nhello\r\n",
    "a chunk longer than it says": CHUNKED + chunk(b"hello") + b"2\r\nhello\r\n0\r\n\r\n",
    "a blank before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok",
    # llhttp knows the interim statuses up to 103, and reads the body of another.
    "an interim answer with a body": b"HTTP/1.1 199 Wait\r\nContent-Length: 5\r\n\r\nhello" + OK,
    "an interim answer in chunks": b"HTTP/1.1 104 Wait\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunk(b"hello")
    + b"0\r\n\r\n"
    + OK,
    "a coding within the chunks": CHUNKED.replace(b"chunked", b"gzip, chunked")
    + chunk(b"hello")
    + b"0\r\n\r\n",
    "a coding in a line of its own": CHUNKED.replace(
        b"\r\n", b"\r\nTransfer-Encoding: gzip\r\n", 1
    )
    + chunk(b"hello")
    + b"0\r\n\r\n",
    "a coding up to the end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\n\r\n",
}
EARLY_CLOSE = {
    "nothing": b"",
    "half a status line": b"HTTP/1.1 20",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n",
    "no body": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
    "half a chunk": CHUNKED + b"5\r\nhel",
    "no last chunk": CHUNKED + chunk(b"hello"),
    "an early hint alone": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
}


async def oracle(url: str) -> tuple[int, str | None, bytes]:
    """Status, content type and body as aiohttp's own client reads them."""
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.post(f"{url}/chat/completions", data=b"{}", allow_redirects=False) as response,
    ):
        return response.status, response.headers.get("Content-Type"), await response.read()


def seen(got: Got) -> tuple[int, str | None, bytes]:
    return got.status, got.headers.get("content-type"), got.body


def cuts(answer: bytes) -> list[tuple[bytes, ...]]:
    """Every cut in two, single bytes, and some at random, seeded."""
    dice = random.Random(len(answer))
    some = [sorted(dice.sample(range(1, len(answer)), min(5, len(answer) - 1))) for _ in range(5)]
    return [
        (answer,),
        tuple(answer[at : at + 1] for at in range(len(answer))),
        *((answer[:at], answer[at:]) for at in range(1, len(answer))),
        *(
            tuple(answer[a:b] for a, b in zip([0, *places], [*places, None], strict=True))
            for places in some
        ),
    ]


@pytest.mark.parametrize("name", GOOD)
async def test_every_cut_of_an_answer_reads_as_aiohttp_reads_it(name: str) -> None:
    answer = GOOD[name]
    async with ScriptedProvider(closing(answer)) as whole:
        expected = await oracle(whole.url)

    pieces = cuts(answer)
    async with ScriptedProvider(answering(*pieces)) as server, pooled(server.url) as pool:
        for cut in pieces:
            got = await ask(pool)
            assert (seen(got), got.ended) == (expected, True), cut
            assert pool.stats().idle == 1, cut

        assert server.accepted == 1


@pytest.mark.parametrize("name", ENDED_BY_CLOSE)
async def test_a_body_that_ends_with_its_connection_is_whole(name: str) -> None:
    answer = ENDED_BY_CLOSE[name]
    async with ScriptedProvider(closing(answer)) as whole:
        expected = await oracle(whole.url)

    pieces = [(answer[:at], answer[at:]) for at in range(0, len(answer), 3)]
    async with ScriptedProvider(closing(*pieces)) as server, pooled(server.url) as pool:
        for cut in pieces:
            got = await ask(pool)
            assert (seen(got), got.ended) == (expected, True), cut
            assert pool.stats().open == 0


@pytest.mark.parametrize("name", NOT_KEPT)
async def test_only_a_clean_end_keeps_the_connection(name: str) -> None:
    async with ScriptedProvider(answering(NOT_KEPT[name])) as server, pooled(server.url) as pool:
        got = await ask(pool)

        assert (got.status, got.body, got.ended) == (200, b"ok", True)
        await until(lambda: pool.stats().open == 0, 2.0)
        await until(lambda: server.open == 0, 2.0)


@pytest.mark.parametrize("name", BROKEN)
async def test_bytes_that_are_no_http_are_refused_at_every_cut(name: str) -> None:
    answer = BROKEN[name]
    outcomes = set()
    every_cut = cuts(answer)
    pieces = iter(every_cut)

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(*next(pieces))
        await peer.left()

    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        for _ in every_cut:
            got = Got()
            with pytest.raises(ProviderBadResponse):
                await ask(pool, got)
            outcomes.add((got.status, got.body, got.ended))

            assert pool.stats().open == 0
            await until(lambda: server.open == 0, 2.0)

    assert len(outcomes) == 1, "what was good before the fault comes through, however it was cut"


@pytest.mark.parametrize("name", EARLY_CLOSE)
async def test_a_connection_closed_early_is_reported_and_nothing_is_made_up(name: str) -> None:
    answer = EARLY_CLOSE[name]
    async with ScriptedProvider(closing(answer)) as server, pooled(server.url) as pool:
        got = Got()
        with pytest.raises(ProviderDisconnected) as raised:
            await ask(pool, got)

        assert not isinstance(raised.value, StaleConnection)
        assert not got.ended
        assert answer.endswith(got.body) or got.body == b"hello"


async def test_a_reset_in_a_body_without_a_length_is_no_end() -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(ENDED_BY_CLOSE["no length"])
        sock = peer.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.abort()

    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        got = Got()
        with pytest.raises(ProviderDisconnected):
            await ask(pool, got)

        assert not got.ended


async def test_trailers_do_not_change_the_headers() -> None:
    seen_headers: list[dict[str, str]] = []

    class Keeps(Got):
        def on_head(self, status: int, headers: object) -> Got:
            assert isinstance(headers, dict)
            seen_headers.append(headers)  # as it is, not a copy
            return super().on_head(status, headers)

    async with ScriptedProvider(answering(GOOD["trailers"])) as server, pooled(server.url) as pool:
        await ask(pool, Keeps())

    assert seen_headers[0]["content-type"] == "text/event-stream"
    assert "x-sum" not in seen_headers[0]


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"x" * 990) for n in range(100)),
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100_000 + b"\r\n",
        b"HTTP/1.1 200 " + b"x" * 100_000 + b"\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 3000,
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000,
    ],
    ids=["many", "long", "reason", "hints", "tiny"],
)
@pytest.mark.parametrize("size", [1 << 20, 1000], ids=["in one piece", "in many"])
async def test_a_head_of_100_kb_is_refused(head: bytes, size: int) -> None:
    answer = head + b"Content-Length: 2\r\n\r\nok"
    pieces = tuple(answer[at : at + size] for at in range(0, len(answer), size))
    async with ScriptedProvider(answering(pieces)) as server, pooled(server.url) as pool:
        with pytest.raises(ProviderBadResponse, match="head"):
            await ask(pool)

        assert pool.stats().open == 0


async def test_trailers_are_bounded_too() -> None:
    trailers = b"".join(b"X-%d: %b\r\n" % (n, b"x" * 990) for n in range(100))
    answer = CHUNKED + chunk(b"ok") + b"0\r\n" + trailers + b"\r\n"
    async with ScriptedProvider(answering(answer)) as server, pooled(server.url) as pool:
        with pytest.raises(ProviderBadResponse):
            await ask(pool)

        assert pool.stats().open == 0


async def test_bytes_on_an_idle_connection_abort_it() -> None:
    late = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    send_late = asyncio.Event()

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        if server.accepted == 1:
            await send_late.wait()
            await peer.send(late)
        await peer.left()

    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        await ask(pool)
        assert pool.stats().idle == 1
        send_late.set()
        await until(lambda: pool.stats().open == 0)
        await until(lambda: server.open == 0)

        assert (await ask(pool)).body == b"ok"
        assert server.accepted == 2


async def test_a_late_answer_is_never_taken_for_the_next_one() -> None:
    # The worst moment: the late bytes are in the socket, unread, when the connection is taken.
    late = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 4\r\n\r\nlate"

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        if server.accepted == 1:
            peer.write(late)
            taken.set()
        await peer.left()

    taken = asyncio.Event()
    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        await ask(pool)
        await taken.wait()
        await until(lambda: pool.stats().open == 0)

        assert (await ask(pool)).status == 200


async def test_a_provider_that_closes_an_idle_connection_is_forgotten_at_once() -> None:
    close = asyncio.Event()
    async with ScriptedProvider(closing((OK, close))) as server, pooled(server.url) as pool:
        await ask(pool)
        assert pool.stats().idle == 1

        close.set()

        await until(lambda: pool.stats().open == 0)


async def test_a_dead_kept_connection_is_stale_and_a_fresh_one_is_not() -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        peer.abort()

    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        await ask(pool)
        with pytest.raises(StaleConnection):
            await ask(pool)

        assert (server.accepted, pool.stats().open) == (1, 0)
        assert (await ask(pool)).body == b"ok"
        assert server.accepted == 2


async def test_a_kept_connection_that_closes_before_it_is_used_is_stale() -> None:
    async with ScriptedProvider(answering(OK)) as server, pooled(server.url) as pool:
        await ask(pool)
        connection = await pool.connect()
        assert connection.transport is not None
        connection.transport.abort()  # the loop has seen the close, the task has not run yet

        with pytest.raises(StaleConnection):
            await exchange(connection, Got()).run([request()])


LATE_408 = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 2\r\n\r\n{}"


async def test_a_connection_is_never_kept_after_a_408() -> None:
    # It answers all the same, when the connection would be idle.
    script = answering((LATE_408, OK))
    async with ScriptedProvider(script) as server, pooled(server.url) as pool:
        assert (await ask(pool)).status == 408

        assert pool.stats().open == 0


async def test_what_a_provider_says_before_it_has_the_request_is_no_answer_to_it() -> None:
    """A provider ends an idle connection just when a request takes it."""
    taken = asyncio.Event()

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await taken.wait()
        peer.write(LATE_408)
        await peer.request()
        await peer.send(OK.replace(b"ok", b"no"))
        await peer.left()

    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        await ask(pool)
        connection = await pool.connect()
        running = asyncio.ensure_future(exchange(connection, Got()).run([request()]))
        await asyncio.sleep(0)
        # As if the 408 had come in the same turn, before the outbox is flushed.
        connection.protocol.data_received(LATE_408)
        with pytest.raises(StaleConnection):
            await running

        assert pool.stats().open == 0
        taken.set()


@pytest.mark.parametrize(
    ("count", "at_once"),
    [
        (2000, 1),
        pytest.param(10_000, 1, marks=[pytest.mark.stress, pytest.mark.timeout(300)]),
        pytest.param(10_000, 6, marks=[pytest.mark.stress, pytest.mark.timeout(300)]),
    ],
)
async def test_a_late_408_never_gives_a_request_the_answer_of_another(
    count: int, at_once: int
) -> None:
    """One of fifty idle connections is ended by a 408 at any moment, and its next request is
    answered all the same.
    """
    luck = random.Random(f"{count} {at_once}")

    async def play(peer: Peer) -> None:
        while True:
            number = (await peer.request()).rpartition(b"\r\n\r\n")[2]
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(number)
            peer.write(head + number)
            if luck.random() < 0.02:
                await ticks(luck.randrange(8))
                peer.write(LATE_408)

    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        swapped = served = 0

        async def client(first: int) -> None:
            nonlocal swapped, served
            for number in range(first, count, at_once):
                body = str(number).encode()
                try:
                    got = await ask(pool, body=body)
                except (StaleConnection, ProviderDisconnected):
                    continue
                served += got.status == 200
                swapped += got.status == 200 and got.body != body
                await ticks(luck.randrange(3))

        await asyncio.gather(*map(client, range(at_once)))

    assert served > count / 2
    assert not swapped


async def test_done_and_a_late_last_chunk_keep_the_connection() -> None:
    seen_done = asyncio.Event()
    script = answering((CHUNKED + chunk(DONE), seen_done, b"0", b"\r\n", b"\r\n"))
    async with ScriptedProvider(script) as server, pooled(server.url) as pool:
        got = await ask(pool, Got(until=b"[DONE]"))
        assert (got.body, pool.stats().idle) == (DONE, 0)
        seen_done.set()

        await until(lambda: pool.stats().idle == 1)
        assert (server.accepted, server.open) == (1, 1)


@pytest.mark.parametrize(
    "more",
    [chunk(b"data: more\n\n") + b"0\r\n\r\n", b"zz\r\n", chunk(b"x"), b"0\r\n\r\n" + OK],
    ids=["an event", "garbage", "a byte", "another answer"],
)
async def test_done_and_more_behind_it_close_the_connection(more: bytes) -> None:
    seen_done = asyncio.Event()
    script = answering((CHUNKED + chunk(DONE), seen_done, more))
    async with ScriptedProvider(script) as server, pooled(server.url) as pool:
        got = await ask(pool, Got(until=b"[DONE]"))
        seen_done.set()

        await until(lambda: server.open == 0)
        assert (got.body, pool.stats().open) == (DONE, 0)


async def test_done_and_then_silence_close_the_connection_after_a_moment() -> None:
    async with (
        ScriptedProvider(answering(CHUNKED + chunk(DONE))) as server,
        pooled(server.url) as pool,
    ):
        got = await ask(pool, Got(until=b"[DONE]"))

        assert (got.body, pool.stats().open, server.open) == (DONE, 1, 1)
        await until(lambda: server.open == 0, exchange_module.LAST_CHUNK_TIMEOUT + 5.0)
        assert pool.stats().open == 0


async def test_an_answer_before_the_upload_is_finished_is_reported_and_the_connection_closed() -> (
    None
):
    refusal = b"HTTP/1.1 413 Too large\r\nContent-Length: 2\r\n\r\n{}"
    done = asyncio.Event()
    async with ScriptedProvider(stalling(done, refusal)) as server, pooled(server.url) as pool:
        got = await ask(pool, body=b"x" * 50_000_000)
        done.set()

        assert (got.status, got.body) == (413, b"{}")
        assert pool.stats().open == 0
        await until(lambda: server.open == 0)


async def test_a_stuck_upload_ends_with_the_write_timeout() -> None:
    gone = asyncio.Event()
    async with ScriptedProvider(stalling(gone)) as server, pooled(server.url) as pool:
        with pytest.raises(WriteTimeout):
            await ask(pool, body=b"x" * 50_000_000, write_timeout=0.3, read_timeout=0.05)

        assert pool.stats().open == 0
        gone.set()


async def test_a_slow_but_moving_upload_passes() -> None:
    body = b"x" * 8_000_000

    async def play(peer: Peer) -> None:
        sock = peer.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        head = await peer.head()
        left = len(body)
        while left:
            left -= len(await peer.reader.read(200_000))
            await asyncio.sleep(0.02)  # the pace, not a wait
        assert head
        await peer.send(OK)
        await peer.left()

    loop = asyncio.get_running_loop()
    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        began = loop.time()
        got = await ask(pool, body=body, write_timeout=0.4, read_timeout=5.0)

        assert got.body == b"ok"
        assert loop.time() - began > 0.4, "slower as a whole than one write may be"
        assert pool.stats().idle == 1


@pytest.mark.parametrize(
    "sent",
    [b"", b"HTTP/1.1 200", CHUNKED, CHUNKED + chunk(b"data: 1\n\n"), CHUNKED + b"5\r\nhel"],
    ids=["nothing", "half a head", "a head", "a chunk", "half a chunk"],
)
async def test_silence_ends_with_the_read_timeout(sent: bytes) -> None:
    async with ScriptedProvider(answering(sent)) as server, pooled(server.url) as pool:
        with pytest.raises(ReadTimeout):
            await asyncio.wait_for(ask(pool, read_timeout=0.1), patience(5))

        assert pool.stats().open == 0
        await until(lambda: server.open == 0)


async def test_a_kept_connection_keeps_no_longer_deadline_of_the_request_before() -> None:
    async with ScriptedProvider(answering(OK, b"")) as server, pooled(server.url) as pool:
        await ask(pool, read_timeout=60.0)

        with pytest.raises(ReadTimeout):
            await asyncio.wait_for(ask(pool, read_timeout=0.1), patience(5))

        assert server.accepted == 1


async def test_a_drip_longer_than_the_read_timeout_passes() -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(12):
            await asyncio.sleep(0.1)  # the drip itself
            await peer.send(chunk(b"x"))
        await peer.send(b"0\r\n\r\n")
        await peer.left()

    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        got = await ask(pool, read_timeout=0.8)

        assert got.body == b"x" * 12
        assert pool.stats().idle == 1


async def test_an_error_of_the_sink_ends_the_request_and_closes_the_connection() -> None:
    class Full(Got):
        def feed(self, data: bytes) -> bool:
            raise ProviderBadResponse("too much")

    async with ScriptedProvider(answering(GOOD["chunks"])) as server, pooled(server.url) as pool:
        with pytest.raises(ProviderBadResponse, match="too much"):
            await ask(pool, Full())

        assert pool.stats().open == 0
        await until(lambda: server.open == 0)


async def test_an_error_where_the_head_is_judged_passes_as_it_is() -> None:
    class Judge(Got):
        def on_head(self, status: int, headers: object) -> Got:
            raise ProviderBadResponse("compressed")

    async with ScriptedProvider(answering(OK)) as server, pooled(server.url) as pool:
        with pytest.raises(ProviderBadResponse, match="compressed"):
            await ask(pool, Judge())

        assert pool.stats().open == 0


@pytest.mark.parametrize("sent", [b"", CHUNKED, CHUNKED + chunk(b"x"), CHUNKED + b"5\r\nhel"])
async def test_leaving_closes_the_connection_at_once(sent: bytes) -> None:
    async with ScriptedProvider(answering(sent)) as server, pooled(server.url) as pool:
        got = Got()
        task = asyncio.ensure_future(ask(pool, got))
        await until(lambda: server.open == 1 and (not sent or got.status == 200))

        task.cancel()
        await asyncio.wait([task])

        assert task.cancelled()
        assert pool.stats().open == 0
        await until(lambda: server.open == 0, 2.0)


async def test_leaving_in_the_upload_closes_the_connection_at_once() -> None:
    reading, gone = asyncio.Event(), asyncio.Event()
    script = stalling(gone, begun=reading)
    async with ScriptedProvider(script) as server, pooled(server.url) as pool:
        task = asyncio.ensure_future(ask(pool, body=b"x" * 50_000_000))
        await reading.wait()

        task.cancel()
        await asyncio.wait([task])

        assert task.cancelled()
        assert pool.stats().open == 0
        gone.set()


async def test_bytes_in_the_very_turn_of_leaving_do_not_keep_the_connection() -> None:
    async with (
        ScriptedProvider(answering(CHUNKED + chunk(b"x"))) as server,
        pooled(server.url) as pool,
    ):
        connection = await pool.connect()
        protocol = connection.protocol
        assert protocol is not None
        got = Got()
        task = asyncio.ensure_future(exchange(connection, got).run([request()]))
        await until(lambda: got.body == b"x")

        task.cancel()
        protocol.data_received(b"5")  # read from the socket before the task has seen it
        await asyncio.wait([task])

        assert task.cancelled()
        assert pool.stats().open == 0


async def test_leaving_from_within_the_sink_closes_the_connection() -> None:
    # What a log does when its last reader leaves because of what was just appended.
    class Leaves(Got):
        def feed(self, data: bytes) -> bool:
            task.cancel()
            return False

    async with (
        ScriptedProvider(answering(CHUNKED + chunk(b"x"))) as server,
        pooled(server.url) as pool,
    ):
        task: asyncio.Task[Got] = asyncio.ensure_future(ask(pool, Leaves()))
        await asyncio.wait([task])

        assert task.cancelled()
        assert pool.stats().open == 0
        await until(lambda: server.open == 0, 2.0)


async def speak_first(peer: Peer) -> None:
    peer.write(b"220 mail.example ESMTP ready\r\n")
    await peer.left()


async def hang_up(peer: Peer) -> None:
    peer.abort()


@pytest.mark.parametrize("play", [speak_first, hang_up])
async def test_a_provider_that_never_waits_for_a_request_is_a_fault_and_nothing_more(
    play: Callable[[Peer], Awaitable[None]],
) -> None:
    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        for _ in range(20):
            with pytest.raises(ProviderFault) as raised:
                await ask(pool)
            assert play is speak_first or not isinstance(raised.value, StaleConnection)

        assert pool.stats().open == 0


async def test_a_hundred_requests_use_one_connection() -> None:
    async with ScriptedProvider(answering(*[OK] * 100)) as server, pooled(server.url) as pool:
        answers = [await ask(pool) for _ in range(100)]

        assert {got.body for got in answers} == {b"ok"}
        assert server.accepted == 1


async def test_a_paused_exchange_reads_nothing_and_its_deadline_rests() -> None:
    waiting = 0
    backpressure = Backpressure(lambda: waiting)
    sent = asyncio.Event()
    script = answering((CHUNKED + chunk(b"first"), sent, chunk(b"second"), b"0\r\n\r\n"), OK)
    async with ScriptedProvider(script) as provider, pooled(provider.url) as pool:
        loop, got = asyncio.get_running_loop(), Got()
        connection = await pool.connect()
        paused = exchange(connection, got, backpressure, read_timeout=0.1)
        running = asyncio.ensure_future(paused.run([request()]))
        await until(lambda: got.body == b"first")

        paused.pause()
        sent.set()
        assert backpressure.paused == 1
        assert paused.check_deadline() is None
        assert paused.silence(loop.time()) is None
        paused.last_byte_at -= 1000.0
        assert paused.check_deadline() is None, "the deadline rests"
        assert not running.done()
        assert got.body == b"first"

        backpressure.end()
        await running
        assert got.body == b"firstsecond"
        assert backpressure.paused == 0
        assert (await ask(pool)).body == b"ok"
        assert provider.accepted == 1


async def test_an_exchange_is_not_paused_while_a_request_waits() -> None:
    backpressure = Backpressure(lambda: 1)

    async with (
        ScriptedProvider(
            answering((CHUNKED + chunk(b"a"), chunk(b"b"), b"0\r\n\r\n"))
        ) as provider,
        pooled(provider.url) as pool,
    ):
        got = Got()
        busy = exchange(await pool.connect(), got, backpressure)
        running = asyncio.ensure_future(busy.run([request()]))
        busy.pause()
        await running

        assert got.body == b"ab"
        assert backpressure.paused == 0


async def test_leaving_a_paused_exchange_closes_its_connection() -> None:
    backpressure = Backpressure(lambda: 0)

    async with (
        ScriptedProvider(answering(CHUNKED + chunk(b"first"))) as provider,
        pooled(provider.url) as pool,
    ):
        got = Got()
        paused = exchange(await pool.connect(), got, backpressure)
        running = asyncio.ensure_future(paused.run([request()]))
        await until(lambda: got.body == b"first")
        paused.pause()
        running.cancel()

        await until(lambda: provider.open == 0)
        assert backpressure.paused == 0
        assert pool.stats().open == 0

"""The pool: httpx's limits and timeouts on aiohttp's connector, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import datetime as dt
import random
import socket
import ssl
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import trustme

from aioserver.limits.resource import Ticket
from aioserver.limits.scheduler import Scheduler
from aioserver.provider_errors import (
    CertificateFault,
    ConnectError,
    ConnectTimeout,
    PoolTimeout,
    ProviderDisconnected,
)
from aioserver.providers.pool import Pool, connection_gate
from tests.support.scripted_provider import (
    LIMITS,
    OK,
    Got,
    Peer,
    ScriptedProvider,
    answering,
    ask,
    exchange,
    full_listener,
    pooled,
    request,
)
from tests.support.waiting import patience, ticks, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.support.clock import FakeClock

pytestmark = pytest.mark.both_loops


async def serving(peer: Peer) -> None:
    """Answer every request at once."""
    while True:
        await peer.request()
        await peer.send(OK)


def after(turn: asyncio.Event) -> Callable[[Peer], Awaitable[None]]:
    """Answer every request once *turn* is set."""

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await turn.wait()
            await peer.send(OK)

    return play


async def test_an_idle_connection_that_should_close_is_never_taken() -> None:
    async with ScriptedProvider(serving) as server, pooled(server.url) as pool:
        kept = await pool.connect()
        kept.release()

        # In the turn before the take.
        kept.protocol.data_received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        assert (await ask(pool)).body == b"ok"

        assert server.accepted == 2


async def test_only_the_first_end_of_a_connections_use_counts() -> None:
    async with ScriptedProvider(serving) as server, pooled(server.url) as pool:
        first, second = await pool.connect(), await pool.connect()
        for end in (first.release, first.close, first.release, second.close, second.release):
            end()

        assert (pool.stats().open, pool.stats().idle) == (1, 1)
        assert await pool.connect() is first
        await every_connection_at_once(pool, LIMITS.max_connections - 1)
        first.close()
        assert server.accepted == LIMITS.max_connections + 1


async def test_the_connection_that_has_been_idle_longest_is_taken_first() -> None:
    async with ScriptedProvider(serving) as server, pooled(server.url, max_keepalive=3) as pool:
        connections = [await pool.connect() for _ in range(3)]
        for connection in reversed(connections):
            connection.release()

        assert [pool.take() for _ in range(4)] == [*reversed(connections), None]
        for connection in connections:
            connection.close()


async def test_without_an_idle_connection_or_a_place_for_it_none_is_taken() -> None:
    async with (
        ScriptedProvider(serving) as server,
        pooled(server.url, max_connections=1, max_keepalive=1, concurrent_requests=1) as pool,
    ):
        assert pool.take() is None
        only = await pool.connect()
        assert pool.take() is None
        only.release()
        only.protocol.abort()
        # It was lost: its place is given back with it.
        assert pool.take() is None
        only = await pool.connect()
        only.close()


async def test_a_waiter_and_a_newcomer_share_the_connections_that_are_given_back() -> None:
    async with (
        ScriptedProvider(serving) as server,
        pooled(server.url, max_connections=2, max_keepalive=2, concurrent_requests=1) as pool,
    ):
        both = [await pool.connect() for _ in range(2)]
        waiter = asyncio.ensure_future(pool.connect())
        await until(lambda: pool.stats().waiting == 1)
        for connection in both:
            connection.release()

        assert pool.take() is None, "the place of the first has gone to the waiter"
        newcomer = await pool.connect()

        assert {newcomer, await waiter} == set(both)
        assert server.accepted == 2
        for connection in both:
            connection.close()


@pytest.mark.parametrize("keepalive", [0, 2, 6])
async def test_many_requests_open_no_more_sockets_than_allowed_and_keep_the_cap(
    keepalive: int,
) -> None:
    async with (
        ScriptedProvider(serving) as server,
        pooled(server.url, max_keepalive=keepalive) as pool,
    ):
        answers = await asyncio.gather(*(ask(pool) for _ in range(24)))

        assert {got.body for got in answers} == {b"ok"}
        assert server.accepted == 6
        assert (pool.stats().open, pool.stats().idle) == (keepalive, keepalive)
        await until(lambda: server.open == keepalive)


@pytest.mark.parametrize("keepalive", [0, 2, 6])
async def test_the_cap_holds_after_half_of_the_requests_have_left(keepalive: int) -> None:
    turn = asyncio.Event()
    async with (
        ScriptedProvider(after(turn)) as server,
        pooled(server.url, max_keepalive=keepalive) as pool,
    ):
        tasks = [asyncio.ensure_future(ask(pool)) for _ in range(30)]
        await until(lambda: server.accepted == 6 and pool.stats().waiting == 24)

        for task in tasks[3:18]:
            task.cancel()
        turn.set()
        await asyncio.wait(tasks)

        assert pool.stats().waiting == 0
        assert pool.stats().open == pool.stats().idle <= keepalive
        await until(lambda: server.open == keepalive)


async def test_a_connection_is_not_kept_for_a_request_that_opens_its_own() -> None:
    # Two are asked for; while the second still connects, the first is done: nobody will take it.
    loop = asyncio.get_running_loop()
    connect = loop.sock_connect
    slow, seconds = asyncio.Event(), 0

    async def sock_connect(*args: Any) -> None:
        nonlocal seconds
        seconds += 1
        await slow.wait()
        await connect(*args)

    async with ScriptedProvider(serving) as server, pooled(server.url, max_keepalive=0) as pool:
        first = await pool.connect()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "sock_connect", sock_connect)
            second = asyncio.ensure_future(pool.connect())
            await until(lambda: seconds == 1)
            await exchange(first, Got()).run([request()])
            idle = pool.stats().idle
            slow.set()
            await exchange(await second, Got()).run([request()])

        assert idle == 0
        assert pool.stats().open == 0


async def test_a_cancel_storm_leaves_nothing_busy() -> None:
    dice = random.Random(7)

    async def play(peer: Peer) -> None:
        while True:
            await peer.request()
            await asyncio.sleep(dice.random() * 0.004)
            await peer.send(OK[:20], OK[20:])

    async with ScriptedProvider(play) as server, pooled(server.url) as pool:
        for _ in range(15):
            tasks = [asyncio.ensure_future(ask(pool)) for _ in range(40)]
            for task in dice.sample(tasks, 30):
                await asyncio.sleep(dice.random() * 0.002)
                task.cancel()
            await asyncio.wait(tasks)
            assert all(task.cancelled() or task.result().body == b"ok" for task in tasks)
            stats = pool.stats()
            assert (stats.waiting, stats.open - stats.idle) == (0, 0)
            assert stats.idle <= 2

        assert [(await ask(pool)).body for _ in range(6)] == [b"ok"] * 6
        await every_connection_at_once(pool)
        await until(lambda: server.open == pool.stats().idle)


async def test_cancelling_while_connecting_leaves_no_socket_behind() -> None:
    dice = random.Random(11)
    async with ScriptedProvider(serving) as server, pooled(server.url) as pool:
        for _ in range(60):
            task = asyncio.ensure_future(pool.connect())
            await ticks(dice.randrange(8))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await task).close()

        assert pool.stats().open == 0
        await until(lambda: server.open == 0)
        await every_connection_at_once(pool)


async def every_connection_at_once(pool: Pool, free: int = LIMITS.max_connections) -> None:
    """Open as many connections as the pool allows: a place that was lost would be missed here."""
    connections = [await pool.connect() for _ in range(free)]
    stats = pool.stats()
    assert (stats.open - stats.idle, stats.waiting) == (LIMITS.max_connections, 0)
    for connection in connections:
        connection.close()


async def test_a_wait_for_a_connection_ends_with_the_pool_timeout() -> None:
    turn = asyncio.Event()
    async with (
        ScriptedProvider(after(turn)) as server,
        pooled(
            server.url,
            max_connections=1,
            max_keepalive=1,
            concurrent_requests=1,
            pool_timeout=0.1,
        ) as pool,
    ):
        first = asyncio.ensure_future(ask(pool))
        await until(lambda: server.accepted == 1)

        with pytest.raises(PoolTimeout):
            await asyncio.wait_for(ask(pool), patience(5))

        assert pool.stats().waiting == 0
        turn.set()
        assert (await first).body == b"ok"
        assert (await ask(pool)).body == b"ok"
        assert server.accepted == 1


async def test_connections_that_were_idle_say_nothing_of_how_long_others_are_used(
    clock: FakeClock,
) -> None:
    limits = dataclasses.replace(
        LIMITS, max_connections=1, max_keepalive=1, concurrent_requests=1, pool_timeout=1.0
    )
    gate = connection_gate(limits, Scheduler(asyncio.get_running_loop()), clock)
    for _ in range(9):
        place = gate.try_start(Ticket())
        assert place is not None
        clock.now += 60.0
        place.release()

    assert gate.try_start(Ticket()) is not None
    assert gate.retry_after() <= 1.5


async def test_a_refused_connection_is_a_connect_error() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        async with pooled(f"http://127.0.0.1:{port}/v1") as pool:
            with pytest.raises(ConnectError):
                await ask(pool)

            assert pool.stats().open == 0


async def test_a_name_that_does_not_exist_is_a_connect_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def getaddrinfo(*_args: Any, **_kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with pooled("http://no-such-provider.test/v1") as pool:
        with pytest.raises(ConnectError):
            await ask(pool)

        assert pool.stats().open == 0


@pytest.mark.parametrize("name", ["a" * 70 + ".test", "a..b.test"])
async def test_a_name_that_can_be_none_is_a_connect_error(name: str) -> None:
    async with pooled(f"http://{name}/v1") as pool:
        with pytest.raises(ConnectError):
            await ask(pool)

        assert pool.stats().open == 0


async def test_a_resolver_that_hangs_is_a_connect_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_args: Any, **_kwargs: Any) -> Any:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with pooled("http://slow-name.test/v1", connect_timeout=0.1) as pool:
        outcomes = await asyncio.wait_for(
            asyncio.gather(*(ask(pool) for _ in range(3)), return_exceptions=True), patience(5)
        )

        assert [type(outcome) for outcome in outcomes] == [ConnectTimeout] * 3
        assert pool.stats().open == 0


async def test_a_full_accept_queue_is_a_connect_timeout() -> None:
    async with (
        full_listener() as port,
        pooled(f"http://127.0.0.1:{port}/v1", connect_timeout=0.2) as pool,
    ):
        with pytest.raises(ConnectTimeout):
            await asyncio.wait_for(ask(pool), patience(5))

        assert pool.stats().open == 0


async def test_a_stalled_tls_handshake_is_a_connect_timeout() -> None:
    async with ScriptedProvider(answering()) as server:
        url = f"https://127.0.0.1:{server.port}/v1"
        async with pooled(url, connect_timeout=0.2) as pool:
            with pytest.raises(ConnectTimeout):
                await asyncio.wait_for(ask(pool), patience(5))

            assert pool.stats().open == 0
            await until(lambda: server.open == 0)


async def test_a_connection_idle_for_longer_than_its_expiry_is_not_used_again() -> None:
    async with (
        ScriptedProvider(serving) as server,
        pooled(server.url, keepalive_expiry=0.1) as pool,
    ):
        await ask(pool)
        assert pool.stats().idle == 1

        await until(lambda: server.open == 0)  # the sweep, without another request
        await ask(pool)

        assert server.accepted == 2


async def test_closing_the_pool_closes_what_is_idle_and_what_is_in_use() -> None:
    requests = []

    async def play(peer: Peer) -> None:
        requests.append(await peer.request())
        if server.accepted == 1:
            await peer.send(OK)
        await peer.left()

    async with ScriptedProvider(play) as server:
        pool = Pool(server.url, LIMITS)
        await ask(pool)
        idle = await pool.connect()
        task = asyncio.ensure_future(ask(pool))
        await until(lambda: len(requests) == 2)
        idle.release()

        await pool.close()

        with pytest.raises(ProviderDisconnected):
            await task
        await until(lambda: server.open == 0)


# Certificates.


def server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


async def test_tls_to_a_provider_that_is_trusted(authority: trustme.CA, ca_file: str) -> None:
    context = server_context(authority.issue_cert("127.0.0.1"))
    async with (
        ScriptedProvider(serving, ssl=context) as server,
        pooled(server.url, ca_file=ca_file) as pool,
    ):
        for _ in range(3):
            assert (await ask(pool)).body == b"ok"

        assert (server.accepted, pool.stats().idle) == (1, 1)


async def test_leaving_a_tls_stream_aborts_it_without_a_farewell(
    authority: trustme.CA, ca_file: str
) -> None:
    context = server_context(authority.issue_cert("127.0.0.1"))
    async with (
        ScriptedProvider(answering(OK[:-1]), ssl=context) as server,
        pooled(server.url, ca_file=ca_file) as pool,
    ):
        got = Got()
        task = asyncio.ensure_future(ask(pool, got))
        await until(lambda: got.body == b"o")
        task.cancel()
        await asyncio.wait([task])

        assert pool.stats().open == 0
        await until(lambda: server.open == 0, 2.0)


@pytest.mark.parametrize("fault", ["unknown authority", "wrong name", "expired"])
async def test_a_certificate_that_does_not_hold_is_a_fault_of_its_own(
    fault: str, authority: trustme.CA, ca_file: str
) -> None:
    past = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    certificate = {
        "unknown authority": lambda: trustme.CA().issue_cert("127.0.0.1"),
        "wrong name": lambda: authority.issue_cert("elsewhere.test"),
        "expired": lambda: authority.issue_cert("127.0.0.1", not_after=past),
    }[fault]()
    context = server_context(certificate)
    async with (
        ScriptedProvider(serving, ssl=context) as server,
        pooled(server.url, ca_file=ca_file) as pool,
    ):
        with pytest.raises(CertificateFault) as raised:
            await ask(pool)

        assert (raised.value.http_status, raised.value.code) == (502, "provider_auth_error")
        assert pool.stats().open == 0
        await until(lambda: server.open == 0)


async def test_a_provider_that_speaks_no_tls_is_a_connect_error(ca_file: str) -> None:
    async def play(peer: Peer) -> None:
        await peer.reader.read(10)
        await peer.send(b"HTTP/1.1 400 The plain HTTP request was sent to HTTPS port\r\n\r\n")

    async with (
        ScriptedProvider(play) as server,
        pooled(f"https://127.0.0.1:{server.port}", ca_file=ca_file) as pool,
    ):
        with pytest.raises(ConnectError):
            await ask(pool)


# Proxies.


class Proxy(ScriptedProvider):
    """A proxy that records the heads it is sent, and tunnels where it is asked to CONNECT."""

    def __init__(self, *, refuse: bool = False) -> None:
        super().__init__(self._proxy)
        self.heads: list[bytes] = []
        self._refuse = refuse

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _proxy(self, peer: Peer) -> None:
        while True:
            data = await peer.request()
            self.heads.append(data.partition(b"\r\n\r\n")[0])
            if not data.startswith(b"CONNECT"):
                await peer.send(OK)
                continue
            if self._refuse:
                await peer.send(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
                return
            host, _, port = data.split()[1].decode().rpartition(":")
            await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            there = Peer(*await asyncio.open_connection(host, int(port)))
            try:
                await asyncio.gather(self._pass(peer, there), self._pass(there, peer))
            finally:
                there.close()
            return

    async def _pass(self, a: Peer, b: Peer) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await a.reader.read(65536):
                b.write(data)
        b.close()


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without any proxy of the machine's own."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


async def test_http_proxy_of_the_environment_is_used(no_environment: pytest.MonkeyPatch) -> None:
    async with Proxy() as proxy:
        no_environment.setenv("HTTP_PROXY", proxy.address)
        no_environment.setenv("http_proxy", proxy.address)
        async with pooled("http://provider.test:81/v1") as pool:
            assert pool.forwards
            for _ in range(2):
                assert (await ask(pool)).body == b"ok"

        assert proxy.accepted == 1


@pytest.mark.parametrize("exempt", ["127.0.0.1", "localhost,127.0.0.1:{port}", "*"])
async def test_no_proxy_exempts_a_provider(
    exempt: str, no_environment: pytest.MonkeyPatch
) -> None:
    async with Proxy() as proxy, ScriptedProvider(serving) as server:
        no_environment.setenv("http_proxy", proxy.address)
        no_environment.setenv("no_proxy", exempt.format(port=server.port))
        async with pooled(server.url) as pool:
            assert not pool.forwards
            await ask(pool)

        assert (proxy.accepted, server.accepted) == (0, 1)


async def test_https_goes_through_a_tunnel_of_the_proxy(
    no_environment: pytest.MonkeyPatch, authority: trustme.CA, ca_file: str
) -> None:
    context = server_context(authority.issue_cert("127.0.0.1"))
    async with Proxy() as proxy, ScriptedProvider(serving, ssl=context) as server:
        no_environment.setenv("https_proxy", proxy.address.replace("//", "//user:pass@"))
        async with pooled(server.url, ca_file=ca_file) as pool:
            assert not pool.forwards
            assert not pool.proxy_headers()
            for _ in range(3):
                assert (await ask(pool)).body == b"ok"

        (head,) = proxy.heads
        lines = head.decode().split("\r\n")
        assert lines[0] == f"CONNECT 127.0.0.1:{server.port} HTTP/1.1"
        assert f"Host: 127.0.0.1:{server.port}" in lines
        credentials = base64.b64encode(b"user:pass").decode()
        assert f"Proxy-Authorization: Basic {credentials}" in lines
        await until(lambda: proxy.open == 0)


async def test_a_proxy_that_refuses_the_tunnel_is_a_connect_error(
    no_environment: pytest.MonkeyPatch,
) -> None:
    async with Proxy(refuse=True) as proxy:
        no_environment.setenv("https_proxy", proxy.address)
        async with pooled("https://provider.test/v1") as pool:
            with pytest.raises(ConnectError):
                await ask(pool)

            assert pool.stats().open == 0
            await until(lambda: proxy.open == 0)


async def test_credentials_for_a_plain_proxy_are_known_before_the_first_connection(
    no_environment: pytest.MonkeyPatch,
) -> None:
    no_environment.setenv("http_proxy", "http://user:p%40ss@127.0.0.1:1")
    async with pooled("http://provider.test/v1") as pool:
        credentials = base64.b64encode(b"user:p@ss").decode()
        assert pool.proxy_headers() == {"Proxy-Authorization": f"Basic {credentials}"}


async def test_the_connector_counts_what_is_idle_and_what_is_in_use() -> None:
    async with ScriptedProvider(serving) as server, pooled(server.url) as pool:
        connections = [await pool.connect() for _ in range(3)]
        assert (pool.stats().open, pool.stats().idle) == (3, 0)

        for connection in connections:
            connection.release()

        assert (pool.stats().open, pool.stats().idle) == (2, 2)
        pool.drop_idle()
        assert pool.stats().open == 0
        await until(lambda: server.open == 0)


async def test_aiohttp_itself_still_opens_and_keeps_more() -> None:
    # The reason for the cap and the gate; should this ever fail, they may have become superfluous.
    async with ScriptedProvider(serving) as server, aiohttp.ClientSession() as session:
        async with asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(_read(session, f"{server.url}/chat/completions"))
        assert session.connector is not None
        assert sum(map(len, session.connector._conns.values())) == 6


async def _read(session: aiohttp.ClientSession, url: str) -> None:
    async with session.post(url, data=b"{}") as response:
        await response.read()

"""Where instances reach each other: who is let in, what is asked, and by which address."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from aioserver.config.faults import ConfigurationError
from aioserver.config.settings import Cluster, PeerTls
from aioserver.wings.cluster.answers import peer_network
from aioserver.wings.cluster.answers.fan_out import FanOut
from aioserver.wings.cluster.answers.greeting import (
    GREETING_TIMEOUT,
    MAX_GREETING,
    VERSION,
    Forget,
    Greeting,
    Listing,
    Look,
    encode,
    framed,
)
from aioserver.wings.cluster.answers.peer_listener import MAX_OTHERS
from aioserver.wings.cluster.answers.peer_network import (
    Address,
    Gone,
    Unreachable,
    bind_tcp,
    bind_unix,
)
from tests.support.chat import chat, to_end
from tests.support.instances import SECRET, instances
from tests.support.jumping_loop import block
from tests.support.waiting import ticks, until, within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from aioserver.wings.cluster.answers.peer_network import PeerNetwork
    from tests.support.instances import Instance, NamedNetwork

# A server from which no address but that of loopback follows.
REDIS = "redis://127.0.0.1"
LOOK = encode(Greeting(SECRET, Look("state")))


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[list[Instance]]:
    async with instances(tmp_path) as both:
        both[0].look = lambda what: f"the {what} of a".encode()
        yield both


def network_of(instance: Instance) -> NamedNetwork:
    return instance.world.networks[instance.name]


async def connected(to: Instance) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(network_of(to).where(to.name).host)


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return await reader.read()
    return b""


def refused(instance: Instance) -> int:
    return int(instance.server.context.metrics.auth_failures["invalid_key"].value)


@pytest.mark.parametrize(
    "sent",
    [
        encode(Greeting(b"x" * 32, Look("state"))),
        encode(Greeting(b"", Look("state"))),
        LOOK.replace(VERSION, b"aioserver-peer/2 "),
        LOOK.replace(b'"look"', b'"other"'),
        VERSION + b"{}\n",
        VERSION + b"[" * 5000 + b"\n",
        b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n",
        LOOK[:-1] + b" " * MAX_GREETING,
        LOOK[:-1],
        b"",
    ],
    ids=[
        *("another secret", "no secret", "another version", "another question", "no question"),
        *("nested", "HTTP", "no end", "half of it", "nothing"),
    ],
)
async def test_nobody_gets_a_byte_without_a_greeting_of_an_instance(
    pair: list[Instance], sent: bytes
) -> None:
    reader, writer = await connected(pair[0])
    began = asyncio.get_running_loop().time()
    writer.write(sent)

    assert await rest_of(reader) == b""

    writer.close()
    assert refused(pair[0]) == 1
    # Who may say it yet has a second.
    waits = b"\n" not in sent and len(sent) < MAX_GREETING
    passed = asyncio.get_running_loop().time() - began
    assert passed >= GREETING_TIMEOUT * 0.99 if waits else within(GREETING_TIMEOUT / 2, began)


async def test_nobody_knows_a_secret_on_which_nobody_has_agreed(pair: list[Instance]) -> None:
    a, b = pair

    nobody = FanOut(network_of(b), lambda: b"")
    answers = await nobody.ask([a.name], Look("state"))

    assert answers.missing == [a.name]
    assert refused(a) == 1


async def test_a_greeting_is_understood_however_its_bytes_are_cut(pair: list[Instance]) -> None:
    for step in (1, 7, len(LOOK)):
        reader, writer = await connected(pair[0])
        for start in range(0, len(LOOK), step):
            writer.write(LOOK[start : start + step])
            await asyncio.sleep(0)

        assert await rest_of(reader) == framed(b"the state of a")
        writer.close()
    assert refused(pair[0]) == 0


@pytest.mark.real_time
async def test_a_greeting_has_come_though_our_loop_was_late(pair: list[Instance]) -> None:
    reader, writer = await connected(pair[0])
    await until(lambda: len(network_of(pair[0]).accepted) == 1)
    writer.write(LOOK)
    block(GREETING_TIMEOUT + 0.1)

    assert await rest_of(reader) == framed(b"the state of a")
    writer.close()


async def test_one_connection_too_many_that_says_nothing_ends_the_oldest(
    pair: list[Instance],
) -> None:
    a, b = pair
    most = a.server.context.admission.max_tunnels + MAX_OTHERS
    silent = [await connected(a) for _ in range(most)]
    await until(lambda: refused(a) == 0)

    looked = await FanOut(network_of(b), lambda: SECRET).look([a.name], "state")

    assert looked == {a.name: b"the state of a"}
    assert await rest_of(silent[0][0]) == b""
    assert refused(a) == 1
    for _, writer in silent:
        writer.close()


async def test_a_bug_in_an_answer_ends_no_listener(
    pair: list[Instance], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair
    a.look = lambda what: {}[what]  # type: ignore[index]
    fan_out = FanOut(network_of(b), lambda: SECRET)

    assert await fan_out.look([a.name], "state") == {a.name: b""}

    assert "bug in a question of another instance" in caplog.text
    a.look = lambda _what: b"well"
    assert await fan_out.look([a.name], "state") == {a.name: b"well"}


async def test_an_instance_whose_ports_are_closed_still_answers_the_others(
    pair: list[Instance],
) -> None:
    a, b = pair
    async with a.server.connect() as ws:
        await ws.send_json(chat("r1"))
        await to_end(ws)
    await a.server.runner.end()

    async with b.server.session.get(b.server.sse) as response:
        listed = await response.json()

    assert [each["request_id"] for each in listed["streams"]] == ["r1"]
    assert "partial" not in listed


async def test_an_instance_that_has_left_is_gone_and_one_that_is_silent_is_not_known(
    pair: list[Instance],
) -> None:
    a, b = pair
    fan_out = FanOut(network_of(b), lambda: SECRET)
    a.world.silent.add(a.name)

    silent = await fan_out.ask([a.name], Forget("", "x"))
    a.world.silent.clear()
    asked = await fan_out.ask([a.name], Forget("", "x"))
    network_of(a).close()
    gone = await fan_out.ask([a.name], Listing("", ""))

    assert (silent.answers, silent.missing) == ({}, [a.name])
    assert (asked.values(), asked.missing) == ([False], [])
    assert (gone.answers, gone.missing) == ({}, [])


async def test_an_answer_that_is_cut_is_not_known(tmp_path: Path) -> None:
    class Cutting(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.write(framed(b"answer")[:-1])
            transport.close()

    network = (
        bind_unix(tmp_path, "a") if len(str(tmp_path)) < 90 else await bind_tcp(Cluster(), REDIS)
    )
    await network.listen(Cutting)
    name = f"host-1-a@{network.end}"

    answers = await FanOut(network, lambda: SECRET).ask([name], Listing("", ""))
    network.close()

    assert answers.missing == [name]


# Names, and their addresses.


def echoing() -> asyncio.Protocol:
    """Sends back what comes, and ends."""

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)
            self.transport.close()

    return Echo()


async def echoed(by: PeerNetwork, name: str) -> bytes:
    reader = asyncio.StreamReader()
    transport, _ = await by.dial(name, lambda: asyncio.StreamReaderProtocol(reader))
    try:
        transport.write(b"hello")
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        transport.abort()


@pytest.mark.parametrize(
    "name", ["a", "host-1-a@", "a@unix", "a@host", "a@host:", "a@host:x", "a@host:70000", "a@:80"]
)
async def test_an_instance_whose_name_has_no_address_is_unreachable(name: str) -> None:
    network = await bind_tcp(Cluster(), REDIS)

    with pytest.raises(Unreachable, match="its name has no address"):
        await network.dial(name, asyncio.Protocol)

    answers = await FanOut(network, lambda: SECRET).ask([name], Look("state"))
    network.close()
    assert answers.missing == [name]


@pytest.mark.parametrize(
    ("cluster", "end"),
    [
        (Cluster(), "127.0.0.1:{}"),
        (Cluster(listen="127.0.0.1:0"), "127.0.0.1:{}"),
        (Cluster(listen="0.0.0.0:0"), "127.0.0.1:{}"),
        (Cluster(advertise="gateway.internal"), "gateway.internal:{}"),
        (Cluster(advertise="[::1]"), "[::1]:{}"),
        (Cluster(listen="0.0.0.0:0", advertise="10.0.0.5:4000"), "10.0.0.5:4000"),
    ],
)
async def test_a_name_ends_with_the_address_by_which_others_reach_its_instance(
    cluster: Cluster, end: str
) -> None:
    network = await bind_tcp(cluster, REDIS)
    port = network._sock.getsockname()[1]  # noqa: SLF001 - no name has it if another is advertised
    network.close()

    assert network.end == end.format(port)
    address = network.where(f"host-1-a@{network.end}")
    assert address.port == (4000 if "4000" in end else port)
    assert "[" not in address.host


def test_an_address_is_written_as_in_a_url() -> None:
    assert str(Address("::1", 80)) == "[::1]:80"
    assert str(Address("10.0.0.5", 80)) == "10.0.0.5:80"


async def test_of_a_range_the_first_free_port_is_taken() -> None:
    first = await bind_tcp(Cluster(), REDIS)
    port = int(first.end.rpartition(":")[2])

    with pytest.raises(ConfigurationError, match=r"cluster.listen: no port of 127"):
        await bind_tcp(Cluster(listen=f"127.0.0.1:{port}"), REDIS)
    second = await bind_tcp(Cluster(listen=f"127.0.0.1:{port}-{min(port + 50, 65535)}"), REDIS)

    assert int(second.end.rpartition(":")[2]) > port
    first.close()
    second.close()


async def test_an_instance_that_has_ended_refuses_connections() -> None:
    network = await bind_tcp(Cluster(), REDIS)
    name = f"host-1-a@{network.end}"

    await network.listen(echoing)
    assert await echoed(network, name) == b"hello"

    network.close()
    # uvloop closes the socket a turn later.
    await ticks()
    with pytest.raises(Gone):
        await network.dial(name, asyncio.Protocol)


async def test_the_socket_of_a_worker_is_a_file_that_goes_with_it(short_path: Path) -> None:
    networks = [bind_unix(short_path, token) for token in ("0123abcd", "deadbeef")]
    a, b = networks
    await a.listen(echoing)

    assert a.end == "unix"
    assert await echoed(b, "host-1-0123abcd@unix") == b"hello"
    with pytest.raises(Gone):
        await b.dial("host-1-00000000@unix", asyncio.Protocol)
    # The other one is killed, and the parent says so.
    a.forget("deadbeef")
    a.forget("deadbeef")
    a.close()

    assert not os.listdir(short_path)  # noqa: PTH208 - a look at an empty folder
    b.close()


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


def test_a_path_that_is_too_long_for_a_socket_is_told(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()

    with pytest.raises(ConfigurationError, match="too long for a socket"):
        bind_unix(folder, "0123abcd")


# TLS.


@pytest.fixture
def make_tls(tmp_path: Path) -> Callable[[str], PeerTls]:
    """Make the files of an instance, whose certificate an authority of that name has signed."""
    authorities = {name: trustme.CA() for name in ("ours", "others")}

    def make(name: str) -> PeerTls:
        files = [tmp_path / f"{name}.pem", tmp_path / f"{name}-ca.pem"]
        pair = authorities[name].issue_cert("any.name").private_key_and_cert_chain_pem
        pair.write_to_path(str(files[0]))
        authorities["ours"].cert_pem.write_to_path(str(files[1]))
        return PeerTls(cert_file=str(files[0]), ca_file=str(files[1]))

    return make


# The kernel takes its time over the pieces of a handshake.
@pytest.mark.real_time
async def test_with_tls_both_sides_show_a_certificate_of_their_authority(
    make_tls: Callable[[str], PeerTls],
) -> None:
    ours = Cluster(tls=make_tls("ours"))
    a, b = await bind_tcp(ours, REDIS), await bind_tcp(ours, REDIS)
    stranger, plain = (
        await bind_tcp(Cluster(tls=make_tls("others")), REDIS),
        await bind_tcp(Cluster(), REDIS),
    )
    for network in (a, stranger, plain):
        await network.listen(echoing)
    names = {network: f"host-1-a@{network.end}" for network in (a, stranger, plain)}

    assert await echoed(b, names[a]) == b"hello"
    # An instance shows the certificate of another authority; one speaks no TLS.
    for network in (stranger, plain):
        with pytest.raises(Unreachable):
            await echoed(b, names[network])
    # The same from the other side: of TLS 1.3 a client hears that only behind its handshake.
    with contextlib.suppress(Unreachable):
        assert await echoed(stranger, names[a]) == b""
    assert await echoed(plain, names[a]) != b"hello"
    for network in (a, b, stranger, plain):
        network.close()


async def resumed(by: PeerNetwork, name: str) -> bool:
    """Whether a connection to *name*, which has brought something, has resumed a session."""
    reader = asyncio.StreamReader()
    transport, _ = await by.dial(name, lambda: asyncio.StreamReaderProtocol(reader))
    try:
        transport.write(b"hello")
        assert await asyncio.wait_for(reader.read(), 10) == b"hello"
        return bool(transport.get_extra_info("ssl_object").session_reused)
    finally:
        transport.abort()


@pytest.mark.real_time
async def test_tls_is_resumed_with_each_instance_that_is_reached_again(
    make_tls: Callable[[str], PeerTls],
) -> None:
    ours = Cluster(tls=make_tls("ours"))
    a, b, c = [await bind_tcp(ours, REDIS) for _ in range(3)]
    for network in (a, c):
        await network.listen(echoing)
    to_a, to_c = f"host-1-a@{a.end}", f"host-1-c@{c.end}"

    found = [await resumed(b, name) for name in (to_a, to_c, to_a, to_c, to_a, to_a)]
    # Another process has got the address; two connections at once.
    found.append(await resumed(b, f"host-2-a2@{a.end}"))
    found += await asyncio.gather(resumed(b, to_a), resumed(b, to_a))
    found.append(await resumed(b, to_a))
    # It does not know the session, and nobody learns of it.
    found.append(await resumed(b, f"host-1-a@{c.end}"))

    assert found == [*(False, False), *(True,) * 4, False, True, True, True, False]
    for network in (a, b, c):
        network.close()


@pytest.mark.real_time
async def test_the_name_of_an_instance_is_not_sent_in_clear(
    make_tls: Callable[[str], PeerTls],
) -> None:
    b = await bind_tcp(Cluster(tls=make_tls("ours")), REDIS)
    sent = asyncio.get_running_loop().create_future()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes((await reader.readexactly(5))[3:])
        sent.set_result(await reader.readexactly(size))
        writer.close()

    async with await asyncio.start_server(hear, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unreachable):
            await echoed(b, f"host-1-abcdef@127.0.0.1:{port}")

    # It is a ClientHello.
    assert (hello := await sent).startswith(b"\x01")
    assert b"abcdef" not in hello
    b.close()


@pytest.mark.real_time
async def test_no_more_tls_sessions_are_kept_than_a_few(
    make_tls: Callable[[str], PeerTls], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_network, "MAX_SESSIONS", 2)
    ours = Cluster(tls=make_tls("ours"))
    a, b = await bind_tcp(ours, REDIS), await bind_tcp(ours, REDIS)
    await a.listen(echoing)

    names = [f"host-1-{token}@{a.end}" for token in ("x", "y", "x", "z", "x", "y")]
    found = [await resumed(b, name) for name in names]

    assert found == [False, False, True, False, True, False]
    for network in (a, b):
        network.close()


@pytest.mark.parametrize("name", ["cert_file", "ca_file"])
async def test_a_certificate_that_cannot_be_used_is_a_fault_of_the_configuration(
    make_tls: Callable[[str], PeerTls], tmp_path: Path, name: str
) -> None:
    tls = make_tls("ours")
    (tmp_path / f"ours{'' if name == 'cert_file' else '-ca'}.pem").write_text("nothing")

    with pytest.raises(ConfigurationError, match=r"cluster.tls: "):
        await bind_tcp(Cluster(tls=tls), REDIS)

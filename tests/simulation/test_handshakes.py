"""TLS in virtual time: handshakes that stall lock nobody out, however many; and the pair of files
in use always matches, in whatever order and pieces it is written.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import pytest

from aioserver.config.settings import Tls
from aioserver.files.watched_files import WatchedFiles
from aioserver.files.x509 import certificates
from aioserver.server.certificates import ListenerTls, load
from aioserver.server.tls import MAX_UNFINISHED, TIMEOUT
from aioserver.telemetry.counters import Counter
from aioserver.telemetry.metrics import HANDSHAKES
from tests.support.tls import authority, pair, put, trusting
from tests.support.virtual_loop import run_virtually

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from aioserver.server.connection import ConnectionServer
    from aioserver.server.tls import Handshakes

# Seconds for which sockets come that stall, and how many come in a second: a honest client of
# the longest way needs less time than it takes to displace so many.
ATTACK, RATE = 12, 600
# The longest round trip of an honest client, in seconds.
WAY = 0.4


class Wire(asyncio.Transport):
    """A connection in memory: the transport below TLS, whose other end takes *way* seconds.

    *got* keeps what arrives there.
    """

    def __init__(self, way: float = 0.0) -> None:
        super().__init__({"peername": ("192.0.2.1", 1)})
        self.way = way
        self.protocol: asyncio.Protocol | None = None
        self.got = asyncio.Queue[bytes]()
        self.closed = False

    def attach(self, protocol: asyncio.Protocol) -> None:
        """Be accepted for *protocol*."""
        self.protocol = protocol
        protocol.connection_made(self)

    async def send(self, data: bytes) -> None:
        """Send *data* from the other end."""
        await asyncio.sleep(self.way / 2)
        if self.protocol is not None and not self.closed:
            self.protocol.data_received(data)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self.protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        asyncio.get_running_loop().call_later(self.way / 2, self.got.put_nowait, bytes(data))

    def write_eof(self) -> None:
        """Do nothing: nobody waits for it here."""

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self._lose)

    def abort(self) -> None:
        self.close()

    def _lose(self) -> None:
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            protocol.connection_lost(None)
        self.got.put_nowait(b"")


class Connections:
    """Makes connections, and counts those that are to be made."""

    def __init__(self) -> None:
        self.made = self.pending = 0

    def __call__(self) -> asyncio.Protocol:
        self.made += 1
        return asyncio.Protocol()

    def handshake_begins(self) -> None:
        self.pending += 1

    def handshake_ends(self) -> None:
        self.pending -= 1


async def honest(handshakes: Handshakes, server: ConnectionServer, way: float) -> bool:
    """Connect as any client does; whether the handshake was done."""
    wire = Wire(way)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting().wrap_bio(incoming, outgoing, server_hostname="localhost")
    await asyncio.sleep(way)
    wire.attach(handshakes.make(server))
    while True:
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            if outgoing.pending:
                await wire.send(outgoing.read())
            if not (data := await wire.got.get()):
                return False
            incoming.write(data)
        else:
            await wire.send(outgoing.read())
            done = not wire.closed
            wire.close()
            return done


async def stall(handshakes: Handshakes, server: ConnectionServer, dice: random.Random) -> None:
    """Connect, and come to nothing in one of many ways."""
    wire = Wire()
    wire.attach(handshakes.make(server))
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    for part in dice.choice(
        [[], [hello[:1]], [hello], [hello, b"x" * 40], [b"GET / "], [b"\xff"]]
    ):
        await wire.send(part)
        await asyncio.sleep(dice.random())
    if dice.random() < 0.2:
        wire.close()


async def attacked(seed: int, section: Tls) -> None:
    dice = random.Random(seed)
    outcomes = {outcome: Counter() for outcome in HANDSHAKES}
    tls = ListenerTls(section, lambda: section, outcomes)
    made = Connections()
    server = cast("ConnectionServer", made)
    most, tasks, clients = 0, set[asyncio.Task[None]](), []
    # First all at once, more than there may be.
    burst = dice.choice([0, MAX_UNFINISHED, 3 * MAX_UNFINISHED])
    for number in range(burst + ATTACK * RATE):
        tasks.add(asyncio.create_task(stall(tls.handshakes, server, dice)))
        if number % 300 == 0:
            way = dice.random() * WAY
            clients.append(asyncio.create_task(honest(tls.handshakes, server, way)))
        if number >= burst:
            await asyncio.sleep(dice.expovariate(RATE))
        most = max(most, len(tls.handshakes))
        assert most <= MAX_UNFINISHED, f"seed {seed}"
        assert made.pending == len(tls.handshakes), f"seed {seed}"
    assert all(await asyncio.gather(*clients)), f"seed {seed}: an honest client was locked out"
    await asyncio.gather(*tasks)
    await asyncio.sleep(TIMEOUT + 1)
    assert len(tls.handshakes) == made.pending == 0, f"seed {seed}"
    assert made.made == outcomes["done"].value == len(clients), f"seed {seed}"
    total = sum(counter.value for counter in outcomes.values())
    assert total == burst + ATTACK * RATE + len(clients), f"seed {seed}: each is counted once"
    tls.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_honest_clients_get_in_while_any_number_stall(tmp_path: Path, seed: int) -> None:
    """It takes seconds: 10,000 sockets, of which 1,024 at a time may be unfinished."""
    run_virtually(attacked(seed, Tls(**pair(tmp_path))))


# The files of a pair.


def matching(context: ssl.SSLContext) -> bytes | None:
    """Do a handshake with *context*, and return the certificate that was shown: its key fits."""
    bios = [ssl.MemoryBIO() for _ in range(4)]
    client = trusting().wrap_bio(bios[0], bios[1], server_hostname="localhost")
    server = context.wrap_bio(bios[2], bios[3], server_side=True)
    for _ in range(4):
        for side in (client, server):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
            bios[2].write(bios[1].read())
            bios[0].write(bios[3].read())
    return client.getpeercert(binary_form=True)


def steps(
    dice: random.Random, folder: Path, contents: Iterable[tuple[str, bytes]]
) -> Iterable[Any]:
    """Yield after each step of writing *contents*, in an order and in pieces of chance."""
    for name, content in sorted(contents, key=lambda _: dice.random()):
        path = folder / name
        if dice.random() < 0.5:
            put(path, content)
            yield None
            continue
        if dice.random() < 0.3:
            path.unlink()
            yield None
        cuts = sorted(dice.randrange(len(content)) for _ in range(dice.randrange(4)))
        with path.open("wb") as file:
            yield None
            for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
                file.write(content[begin:end])
                file.flush()
                yield None


@pytest.mark.parametrize("seed", range(1, 9))
async def test_pair_in_use_always_matches(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    pairs = []
    for _ in range(3):
        certificate = authority("ours").issue_cert("localhost")
        chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
        pairs.append({"cert": chain, "key": certificate.private_key_pem.bytes()})
    written = {certificates(entry["cert"])[0].der for entry in pairs}
    for name, content in pairs[0].items():
        put(tmp_path / name, content)
    section = Tls(cert_file=str(tmp_path / "cert"), key_file=str(tmp_path / "key"))
    tls = ListenerTls(section, lambda: section, {outcome: Counter() for outcome in HANDSHAKES})
    watched = WatchedFiles(lambda _kind, _text: None)
    tls.watch(watched)

    for entry in pairs[1:]:
        for _ in steps(dice, tmp_path, entry.items()):
            if dice.random() < 0.7:
                await watched.look()
                assert matching(tls.loaded.context) in written, f"seed {seed}"
        await watched.look()
        assert matching(tls.loaded.context) == certificates(entry["cert"])[0].der, f"seed {seed}"

    assert load(section).same(tls.loaded)
    tls.close()

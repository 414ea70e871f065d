"""What TLS on the listener costs, as ratios within one run: events, idle sockets, handshakes.

    python benchmarks/tls.py                # about two minutes
    python benchmarks/tls.py --rounds 1     # a look, not a verdict

A plain server and one that speaks TLS are up together on one core, and are measured in turns, so
that a noisy neighbour is a neighbour of both. The time is the kernel's, of all threads of the
server. Its clients, and the mock provider, share the other core.

| row | |
| --- | --- |
| events | events per second of CPU time, 100 SSE streams of 50 a second, TLS to plain |
| idle | resident KiB that an idle WebSocket over TLS takes beside a plain one |
| handshakes | per second of CPU time, P-256, in full (TLS 1.3) |
| resumed | how many times as many are resumed as are made in full, over TLS 1.2; and over TLS 1.3, which agrees on a new secret each time |

Exit code 1: a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple

import uvloop
from certificate import HARNESS
from loads import Load
from measure import CHAT, HERE, Bench
from peers import AIOSERVER
from process import cpu_time, free_port, running

if TYPE_CHECKING:
    from collections.abc import Iterator

STREAMS, SECONDS = 100, 6.0
IDLE, HANDSHAKES = 1000, 600
GOALS = {"events": 0.65, "idle": 48.0, "handshakes": 900.0, "resumed": 1.6, "resumed 1.3": 0.0}
VERSIONS = {"resumed": ssl.TLSVersion.TLSv1_2, "resumed 1.3": ssl.TLSVersion.TLSv1_3}
TLS = "    tls: {cert_file: $folder/provider.pem}\n    concurrency:\n"
UPGRADE = (
    b"GET /ws/chat HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


class Server(NamedTuple):
    """A server that listens on *port*; *context* is that of its clients, None if it is plain."""

    pid: int
    port: int
    context: ssl.SSLContext | None

    def connect(self, session: ssl.SSLSession | None = None) -> socket.socket:
        """Connect, with the handshake of TLS."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        if self.context is None:
            return sock
        return self.context.wrap_socket(sock, server_hostname="127.0.0.1", session=session)

    def resident(self) -> int:
        """Return the bytes of its memory that are resident."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def serving(bench: Bench, *, tls: bool) -> Iterator[Server]:
    """Start a server, and wait until it answers."""
    port = free_port()
    file = bench.folder / f"{'tls' if tls else 'plain'}.yaml"
    config = AIOSERVER.replace("    concurrency:\n", TLS, 1) if tls else AIOSERVER
    names = {"port": port, "folder": bench.folder, **bench.provider_names(tls=False)}
    file.write_text(Template(config).substitute(names))
    command = [sys.executable, "-m", "aioserver", "serve", "--config", str(file)]
    context = None
    if tls:
        context = ssl.create_default_context(cafile=bench.encrypted.authority)
    with (
        file.with_suffix(".log").open("wb") as log,
        running(
            [*command, "--loop", bench.loop],
            core=bench.server_core,
            folder=str(HERE.parent),
            output=log,
        ) as process,
    ):
        server = Server(process.pid, port, context)
        deadline = time.monotonic() + 30
        while True:
            try:
                with server.connect():
                    break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit(file.with_suffix(".log").read_text()) from None
                time.sleep(0.05)
        yield server


class Stream(asyncio.Protocol):
    """Asks for one stream after the other, and counts their events."""

    BODY = json.dumps({**CHAT, "stream": True}).encode()
    REQUEST = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
    )

    def __init__(self) -> None:
        self.events = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first one."""
        self._transport = transport  # type: ignore[assignment]  # uvloop's is none
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Count, and ask for the next one at the end."""
        self.events += data.count(b"data: {")
        if data.endswith(b"0\r\n\r\n"):
            self._ask()

    def _ask(self) -> None:
        assert self._transport is not None
        self._transport.write(self.REQUEST)


async def events(server: Server, seconds: float) -> float:
    """Return the events of a second of CPU time."""
    loop = asyncio.get_running_loop()
    streams = []
    for _ in range(STREAMS):
        transport, stream = await loop.create_connection(
            Stream, "127.0.0.1", server.port, ssl=server.context
        )
        streams.append((transport, stream))
        # They do not begin together, or their events would come together.
        await asyncio.sleep(1.0 / STREAMS)
    await asyncio.sleep(1.0)
    before, cpu = sum(stream.events for _, stream in streams), cpu_time(server.pid)
    await asyncio.sleep(seconds)
    count = sum(stream.events for _, stream in streams) - before
    spent = (cpu_time(server.pid) - cpu) / 1e9
    for transport, _ in streams:
        transport.abort()
    await asyncio.sleep(0.5)
    return count / spent


def idle(server: Server) -> float:
    """Return the resident KiB of an idle WebSocket."""
    with contextlib.ExitStack() as stack:
        counts = []
        # The first ones pay for what all of them need.
        for number in (IDLE // 5, IDLE):
            for _ in range(number):
                sock = stack.enter_context(server.connect())
                sock.sendall(UPGRADE)
                assert sock.recv(4096).startswith(b"HTTP/1.1 101")
            time.sleep(1.0)
            counts.append(server.resident())
        return (counts[1] - counts[0]) / IDLE / 1024


def handshakes(server: Server, version: ssl.TLSVersion, *, resume: bool) -> float:
    """Return the handshakes of a second of CPU time."""
    assert server.context is not None
    server.context.maximum_version = version
    session = None
    if resume:
        with server.connect() as sock:
            assert isinstance(sock, ssl.SSLSocket)
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            sock.recv(4096)
            session = sock.session
    before = cpu_time(server.pid)
    for _ in range(HANDSHAKES):
        with server.connect(session) as sock:
            assert isinstance(sock, ssl.SSLSocket)
            assert sock.session_reused == resume
    time.sleep(0.2)
    return HANDSHAKES / ((cpu_time(server.pid) - before) / 1e9)


def main() -> int:
    """Measure, and print a table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    options = parser.parse_args()
    subprocess.run(["make", "-s", "-C", str(HARNESS)], check=True, timeout=120)
    cores = sorted(os.sched_getaffinity(0))[:2]
    rows: dict[str, list[float]] = {name: [] for name in GOALS}
    with (
        tempfile.TemporaryDirectory(prefix="aioserver-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        bench = Bench.create(Path(folder), options.loop, cores[0], cores[-1])
        stack.enter_context(bench.mock(Load(mode="sse", connections=1, interval_ms=20)))
        plain = stack.enter_context(serving(bench, tls=False))
        secure = stack.enter_context(serving(bench, tls=True))
        os.sched_setaffinity(0, {cores[-1]})
        rows["idle"].append(idle(secure) - idle(plain))
        for _ in range(options.rounds):
            rates = [uvloop.run(events(server, options.seconds)) for server in (plain, secure)]
            rows["events"].append(rates[1] / rates[0])
            print(
                f"  µs an event: {1e6 / rates[0]:.1f} plain, {1e6 / rates[1]:.1f} TLS", flush=True
            )
            full = 0.0
            for name, version in VERSIONS.items():
                full = handshakes(secure, version, resume=False)
                rows[name].append(handshakes(secure, version, resume=True) / full)
            rows["handshakes"].append(full)
    good = True
    for name, values in rows.items():
        middle = statistics.median(values)
        reached = middle <= GOALS[name] if name == "idle" else middle >= GOALS[name]
        good &= reached
        least, most = min(values), max(values)
        word = "reached" if reached else "MISSED"
        print(f"{name}: {middle:.2f} ({least:.2f} to {most:.2f}), goal {GOALS[name]:g}: {word}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

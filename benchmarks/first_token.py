"""The first content of an answer: when it comes, with and without `continuation`, and beside another
tree, as one from before its preamble was held.

    git worktree add /tmp/before COMMIT
    python benchmarks/first_token.py --before /tmp/before      # about a minute
    python benchmarks/first_token.py --count 500               # this tree alone

The provider sends a role, and its first content a millisecond later. Two times are taken of each
answer: from the request to the first content at the client, and from the provider's write of it,
which its time stamp says. The servers are up together, and get their requests in turns, so that a
noisy neighbour is a neighbour of all of them. On a machine that does much else, run it with
priority: `chrt -f 10 python benchmarks/first_token.py …`. It prints microseconds, the first tenth,
the median and the last tenth, each with its ratio to that of the first server.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from certificate import HARNESS
from loads import Load
from measure import CHAT, Bench, Server
from peers import AIOSERVER, CONTINUED, PEERS

COUNT, WARM = 3000, 100
FIRST, STAMP, END = b'"content":"0001"', b'"fp_', b"0\r\n\r\n"
# What the first of them is, the others are compared with.
BEFORE, PLAIN = "before", "now"
PARTS = {"request to content": 0, "provider's write to content": 1}


class Client:
    """A connection to *server*, which asks for one stream after another."""

    def __init__(self, server: Server) -> None:
        body = json.dumps({**CHAT, "stream": True}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._request = head.encode() + body
        self._socket = socket.create_connection(("127.0.0.1", server.port), 30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self) -> tuple[float, float]:
        """Read one answer; return the microseconds until its first content, from the request and
        from the provider's write.
        """
        data, came = b"", 0
        began = time.monotonic_ns()
        self._socket.sendall(self._request)
        while not data.endswith(END):
            part = self._socket.recv(65536)
            if not part:
                raise SystemExit(f"an answer that is cut: {data!r}")
            data += part
            if not came and FIRST in data:
                came = time.monotonic_ns()
        # That of the same event.
        place = data.rindex(STAMP, 0, data.index(FIRST)) + len(STAMP)
        return (came - began) / 1000, (came - int(data[place : place + 16], 16)) / 1000


def compare(servers: dict[str, Server], count: int) -> None:
    """Ask *servers* in turns, *count* times each, and print how they compare with the first of
    them.
    """
    clients = {name: Client(server) for name, server in servers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    for number in range(WARM + count):
        for name, client in clients.items():
            answer = client.ask()
            if number >= WARM:
                times[name].append(answer)
    for part, place in PARTS.items():
        base: list[float] = []
        for name, answers in times.items():
            quantiles = statistics.quantiles((answer[place] for answer in answers), n=10)
            # The first tenth, the median, and the last tenth.
            some = [quantiles[0], quantiles[4], quantiles[8]]
            base = base or some
            cells = [
                f"{value:.0f} ({value / other:.3f})"
                for value, other in zip(some, base, strict=True)
            ]
            print(f"| {part} | {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure, and print the times."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", help="a tree to compare with")
    parser.add_argument("--count", type=int, default=COUNT, help="answers of each")
    arguments = parser.parse_args()
    subprocess.run(["make", "-s", "-C", str(HARNESS)], check=True, timeout=120)
    cores = sorted(os.sched_getaffinity(0))[:2]
    ours = PEERS["aioserver"]
    peers = {PLAIN: (ours, AIOSERVER), "continued": (ours, CONTINUED)}
    if arguments.before:
        elsewhere = ("env", "-C", str(Path(arguments.before).absolute()), *ours.command)
        before = dataclasses.replace(ours, name=BEFORE, command=elsewhere)
        peers = {BEFORE: (before, AIOSERVER), **peers}
    load = Load(mode="sse", connections=1, chunks=5, interval_ms=1, mock=("--stamp",))
    with (
        tempfile.TemporaryDirectory(prefix="aioserver-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        bench = Bench.create(Path(folder), "uvloop", cores[0], cores[-1])
        with bench.mock(load):
            servers = {
                name: stack.enter_context(bench.server(peer, config=config))
                for name, (peer, config) in peers.items()
            }
            compare(servers, arguments.count)


if __name__ == "__main__":
    main()

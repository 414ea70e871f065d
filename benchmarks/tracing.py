"""The cost of traces: CPU time of a server for a request without them, with them, and with a
collector that is away.

    python benchmarks/tracing.py            # about two minutes
    python benchmarks/tracing.py 40         # with so many rounds

The three servers are up together, and get their requests in turns of some hundred, so that a noisy
neighbour is a neighbour of all of them. The time is the kernel's, of all threads, and covers the
export. The numbers are medians over the rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from certificate import HARNESS
from loads import Load
from measure import CHAT, Bench, Server
from peers import AIOSERVER, PEERS

ROUNDS = 25
# Requests of one round, by whether they are streamed; a stream has 100 events.
REQUESTS = {False: 400, True: 30}
WARM = 10
TRACING = "tracing:\n  otlp_endpoint: http://127.0.0.1:{}\n"


class Collector(BaseHTTPRequestHandler):
    """Takes spans, and forgets them."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer an export."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


def cpu_time(pid: int) -> int:
    """Return the nanoseconds that the threads of a process have run."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def ask(connection: HTTPConnection, count: int, *, stream: bool) -> None:
    """Ask *count* times, and read the whole answers."""
    body = json.dumps({**CHAT, "stream": stream})
    for _ in range(count):
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200 or not response.read():
            raise SystemExit(f"no answer: {response.status}")


def cost(server: Server, *, stream: bool) -> float:
    """Return the microseconds of CPU time of a request."""
    assert server.pid is not None
    with contextlib.closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        ask(connection, WARM, stream=stream)
        before = cpu_time(server.pid)
        ask(connection, REQUESTS[stream], stream=stream)
        return (cpu_time(server.pid) - before) / REQUESTS[stream] / 1000


def compare(servers: dict[str, Server], rounds: int, *, stream: bool) -> None:
    """Measure *servers* in turns, and print what a request costs more than without traces."""
    costs: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(rounds):
        for name, server in servers.items():
            costs[name].append(cost(server, stream=stream))
    kind = "stream of 100 events" if stream else "whole answer"
    without = costs["without"]
    for name, values in costs.items():
        middle = statistics.median(values)
        more = statistics.median([on - off for on, off in zip(values, without, strict=True)])
        share = more / statistics.median(without)
        print(f"{kind}, {name}: {middle:.0f} µs, {more:+.1f} µs ({share:+.1%})", flush=True)


def main() -> None:
    """Measure, and print a table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    subprocess.run(["make", "-s", "-C", str(HARNESS)], check=True, timeout=120)
    cores = sorted(os.sched_getaffinity(0))[:2]
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    configs = {
        "without": AIOSERVER,
        "with": AIOSERVER + TRACING.format(collector.server_address[1]),
        "collector away": AIOSERVER + TRACING.format(9),
    }
    with (
        tempfile.TemporaryDirectory(prefix="aioserver-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        bench = Bench.create(Path(folder), "uvloop", cores[0], cores[-1])
        servers = {}
        with bench.mock(Load(mode="http", connections=1)):
            for name, config in configs.items():
                peer = PEERS["aioserver"]
                servers[name] = stack.enter_context(bench.server(peer, config=config))
        for stream in (False, True):
            # Events that come one by one, as a model makes them.
            load = Load(mode="sse" if stream else "http", connections=1, interval_ms=int(stream))
            with bench.mock(load):
                compare(servers, rounds, stream=stream)
    collector.shutdown()


if __name__ == "__main__":
    main()

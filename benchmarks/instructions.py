"""Instructions that an answer costs, counted by valgrind: a number that no other program on the
machine changes.

    python benchmarks/instructions.py               # of this version, about two minutes
    python benchmarks/instructions.py TREE TREE     # of other work trees, one after the other
    python benchmarks/instructions.py --continued   # where an answer that breaks off is continued

Counts of one version differ by some percent, by the moments at which the loop wakes. They know no
caches, and no kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path
from string import Template

from certificate import HARNESS
from loads import Load
from measure import CHAT, Bench
from peers import AIOSERVER, CONTINUED
from process import free_port

WARM, COUNTED = 60, 200
# Seconds for the start of a server, which is some fifty times slower here.
PATIENCE = 180.0


def ask(connection: HTTPConnection, *, stream: bool) -> None:
    """Ask once, and read the whole answer."""
    body = json.dumps({**CHAT, "stream": stream})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200 or not response.read():
        raise SystemExit(f"no answer: {response.status}")


def wait_for(connection: HTTPConnection) -> None:
    """Wait for the first answer."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return ask(connection, stream=True)
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def count(bench: Bench, tree: Path, configuration: str, *, stream: bool) -> float:
    """Return the instructions of an answer of the version in *tree*."""
    port, out = free_port(), bench.folder / f"{free_port()}.out"
    config = bench.folder / "config.yaml"
    config.write_text(
        Template(configuration).substitute(bench.provider_names(tls=False), port=port)
    )
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", sys.executable]
    command += ["-m", "aioserver", "serve", "--config", str(config), "--loop", bench.loop]
    environ = {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "1"}
    log = bench.folder / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=bench.folder, env=environ, stdout=file, stderr=file)
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        wait_for(connection)
        for _ in range(WARM):
            ask(connection, stream=stream)
        control(server.pid, "--zero")
        for _ in range(COUNTED):
            ask(connection, stream=stream)
        control(server.pid, "--dump")
        connection.close()
    finally:
        server.kill()
        server.wait()
    # The last part is of the counted answers.
    (dump,) = (path for path in bench.folder.glob(f"{out.name}*") if path != out)
    (total,) = (line for line in dump.read_text().splitlines() if line.startswith("totals:"))
    return int(total.split()[1]) / COUNTED


def control(pid: int, what: str) -> None:
    """Have valgrind do *what* with its counts."""
    subprocess.run(
        ["callgrind_control", what, str(pid)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )


def main() -> None:
    """Count for each tree of the command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended
    parser = argparse.ArgumentParser()
    parser.add_argument("trees", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    parser.add_argument("--continued", action="store_true")
    arguments = parser.parse_args()
    configuration = CONTINUED if arguments.continued else AIOSERVER
    subprocess.run(["make", "-s", "-C", str(HARNESS)], check=True, timeout=120)
    cores = sorted(os.sched_getaffinity(0))[:2]
    print("| tree | whole answer | stream of 100 events |\n| --- | ---: | ---: |")
    for tree in (tree.resolve() for tree in arguments.trees):
        with tempfile.TemporaryDirectory(prefix="aioserver-bench-") as folder:
            bench = Bench.create(Path(folder), "uvloop", cores[0], cores[-1])
            with bench.mock(Load(mode="sse", connections=1)):
                whole, streamed = (
                    count(bench, tree, configuration, stream=stream) for stream in (False, True)
                )
        print(f"| {tree.name} | {whole:,.0f} | {streamed:,.0f} |", flush=True)


if __name__ == "__main__":
    main()

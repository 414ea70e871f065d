"""Instructions that an answer costs, counted by valgrind: a number that no other program on the
machine changes.

    python benchmarks/instructions.py               # of this version, less than a minute
    python benchmarks/instructions.py TREE TREE     # of other work trees, one after the other
    python benchmarks/instructions.py --without hooks    # beside it, with a wing deleted
    python benchmarks/instructions.py --bytecodes   # those of Python instead, in seconds
    python benchmarks/instructions.py --continued   # where an answer that breaks off is continued

Counts of one version still differ by a percent or so, by the moments at which the loop wakes. They
know no caches, and no kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from certificate import HARNESS
from loads import Load
from measure import CHAT, HERE, Bench
from peers import AIOSERVER, CONTINUED
from process import free_port

from tests.support.without_wing import copy_package_without

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# How each kind is asked for, by whether it is streamed, and how often. An event of a stream comes a
# while after the one before it, so that each has a turn of the loop.
LOADS = {
    False: (Load(mode="http", connections=1), 200),
    True: (Load(mode="sse", connections=1, interval_ms=3), 20),
}
# Requests before the first that are counted: the last 1,000 are remembered, and to forget costs too.
WARM = 1000
# Seconds for the start of a server, which is some fifty times slower here.
PATIENCE = 180.0


def ask(connection: HTTPConnection, *, stream: bool) -> None:
    """Ask once, and read the whole answer."""
    body = json.dumps({**CHAT, "stream": stream})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200 or not response.read():
        raise SystemExit(f"no answer: {response.status}")


def asked(connection: HTTPConnection, number: int, *, stream: bool) -> None:
    """Ask *number* times."""
    for _ in range(number):
        ask(connection, stream=stream)


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


class Valgrind:
    """Counts the instructions of a server; each round takes a while."""

    rounds = 4

    def __init__(self, bench: Bench, arguments: Sequence[str], environ: dict[str, str]) -> None:
        self._out = bench.folder / f"{free_port()}.out"
        command = ("valgrind", "--tool=callgrind", f"--callgrind-out-file={self._out}")
        with (bench.folder / "server.log").open("wb") as log:
            self.server = subprocess.Popen(
                (*command, sys.executable, "-m", "aioserver", *arguments),
                cwd=bench.folder,
                env=environ,
                stdout=log,
                stderr=log,
            )

    def count(self, work: Callable[[], object]) -> int:
        """Return the instructions of *work*."""
        self._control("--zero")
        work()
        self._control("--dump")
        # One dump after the other, numbered.
        (dump,) = self._out.parent.glob(f"{self._out.name}.*")
        (total,) = (line for line in dump.read_text().splitlines() if line.startswith("totals:"))
        dump.unlink()
        return int(total.split()[1])

    def _control(self, what: str) -> None:
        subprocess.run(
            ["callgrind_control", what, str(self.server.pid)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )


class Bytecodes:
    """Counts the bytecodes of a server."""

    rounds = 20

    def __init__(self, bench: Bench, arguments: Sequence[str], environ: dict[str, str]) -> None:
        reading, writing = os.pipe()
        self._counts = os.fdopen(reading)
        with (bench.folder / "server.log").open("wb") as log:
            self.server = subprocess.Popen(
                (sys.executable, HERE / "bytecodes.py", str(writing), *arguments),
                cwd=bench.folder,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                bufsize=1,
                pass_fds=(writing,),
            )
        os.close(writing)

    def count(self, work: Callable[[], object]) -> int:
        """Return the bytecodes of *work*."""
        before = self._turn("on")
        work()
        return self._turn("off") - before

    def _turn(self, word: str) -> int:
        assert self.server.stdin is not None
        self.server.stdin.write(f"{word}\n")
        return int(self._counts.readline())


def count(
    bench: Bench, tree: Path, configuration: str, kind: type[Valgrind | Bytecodes]
) -> list[float]:
    """Return what a whole answer, and a stream, of the version in *tree* take."""
    port, config = free_port(), bench.folder / "config.yaml"
    config.write_text(
        Template(configuration).substitute(bench.provider_names(tls=False), port=port)
    )
    arguments = ("serve", "--config", str(config), "--loop", bench.loop)
    counter = kind(
        bench, arguments, {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "1"}
    )
    counts = []
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        for stream, (load, number) in LOADS.items():
            with bench.mock(load):
                wait_for(connection)
                each = number // kind.rounds
                work = partial(asked, connection, each, stream=stream)
                asked(connection, number // 4 if stream else WARM, stream=stream)
                # The median leaves out what the server does by the clock, in a few rounds.
                rounds = [counter.count(work) / each for _ in range(kind.rounds)]
                counts.append(statistics.median(rounds))
        connection.close()
    finally:
        counter.server.kill()
        counter.server.wait()
    return counts


def main() -> None:
    """Count for each tree of the command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended
    parser = argparse.ArgumentParser()
    parser.add_argument("trees", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    parser.add_argument("--continued", action="store_true")
    parser.add_argument("--bytecodes", action="store_true")
    parser.add_argument("--without", action="append", default=[], metavar="WING")
    arguments = parser.parse_args()
    configuration = CONTINUED if arguments.continued else AIOSERVER
    kind = Bytecodes if arguments.bytecodes else Valgrind
    subprocess.run(["make", "-s", "-C", str(HARNESS)], check=True, timeout=120)
    cores = sorted(os.sched_getaffinity(0))[:2]
    print("| tree | whole answer | stream of 100 events |\n| --- | ---: | ---: |")
    for name in (*arguments.trees, *arguments.without):
        with tempfile.TemporaryDirectory(prefix="aioserver-bench-") as folder:
            bench = Bench.create(Path(folder), "uvloop", cores[0], cores[-1])
            if isinstance(name, Path):
                tree = name.resolve()
            else:
                tree = bench.folder / f"without {name}"
                copy_package_without(name, tree)
            whole, streamed = count(bench, tree, configuration, kind)
        print(f"| {tree.name} | {whole:,.0f} | {streamed:,.0f} |", flush=True)


if __name__ == "__main__":
    main()

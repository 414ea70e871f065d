"""What a relay adds, how much it carries, and what it keeps: the columns that people compare.

    python benchmarks/board.py [--quick] [--only aioserver,bare] [--steps latency,memory] [--runs 5]
                               [--loop uvloop|asyncio] [--peers] [--loaded] [--json FILE]

The load is that of a public board of gateways: a question of 16 tokens at most, an answer of some
250 bytes at once, and streams of a role and 64 pieces of 16 bytes, the first at once and the
others each 20 ms. `lanes` asks the same by the faces whose requests are translated. What is added
is a percentile through the server less the same percentile without it, in turns. Every time is
kept as it is, since a histogram hides rare gaps. A window with a failure says nothing. While
others use the cores, it waits for a minute and then ends; `--loaded` measures nevertheless.
Printed are the medians of all runs.

A server has the first core alone, and the provider and the load the second; several workers have
both. Exit code: 0 done, 1 something is INVALID, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import virtual
from certificate import HARNESS
from loads import Load
from measure import Bench, Result, Server, StepFailed, faults
from peers import AIOSERVER, DIRECT, PEERS, Peer
from process import QUIET, tree, wait_for_quiet
from table import machine
from workers import peer as with_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

QUESTION = {
    "model": "mock-model",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 16,
}
# Kinds of times in the file of samples, and how many of their units are a millisecond.
WHOLE, FIRST, GAP = 1, 2, 3
UNITS = 10_000
# Milliseconds of the 99th percentile below which a rate counts, and the widest gap of a stream.
LIMITS = (1, 5, 10, 50, 100)
WIDEST = 200
# The frontier: requests at once, and windows for each.
RUNGS, WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256), 3
STREAMS = (64, 128, 256, 512, 768, 1024, 1536, 2048)
# Streams beside each other where a first event and gaps are compared.
BESIDE = 64
# Memory: requests at once and seconds between two looks, growth that still counts as flat, looks at
# most, and the seconds of rest.
BUSY, LOOK, FLAT, LOOKS, REST = 64, 5.0, 1.01, 12, 60.0

Numbers = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a step has found: rows of the table, and points (x, y) of a curve."""

    rows: Numbers
    curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Run:
    """All numbers of one run: the rows of each column, the curves of each step and column, and the
    columns of which a step has failed.
    """

    rows: dict[str, Numbers]
    curves: dict[str, dict[str, list[tuple[float, float]]]]
    invalid: list[str]


def whole(connections: int, seconds: float) -> Load:
    """Return requests that are not streamed, one after the other on each connection."""
    return Load(
        mode="http",
        connections=connections,
        chunks=4,
        warmup=0.5,
        duration=seconds,
        body=QUESTION,
    )


def streams(connections: int, seconds: float) -> Load:
    """Return streams of 64 pieces, one after the other on each connection; each takes 1.3 s."""
    return Load(
        mode="sse",
        connections=connections,
        chunks=64,
        interval_ms=20,
        ramp=1.3,
        warmup=1.0,
        duration=seconds,
        drain=5.0,
        body=QUESTION,
        mock=("--text-bytes", "16"),
        options=("--max-gap", str(WIDEST)),
    )


@dataclasses.dataclass(frozen=True)
class Lane:
    """A face whose requests are translated for the provider: its *path*, a *question*, the *key*
    of the texts in its events, and the *end* that stands in the last one.
    """

    name: str
    path: str
    question: Mapping[str, object]
    key: str
    end: str

    def takes(self, load: Load) -> Load:
        """Return *load* as this face takes it."""
        options = ("--path", self.path, "--seq-key", self.key, "--marker", self.end)
        return dataclasses.replace(load, body=self.question, options=(*load.options, *options))


LANES = (
    Lane("Messages", "/v1/messages", QUESTION, "text", '"message_stop"'),
    Lane(
        "Responses",
        "/v1/responses",
        {"model": "mock-model", "input": "hello", "max_output_tokens": 16, "store": False},
        "delta",
        '"response.completed"',
    ),
)


class Board:
    """The steps over one *bench*; *scale* shortens the seconds."""

    def __init__(self, bench: Bench, scale: float) -> None:
        self._bench, self._scale = bench, scale
        self._direct = Server(DIRECT, bench.provider, None)
        self._samples = bench.folder / "samples"

    def _measured(self, server: Server, load: Load) -> tuple[Result, dict[int, array[int]]]:
        """Return the numbers of *load* on *server*, and all times, sorted, by their kind.

        Raises:
            StepFailed: there was a failure.
        """
        options = (*load.options, "--samples", str(self._samples))
        result = self._bench.measure(server, dataclasses.replace(load, options=options))
        if wrong := faults(result):
            raise StepFailed("; ".join(wrong))
        pairs = array("I", self._samples.read_bytes())
        times: dict[int, array[int]] = {}
        for kind, value in zip(pairs[::2], pairs[1::2], strict=True):
            times.setdefault(kind, array("I")).append(value)
        return result, {kind: array("I", sorted(values)) for kind, values in times.items()}

    def latency(self, server: Server) -> Found:
        """Return what one request at a time takes more than without the server, in ms."""
        load = whole(1, 6.0 * self._scale)
        (_, straight), (_, through) = (
            self._measured(each, load) for each in (self._direct, server)
        )
        return Found(
            {
                f"added p{share}, µs": 1000 * added(straight[WHOLE], through[WHOLE], share)
                for share in (50, 99)
            }
        )

    def frontier(self, server: Server) -> Found:
        """Return the most requests a second whose 99th percentile is below each of LIMITS, and the
        rate by the percentile, in ms, of each window.
        """
        best = dict.fromkeys([*LIMITS, None], 0.0)
        windows = []
        for rung in RUNGS:
            for _ in range(WINDOWS):
                with contextlib.suppress(StepFailed):
                    result, times = self._measured(server, whole(rung, 1.5 * self._scale))
                    p99 = percentile(times[WHOLE], 99)
                    windows.append((p99, result["per_second"]))
                    for limit in best:
                        if limit is None or p99 < limit:
                            best[limit] = max(best[limit], result["per_second"])
        rows = {
            "requests/s" if limit is None else f"requests/s, p99 < {limit} ms": rate
            for limit, rate in best.items()
        }
        return Found(rows, sorted(windows))

    def cpu(self, server: Server) -> Found:
        """Return the CPU time of a request, of all processes of the server."""
        result, _ = self._measured(server, whole(8, 4.0 * self._scale))
        return Found({"CPU of a request, µs": result["cpu_us"]})

    def events(self, server: Server) -> Found:
        """Return what a first event and a gap take more than without the server, in ms."""
        load = streams(BESIDE, 5.0 * self._scale)
        (_, straight), (_, through) = (
            self._measured(each, load) for each in (self._direct, server)
        )
        return Found(
            {
                f"added to {name} p{share}, ms": added(straight[kind], through[kind], share)
                for name, kind in (("the first event", FIRST), ("a gap", GAP))
                for share in (50, 99)
            }
        )

    def lanes(self, server: Server) -> Found:
        """Return what a translated answer costs beside one that passes: requests/s and the CPU of
        a request as ratios, and what a first event takes more, in ms. The lanes take turns.
        """
        if not server.peer.responses:
            return Found({})
        plain, _ = self._measured(server, whole(8, 4.0 * self._scale))
        _, passing = self._measured(server, streams(BESIDE, 5.0 * self._scale))
        rows: Numbers = {}
        for lane in LANES:
            told, _ = self._measured(server, lane.takes(whole(8, 4.0 * self._scale)))
            _, through = self._measured(server, lane.takes(streams(BESIDE, 5.0 * self._scale)))
            rows |= {
                f"{lane.name}, requests/s by passing": told["per_second"] / plain["per_second"],
                f"{lane.name}, CPU of a request by passing": told["cpu_us"] / plain["cpu_us"],
            }
            rows |= {
                f"{lane.name}, first event p{share} beside passing, ms": added(
                    passing[FIRST], through[FIRST], share
                )
                for share in (50, 99)
            }
        return Found(rows)

    def streams(self, server: Server) -> Found:
        """Return how many streams run with every event there and no gap above WIDEST, and the
        share, in percent, of each number of streams that had such a gap.
        """
        held = 0
        stalls: list[tuple[float, float]] = []
        for count in STREAMS:
            try:
                result, _ = self._measured(server, streams(count, 5.0 * self._scale))
            except StepFailed:
                break
            stalls.append((count, 100 * result["stuttering"] / count))
            if not any(share for _, share in stalls):
                held = count
        return Found({"streams": float(held)}, stalls)

    def memory(self, server: Server) -> Found:
        """Return the memory of all processes: idle, under load until it is flat, and afterwards, in
        MiB.
        """
        assert server.pid is not None
        idle = resident(server.pid)
        busy = [idle]
        load = Load(mode="http", connections=BUSY, chunks=4, duration=LOOK, body=QUESTION)
        for _ in range(LOOKS):
            self._bench.measure(server, load)
            self._bench.measure(server, streams(10 * BUSY, LOOK))
            busy.append(resident(server.pid))
            if busy[-1] <= FLAT * busy[-2]:
                break
        time.sleep(REST * self._scale)
        after = resident(server.pid)
        return Found(
            {
                "MiB idle": idle,
                "MiB under load": max(busy),
                "MiB afterwards": after,
                "afterwards / idle": after / idle,
            }
        )


STEPS: dict[str, Callable[[Board, Server], Found]] = {
    "latency": Board.latency,
    "frontier": Board.frontier,
    "cpu": Board.cpu,
    "events": Board.events,
    "lanes": Board.lanes,
    "streams": Board.streams,
    "memory": Board.memory,
}


def percentile(times: array[int], share: float) -> float:
    """Return a percentile of sorted *times*, in ms."""
    return times[min(len(times) - 1, int(len(times) * share / 100))] / UNITS


def added(straight: array[int], through: array[int], share: float) -> float:
    """Return a percentile of *through* less that of *straight*, in ms."""
    return percentile(through, share) - percentile(straight, share)


def resident(pid: int) -> float:
    """Return the memory of a process and its descendants in MiB; shared pages count once."""
    kib = 0
    for member in tree(pid):
        rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
        kib += int(rollup.split("\nPss:")[1].split()[0])
    return kib / 1024


@contextlib.contextmanager
def serving(bench: Bench, peer: Peer, *, both: bool) -> Iterator[Server]:
    """Run *peer* while the provider may be away; on *both* cores, or on its own."""
    with contextlib.ExitStack() as stack:
        with bench.mock(whole(1, 1.0)):
            server = stack.enter_context(bench.server(peer))
        assert server.pid is not None
        if both:
            for process in tree(server.pid):
                os.sched_setaffinity(process, {bench.server_core, bench.load_core})
        yield server


def one_run(
    bench: Bench, columns: dict[str, Peer], steps: Sequence[str], scale: float, *, loaded: bool
) -> Run:
    """Return the numbers of each column. Every step goes over all servers, in an order of its own.
    *loaded*: also beside other programs.
    """
    cores = (bench.server_core, bench.load_core)
    board = Board(bench, scale)
    run = Run({name: {} for name in columns}, {}, [])
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving(bench, peer, both="workers" in name))
            for name, peer in columns.items()
        }
        for step in steps:
            order = list(servers.items())
            random.shuffle(order)
            for name, server in order:
                if not loaded and (share := wait_for_quiet(cores)) > QUIET:
                    raise SystemExit(
                        f"others use {share:.0%} of the two cores: this would measure them, too "
                        "(--loaded measures nevertheless)"
                    )
                try:
                    found = STEPS[step](board, server)
                except StepFailed as fault:
                    print(f"  {step:9} {name:20} INVALID: {fault}", file=sys.stderr)
                    run.invalid.append(name)
                    continue
                shown = ", ".join(f"{key} {value:.4g}" for key, value in found.rows.items())
                print(f"  {step:9} {name:20} {shown}", file=sys.stderr)
                run.rows[name] |= found.rows
                if found.curve:
                    run.curves.setdefault(step, {})[name] = found.curve
    return run


def table(runs: Sequence[Run]) -> str:
    """Return the medians as a table of Markdown."""
    columns = list(runs[0].rows)
    rows = dict.fromkeys(key for run in runs for found in run.rows.values() for key in found)
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        cells = []
        for column in columns:
            missing = "INVALID" if any(column in run.invalid for run in runs) else ""
            values = [run.rows[column][row] for run in runs if row in run.rows[column]]
            cells.append(f"{statistics.median(values):,.4g}" if values else missing)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def known_columns() -> dict[str, Peer]:
    """Return every column: aioserver with 1, 2 and 4 workers, and the others."""
    # Responses are translated, though the provider speaks them, too.
    bridged = AIOSERVER.replace(
        "model: mock-model\n", "model: mock-model\n      responses: false\n"
    )
    aioserver = dataclasses.replace(PEERS["aioserver"], config=bridged)
    ours: dict[str, Peer] = {"aioserver": aioserver}
    ours |= {f"aioserver, {count} workers": with_workers(count) for count in (2, 4)}
    return ours | {name: peer for name, peer in PEERS.items() if name not in {*ours, "haproxy"}}


def options() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a quarter of the time, and one run")
    parser.add_argument("--loaded", action="store_true", help="measure beside other programs, too")
    parser.add_argument("--only", help="comma-separated servers (aioserver: with 1, 2, 4 workers)")
    parser.add_argument("--peers", action="store_true", help="install and measure LiteLLM, too")
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated steps")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--runs", type=int, help="default 5; with --quick 1")
    parser.add_argument("--json", type=Path, help="write all runs to this file")
    chosen = parser.parse_args()
    chosen.steps = chosen.steps.split(",")
    if unknown := [name for name in chosen.steps if name not in STEPS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(STEPS)}")
    chosen.runs = chosen.runs or (1 if chosen.quick else 5)
    return chosen


def chosen_columns(chosen: argparse.Namespace) -> dict[str, Peer]:
    """Return the columns that were asked for and are installed."""
    columns: dict[str, Peer] = {}
    for name, peer in known_columns().items():
        if chosen.only is not None:
            wanted = name.partition(",")[0] in chosen.only.split(",")
        else:
            wanted = not peer.requirement or chosen.peers
        if not wanted or (peer.program and not shutil.which(peer.program)):
            continue
        if peer.requirement and (why := virtual.install(name, peer.requirement)):
            print(f"{name} is left out, it cannot be installed: {why}", file=sys.stderr)
            continue
        columns[name] = peer
    return columns


def main() -> int:
    """Measure, and print the table."""
    chosen = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for the server, one for the load")
    os.sched_setaffinity(0, {cores[1]})
    subprocess.run(["make", "-s", "-C", str(HARNESS)], check=True, timeout=120)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    columns = chosen_columns(chosen)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="aioserver-board-") as folder:
        bench = Bench.create(Path(folder), chosen.loop, *cores)
        measure = partial(
            one_run,
            bench,
            columns,
            chosen.steps,
            0.25 if chosen.quick else 1.0,
            loaded=chosen.loaded,
        )
        for number in range(1, chosen.runs + 1):
            print(f"run {number} of {chosen.runs}", file=sys.stderr)
            runs.append(measure())
    where = machine(cores, chosen.loop, chosen.runs, chosen.quick)
    print(f"{where}\n\n{table(runs)}")
    if chosen.json:
        everything = {"machine": where, "runs": [dataclasses.asdict(run) for run in runs]}
        chosen.json.write_text(json.dumps(everything, indent=1) + "\n")
    return int(any(run.invalid for run in runs))


if __name__ == "__main__":
    sys.exit(main())

"""Measure aioserver against a bare aiohttp pass-through, side by side, and print the table.

    python benchmarks/run.py [--quick] [--only aioserver,bare] [--loop uvloop|asyncio] [--runs N]
                             [--steps plain,fast,…] [--json FILE]

The servers have one core for themselves, the mock provider and the load generator another. In each
run all servers are up and every step goes over them in turn, so that what disturbs the machine
disturbs both halves of a ratio. What each row means is in README.md beside this file.

Exit code: 0 done, 1 a row is INVALID or something would not start, 2 wrong usage.
"""

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from peers import BASELINE, PEERS, Peer
from process import Watch, free_port, running, usage

HERE = Path(__file__).resolve().parent
HARNESS = HERE / "harness"
CHAT = {"model": "mock-model", "messages": [{"role": "user", "content": "Hello, how are you?"}]}
# loadgen replaces %ID%: aioserver answers a request_id that it knows from its log, not anew.
FRAME = '{"action":"chat","request_id":"%ID%","payload":{"text":"Hello","streaming":true}}'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One step: how the mock provider answers and how loadgen asks. Times in seconds."""

    mode: str  # loadgen's: http | sse | ws
    connections: int
    chunks: int = 100
    interval_ms: int = 0  # 0: as fast as they come
    ramp: float = 0.0
    warmup: float = 1.0
    duration: float = 5.0
    drain: float = 10.0

    @property
    def rate(self) -> float:
        """Events per second that the provider sends in all; 0.0: without a limit."""
        return self.connections * 1000 / self.interval_ms if self.interval_ms else 0.0

    def shortened(self) -> "Load":
        """The same for --quick. A paced stream's ramp stays its length: starts stay spread out."""
        chunks = self.chunks // 2 if self.interval_ms else self.chunks
        return dataclasses.replace(
            self, chunks=chunks, ramp=self.ramp / 2, warmup=0.5, duration=self.duration / 2
        )


# A paced stream takes 4 s (200 events, 50 a second), and so does its ramp: at every moment as many
# streams begin as end.
LOADS = {
    "plain": Load(mode="http", connections=64),
    "fast": Load(mode="sse", connections=64),
    "sse500": Load(mode="sse", connections=500, chunks=200, interval_ms=20, ramp=4, duration=6),
    "sse1000": Load(mode="sse", connections=1000, chunks=200, interval_ms=20, ramp=4, duration=6),
    "ws500": Load(mode="ws", connections=500, chunks=200, interval_ms=20, ramp=4, duration=6),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: field *field* of step *step*."""

    step: str
    field: str
    title: str
    better: str  # more | less
    digits: int = 0


ROWS = (
    Row("plain", "per_second", "requests/s, not streamed, 64 connections", "more"),
    Row("fast", "per_second", "streams/s of 100 events, 64 connections", "more"),
    Row("fast", "chunks_per_second", "events/s of these", "more"),
    Row("sse500", "cpu_us", "CPU µs per event, 500 SSE streams of 50 events/s", "less", 1),
    Row("sse500", "gap_p99_ms", "p99 gap, ms, 500 SSE streams", "less", 1),
    Row("sse500", "ttft_p99_ms", "p99 first token, ms, 500 SSE streams", "less", 1),
    Row("sse1000", "chunks_per_second", "events/s, 1,000 SSE streams, 50,000 sent", "more"),
    Row("sse1000", "gap_p99_ms", "p99 gap, ms, 1,000 SSE streams", "less", 1),
    Row("sse1000", "ttft_p99_ms", "p99 first token, ms, 1,000 SSE streams", "less", 1),
    Row("sse1000", "rss_mb", "resident MB, 1,000 SSE streams", "less", 1),
    Row("ws500", "cpu_us", "CPU µs per event, 500 WebSocket streams of 50 events/s", "less", 1),
    Row("ws500", "chunks_per_second", "events/s, 500 WebSocket streams, 25,000 sent", "more"),
    Row("ws500", "gap_p99_ms", "p99 gap, ms, 500 WebSocket streams", "less", 1),
    Row("ws500", "ttft_p99_ms", "p99 first token, ms, 500 WebSocket streams", "less", 1),
    Row("start", "seconds", "start to first good answer, s", "less", 2),
    Row("start", "rss_mb", "resident MB after it", "less", 1),
)
# Where one of these is not 0 the step's numbers say nothing.
ERRORS = ("truncated", "seq_bad", "unfinished", "io_errors", "connect_errors", "timeouts")

Result = dict[str, Any]  # a step's numbers; "faults": list[str] says why they do not count


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """What is the same for every step: ports, cores and a folder for configurations and logs."""

    folder: Path
    loop: str
    provider: int  # port of the mock provider
    server_core: int
    load_core: int

    @contextlib.contextmanager
    def mock(self, load: Load) -> Iterator[int]:
        """Run the mock provider as *load* wants it; yields its pid once it answers."""
        command = [HARNESS / "mockllm", "--port", self.provider]
        command += ["--chunks", load.chunks, "--interval-ms", load.interval_ms]
        with (
            (self.folder / "mockllm.log").open("ab") as log,
            running(text(command), core=self.load_core, folder=str(HERE), output=log) as process,
        ):
            deadline = time.monotonic() + 5
            while ask(self.provider, "GET", "/stats") is None:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit(f"mockllm does not start on port {self.provider}")
                time.sleep(0.01)
            yield process.pid

    @contextlib.contextmanager
    def server(self, peer: Peer) -> Iterator["Server"]:
        """Start *peer*; yields it after its first good answer. The mock provider must be up."""
        port, config = free_port(), self.folder / f"{peer.name}.yaml"
        names = {"python": sys.executable, "here": HERE, "config": config, "loop": self.loop}
        names |= {"port": port, "provider": self.provider}
        config.write_text(Template(peer.config).substitute(names))
        command = [Template(part).substitute(names) for part in peer.command]
        path = self.folder / f"{peer.name}.log"
        with path.open("wb") as log:
            began = time.monotonic()
            root = str(HERE.parent)
            with running(command, core=self.server_core, folder=root, output=log) as process:
                while not good_answer(peer, port):
                    if time.monotonic() - began > peer.patience or process.poll() is not None:
                        tail = path.read_text(errors="replace")[-3000:]
                        raise SystemExit(f"{peer.name} does not start:\n{tail}")
                    time.sleep(0.005)
                took = time.monotonic() - began
                time.sleep(0.3)
                yield Server(peer, port, process.pid, took, usage(process.pid)[1])

    def measure(self, server: "Server", load: Load) -> Result:
        """Put *load* on *server*, and watch what it uses from the warm-up's end to the last start."""
        with self.mock(load) as mock:
            time.sleep(
                0.2
            )  # for the server to see that the connections of the step before are dead
            command = self.loadgen(server, load)
            with running(
                command, core=self.load_core, folder=str(HERE), output=subprocess.PIPE
            ) as loadgen:
                time.sleep(load.ramp + load.warmup)
                watch = Watch((server.pid, mock, loadgen.pid), (self.server_core, self.load_core))
                time.sleep(load.duration)
                (cpu, *_), foreign = watch.read()
                memory = usage(server.pid)[1]
                try:
                    output, _ = loadgen.communicate(timeout=load.drain + 10)
                except subprocess.TimeoutExpired:
                    return {"faults": ["loadgen did not end"]}
            late = json.loads(ask(self.provider, "GET", "/stats") or "{}")
        result: Result = json.loads(output) if output else {"faults": ["loadgen failed"]}
        if "faults" in result:
            return result
        events = result.get("chunks_per_second", result["per_second"]) * result["seconds"]
        result["cpu_us"] = cpu * 1e6 / events if events else 0.0
        result["cpu_share"] = cpu / load.duration
        result["rss_mb"], result["foreign_share"] = memory, foreign
        result["provider_late_p99_ms"] = late.get("late_ms", {}).get("p99")
        result["faults"] = faults(result)
        return result

    def loadgen(self, server: "Server", load: Load) -> list[str]:
        """The command that puts *load* on *server*."""
        peer, body = server.peer, self.folder / f"{load.mode}.json"
        path = peer.path
        if load.mode == "ws":
            assert peer.websocket is not None
            path = peer.websocket
            body.write_text(FRAME)
        else:
            body.write_text(json.dumps({**CHAT, "stream": load.mode == "sse"}))
        command = [HARNESS / "loadgen", "--json", "--mode", load.mode, "--port", server.port]
        command += ["--path", path, "--body-file", body, "--connections", load.connections]
        command += ["--ramp", load.ramp, "--warmup", load.warmup, "--duration", load.duration]
        command += ["--drain", load.drain, "--timeout", load.drain]
        if load.mode != "http":
            command += ["--expect", load.chunks]
            command += ["--seq-key", "data" if load.mode == "ws" else "content"]
        for header in peer.headers:
            command += ["--header", header]
        return text(command)


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """A peer that is up."""

    peer: Peer
    port: int
    pid: int
    took: float  # seconds from the start to the first good answer
    memory: float  # MB resident after it


def text(command: Sequence[object]) -> list[str]:
    return [str(part) for part in command]


def ask(
    port: int, method: str, path: str, body: str = "", headers: Sequence[str] = ()
) -> bytes | None:
    """The body of a 200, else None."""
    fields = {"Content-Type": "application/json"}
    fields |= dict(header.split(": ", 1) for header in headers)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path, body or None, fields)
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def good_answer(peer: Peer, port: int) -> bool:
    """One request that is not streamed: its answer must hold the provider's text."""
    return b"00010002" in (ask(port, "POST", peer.path, json.dumps(CHAT), peer.headers) or b"")


def faults(result: Result) -> list[str]:
    """Why the numbers of *result* do not count."""
    found = [f"{name}={result[name]}" for name in ERRORS if result.get(name)]
    found += [
        f"status {status}: {count}"
        for status, count in result["status"].items()
        if status not in {"200", "101"}
    ]
    if not result["ok"]:
        found.append("nothing was measured")
    return found


def one_run(bench: Bench, peers: Sequence[Peer], loads: dict[str, Load]) -> dict[str, Any]:
    """Every step over every peer in turn: {peer: {step: result}}."""
    results: dict[str, dict[str, Result]] = {peer.name: {} for peer in peers}
    with contextlib.ExitStack() as stack:
        servers = []
        with bench.mock(LOADS["plain"]):
            for peer in peers:
                server = stack.enter_context(bench.server(peer))
                servers.append(server)
                results[peer.name]["start"] = {
                    "seconds": server.took,
                    "rss_mb": server.memory,
                    "faults": [],
                }
        for step, load in loads.items():
            for server in servers:
                if load.mode == "ws" and server.peer.websocket is None:
                    continue
                result = results[server.peer.name][step] = bench.measure(server, load)
                brief = " ".join(result["faults"]) or f"{result['per_second']:.1f}/s"
                print(f"  {step:8} {server.peer.name:12} {brief}", file=sys.stderr)
    return results


def tabulate(runs: Sequence[dict[str, Any]], peers: Sequence[str]) -> list[dict[str, Any]]:
    """The table's rows: the median of each peer, and of its ratios to the baseline run by run."""
    rows = []
    others = [name for name in peers if name != BASELINE and BASELINE in peers]
    for row in ROWS:
        line: dict[str, Any] = dataclasses.asdict(row) | {"values": {}, "ratios": {}}
        series: dict[str, list[float] | None] = {}
        for name in peers:
            results = [run[name].get(row.step) for run in runs]
            if None in results:
                continue  # not asked for, or a peer without a WebSocket
            valid = not any(result["faults"] for result in results)
            series[name] = [result[row.field] for result in results] if valid else None
            values = series[name]
            line["values"][name] = None if values is None else statistics.median(values)
        for name in others:
            ours, base = series.get(name), series.get(BASELINE)
            if ours and base and all(base):
                ratios = [a / b for a, b in zip(ours, base, strict=True)]
                line["ratios"][name] = [min(ratios), statistics.median(ratios), max(ratios)]
        if series:
            rows.append(line)
    return rows


def markdown(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> str:
    others = [name for name in peers if name != BASELINE and BASELINE in peers]
    head = ["measured", "better", *peers, *(f"{n}/{BASELINE}: min, median, max" for n in others)]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in rows:
        cells = [row["title"], row["better"]]
        for name in peers:
            value = row["values"].get(name, "")
            if isinstance(value, int | float):
                value = f"{value:,.{row['digits']}f}"
            cells.append("INVALID" if value is None else str(value))
        for name in others:
            low, middle, high = row["ratios"].get(name) or (None, None, None)
            cells.append(f"{low:.2f}, **{middle:.2f}**, {high:.2f}" if middle else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine(cores: Sequence[int], loop: str, runs: int, quick: bool) -> str:
    """One line that says where the numbers come from."""
    model = "unknown processor"
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        model = next(
            (x.split(": ")[1].strip() for x in cpuinfo if x.startswith("model name")), model
        )
    stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    software = f"Python {platform.python_version()}, aiohttp {version('aiohttp')}"
    software += f", uvloop {version('uvloop')}" if loop == "uvloop" else ", asyncio's loop"
    measured = f"{runs} run{'s' if runs > 1 else ''}{', --quick' if quick else ''}"
    return (
        f"{stamp}; {model}, cores {cores[0]} (server) and {cores[1]} (load) of {os.cpu_count()}; "
        f"Linux {platform.release()}; {software}; {measured}"
    )


def remarks(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know: what is invalid and why, and how noisy the machine was."""
    found, noise, late = [], 0.0, 0.0
    for number, run in enumerate(runs, 1):
        for name, steps in run.items():
            for step, result in steps.items():
                if result["faults"]:
                    found.append(f"INVALID: {name}, {step}, run {number}: {result['faults']}")
                noise = max(noise, result.get("foreign_share") or 0.0)
                late = max(late, result.get("provider_late_p99_ms") or 0.0)
    found.append(f"Others used at most {noise:.0%} of the two cores in a step (quiet: under 5%).")
    found.append(f"The mock provider was at most {late:.1f} ms late (p99 of a step).")
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="half as long, and one run")
    parser.add_argument("--only", default="aioserver,bare", help="comma-separated servers")
    parser.add_argument("--steps", default=",".join(LOADS), help="comma-separated steps")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--runs", type=int, help="default 3; with --quick 1")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    chosen = parser.parse_args()
    chosen.peers = chosen.only.split(",")
    chosen.steps = chosen.steps.split(",")
    chosen.runs = chosen.runs or (1 if chosen.quick else 3)
    for wanted, known in ((chosen.peers, PEERS), (chosen.steps, LOADS)):
        for name in wanted:
            if name not in known:
                parser.error(f"{name!r} is none of {', '.join(known)}")
    return chosen


def main() -> int:
    chosen = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for the server, one for the load")
    os.sched_setaffinity(0, {cores[1]})  # keep out of the servers' way ourselves
    subprocess.run(["make", "-s", "-C", str(HARNESS)], check=True, timeout=120)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # inherited by what we start

    loads = {step: LOADS[step] for step in LOADS if step in chosen.steps}
    if chosen.quick:
        loads = {step: load.shortened() for step, load in loads.items()}
    peers = [PEERS[name] for name in chosen.peers]
    runs = []
    with tempfile.TemporaryDirectory(prefix="aioserver-bench-") as folder:
        bench = Bench(Path(folder), chosen.loop, free_port(), *cores)
        for number in range(1, chosen.runs + 1):
            print(f"run {number} of {chosen.runs}", file=sys.stderr)
            runs.append(one_run(bench, peers, loads))

    rows, notes = tabulate(runs, chosen.peers), remarks(runs)
    where = machine(cores, chosen.loop, chosen.runs, chosen.quick)
    print(f"{where}\n\n{markdown(rows, chosen.peers)}\n")
    print("\n".join(f"- {note}" for note in notes))
    if chosen.json:
        record = {"machine": where, "rows": rows, "notes": notes, "runs": runs}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(note.startswith("INVALID") for note in notes))


if __name__ == "__main__":
    sys.exit(main())

"""What several workers give and cost, and what their server carries.

Ends by itself, in about three minutes.

    python benchmarks/workers.py                  # all tables
    python benchmarks/workers.py --only spread    # of load, spread, server, remote

All share the machine's two cores with the mock provider and the load generator: CPU per answer is
to be trusted, rates are those of this mixture.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
import redis
from certificate import HARNESS
from loads import Load
from measure import Bench, Server, ask, faults
from peers import AIOSERVER, Peer
from process import tree

from tests.support.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORKERS = (1, 2, 4)
WHOLE = Load(mode="http", connections=64)
SPACED = Load(mode="sse", connections=300, chunks=100, interval_ms=20, ramp=2.0, duration=5.0)
SOCKETS = 600
# Places of the provider where the commands of the server are counted, and how many of them are in
# use.
PLACES, PARTS, RATE = 100, (0.3, 0.9), 24_000
# Half a second each.
ANSWERS = Load(mode="sse", connections=0, chunks=25, interval_ms=20, ramp=0.5, duration=5.0)
# Streams that are read at their own instance, twice, and at the other one; and events of each.
STREAMS, EVENTS = 50, 150


def peer(workers: int, redis_url: str | None = None, places: int = 4000) -> Peer:
    """Return aioserver with so many workers.

    Its private server is in the folder of the benchmark.
    """
    config = AIOSERVER.replace("workers: 1", f"workers: {workers}")
    config = config.replace("concurrent_requests: 4000", f"concurrent_requests: {places}")
    if places < 4000:
        # Twice what so many places can start in a minute.
        config = config.replace("requests_per_minute: 100000000", f"requests_per_minute: {RATE}")
    if redis_url is not None:
        config += f"cluster: {{redis_url: {redis_url}}}\n"
    return Peer(
        name="aioserver",
        command=(
            *("env", "RUNTIME_DIRECTORY=$folder", "$python", "-m", "aioserver", "serve"),
            *("--config", "$config", "--port", "$port", "--loop", "$loop"),
        ),
        config=config,
        websocket="/ws/chat",
        events="/events",
    )


@contextlib.contextmanager
def serving(bench: Bench, kind: Peer) -> Iterator[Server]:
    """Run a server on all cores, while the mock provider may be away."""
    with contextlib.ExitStack() as stack:
        with bench.mock(Load(mode="http", connections=1)):
            server = stack.enter_context(bench.server(kind))
        assert server.pid is not None
        for process in tree(server.pid):
            os.sched_setaffinity(process, {bench.server_core, bench.load_core})
        yield server


def memory(pid: int) -> tuple[float, float, float]:
    """Return the proportional set size (PSS) in MB of a worker (mean), the parent, and the private
    server.
    """
    sizes: dict[str, list[float]] = {"worker": [], "parent": [0.0], "server": [0.0]}
    for member in tree(pid):
        rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
        size = int(rollup.split("\nPss:")[1].split()[0]) * 1024 / 1e6
        name = Path(f"/proc/{member}/comm").read_text()
        environ = Path(f"/proc/{member}/environ").read_bytes()
        if "valkey" in name or "redis" in name:
            sizes["server"] = [size]
        elif b"AIOSERVER_WORKER=" in environ:
            sizes["worker"].append(size)
        else:
            sizes["parent"] = [size]
    workers = sizes["worker"] or sizes["parent"]
    return statistics.mean(workers), sizes["parent"][0], sizes["server"][0]


def load(bench: Bench) -> None:
    """Print what 1, 2 and 4 workers do with whole answers and with spaced events, beside one
    process that has the share of the load that each of them has; and their memory.
    """
    shares: dict[int, list[float]] = {}
    with serving(bench, peer(1)) as server:
        for workers in WORKERS:
            results = [
                bench.measure(
                    server, dataclasses.replace(each, connections=each.connections // workers)
                )
                for each in (WHOLE, SPACED)
            ]
            shares[workers] = [result["cpu_us"] for result in results]
    print(
        "\n| workers | whole answers/s | CPU µs each | of one process with a worker's share | "
        "events/s, spaced | CPU µs each | of one process with a worker's share | p99 gap, ms | "
        "PSS of a worker, of the parent, of the server, MB | foreign load |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for workers in WORKERS:
        with serving(bench, peer(workers)) as server:
            assert server.pid is not None
            sizes = memory(server.pid)
            whole, spaced = (bench.measure(server, each) for each in (WHOLE, SPACED))
        for result in (whole, spaced):
            if wrong := faults(result):
                print(f"INVALID with {workers} workers: {wrong}")
        print(
            f"| {workers} | {whole['per_second']:,.0f} | {whole['cpu_us']:.0f} | "
            f"{shares[workers][0]:.0f} | {spaced['chunks_per_second']:,.0f} | "
            f"{spaced['cpu_us']:.0f} | {shares[workers][1]:.0f} | "
            f"{spaced['gap_p99_ms']:.0f} | {', '.join(f'{size:.0f}' for size in sizes)} | "
            f"{max(whole['foreign_share'], spaced['foreign_share']):.0%} |",
            flush=True,
        )


def spread(bench: Bench) -> None:
    """Print how idle WebSockets that come within half a second are spread."""
    print(f"\n| workers | {SOCKETS} WebSockets in 0.5 s: of each worker |\n| ---: | --- |")
    for workers in WORKERS[1:]:
        with serving(bench, peer(workers)) as server, bench.idle(server, SOCKETS, ramp=0.5):
            stats = json.loads(ask(server.port, "GET", "/stats") or b"{}")
            held = sorted(each["connections"] for each in stats["instances"].values())
        print(f"| {workers} | {', '.join(map(str, held))} |", flush=True)


def commands(client: redis.Redis) -> dict[str, float]:
    """Return what the server has done so far. What scripts call is a part of their own call."""
    info: Any = client.info("all")
    calls = {name: info.get(f"cmdstat_{name}", {}) for name in ("evalsha", "eval", "publish")}
    return {
        "settled": calls["evalsha"].get("calls", 0),
        "claims": calls["eval"].get("calls", 0),
        "publications": calls["publish"].get("calls", 0),
        "bytes": info["total_net_input_bytes"] + info["total_net_output_bytes"],
        "cpu": info["used_cpu_user"] + info["used_cpu_sys"],
    }


def server_commands(bench: Bench) -> None:
    """Print what the private server carries for each answer, at two loads of the provider's
    places.
    """
    print(
        f"\n| workers | face | of {PLACES} places in use | answers/s | `settle` per answer | "
        "claims | bytes | CPU of the server, µs |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for workers in WORKERS[1:]:
        with serving(bench, peer(workers, places=PLACES)) as server:
            (path,) = bench.folder.glob("aioserver-*/valkey.sock")
            client = redis.Redis(unix_socket_path=str(path))
            for mode, face in (("sse", "/v1"), ("ws", "WebSocket")):
                for part in PARTS:
                    each = dataclasses.replace(ANSWERS, mode=mode, connections=int(PLACES * part))
                    calls: dict[str, float] = {}
                    result = bench.measure(server, each, during=counted(client, each, calls))
                    if wrong := faults(result):
                        print(f"INVALID: {wrong}")
                    # loadgen counts answers that began within its time.
                    answers = result["per_second"] * each.duration
                    print(
                        f"| {workers} | {face} | {part:.0%} | {result['per_second']:.0f} "
                        f"| {calls['settled'] / answers:.2f} | {calls['claims'] / answers:.2f} "
                        f"| {calls['bytes'] / answers:.0f} | {calls['cpu'] / answers * 1e6:.0f} |",
                        flush=True,
                    )
            client.close()


def counted(
    client: redis.Redis, each: Load, calls: dict[str, float]
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return what counts the server's commands for the measured time of *each*, in a thread."""

    @contextlib.contextmanager
    def counting() -> Iterator[None]:
        import threading  # noqa: PLC0415 - this step alone

        def count() -> None:
            time.sleep(each.ramp + each.warmup)
            before = commands(client)
            time.sleep(each.duration)
            after = commands(client)
            calls.update({name: after[name] - before[name] for name in after})

        thread = threading.Thread(target=count)
        thread.start()
        yield
        thread.join()

    return counting


async def read(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any] | None, times: dict[int, float]
) -> None:
    """Read the stream at *url*, and note when each of its events came."""
    method = "GET" if body is None else "POST"
    async with session.request(method, url, json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"id:"):
                times[int(line[3:])] = time.perf_counter()


async def follow(ports: tuple[int, int], pause: float) -> tuple[list[float], list[float]]:
    """Read streams at their own instance, there once more, and at the other one; return how much
    later the last two are.
    """
    own, other = (f"http://127.0.0.1:{port}/sse/chat" for port in ports)
    local: list[float] = []
    remote: list[float] = []

    async def stream(number: int) -> None:
        name = f"s{time.time_ns()}-{number}"
        readers: list[dict[int, float]] = [{}, {}, {}]
        first, second, third = readers
        async with asyncio.TaskGroup() as group:
            group.create_task(read(session, own, {"request_id": name, "text": "Hello"}, first))
            while not first:  # noqa: ASYNC110 - it is a dictionary
                await asyncio.sleep(0.005)
            group.create_task(read(session, f"{own}/{name}", None, second))
            group.create_task(read(session, f"{other}/{name}", None, third))
        # The first events are those that were there when the readers came.
        numbers = sorted(first)[20:]
        local.extend(second[event] - first[event] for event in numbers)
        remote.extend(third[event] - first[event] for event in numbers)

    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        asyncio.TaskGroup() as group,
    ):
        for number in range(STREAMS):
            group.create_task(stream(number))
            await asyncio.sleep(pause)
    return sorted(local), sorted(remote)


def remote(bench: Bench) -> None:
    """Print how much later an event is at a reader of another instance, and what the server
    carries for it.
    """
    streams = Load(mode="sse", connections=STREAMS, chunks=EVENTS, interval_ms=20)
    with (
        RedisServer(bench.folder) as own,
        serving(bench, peer(1, own.url)) as server,
        serving(bench, peer(1, own.url)) as two,
        bench.mock(streams),
    ):
        client = redis.Redis(unix_socket_path=str(own.path))
        time.sleep(4)  # the provider was away, and the instances have met
        before = commands(client)
        local, elsewhere = asyncio.run(follow((server.port, two.port), 0.02))
        counts = {name: value - before[name] for name, value in commands(client).items()}
        client.close()
    events = STREAMS * EVENTS
    print("\n| reader | p50, ms | p99, ms later than the first reader |\n| --- | ---: | ---: |")
    for name, values in (("a second one there", local), ("at the other instance", elsewhere)):
        p50, p99 = (values[int(len(values) * part)] * 1000 for part in (0.5, 0.99))
        print(f"| {name} | {p50:.2f} | {p99:.2f} |")
    print(
        f"\n{STREAMS} streams of 50 events/s, all read elsewhere as well: "
        f"{counts['publications'] / events:.3f} publications, {counts['bytes'] / events:.0f} "
        f"bytes in and out, and {counts['cpu'] / events * 1e6:.1f} µs of the "
        "server's CPU an event",
        flush=True,
    )


STEPS = {"load": load, "spread": spread, "server": server_commands, "remote": remote}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"comma-separated: {', '.join(STEPS)}")
    chosen = parser.parse_args().only
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended
    subprocess.run(["make", "-s", "-C", str(HARNESS)], check=True, timeout=120)
    cores = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory(prefix="aioserver-bench-") as folder:
        bench = Bench.create(Path(folder), "uvloop", *cores)
        for name in chosen.split(",") if chosen else STEPS:
            print(f"\n{name}: load average {os.getloadavg()[0]:.1f} at its start", flush=True)
            STEPS[name](bench)


if __name__ == "__main__":
    main()

"""What sharing limits costs: calls per start, CPU of the server and of an instance; and the faults
in virtual time.

    python benchmarks/cluster.py            # three processes and a server, half a minute
    python benchmarks/cluster.py --budgets  # of a key's budget of tokens, which is ample
    python benchmarks/cluster.py --faults   # the table of faults, in virtual time, a few seconds

Counts and CPU are to be trusted, rates are those of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from aioserver.errors import AioserverError
from aioserver.wings.cluster.limits.keys import SharedKey
from aioserver.wings.cluster.limits.leased import LeasedCapacity
from aioserver.wings.cluster.limits.leases import Leases
from aioserver.wings.cluster.limits.renewer import Renewer
from tests.support.cluster_simulation import Load, Simulation
from tests.support.redis_server import RedisServer
from tests.support.resources import Line
from tests.support.turns import Turn

if TYPE_CHECKING:
    from collections.abc import Callable

INSTANCES = 3
# The seconds of a request, and those of a run.
REQUEST, RUN = 0.05, 6.0


# Of a budget: the requests' tokens, by the estimate and in fact, and the starts a second of an
# instance.
ESTIMATED, SPENT = 300, 200
PACES = (200, 5)


async def instance(url: str, number: int, limit: int, load: float, pace: float) -> None:
    """Be one instance, with requests for *load* of the limit, and print what it took. A *pace* is
    the starts a second at a key with a budget, instead.
    """
    import random  # noqa: PLC0415 - each process has its own

    name = f"host-{number}-{time.time_ns()}"
    renewer = Renewer(lambda on_due: Leases(name, on_due=on_due), url, "benchmark")
    leases = renewer.leases
    loop = asyncio.get_running_loop()
    line = Line(0, queue_size=10_000, queue_timeout=60.0)
    key = None
    if pace:
        key = SharedKey(
            10_000, 10_000_000, loop.time, leases=leases, name="key", tokens_per_minute=10**9
        )
    else:
        LeasedCapacity(leases, line.scheduler, line.resource, "p:provider", limit)
    await renewer.open()
    waits: list[float] = []

    async def request() -> None:
        began = time.perf_counter()
        if key is None:
            grant = await line.enter()
            end = grant.release
        else:
            try:
                turn = Turn(key.quota, ESTIMATED)
                await turn.begun()
            except AioserverError:
                return  # at the start, before the instances know each other
            end = partial(turn.end, SPENT)
        waits.append(time.perf_counter() - began)
        await asyncio.sleep(REQUEST)
        end()

    rate = pace or load * limit / REQUEST / INSTANCES

    async def requests(seconds: float) -> None:
        end = at = loop.time()
        end += seconds
        async with asyncio.TaskGroup() as group:
            while at < end:
                at += random.expovariate(rate)
                await asyncio.sleep(at - loop.time())
                group.create_task(request())

    await requests(leases.times.grace + leases.times.beat)
    before, cpu = leases.calls, time.process_time()
    waits.clear()
    await requests(RUN)
    waits.sort()
    row = {
        "starts": len(waits),
        "calls": leases.calls - before,
        "cpu": time.process_time() - cpu,
        "p50": waits[len(waits) // 2],
        "p99": waits[len(waits) * 99 // 100],
    }
    print(json.dumps(row))
    await renewer.leave(5.0)
    await renewer.close()


def measure(server: RedisServer, limit: int, load: float, pace: float = 0.0) -> None:
    """Run the instances, and print a row."""
    server.call("FLUSHALL")
    server.call("CONFIG", "RESETSTAT")

    async def run() -> list[bytes]:
        processes = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, __file__, "--instance", str(number), "--url", server.url),
                *("--limit", str(limit), "--load", str(load), "--pace", str(pace)),
                stdout=asyncio.subprocess.PIPE,
            )
            for number in range(INSTANCES)
        ]
        return [(await process.communicate())[0] for process in processes]

    rows = [json.loads(line) for line in asyncio.run(run())]
    statistics = server.call("INFO", "commandstats").decode()
    match = re.search(r"evalsha:calls=(\d+),usec=(\d+)", statistics)
    assert match is not None
    starts, calls = sum(row["starts"] for row in rows), sum(row["calls"] for row in rows)
    cpu = sum(row["cpu"] for row in rows)
    name = f"{pace:10.0f} /s" if pace else f"{limit:6} {load:5.0%}"
    print(
        f"{name} {starts:7} {calls / starts:12.2f} "
        f"{int(match[2]) / starts:15.0f} {cpu / starts * 1e6:13.0f} "
        f"{max(row['p50'] for row in rows) * 1000:8.2f} "
        f"{max(row['p99'] for row in rows) * 1000:8.1f}",
        flush=True,
    )


def costs(*, budgets: bool) -> None:
    """Print the table of costs, of places or of *budgets*."""
    print("places  load  starts  calls/start  server us/start  client us/start  p50 ms  p99 ms")
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        for pace in PACES if budgets else ():
            measure(server, 0, 0.0, pace)
        for limit, load in () if budgets else ((20, 0.3), (20, 0.9), (200, 0.3), (200, 0.9)):
            measure(server, limit, load)


def faults() -> None:
    """Print how many requests are in flight, twice a second, around each fault at 10 s."""

    def away(simulation: Simulation, seconds: float) -> None:
        simulation.kill_server()
        simulation.later(seconds, simulation.start_server)

    def paused(simulation: Simulation) -> None:
        simulation.pause()
        simulation.later(12.0, simulation.go_on)

    def stopped(simulation: Simulation) -> None:
        instance = simulation.instances[0]
        instance.stop()
        simulation.later(12.0, instance.go_on)

    def put_back(simulation: Simulation) -> None:
        simulation.keep()
        simulation.later(0.5, simulation.roll_back)

    def nothing(_simulation: Simulation) -> None:
        """Do nothing."""

    even, uneven = (100, 100, 100), (100, 20, 20)
    table: list[tuple[str, Callable[[Simulation], None], tuple[int, ...], float]] = [
        ("none", nothing, even, 0.0005),
        ("none, the server is 60 ms away", nothing, even, 0.03),
        ("an instance is killed", lambda each: each.instances[0].kill(), even, 0.0005),
        ("an instance is stopped for 12 s", stopped, even, 0.0005),
        ("the server is paused for 12 s", paused, even, 0.0005),
        ("the server is killed, back empty in 3 s", lambda each: away(each, 3.0), even, 0.0005),
        ("the server is emptied", lambda each: each.empty(), even, 0.0005),
        ("the server is put back by 0.5 s", put_back, even, 0.0005),
        ("the server is gone, load 100:20:20", lambda each: away(each, 1e6), uneven, 0.0005),
    ]
    for name, fault, loads, delay in table:
        simulation = Simulation(1, limit=20, delay=delay)
        for load in loads:
            simulation.add(Load(load))
        simulation.advance(10.0)
        fault(simulation)
        peak, row = 0, []
        for _ in range(48):
            row.append(f"{simulation.mean(0.5):.0f}")
            peak = max(peak, simulation.peak)
        starts = sum(each.starts for each in simulation.instances)
        print(f"{name}: peak {peak}, {simulation.calls / starts:.2f} calls per start")
        print("   ", " ".join(row))


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--budgets", action="store_true")
    parser.add_argument("--instance", type=int)
    parser.add_argument("--url")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--load", type=float)
    parser.add_argument("--pace", type=float)
    options = parser.parse_args()
    if options.instance is not None:
        import uvloop  # noqa: PLC0415 - an option

        uvloop.run(
            instance(options.url, options.instance, options.limit, options.load, options.pace)
        )
    elif options.faults:
        faults()
    else:
        costs(budgets=options.budgets)


if __name__ == "__main__":
    main()

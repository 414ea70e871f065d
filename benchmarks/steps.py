"""The steps of a run: each puts one load, or a few, on one server and returns its numbers."""

import contextlib
import dataclasses
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator

from firehose import reading
from large import sending
from loads import Load, agents, paced, stalled
from measure import Bench, Result, Server, StepFailed, faults, most_sockets
from peers import Peer
from process import Watch, usage

LEVELS = (500, 750, 1000, 1250, 1500, 2000)
IDLE = 10_000  # WebSockets of which the CPU share is taken
IDLE_SECONDS = 40  # two whole rounds of aioserver's pings, whatever their phase
FEW, MANY = 100, 4_000  # idle WebSockets beside the plain requests
IDLE_LEVELS = (FEW, 1_000, 2_000, MANY, 8_000)
CURVE = (50, 100, 250, 500, 750, 1000, 1250, 1500)  # streams
BODIES = (100, 400, 1000, 2000)  # kB of an agent's requests
WATCHERS = 200  # of the server's state
LEAVING = 100  # clients that leave
PLACES, CROWD = 200, 1000  # max_connections of the tight configuration, and who comes at once
RUSH, RUSH_SECONDS = 10_000, 5.0  # clients that come to a full house
ARRIVALS, OVERLOAD_SECONDS = 180, 8.0  # a second, of streams of 1 s: 0.9 of PLACES
MB_LEAST = 200.0  # of the firehose; less proves nothing
MB = 1e6


def plainly(bench: Bench, server: Server, load: Load) -> Result:
    """One load, and what went wrong."""
    result = bench.measure(server, load)
    return result | {"faults": faults(result)}


def over_tls(bench: Bench, server: Server, load: Load) -> Result:
    """The same on a server that reaches its provider over TLS."""
    with fresh(bench, server.peer, tls=True) as encrypting:
        return plainly(bench, encrypting, load)


def held(bench: Bench, server: Server, load: Load) -> Result:
    """The most streams at once of `LEVELS` that are held; the first that are not end it.

    A level that fails is tried a second time: it may have been somebody else's fault.
    """
    streams, why, levels = 0, "", []
    for count in LEVELS:
        for _ in range(2):
            result = bench.measure(server, dataclasses.replace(load, connections=count))
            why = ", ".join(missed(result, count))
            levels.append(result | {"streams": count, "missed": why})
            bench.recover(server)
            if not why:
                break
        if why:
            break
        streams = count
    verdict = f"fails at {count}: {why}" if why else "holds all that was tried"
    return {
        "streams": streams,
        "levels": levels,
        "notes": [verdict] if streams else [],
        "faults": [] if streams else [verdict],
    }


def missed(result: Result, streams: int) -> list[str]:
    """Which of the conditions of a held level *result* does not fulfil."""
    problems = faults(result, ignored=("unfinished", "ok"))  # it ends before its streams do
    if result["gap_p99_ms"] >= 100:
        problems.append(f"p99 gap {result['gap_p99_ms']:.0f} ms")
    if result["ttft_p99_ms"] >= 1000:
        problems.append(f"p99 first token {result['ttft_p99_ms']:.0f} ms")
    if result["chunks_per_second"] <= 0.9 * streams * 50:
        problems.append(f"{result['chunks_per_second']:.0f} events/s of {streams * 50}")
    if result["peak_active"] <= 0.95 * streams:
        problems.append(f"{result['peak_active']} streams at once")
    return problems


@contextlib.contextmanager
def fresh(
    bench: Bench, peer: Peer, config: str | None = None, *, tls: bool = False
) -> Iterator[Server]:
    """A server of its own for a step: memory that was freed before is used again."""
    with contextlib.ExitStack() as stack:
        with bench.mock(Load(mode="http", connections=1)):
            server = stack.enter_context(bench.server(peer, config=config, tls=tls))
        yield server


def memory(bench: Bench, server: Server, load: Load) -> Result:
    """KiB that a fresh server needs more for each running stream."""
    with fresh(bench, server.peer) as fresh_server:
        result = bench.measure(fresh_server, load)
        result["kib"] = kib_each(result["rss_mb"] - fresh_server.memory, load.connections)
    problems = faults(result, ignored=("unfinished", "ok"))
    if result["unfinished"] != load.connections or result["peak_active"] < load.connections:
        problems.append(f"{result['unfinished']} of {load.connections} streams were there")
    return result | {"faults": problems}


def kib_each(megabytes: float, count: int) -> float:
    return megabytes * MB / 1024 / count


def idle(bench: Bench, server: Server, _load: Load) -> Result:
    """What idle WebSockets cost a fresh server: KiB of memory, and CPU as a share of one core."""
    count = most_sockets(IDLE)
    with fresh(bench, server.peer) as fresh_server:
        assert fresh_server.pid is not None
        with bench.idle(fresh_server, count, ramp=5.0):
            grown = usage(fresh_server.pid)[1] - fresh_server.memory
            watch = Watch((fresh_server.pid,), (bench.server_core,))
            time.sleep(IDLE_SECONDS)
            (cpu,), foreign = watch.read()
    return {
        "connections": count,
        "kib": kib_each(grown, count),
        "cpu_percent": 100 * cpu / IDLE_SECONDS,
        "foreign_share": foreign,
        "notes": [f"{count:,} idle WebSockets over {IDLE_SECONDS} s"],
        "faults": [],
    }


def curve(bench: Bench, server: Server, load: Load) -> Result:
    """Gaps and CPU at more and more streams, until the server no longer keeps up; for graph.py."""
    levels = []
    for count in CURVE:
        result = bench.measure(server, dataclasses.replace(load, connections=count))
        bench.recover(server)
        levels.append(result | {"streams": count})
        if missed(result, count):
            break
    return {"levels": levels, "streams": levels[-1]["streams"], "faults": []}


def crowded(bench: Bench, server: Server, load: Load) -> Result:
    """CPU of a plain request beside few and beside many idle WebSockets."""
    costs, problems = {}, []
    for count in IDLE_LEVELS:
        with bench.idle(server, count, ramp=count / 2000):
            result = bench.measure(server, load)
        costs[count] = result["cpu_us"]
        problems += faults(result)
    few, many = costs[FEW], costs[MANY]
    return {
        "levels": [{"idle": count, "cpu_us": cost} for count, cost in costs.items()],
        "few_us": few,
        "many_us": many,
        "quotient": many / few if few else 0.0,
        "faults": problems,
    }


def agent_bodies(bench: Bench, server: Server, _load: Load) -> Result:
    """CPU of a whole answer to a request of an agent, by the size of its body."""
    result: Result = {"faults": [], "foreign_share": 0.0}
    for kilobytes in BODIES:
        one = bench.measure(server, agents(kilobytes))
        result[f"kb{kilobytes}_us"] = one["cpu_us"]
        result["foreign_share"] = max(result["foreign_share"], one["foreign_share"])
        result["faults"] += faults(one)
    return result


def watched(bench: Bench, server: Server, load: Load) -> Result:
    """CPU of a plain request while nobody and while many watch the server's state."""
    alone = bench.measure(server, load)
    with bench.idle(server, WATCHERS, ramp=1.0, watching=True):
        beside = bench.measure(server, load)
    return {
        "alone_us": alone["cpu_us"],
        "watched_us": beside["cpu_us"],
        "quotient": beside["cpu_us"] / alone["cpu_us"] if alone["cpu_us"] else 0.0,
        "faults": faults(alone) + faults(beside),
    }


def leave(bench: Bench, server: Server, load: Load) -> Result:
    """What the provider still sends after its clients have left at their first event, and how
    long.

    Who left is not matched with who was aborted: both are sorted, the n-th goes with the n-th. The
    median of the differences is the median delay where they come in order, and near it elsewhere.
    """
    with bench.mock(load) as mock:
        result = bench.loaded(server, load, mock)
        deadline = time.monotonic() + load.chunks * load.interval_ms / 1000 + 3
        while (over := bench.seen())["aborted"] + over["completed"] < LEAVING:
            if time.monotonic() > deadline:
                raise StepFailed(
                    f"of {LEAVING} answers {over['aborted']} were left by the server and "
                    f"{over['completed']} sent to the end"
                )
            time.sleep(0.1)
    problems = faults(result, ignored=("ok",))
    if result["dropped"] != LEAVING:
        problems.append(f"{result['dropped']} clients have left, not {LEAVING}")
    sent = [events - 1 for _, events in over["aborts"]]
    sent += [load.chunks - 1] * over["completed"]
    left = sorted(result["drop_times_ns"])
    closed = sorted(at for at, _ in over["aborts"])
    delays = [(b - a) / 1e6 for a, b in zip(left, closed, strict=False)]
    return {
        "close_ms": statistics.median(delays) if delays else load.chunks * load.interval_ms,
        "sent_after": statistics.median(sent),
        "to_the_end": over["completed"],
        "aborts": over["aborts"],
        "faults": problems,
    }


def refuse(bench: Bench, server: Server, load: Load) -> Result:
    """How long a refusal takes, of five times as many clients as there are places."""
    result: Result = {"faults": []}
    for mode in ("sse", "ws"):
        with fresh(bench, server.peer, server.peer.tight) as tight:
            answer = bench.measure(tight, dataclasses.replace(load, mode=mode))
        for percentile in ("p50", "p99"):
            result[f"{mode}_{percentile}_ms"] = answer[f"refuse_{percentile}_ms"]
        result[mode] = answer
        if (answer["ok_total"], answer["refused"]) != (PLACES, CROWD - PLACES):
            result["faults"].append(
                f"{mode}: {answer['ok_total']} were served, {answer['refused']} refused, "
                f"{answer['io_errors']} lost connections"
            )
    return result


def large(bench: Bench, server: Server, load: Load) -> Result:
    """How long others wait beside a client that sends the largest body each second."""
    alone = bench.measure(server, load)
    seen: Result = {}
    result = bench.measure(
        server, load, during=lambda: sending(server.port, server.peer.path, seen)
    )
    problems = faults(alone) + faults(result)
    if not seen["answered"] or seen["answered"] < seen["sent"]:
        problems.append(f"{seen['answered']} of {seen['sent']} large bodies were answered")
    names = ("gap_p99_ms", "gap_max_ms", "foreign_share", "provider_late_p99_ms")
    waits = {name: result[name] for name in names}
    note = (
        f"the longest gap was {alone['gap_max_ms']:.0f} ms without the large bodies; the slowest "
        f"of {seen['sent']} of them took {seen['slowest']:.1f} s"
    )
    return waits | {"alone": alone, "beside": result, "notes": [note], "faults": problems}


def firehose(bench: Bench, server: Server, load: Load) -> Result:
    """How long others wait beside one answer that comes as fast as it can be sent."""
    alone = bench.measure(server, load)
    seen: Result = {}
    result = bench.measure(
        server, load, during=lambda: reading(server.port, server.peer.path, seen)
    )
    problems = faults(alone) + faults(result)
    if seen["megabytes"] < MB_LEAST:
        problems.append(f"only {seen['megabytes']:.0f} MB came of the firehose")
    names = ("gap_p99_ms", "foreign_share", "provider_late_p99_ms")
    return {name: result[name] for name in names} | {
        "quotient": result["gap_p99_ms"] / alone["gap_p99_ms"],
        "alone": alone,
        "beside": result,
        "notes": [
            f"{seen['megabytes']:,.0f} MB of the firehose in {load.ramp + load.duration:.0f} s"
        ],
        "faults": problems,
    }


def rush(bench: Bench, server: Server, load: Load) -> Result:
    """How soon a crowd is refused that comes to a full house, and what it does to those inside."""
    count = most_sockets(RUSH)
    crowd = Load(
        mode="sse",
        connections=count,
        chunks=load.chunks,
        ramp=RUSH_SECONDS,
        warmup=0.0,
        duration=0.5,
        options=("--once",),
    )
    seen: Result = {}
    with fresh(bench, server.peer, server.peer.tight) as tight:
        alone = bench.measure(tight, load)
        inside = bench.measure(
            tight, load, during=lambda: bench.beside(tight, crowd, seen, after=1.0)
        )
    problems = faults(alone) + faults(inside)
    if seen["refused"] != count:
        problems.append(
            f"{seen['refused']} of {count} were refused, {seen['ok_total']} served, "
            f"{seen['io_errors']} lost connections"
        )
    return {
        "refuse_p99_ms": seen["refuse_p99_ms"],
        "gap_p99_ms": inside["gap_p99_ms"],
        "foreign_share": inside["foreign_share"],
        "alone": alone,
        "inside": inside,
        "crowd": seen,
        "notes": [
            f"{count:,} clients came; without them the p99 gap was {alone['gap_p99_ms']:.0f} ms"
        ],
        "faults": problems,
    }


def overload(bench: Bench, server: Server, load: Load) -> Result:
    """What five times as many clients as there is room for do to those that are admitted."""
    with fresh(bench, server.peer, server.peer.tight) as tight:
        once = bench.measure(tight, load)
        five = dataclasses.replace(load, connections=5 * load.connections)
        result = bench.measure(tight, five)
    problems = [
        f"{name}={once[name]}" for name in ("truncated", "seq_bad", "io_errors") if once[name]
    ]
    problems += [
        f"{name}={result[name]}" for name in ("truncated", "seq_bad", "io_errors") if result[name]
    ]
    if once["refused"] or not result["refused"]:
        problems.append(f"{once['refused']} were refused at 1x, {result['refused']} at 5x")
    return {
        "refuse_p95_ms": result["refuse_p95_ms"],
        "quotient": result["latency_p50_ms"] / once["latency_p50_ms"],
        "foreign_share": result["foreign_share"],
        "once": once,
        "five": result,
        "faults": problems,
    }


def restart(bench: Bench, server: Server, load: Load) -> Result:
    """What clients lose when the server is told to stop and another starts on its port at once."""
    peer = server.peer
    with contextlib.ExitStack() as stack:

        @contextlib.contextmanager
        def replaced() -> Iterator[None]:
            assert old.pid is not None
            time.sleep(load.warmup)
            os.kill(old.pid, signal.SIGTERM)
            stack.enter_context(bench.server(peer, port=old.port))
            yield

        with bench.mock(load) as mock:
            old = stack.enter_context(bench.server(peer))
            result = bench.loaded(old, load, mock, during=replaced)
    refused = sum(count for status, count in result["status"].items() if int(status) >= 400)
    problems = [f"{name}={result[name]}" for name in ("seq_bad", "unfinished") if result[name]]
    if not result["ok"]:
        problems.append("nothing was measured")
    return result | {"turned_away": refused, "faults": problems}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is done, with which load, and of whom."""

    load: Load
    do: Callable[[Bench, Server, Load], Result] = plainly
    once: bool = False  # in the first run only
    quick: bool = False  # is in --quick
    extra: bool = False  # is done only where --steps names it
    tls: bool = False  # needs a mock provider that was built with OpenSSL
    direct: bool = False  # is done with the mock provider itself, too
    needs: Callable[[Peer], object] = lambda _peer: True


def websocket(peer: Peer) -> object:
    return peer.websocket


HTTP = Load(mode="http", connections=64)
# What takes a server to its limits comes last.
STEPS = {
    "plain": Step(load=HTTP, quick=True),
    "fast": Step(load=Load(mode="sse", connections=64), quick=True),
    "fast10": Step(load=Load(mode="sse", connections=64, chunks=10), quick=True),
    "sse500": Step(load=paced("sse", 500), quick=True),
    "tlsplain": Step(load=HTTP, do=over_tls, tls=True),
    "tls500": Step(load=paced("sse", 500), do=over_tls, tls=True),
    "sse1000": Step(load=paced("sse", 1000)),
    "ws500": Step(load=paced("ws", 500), quick=True, needs=websocket),
    "rws500": Step(load=paced("rws", 500), quick=True, needs=lambda peer: peer.responses),
    "first": Step(load=paced("sse", 750, warmup=0.5, duration=2.5), direct=True),
    "leave": Step(
        load=paced(
            *("sse", LEAVING),
            ramp=0.0,
            warmup=0.0,
            duration=1.0,
            mock=("--ttft-ms", "50"),
            options=("--count", str(LEAVING), "--drop-after", "1"),
        ),
        do=leave,
        once=True,
        quick=True,
    ),
    "agents": Step(load=HTTP, do=agent_bodies),
    "crowded": Step(load=HTTP, do=crowded, once=True, needs=websocket),
    "watched": Step(load=HTTP, do=watched, once=True, quick=True, needs=lambda peer: peer.events),
    "large": Step(
        load=paced("sse", 50, ramp=1.0, warmup=0.5, duration=5.0, drain=5.0),
        do=large,
        once=True,
        needs=lambda peer: peer.tight,
    ),
    "restart": Step(
        load=Load(
            mode="sse",
            connections=64,
            chunks=25,
            interval_ms=20,
            ramp=0.5,
            warmup=1.0,
            duration=5.0,
        ),
        do=restart,
        once=True,
        quick=True,
        needs=lambda peer: peer.restarts,
    ),
    "refuse": Step(
        load=paced("sse", CROWD, ramp=1.0, warmup=0.0, duration=3.0, options=("--once",)),
        do=refuse,
        quick=True,
        needs=lambda peer: peer.tight,
    ),
    "firehose": Step(load=paced("sse", 500), do=firehose, once=True),
    "rush": Step(
        # Streams of 12 s, all there from the start.
        load=paced("sse", PLACES, chunks=600, ramp=0.0, warmup=0.0, duration=1.0, drain=15.0),
        do=rush,
        once=True,
        needs=lambda peer: peer.tight,
    ),
    "overload": Step(
        load=paced(
            *("sse", int(ARRIVALS * OVERLOAD_SECONDS)),
            chunks=50,
            ramp=OVERLOAD_SECONDS,
            warmup=-OVERLOAD_SECONDS,  # all of them are measured
            duration=OVERLOAD_SECONDS + 0.5,
            options=("--once",),
        ),
        do=overload,
        once=True,
        needs=lambda peer: peer.tight,
    ),
    "memory": Step(load=stalled("sse", 1000), do=memory, once=True),
    "wsmemory": Step(load=stalled("ws", 1000), do=memory, once=True, needs=websocket),
    "idle": Step(load=HTTP, do=idle, once=True, needs=websocket),
    "curve": Step(
        load=paced("sse", 0, warmup=0.5, duration=3.0, drain=0.5), do=curve, once=True, extra=True
    ),
    "held": Step(load=paced("sse", 0, warmup=0.5, duration=3.0, drain=0.5), do=held, once=True),
    "wsheld": Step(
        load=paced("ws", 0, warmup=0.5, duration=3.0, drain=0.5),
        do=held,
        once=True,
        needs=websocket,
    ),
}

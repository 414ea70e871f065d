"""Measure aioserver against a bare aiohttp pass-through, side by side, and print the table.

    python benchmarks/run.py [--quick] [--only aioserver,bare] [--loop uvloop|asyncio] [--runs N]
                             [--steps plain,fast,…] [--peers] [--loaded] [--json FILE]

The servers have one core for themselves, the mock provider and the load generator another. In each
run all servers are up and every step goes over them in an order of its own, so that what disturbs
the machine disturbs both halves of a ratio; where others use more than a twentieth of the cores it
ends. What each row means is in README.md beside this file.

Exit code: 0 done, 1 a row is INVALID, 2 wrong usage.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import virtual
from certificate import HARNESS, Encrypted
from measure import Bench, Result, Server, StepFailed
from peers import DIRECT, PEERS, Peer
from process import QUIET, wait_for_quiet
from steps import STEPS, Step
from table import Run, brief, distances, machine, markdown, remarks, summary, tabulate


def attempt(step: str, peer: Peer, do: Callable[..., Result], *arguments: object) -> Result:
    """The result of a step.

    One that goes wrong in whatever way is INVALID, and the run goes on.
    """
    try:
        result = do(*arguments)
    except StepFailed as error:
        result = {"faults": [str(error)]}
    except (OSError, subprocess.SubprocessError, LookupError, ValueError) as error:
        result = {"faults": [f"{type(error).__name__}: {error}"]}
    print(f"  {step:8} {peer.name:12} {brief(step, result)}", file=sys.stderr)
    return result


def one_run(bench: Bench, peers: Sequence[Peer], steps: dict[str, Step], *, loaded: bool) -> Run:
    """Every step over every peer, in an order of its own. *loaded*: also beside other programs."""
    cores = (bench.server_core, bench.load_core)
    results: Run = {peer.name: {} for peer in (DIRECT, *peers)}
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:

        def start(peer: Peer) -> Result:
            servers.append(server := stack.enter_context(bench.server(peer)))
            return {"seconds": server.took, "rss_mb": server.memory, "faults": []}

        with bench.mock(STEPS["plain"].load):
            for peer in peers:
                results[peer.name]["start"] = attempt("start", peer, start, peer)
        for name, step in steps.items():
            order = [Server(DIRECT, bench.provider, None)] * step.direct + servers
            # What disturbs the machine for a while must not always meet the same server.
            random.shuffle(order)
            if not loaded and (share := wait_for_quiet(cores)) > QUIET:
                raise SystemExit(
                    f"others use {share:.0%} of the cores: the numbers of {name} would say nothing "
                    "(--loaded measures nevertheless)"
                )
            for server in order:
                peer = server.peer
                if step.needs(peer) and name in (peer.steps or steps):
                    results[peer.name][name] = attempt(
                        name, peer, step.do, bench, server, step.load
                    )
    return results


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="short, cheap steps, and one run")
    parser.add_argument("--only", help="comma-separated servers; default: all that are installed")
    parser.add_argument("--peers", action="store_true", help="install and measure LiteLLM, too")
    parser.add_argument("--steps", help="comma-separated steps")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--runs", type=int, help="default 3; with --quick 1")
    parser.add_argument("--loaded", action="store_true", help="measure beside other programs, too")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    chosen = parser.parse_args()
    installed = [
        name
        for name, peer in PEERS.items()
        if not peer.requirement and (not peer.program or shutil.which(peer.program))
    ]
    cheap = [
        name for name, step in STEPS.items() if (step.quick or not chosen.quick) and not step.extra
    ]
    chosen.only = chosen.only.split(",") if chosen.only else installed
    chosen.steps = chosen.steps.split(",") if chosen.steps else cheap
    chosen.runs = chosen.runs or (1 if chosen.quick else 3)
    for wanted, known in ((chosen.only, PEERS), (chosen.steps, STEPS)):
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
    for name, peer in PEERS.items():
        if chosen.peers and peer.requirement and name not in chosen.only:
            why = virtual.install(name, peer.requirement)
            if why:
                print(f"{name} is left out, it cannot be installed: {why}", file=sys.stderr)
            else:
                chosen.only.append(name)

    steps = {name: step for name, step in STEPS.items() if name in chosen.steps}
    if not Encrypted.supported():
        print("OpenSSL's headers are not installed: no step with TLS", file=sys.stderr)
        steps = {name: step for name, step in steps.items() if not step.tls}
    if chosen.quick:
        steps = {
            name: dataclasses.replace(step, load=step.load.shortened())
            for name, step in steps.items()
        }
    peers = [PEERS[name] for name in chosen.only]
    runs = []
    with tempfile.TemporaryDirectory(prefix="aioserver-bench-") as folder:
        bench = Bench.create(Path(folder), chosen.loop, *cores)
        for number in range(1, chosen.runs + 1):
            print(f"run {number} of {chosen.runs}", file=sys.stderr)
            due = {name: step for name, step in steps.items() if number == 1 or not step.once}
            runs.append(one_run(bench, peers, due, loaded=chosen.loaded))

    rows, notes = tabulate(runs, chosen.only), remarks(runs)
    where = machine(cores, chosen.loop, chosen.runs, chosen.quick)
    print(f"{where}\n\n{summary(rows)}\n\n{markdown(rows, chosen.only)}\n")
    print("\n".join(f"- {note}" for note in [*notes, *distances(rows)]))
    if chosen.json:
        record = {"machine": where, "rows": rows, "notes": notes, "runs": runs}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(note.startswith("INVALID") for note in notes))


if __name__ == "__main__":
    sys.exit(main())

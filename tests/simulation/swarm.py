"""The command: many seeds, in several processes; what fails is shown with the command that repeats
it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import subprocess
import sys
from dataclasses import dataclass, field
from time import perf_counter

from tests.simulation.clock import fix_hashes, processor_time
from tests.simulation.shrink import Run, shrunk

# Violations of a run that are shown.
SHOWN = 8


@dataclass(slots=True)
class Total:
    """What came of some seeds; *ends* has how many clients ended in which way."""

    seeds: int = 0
    failed: int = 0
    clients: int = 0
    connections: int = 0
    # Seconds in which a processor was busy with them; not a part of what the same seed repeats.
    seconds: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)
    # How often something happened between instances that a fault explains.
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, other: Total) -> None:
        """Add what came of other seeds."""
        self.seeds += other.seeds
        self.failed += other.failed
        self.clients += other.clients
        self.connections += other.connections
        self.seconds += other.seconds
        for mine, others in ((self.ends, other.ends), (self.counts, other.counts)):
            for name, count in others.items():
                mine[name] = mine.get(name, 0) + count


def main() -> None:
    """Run the seeds that the command line names; exit with 1 if one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", default="0-19", help="A-B or A, or several of them: A-B,C")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--instances", type=int, default=1, help="servers behind one balancer")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--without", default="", help="faults, habits and operations to leave out")
    parser.add_argument("--only", default="", help="numbers of the clients that take part")
    parser.add_argument("--shrink", action="store_true", help="look for the smallest failing part")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    fix_hashes("tests.simulation")
    prepare()
    seeds = _seeds_of(args.seeds)
    began = perf_counter()
    total = _in_processes(seeds, args.jobs) if args.jobs > 1 else _run(seeds, args)
    if args.json:
        print(json.dumps(dataclasses.asdict(total)))
    else:
        print(
            f"{total.seeds} seeds, {total.clients:,} clients, {total.connections:,} connections: "
            f"{total.failed} seeds failed, {perf_counter() - began:.0f} s "
            f"({1000 * total.seconds / max(1, total.clients):.2f} s of a "
            "processor for 1,000 clients)"
        )
        ends = sorted(total.ends.items(), key=lambda end: -end[1])
        print(", ".join(f"{end} {count:,}" for end, count in ends))
        if total.counts:
            print(", ".join(f"{name}: {count:,}" for name, count in sorted(total.counts.items())))
    sys.exit(total.failed > 0)


def _seeds_of(text: str) -> list[int]:
    """Return the seeds that the command line names."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def _named(seeds: list[int]) -> str:
    """Return the name of *seeds* on a command line."""
    if seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def prepare() -> None:
    """Make the process ready for runs: nothing is logged, and what is loaded is never garbage."""
    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.freeze()


def _in_processes(seeds: list[int], jobs: int) -> Total:
    """Run *seeds* in *jobs* processes, each of which takes its share."""
    size = -(-len(seeds) // jobs)
    command = [sys.executable, "-m", "tests.simulation", *sys.argv[1:], "--json", "--jobs", "1"]
    workers = [
        subprocess.Popen(
            # The last of an option counts.
            [*command, "--seeds", _named(share)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(jobs)
        if (share := seeds[number * size : (number + 1) * size])
    ]
    total = Total()
    for worker in workers:
        assert worker.stdout is not None
        *lines, last = worker.stdout.read().splitlines() or [""]
        if worker.wait() not in (0, 1):
            raise SystemExit(f"a process of the run has died: {worker.returncode}")
        for line in lines:
            print(line)
        total.add(Total(**json.loads(last)))
    return total


def _run(seeds: list[int], args: argparse.Namespace) -> Total:
    """Run *seeds* one after another."""
    without = tuple(name for name in args.without.split(",") if name)
    only = tuple(int(number) for number in args.only.split(",") if number) or None
    total = Total()
    for seed in seeds:
        began = processor_time()
        run = Run(seed, args.clients, args.instances, without, only)
        outcome = run.play()
        seconds = processor_time() - began
        taken = args.clients if only is None else len(only)
        failed = bool(outcome.violations)
        ends, counts = dict(outcome.ends), dict(outcome.counts)
        total.add(Total(1, failed, taken, outcome.connections, seconds, ends, counts))
        if failed:
            if args.shrink:
                run, outcome = shrunk(run, outcome)
            print(f"FAILED: {run.command()}")
            for violation in outcome.violations[:SHOWN]:
                print(f"  {violation}")
            sys.stdout.flush()
        if args.verbose:
            print(
                f"seed {seed}: {seconds:.1f} s for {outcome.virtual_seconds:.0f} s, "
                f"{outcome.connections} connections, {dict(outcome.ends.most_common(8))}",
                flush=True,
            )
    return total

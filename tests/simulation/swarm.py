"""The command: many seeds, in several processes, and the smallest part of a run that still fails."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from tests.simulation import plan as plans
from tests.simulation.world import play

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from tests.simulation.plan import Plan
    from tests.simulation.world import Outcome


@dataclass(slots=True)
class Total:
    """What came of some seeds; *ends* has how many clients ended in which way."""

    seeds: int = 0
    failed: int = 0
    clients: int = 0
    connections: int = 0
    ends: dict[str, int] = field(default_factory=dict)

    def add(self, other: Total) -> None:
        """Add what came of other seeds."""
        self.seeds += other.seeds
        self.failed += other.failed
        self.clients += other.clients
        self.connections += other.connections
        for end, count in other.ends.items():
            self.ends[end] = self.ends.get(end, 0) + count


def main() -> None:
    """Run the seeds that the command line names; exit with 1 if one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", default="0-19", help="A-B or A")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--without", default="", help="faults, habits and operations to leave out")
    parser.add_argument("--only", default="", help="numbers of the clients that take part")
    parser.add_argument("--shrink", action="store_true", help="look for the smallest failing part")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets of texts is a part of a run.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    logging.disable(logging.CRITICAL)
    first, _, last = args.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    began = perf_counter()
    total = _in_processes(seeds, args.jobs) if args.jobs > 1 else _run(seeds, args)
    if args.json:
        print(json.dumps(dataclasses.asdict(total)))
    else:
        print(
            f"{total.seeds} seeds, {total.clients:,} clients, {total.connections:,} connections: "
            f"{total.failed} seeds failed, {perf_counter() - began:.0f} s"
        )
        ends = sorted(total.ends.items(), key=lambda end: -end[1])
        print(", ".join(f"{end} {count:,}" for end, count in ends))
    sys.exit(total.failed > 0)


def _in_processes(seeds: range, jobs: int) -> Total:
    """Run *seeds* in *jobs* processes, each of which takes its share."""
    size = -(-len(seeds) // jobs)
    workers = [
        subprocess.Popen(
            # The last of an option counts.
            [
                *(
                    sys.executable,
                    "-m",
                    "tests.simulation",
                    *sys.argv[1:],
                    "--json",
                    "--jobs",
                    "1",
                ),
                *("--seeds", f"{share[0]}-{share[-1]}"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(jobs)
        if (share := seeds[number * size : (number + 1) * size])
    ]
    total = Total()
    for worker in workers:
        assert worker.stdout is not None
        *lines, last = worker.stdout.read().splitlines()
        worker.wait()
        for line in lines:
            print(line)
        total.add(Total(**json.loads(last)))
    return total


def _run(seeds: range, args: argparse.Namespace) -> Total:
    """Run *seeds* one after another."""
    without = [name for name in args.without.split(",") if name]
    only = [int(number) for number in args.only.split(",") if number] or None
    total = Total()
    for seed in seeds:
        began = perf_counter()
        outcome = play(_reduced(plans.draw(seed, args.clients), without), only)
        taken = args.clients if only is None else len(only)
        failed = bool(outcome.violations)
        total.add(Total(1, failed, taken, outcome.connections, outcome.ends))
        if failed:
            _report(outcome, args.clients, without, only, shrink=args.shrink)
        if args.verbose:
            print(
                f"seed {seed}: {perf_counter() - began:.1f} s for {outcome.virtual_seconds:.0f} s, "
                f"{outcome.connections} connections, {dict(outcome.ends.most_common(8))}",
                flush=True,
            )
    return total


def _reduced(plan: Plan, without: Collection[str]) -> Plan:
    """Return *plan* without some faults, habits and operations."""
    return dataclasses.replace(
        plan,
        faults={name: share for name, share in plan.faults.items() if name not in without},
        habits={name: share for name, share in plan.habits.items() if name not in without},
        operations={name: at for name, at in plan.operations.items() if name not in without},
        provider_fault_share=0.0 if "provider" in without else plan.provider_fault_share,
    )


def _report(
    outcome: Outcome,
    clients: int,
    without: Sequence[str],
    only: Sequence[int] | None,
    *,
    shrink: bool,
) -> None:
    seed = outcome.plan.seed
    if shrink:
        without, only, outcome = _shrunk(seed, clients, without, only, outcome)
    command = f"python -m tests.simulation --seeds {seed} --clients {clients}"
    if without:
        command += f" --without '{','.join(without)}'"
    if only is not None:
        command += f" --only {','.join(map(str, only))}"
    print(f"FAILED: {command}")
    for violation in outcome.violations[:8]:
        print(f"  {violation}")
    sys.stdout.flush()


def _shrunk(
    seed: int,
    clients: int,
    without: Sequence[str],
    only: Sequence[int] | None,
    outcome: Outcome,
) -> tuple[list[str], list[int] | None, Outcome]:
    """Leave out what the failure does not need: first faults, then clients (Zeller's ddmin, 2002)."""
    plan = plans.draw(seed, clients)
    left_out = list(without)
    members = list(range(clients)) if only is None else list(only)

    def fails(absent: Sequence[str], present: Sequence[int]) -> Outcome | None:
        result = play(_reduced(plan, absent), present)
        return result if result.violations else None

    for name in (*plan.faults, *plan.habits, *plan.operations, "provider"):
        if name not in left_out and (found := fails([*left_out, name], members)):
            left_out.append(name)
            outcome = found
    size = len(members) // 2
    while size:
        start = 0
        while start < len(members) and len(members) > 1:
            rest = members[:start] + members[start + size :]
            if rest and (found := fails(left_out, rest)):
                members, outcome = rest, found
            else:
                start += size
        size //= 2
    return left_out, members, outcome

"""The command: many seeds, in several processes, and the smallest part of a run that still fails."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import multiprocessing
import os
import sys
from collections import Counter
from time import perf_counter
from typing import TYPE_CHECKING

from tests.simulation import plan as plans
from tests.simulation.world import play

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from tests.simulation.plan import Plan
    from tests.simulation.world import Outcome


def main() -> None:
    """Run the seeds that the command line names; exit with 1 if one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", default="0-19", help="A-B or A")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--without", default="", help="faults, habits and operations to leave out")
    parser.add_argument("--only", default="", help="numbers of the clients that take part")
    parser.add_argument("--shrink", action="store_true", help="look for the smallest failing part")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets of texts is a part of a run.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    logging.disable(logging.CRITICAL)
    first, _, last = args.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    without = [name for name in args.without.split(",") if name]
    only = [int(number) for number in args.only.split(",") if number] or None
    began, failed, ends, connections = perf_counter(), 0, Counter[str](), 0
    jobs = [(seed, args.clients, without, only) for seed in seeds]
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        results = pool.imap(_one, jobs) if args.jobs > 1 else map(_one, jobs)
        for outcome, seconds in results:
            ends += outcome.ends
            connections += outcome.connections
            if outcome.violations:
                failed += 1
                _report(outcome, args.clients, without, only, shrink=args.shrink)
            if args.verbose:
                print(
                    f"seed {outcome.plan.seed}: {seconds:.1f} s for {outcome.virtual_seconds:.0f} s, "
                    f"{outcome.connections} connections, {dict(outcome.ends.most_common(8))}",
                    flush=True,
                )
    total = len(jobs) * args.clients if only is None else len(jobs) * len(only)
    print(
        f"{len(jobs)} seeds, {total:,} clients, {connections:,} connections: {failed} seeds failed, "
        f"{perf_counter() - began:.0f} s"
    )
    print(", ".join(f"{end} {count:,}" for end, count in ends.most_common(30)))
    sys.exit(failed > 0)


def _one(job: tuple[int, int, Sequence[str], Sequence[int] | None]) -> tuple[Outcome, float]:
    seed, clients, without, only = job
    began = perf_counter()
    outcome = play(_reduced(plans.draw(seed, clients), without), only)
    return outcome, perf_counter() - began


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

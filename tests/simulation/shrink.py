"""The smallest part of a run that still fails: fewer faults, then fewer clients (Zeller's ddmin,
2002).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.simulation import plan as plans
from tests.simulation.clock import processor_time
from tests.simulation.world import play

if TYPE_CHECKING:
    from tests.simulation.plan import Plan
    from tests.simulation.world import Outcome

# Seconds of a processor after which the smallest part so far is good enough.
ENOUGH = 120.0


@dataclass(frozen=True, slots=True)
class Run:
    """A seed, *without* some faults, habits and operations, and with the clients *only*; None: all
    of them.
    """

    seed: int
    clients: int
    instances: int = 1
    without: tuple[str, ...] = ()
    only: tuple[int, ...] | None = None

    def plan(self) -> Plan:
        """Return the plan of this run."""
        groups = "groups" not in self.without
        plan = plans.draw(self.seed, self.clients, self.instances, groups=groups)
        if plan.grouping is not None and "kills" in self.without:
            plan = dataclasses.replace(plan, grouping=dataclasses.replace(plan.grouping, kills=()))
        return dataclasses.replace(
            plan,
            faults=self._kept(plan.faults),
            habits=self._kept(plan.habits),
            operations=self._kept(plan.operations),
            provider_links={} if "links" in self.without else plan.provider_links,
            provider_fault_share=0.0 if "provider" in self.without else plan.provider_fault_share,
            silent=0.0 if "silent" in self.without else plan.silent,
            uploads=0.0 if "uploads" in self.without else plan.uploads,
        )

    def _kept(self, leases: dict[str, float]) -> dict[str, float]:
        return {name: share for name, share in leases.items() if name not in self.without}

    def play(self) -> Outcome:
        """Play it."""
        return play(self.plan(), self.only)

    def command(self) -> str:
        """Return the command that repeats it."""
        command = f"python -m tests.simulation --seeds {self.seed} --clients {self.clients}"
        if self.instances > 1:
            command += f" --instances {self.instances}"
        if self.without:
            command += f" --without '{','.join(self.without)}'"
        if self.only is not None:
            command += f" --only {','.join(map(str, self.only))}"
        return command


def shrunk(run: Run, outcome: Outcome) -> tuple[Run, Outcome]:
    """Leave out what the first violation of *outcome* does not need."""
    wanted, until = _kind(outcome.violations[0]), processor_time() + ENOUGH

    def fails(smaller: Run) -> bool:
        nonlocal run, outcome
        if processor_time() > until:
            return False
        result = smaller.play()
        if wanted not in map(_kind, result.violations):
            return False
        run, outcome = smaller, result
        return True

    plan = run.plan()
    names = (
        *plan.faults,
        *plan.habits,
        *plan.operations,
        "links",
        "provider",
        "silent",
        "uploads",
    )
    names += () if plan.grouping is None else ("groups", "kills")
    for name in names:
        if name not in run.without:
            fails(dataclasses.replace(run, without=(*run.without, name)))
    members = tuple(range(run.clients)) if run.only is None else run.only
    size = len(members) // 2
    while size:
        start = 0
        while start < len(members) and len(members) > 1:
            rest = members[:start] + members[start + size :]
            if rest and fails(dataclasses.replace(run, only=rest)):
                members = rest
            else:
                start += size
        size //= 2
    return run, outcome


def _kind(violation: str) -> str:
    """Return what was broken, without when, and by how much."""
    return re.sub(r"\d+(\.\d+)?|\(.*?\)", "", violation)

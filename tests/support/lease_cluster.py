"""Instances whose calls are carried at once, with the server's script in memory."""

from __future__ import annotations

from aioserver.wings.cluster.limits.lease_messages import SECOND
from aioserver.wings.cluster.limits.leases import Leases
from tests.support.clock import FakeClock
from tests.support.renew_script import Script


class Cluster:
    """Instances of which each call is carried at once, when it is due."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.script = Script()
        self.instances: dict[str, Leases] = {}
        self.away = False

    def add(self, name: str) -> Leases:
        leases = self.instances[name] = Leases(name, clock=self.clock)
        return leases

    def call(self, leases: Leases) -> None:
        request = leases.request("run")
        if self.away:
            leases.failed("away")
            return
        answer, wakes = self.script.renew(request, round(self.clock() * SECOND))
        leases.answered(answer)
        for name, words in wakes.items():
            self.instances[name].woken(words)

    def renew(self) -> None:
        """Carry all calls that are due."""
        for _ in range(100):
            due = [each for each in self.instances.values() if each.due <= self.clock()]
            if not due:
                return
            for each in due:
                self.call(each)
        raise AssertionError("it goes on for ever")

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass, in which nothing is late."""
        while seconds > 1e-9:
            step = min(0.25, seconds)
            self.clock.now += step
            seconds -= step
            self.renew()

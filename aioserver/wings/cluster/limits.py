"""The limits of a provider, shared with other instances: places, starts a minute, and what is
known of its health.

Places, starts and tokens are exact (wings/cluster/grants.py, wings/cluster/rates.py,
wings/cluster/shared_tokens.py). Whether the
provider is dead, and whether it wants to be left alone, is told to all: each applies it to its own
breaker and pace, and together they try a dead provider as often as one would.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from aioserver.limits.gate import Gate
from aioserver.providers.health import ProviderObserver
from aioserver.providers.queueing import FAILOVER_WAIT, Permits, ProviderGate
from aioserver.wings.cluster.keys import SharedKey
from aioserver.wings.cluster.rates import SharedRate
from aioserver.wings.cluster.shared_gate import ConnectionGate, SharedGate
from aioserver.wings.cluster.shared_tokens import SharedTokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from fractions import Fraction

    from aioserver.config.settings import ClientKey, HttpClient
    from aioserver.limits.fixed_share import Scope
    from aioserver.limits.quota import Quota
    from aioserver.limits.scheduler import Scheduler
    from aioserver.providers.health import Health
    from aioserver.providers.provider import Provider
    from aioserver.wings.cluster.leases import Leases

# The words that are told of a provider: it is dead; it is dead and cannot be reached; it has
# answered again; it wants to be left alone.
DEAD, AWAY, ALIVE, COOLING = "dead", "away", "alive", "cooling"
# Seconds for which instances that come later hear of a death, and for which its end is told. An
# instance that was told of a death tries the provider by itself, and does not take it for alive
# because nobody tells of it any more.
DEATH, RETURN = 60.0, 10.0


class SharedPermits(SharedGate, Permits):
    """The permits of answers in the background for places of a provider that all instances
    share.
    """

    def __init__(
        self,
        leases: Leases,
        name: str,
        limits: HttpClient,
        room: Callable[[], Fraction | int],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(name, limits, room, clock)
        self.share(leases, f"b:{name}")


class SharedProviderGate(SharedGate, ProviderGate):
    """The gate of a provider whose places and starts all instances share."""

    def __init__(
        self,
        leases: Leases,
        name: str,
        limits: HttpClient,
        health: Health,
        clock: Callable[[], float] = time.monotonic,
        on_starving: Callable[[], None] = lambda: None,
    ) -> None:
        self._all_leases = leases
        self._on_starving = on_starving
        self._complete = False
        self._shared_tokens: SharedTokens | None = None
        super().__init__(name, limits, health, clock)
        self.share(leases, f"p:{name}")
        self._complete = True
        self.instances_changed()

    def apply_limits(self, limits: HttpClient) -> None:
        """Use new limits, those of all instances together."""
        super().apply_limits(limits)
        if not limits.tokens_per_minute and self._shared_tokens is not None:
            self._all_leases.drop_pace(self._shared_tokens.rate)
            self._shared_tokens = None

    def instances_changed(self) -> None:
        """Take in how many instances there are now."""
        self._health.breaker.instances = self._all_leases.instances

    def _make_permits(self) -> Permits:
        return SharedPermits(
            self._all_leases, self._name, self._limits, lambda: self.room, self._clock
        )

    def others_starve(self) -> None:
        """Tell those that hold places here of requests that wait in other instances."""
        if self.waiting_elsewhere:
            self._on_starving()

    def _make_rate(self, interval: float, tolerance: float) -> SharedRate:
        return SharedRate(
            self._all_leases,
            f"P:{self._name}",
            interval,
            tolerance,
            self._clock,
            waiting=lambda: max(1, self.waiting),
            on_slots=self._slots_came,
        )

    def _make_tokens(self, interval: float, tolerance: float) -> SharedTokens:
        self._shared_tokens = SharedTokens(
            self._all_leases,
            f"T:{self._name}",
            interval,
            tolerance,
            self._clock,
            on_slots=self._slots_came,
        )
        return self._shared_tokens

    def _slots_came(self) -> None:
        if self._complete:
            self.serve()


class Teller(ProviderObserver):
    """Tells the other instances what this one finds out about the provider *name*."""

    def __init__(self, leases: Leases, name: str) -> None:
        self._leases = leases
        self._name = name

    def died(self, *, unreachable: bool) -> None:
        """Tell that the provider is dead, and whether it cannot be reached."""
        tell = self._leases.told.tell
        tell(self._name, ALIVE, 0.0)
        tell(self._name, AWAY if unreachable else DEAD, DEATH)

    def revived(self) -> None:
        """Tell that the provider has answered again."""
        tell = self._leases.told.tell
        tell(self._name, DEAD, 0.0)
        tell(self._name, AWAY, 0.0)
        tell(self._name, ALIVE, RETURN)

    def cooling(self, seconds: float) -> None:
        """Tell that the provider wants to be left alone for *seconds*."""
        self._leases.told.tell(self._name, COOLING, seconds)


class SharedLimits:
    """Makes the gates and the quotas of keys that share limits by *leases*, and passes on what is
    told.

    The workers of one host, which is their *scope*, share connections.
    """

    def __init__(self, leases: Leases, scope: Scope | None = None) -> None:
        self._leases = leases
        self._scope = scope
        self._gates: dict[str, SharedProviderGate] = {}
        # How many connections the workers of its host have together, or else the instance.
        self._admitted: Callable[[], int] = lambda: 0
        self._providers: Callable[[], Mapping[str, Provider]] = dict

    def serve(self, providers: Callable[[], Mapping[str, Provider]]) -> None:
        """Let what others tell reach the *providers* that are configured: none before."""
        self._providers = providers

    def make_gate(
        self,
        name: str,
        limits: HttpClient,
        health: Health,
        clock: Callable[[], float],
        on_starving: Callable[[], None],
    ) -> ProviderGate:
        """Return the gate of the provider *name*; *on_starving* is called while requests wait in
        other instances for places that are taken here.
        """
        gate = self._gates[name] = SharedProviderGate(
            self._leases, name, limits, health, clock, on_starving
        )
        return gate

    def observe(self, name: str) -> ProviderObserver:
        """Return who tells the other instances what this one finds out about the provider
        *name*.
        """
        return Teller(self._leases, name)

    def make_admission(self, limit: int, **bounds: Any) -> Gate:
        """Return the gate in front of the handlers; the arguments are those of `Gate`."""
        if self._scope is None:
            own = Gate(limit, **bounds)
            self._admitted = lambda: own.stats().limit
            return own
        gate = ConnectionGate(self._leases, self._scope, limit, **bounds)
        self._admitted = lambda: gate.shared_limit
        return gate

    @property
    def connections(self) -> tuple[str, int]:
        """The host whose workers share connections, and how many they have together; an instance
        without a parent is a host of its own.
        """
        host = self._leases.instance if self._scope is None else self._scope.host
        return host, self._admitted()

    def make_quota(self, key: ClientKey, scheduler: Scheduler | None = None) -> Quota:
        """Return the quota of *key*; what waits there is started by *scheduler*."""
        return SharedKey(
            key.max_concurrent,
            key.requests_per_minute,
            max_connections=key.max_connections,
            queue_size=key.queue_size,
            tokens_per_minute=key.tokens_per_minute,
            tokens_per_day=key.tokens_per_day,
            leases=self._leases,
            name=key.name,
            scope=self._scope,
            scheduler=scheduler,
        ).quota

    def told(self, name: str, word: str, seconds: float) -> None:
        """Take in that *word* holds of the provider *name* for *seconds*; 0.0: no more."""
        provider = self._providers().get(name)
        if provider is None or not seconds:
            return
        if word == COOLING:
            self._gates[name].told_cooling(seconds, FAILOVER_WAIT)
        elif word == ALIVE:
            provider.absence.told_alive()
        elif word in {DEAD, AWAY}:
            provider.absence.told_dead(unreachable=word == AWAY)

    def instances_changed(self) -> None:
        """Take in how many instances there are now."""
        for gate in self._gates.values():
            gate.instances_changed()

"""The limits of a provider, shared with other instances: places, starts a minute, and what is
known of its health.

Places, starts and tokens are exact (wings/cluster/grants.py, wings/cluster/rates.py,
wings/cluster/shared_tokens.py). Whether the
provider is dead, and whether it wants to be left alone, is told to all: each applies it to its own
breaker and pace, and together they try a dead provider as often as one would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.providers.health import ProviderObserver
from aioserver.wings.cluster.keys import SharedKey
from aioserver.wings.cluster.leased import LeasedCapacity
from aioserver.wings.cluster.rates import SharedRate
from aioserver.wings.cluster.shared_tokens import SharedTokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config.settings import ClientKey
    from aioserver.limits.fixed_share import Scope
    from aioserver.limits.gcra import Gcra
    from aioserver.limits.quota import Quota
    from aioserver.limits.resource import Resource
    from aioserver.limits.scheduler import Scheduler
    from aioserver.providers.capacity import SharedCapacity
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


class SharedProvider:
    """The capacity of the provider *name*, of which *health* knows how it is, as all instances
    share it.
    """

    def __init__(
        self,
        leases: Leases,
        scheduler: Scheduler,
        name: str,
        health: Health,
        clock: Callable[[], float],
        on_starving: Callable[[], None],
    ) -> None:
        self._leases, self._scheduler, self._clock = leases, scheduler, clock
        self._name, self._health, self._on_starving = name, health, on_starving
        self._places: LeasedCapacity | None = None
        self._tokens: SharedTokens | None = None
        self.instances_changed()

    def instances_changed(self) -> None:
        """Take in how many instances there are now."""
        self._health.breaker.instances = self._leases.instances

    def places(self, resource: Resource, limit: int) -> None:
        """Share the places of *resource*, as `SharedCapacity` says."""
        if resource.within is not None:
            name = f"b:{self._name}"
            LeasedCapacity(self._leases, self._scheduler, resource, name, limit)
            return
        self._places = LeasedCapacity(
            self._leases,
            self._scheduler,
            resource,
            f"p:{self._name}",
            limit,
            on_starving=self._on_starving,
        )

    @property
    def starving(self) -> bool:
        """Whether requests wait in other instances for places that are taken here."""
        return self._places is not None and self._places.waiting_elsewhere > 0

    def starts(self, interval: float, tolerance: float, serve: Callable[[], None]) -> Gcra:
        """Return the rate of starts, as `SharedCapacity` says."""
        return SharedRate(
            self._leases,
            f"P:{self._name}",
            interval,
            tolerance,
            self._clock,
            waiting=self._waiting,
            on_slots=serve,
        )

    def _waiting(self) -> int:
        return 1 if self._places is None else max(1, self._places.waiting)

    def tokens(self, interval: float, tolerance: float, serve: Callable[[], None]) -> Gcra:
        """Return the rate of tokens, as `SharedCapacity` says."""
        self._tokens = SharedTokens(
            self._leases, f"T:{self._name}", interval, tolerance, self._clock, on_slots=serve
        )
        return self._tokens

    def without_tokens(self) -> None:
        """Share no tokens any more: they are not paced."""
        if self._tokens is not None:
            self._leases.drop_pace(self._tokens.rate)
            self._tokens = None


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
    """Shares the capacity of providers, and makes the quotas of keys that share limits, by *leases*, and passes on what is
    told.

    The workers of one host, which is their *scope*, share connections.
    """

    def __init__(self, leases: Leases, scope: Scope | None = None) -> None:
        self._leases = leases
        self._scope = scope
        self._shared: dict[str, SharedProvider] = {}
        # How many connections the workers of its host have together, or else the instance.
        self._admitted: Callable[[], int] = lambda: 0
        self._providers: Callable[[], Mapping[str, Provider]] = dict

    def serve(self, providers: Callable[[], Mapping[str, Provider]]) -> None:
        """Let what others tell reach the *providers* that are configured: none before."""
        self._providers = providers

    def share_provider(
        self,
        scheduler: Scheduler,
        name: str,
        health: Health,
        clock: Callable[[], float],
        on_starving: Callable[[], None],
    ) -> SharedCapacity:
        """Return what shares the capacity of the provider *name*; *on_starving* is called while
        requests wait in other instances for places that are taken here.
        """
        shared = self._shared[name] = SharedProvider(
            self._leases, scheduler, name, health, clock, on_starving
        )
        return shared

    def observe(self, name: str) -> ProviderObserver:
        """Return who tells the other instances what this one finds out about the provider
        *name*.
        """
        return Teller(self._leases, name)

    def share_door(self, scheduler: Scheduler, door: Resource, limit: int) -> None:
        """Share the *limit* places in front of the handlers among the workers of one host; its
        queue is a fixed share.
        """
        if (scope := self._scope) is None:
            self._admitted = lambda: door.limit
        else:
            name = f"h:{scope.host}:c"
            capacity = LeasedCapacity(self._leases, scheduler, door, name, limit, scope=scope)
            self._admitted = lambda: capacity.limit

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
            provider.capacity.told_cooling(seconds)
        elif word == ALIVE:
            provider.told_alive()
        elif word in {DEAD, AWAY}:
            provider.told_dead(unreachable=word == AWAY)

    def instances_changed(self) -> None:
        """Take in how many instances there are now."""
        for shared in self._shared.values():
            shared.instances_changed()

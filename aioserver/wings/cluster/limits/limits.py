"""The limits of a provider, shared with other instances: places, starts a minute, and the state of
its health.

Places, starts and tokens are exact (grants.py, rates.py, shared_tokens.py). Death and cooldown of
a provider are announced to all instances. Each applies them to its own breaker and pace, and
together they try a dead provider as often as a single instance would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.providers.health import ProviderObserver
from aioserver.wings.cluster.limits.keys import SharedKey
from aioserver.wings.cluster.limits.leased import LeasedCapacity
from aioserver.wings.cluster.limits.rates import SharedRate
from aioserver.wings.cluster.limits.shared_tokens import SharedTokens

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
    from aioserver.wings.cluster.limits.leases import Leases

# The states of a provider that are announced: it is dead; it is dead and cannot be reached; it has
# answered again; it is cooling down.
DEAD, AWAY, ALIVE, COOLING = "dead", "away", "alive", "cooling"
# Seconds for which a death is announced to instances that join later, and for which its end is
# announced. An instance that has received the announcement of a death tries the provider itself.
# It does not take the provider for alive because the announcement has expired.
DEATH, RETURN = 60.0, 10.0


class SharedProvider:
    """The capacity of the provider *name*, shared by all instances; *health* is its state here."""

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
        """Note that the number of instances has changed."""
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

    @property
    def elsewhere(self) -> int:
        """How many places may be free in other instances, as far as is known."""
        return 0 if self._places is None else self._places.elsewhere

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
        """Stop sharing tokens: they are not paced."""
        if self._tokens is not None:
            self._leases.drop_pace(self._tokens.rate)
            self._tokens = None


class Announcer(ProviderObserver):
    """Announces the findings of this instance about the provider *name* to the others."""

    def __init__(self, leases: Leases, name: str) -> None:
        self._leases = leases
        self._name = name

    def died(self, *, unreachable: bool) -> None:
        """Announce that the provider is dead, and whether it cannot be reached."""
        announce = self._leases.announcements.announce
        announce(self._name, ALIVE, 0.0)
        announce(self._name, AWAY if unreachable else DEAD, DEATH)

    def revived(self) -> None:
        """Announce that the provider has answered again."""
        announce = self._leases.announcements.announce
        announce(self._name, DEAD, 0.0)
        announce(self._name, AWAY, 0.0)
        announce(self._name, ALIVE, RETURN)

    def cooling(self, seconds: float) -> None:
        """Announce that the provider must not be asked for *seconds*."""
        self._leases.announcements.announce(self._name, COOLING, seconds)


class SharedLimits:
    """Shares the capacity of providers and the limits of keys by *leases*, and applies the
    announcements of others.

    The workers of one host, which is their *scope*, share connections.
    """

    def __init__(self, leases: Leases, scope: Scope | None = None) -> None:
        self._leases = leases
        self._scope = scope
        self._shared: dict[str, SharedProvider] = {}
        # Returns how many connections the workers of its host have together; without a host, those
        # of this instance.
        self._admitted: Callable[[], int] = lambda: 0
        self._providers: Callable[[], Mapping[str, Provider]] = dict

    def serve(self, providers: Callable[[], Mapping[str, Provider]]) -> None:
        """Let announcements reach the configured *providers*; before this call they reach none."""
        self._providers = providers

    def share_provider(
        self,
        scheduler: Scheduler,
        name: str,
        health: Health,
        clock: Callable[[], float],
        on_starving: Callable[[], None],
    ) -> SharedCapacity:
        """Return the shared capacity of the provider *name*; *on_starving* is called while
        requests wait, here or in other instances, for places that are taken.
        """
        shared = self._shared[name] = SharedProvider(
            self._leases, scheduler, name, health, clock, on_starving
        )
        return shared

    def observe(self, name: str) -> ProviderObserver:
        """Return the observer that announces this instance's findings about the
        provider *name*.
        """
        return Announcer(self._leases, name)

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
        """Return the quota of *key*; *scheduler* starts the requests that wait there."""
        return SharedKey(
            key.max_concurrent,
            key.requests_per_minute,
            max_connections=key.max_connections,
            queue_size=key.queue_size,
            tokens_per_minute=key.tokens_per_minute,
            tokens_per_day=key.tokens_per_day,
            tokens_per_week=key.tokens_per_week,
            tokens_per_month=key.tokens_per_month,
            leases=self._leases,
            name=key.name,
            scope=self._scope,
            scheduler=scheduler,
        ).quota

    def announced(self, name: str, word: str, seconds: float) -> None:
        """Apply an announcement: *word* holds of the provider *name* for *seconds*; 0.0: no
        longer.
        """
        provider = self._providers().get(name)
        if provider is None or not seconds:
            return
        if word == COOLING:
            provider.capacity.told_cooling(seconds)
        elif word == ALIVE:
            provider.capacity.told_alive()
        elif word in {DEAD, AWAY}:
            provider.capacity.told_dead(unreachable=word == AWAY)

    def instances_changed(self) -> None:
        """Note that the number of instances has changed."""
        for shared in self._shared.values():
            shared.instances_changed()

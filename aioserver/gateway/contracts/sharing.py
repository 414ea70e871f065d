"""The contract of shared limits: the places of providers, the quotas of keys, and the secret of
sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.auth.sessions import Sessions
    from aioserver.config.settings import ClientKey
    from aioserver.limits.quota import Quota
    from aioserver.limits.resource import Resource
    from aioserver.limits.scheduler import Scheduler
    from aioserver.providers.capacity import SharedCapacity
    from aioserver.providers.health import Health, ProviderObserver


class Sharing(Protocol):
    """The limits of all instances together, which the wing `cluster` implements."""

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

    def observe(self, name: str) -> ProviderObserver:
        """Return an observer that tells the other instances what this one learns about the
        provider *name*.
        """

    def make_quota(self, key: ClientKey, scheduler: Scheduler | None = None) -> Quota:
        """Return the quota of *key*, which all instances share; *scheduler* starts the requests
        that wait there.
        """

    def share_door(self, scheduler: Scheduler, door: Resource, limit: int) -> None:
        """Share the *limit* places in front of the handlers, if other processes use some of them."""

    @property
    def token(self) -> int:
        """A number that no other instance ever has."""

    def ended(self, token: int) -> None:
        """Note that the process of another instance has certainly ended."""

    def retire(self) -> None:
        """Keep no places to spare from now on, since others serve in place of this instance."""

    async def others_serve(self) -> bool:
        """Return whether an instance of another parent, or without one, has said within a second
        that it takes new work.
        """

    async def settled(self) -> None:
        """Wait, for a second at most, until the limits held by such instances are free."""

    async def agree_on_sessions(self, sessions: Sessions) -> None:
        """Let *sessions* use the secret on which the instances agree, its own if there was none.

        Without an answer it keeps its own secret until there is one: a session is then valid only
        at the instance that made it.
        """

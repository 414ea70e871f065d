"""What several instances share of their limits: the gates of providers, the quotas of keys, and
the secret of sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from aioserver.config.settings import ClientKey
    from aioserver.limits.gate import Gate
    from aioserver.limits.quota import Quota
    from aioserver.limits.scheduler import Scheduler
    from aioserver.providers.health import ProviderObserver
    from aioserver.providers.queueing import GateFactory


class Sharing(Protocol):
    """The limits of all instances together, which the wing `cluster` implements."""

    @property
    def make_gate(self) -> GateFactory:
        """What makes the gate of a provider, whose places and starts all instances share; its last
        argument is called while requests wait in other instances for places that are taken here.
        """

    def observe(self, name: str) -> ProviderObserver:
        """Return who tells the other instances what this one finds out about the provider
        *name*.
        """

    def make_quota(self, key: ClientKey, scheduler: Scheduler | None = None) -> Quota:
        """Return the quota of *key*, which all instances share; what waits there is started by
        *scheduler*.
        """

    def make_admission(self, limit: int, **bounds: Any) -> Gate:
        """Return the gate in front of the handlers; the arguments are those of `Gate`."""

    @property
    def token(self) -> int:
        """The number of this instance, which no other one ever has."""

    def ended(self, token: int) -> None:
        """Note that the process of another instance has ended for certain."""

    async def agree_on_pepper(self, own: bytes) -> bytes:
        """Return the secret of browser sessions on which the instances agree: *own*, if none was
        there before.

        Without an answer it is *own*, and a session holds only where it was made.
        """

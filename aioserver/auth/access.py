"""Who may come in at all: the valid keys, the hosts that are answered, the proxies that are believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.auth.hosts import Hosts, Proxies
from aioserver.auth.keys import Keys
from aioserver.limits.quota import Quota

if TYPE_CHECKING:
    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Auth

# Never reached: answers at once, and answers a minute, of a client without a key.
NO_LIMITS = 1 << 31, 1 << 31


class Access:
    """The section `auth` of the configuration, as it holds now.

    With keys a client needs one. Without keys, and unless `auth.open` is set, a request is answered
    only under a name of this machine or an allowed one.

    The object stays when the configuration is read again; what it holds is replaced. *keyless* has
    no limits: it ends what clients without a key hold when they may no longer come.
    """

    def __init__(self, auth: Auth | None = None, pepper: bytes = b"") -> None:
        self.keys = Keys(pepper)
        self.keyless = Quota(*NO_LIMITS)
        self.apply(auth)

    @property
    def keyed(self) -> bool:
        """Whether a client needs a key."""
        return len(self.keys) > 0

    def apply(self, auth: Auth | None) -> frozenset[str]:
        """Use these settings from now on.

        Return the names of the callers who may no longer come, since their key was removed or
        replaced. Among them is "", the clients without a key, where keys are new.
        """
        open_before = not self.keyed
        gone = self.keys.apply(auth.keys if auth is not None else ())
        local_only = auth is None or not (auth.open or auth.keys)
        self.hosts = Hosts(auth.allowed_hosts if auth is not None else ()) if local_only else None
        self.proxies = Proxies(auth.trusted_proxies if auth is not None else ())
        if not (open_before and self.keyed):
            return gone
        self.keyless.revoke()
        self.keyless = Quota(*NO_LIMITS)
        return gone | {""}

    def current(self, caller: Caller) -> Caller | None:
        """Return *caller* as it is configured now; None if it may no longer come."""
        if not caller.name:
            return None if self.keyed else caller
        return self.keys.current(caller)

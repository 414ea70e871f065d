"""The section `auth` as it is in use: the valid keys, the hosts that are answered, the proxies
that are trusted.

Whether a request may pass is decided in guard.py, which reads it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.auth.hosts import Hosts, Proxies
from aioserver.auth.keys import Keys, quota_of
from aioserver.limits.quota import Quota

if TYPE_CHECKING:
    from aioserver.auth.callers import Caller
    from aioserver.auth.keys import MakeQuota
    from aioserver.config.settings import Auth

# Limits that are never reached: answers at once, and answers a minute, of clients without a key.
NO_LIMITS = 1 << 31, 1 << 31


class Access:
    """The section `auth` of the configuration in use.

    Always: where a client needs a key, it needs one though none be left: taking out the last one
    opens nothing. Where none is needed, and unless `auth.open` is set, a request is answered only
    under a name of this machine or an allowed one.

    The object stays when the configuration is read again; its attributes are replaced. The quota
    *keyless* limits nothing: revoking it ends the work of clients without a key, once they need
    one.
    """

    def __init__(
        self,
        auth: Auth | None = None,
        pepper: bytes = b"",
        make_quota: MakeQuota = quota_of,
    ) -> None:
        self.keys = Keys(pepper, make_quota=make_quota)
        self.keyless = Quota(*NO_LIMITS)
        # Whether a client needs a key.
        self.keyed = False
        self.apply(auth)

    def apply(self, auth: Auth | None) -> frozenset[str]:
        """Use the settings *auth* from now on.

        Return the names of the callers that are no longer admitted, since their key was removed or
        replaced. If clients need a key only from now on, the name "" of those without one is
        included.
        """
        open_before = not self.keyed
        self.keyed = auth is not None and auth.guarded
        revoked = self.keys.apply(auth.all_keys if auth is not None else ())
        local_only = not self.keyed and not (auth is not None and auth.open)
        self.hosts = Hosts(auth.allowed_hosts if auth is not None else ()) if local_only else None
        self.proxies = Proxies(auth.trusted_proxies if auth is not None else ())
        if not (open_before and self.keyed):
            return revoked
        self.keyless.revoke()
        self.keyless = Quota(*NO_LIMITS)
        return revoked | {""}

    def current(self, caller: Caller) -> Caller | None:
        """Return *caller* as it is configured now; None if it is no longer admitted."""
        if not caller.name:
            return None if self.keyed else caller
        return self.keys.current(caller)

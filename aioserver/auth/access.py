"""The section `auth` in use: the valid keys and tokens, the hosts for which requests are answered,
and the trusted proxies.

guard.py decides by it whether a request may pass.
"""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import TYPE_CHECKING

from aioserver.auth.hosts import Hosts, Proxies
from aioserver.auth.keys import ENDED, UNKNOWN, Keys, quota_of
from aioserver.auth.sessions import Sessions, name_in
from aioserver.auth.tokens import PREFIX
from aioserver.errors import InvalidApiKey, SessionEnded, TokenRefused
from aioserver.limits.quota import Quota

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.auth.callers import Caller
    from aioserver.auth.keys import MakeQuota
    from aioserver.auth.tokens import Tokens
    from aioserver.config.settings import Auth

# Limits that are never reached: answers at once, and answers a minute, of clients without a key.
NO_LIMITS = 1 << 31, 1 << 31
# The dots of a token: between its head, its claims and its signature (RFC 7515, 7.1).
DOTS = 2


class Access:
    """The section `auth` of the configuration in use.

    Always: clients that need a key need one even after the last key was removed. If clients need no
    key, requests are answered only under a name of this machine or an allowed name, unless
    `auth.open` is set.

    The object stays when the configuration is read again; its attributes are replaced. The quota
    *keyless* limits nothing: its revocation ends the work of clients without a key, once they need
    one.
    """

    def __init__(
        self,
        auth: Auth | None = None,
        sessions: Sessions | None = None,
        make_quota: MakeQuota = quota_of,
        tokens: Tokens | None = None,
    ) -> None:
        self.sessions = Sessions() if sessions is None else sessions
        self.keys = Keys(self.sessions, make_quota=make_quota)
        # None: no wing accepts tokens.
        self.tokens = tokens
        self.keyless = Quota(*NO_LIMITS)
        # Returns this process's part of a total use, if each process has a part of every limit.
        self.part_of: Callable[[int], int] = int
        # Whether a client needs a key.
        self.keyed = False
        if tokens is not None:
            tokens.use(make_quota)
        self.apply(auth)

    def apply(self, auth: Auth | None) -> frozenset[str]:
        """Apply the settings *auth*.

        Return the names of the callers that are no longer admitted, since their key was removed or
        replaced. If clients need a key only from now on, the name "" of those without one is
        included.
        """
        open_before = not self.keyed
        self.keyed = auth is not None and auth.guarded
        revoked = self.keys.apply(auth.all_keys if auth is not None else ())
        if self.tokens is not None:
            revoked |= self.tokens.apply(auth.jwt if auth is not None else None)
        local_only = not self.keyed and not (auth is not None and auth.open)
        self.hosts = Hosts(auth.allowed_hosts if auth is not None else ()) if local_only else None
        self.proxies = Proxies(auth.trusted_proxies if auth is not None else ())
        if not (open_before and self.keyed):
            return revoked
        self.keyless.revoke()
        self.keyless = Quota(*NO_LIMITS)
        return revoked | {""}

    def caller(self, key: bytes) -> Caller:
        """Return the caller with *key*, which may be a token.

        Raises:
            InvalidApiKey: it is neither a valid key nor a valid token.
            Undecided, PermissionDenied, AuthUnavailable, ServerAtCapacity: see `Tokens.caller`.
        """
        digest = hashlib.sha256(key).digest()
        caller = self.keys.find(digest)
        if caller is None:
            if self.tokens is None or key.count(b".") != DOTS:
                raise InvalidApiKey(UNKNOWN)
            caller = self.tokens.caller(key, digest)
        return caller

    def current(self, caller: Caller) -> Caller | None:
        """Return *caller* with its present configuration; None if it is no longer admitted."""
        if not caller.name:
            return None if self.keyed else caller
        if caller.role and self.tokens is not None:
            return self.tokens.current(caller)
        return self.keys.current(caller)

    def quotas(self) -> dict[str, Quota]:
        """Return the quotas of all callers, by their names."""
        return {**self.keys.quotas(), **(self.tokens.quotas() if self.tokens is not None else {})}

    def session(self, caller: Caller) -> tuple[str, int]:
        """Return a new session of *caller*, and the seconds for which it is valid: SESSION_SECONDS
        at most, and no longer than its token.

        Raises:
            TokenRefused: the token has expired.
        """
        if not caller.role or self.tokens is None:
            return self.keys.session(caller)
        parts = caller.name.removeprefix(PREFIX), caller.role, caller.signer
        name = PREFIX + ".".join(map(_encoded, parts))
        session, seconds = self.sessions.make(name, self.tokens.binding, caller.exp)
        if seconds <= 0:
            raise TokenRefused("the token has expired")
        return session, seconds

    def resume(self, session: str) -> Caller:
        """Return the caller with *session*.

        Raises:
            SessionEnded: no caller has it, it is too old, or its key or role is no longer valid.
            Undecided, AuthUnavailable, ServerAtCapacity: see `Tokens.of_session`.
        """
        if self.tokens is None or not session.startswith(PREFIX):
            return self.keys.resume(session)
        seconds = self.sessions.seconds(session, self.tokens.binding)
        if seconds:
            parts = name_in(session).removeprefix(PREFIX).split(".")
            name, role, signer = map(_decoded, parts)
            caller = self.tokens.of_session(name, role, signer, seconds)
            if caller is not None:
                return caller
        raise SessionEnded(ENDED)


def _encoded(text: str) -> str:
    """Return *text* without dots and characters that would need quotes in a cookie."""
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decoded(part: str) -> str:
    return urlsafe_b64decode(part + "=" * (-len(part) % 4)).decode()

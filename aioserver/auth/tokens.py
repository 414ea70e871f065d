"""What makes callers of tokens, as access and guard know it: a wing brings it (wings/jwt).

A token comes wherever a key may come. Whether it is good is known at once, but where it names a
key of its issuer that is not there yet: that is `Undecided`, and its request waits in the
middleware, before its body is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from aioserver.auth.callers import Caller
    from aioserver.auth.keys import MakeQuota
    from aioserver.config.settings import Jwt
    from aioserver.limits.quota import Quota

# What the name of a caller with a token begins with; no key has a colon in its name.
PREFIX = "jwt:"


class Undecided(Exception):
    """It has to be waited for the keys of the issuer.

    *caller* waits, for some seconds at most, and returns the caller of the token. It raises
    TokenRefused, PermissionDenied, AuthUnavailable or ServerAtCapacity. Cancelling it is safe.
    """

    def __init__(self, caller: Callable[[], Awaitable[Caller]]) -> None:
        super().__init__("the keys of the issuer are awaited")
        self.caller = caller


class Tokens(Protocol):
    """Makes callers of tokens.

    Always: the callers of one name share one quota.
    """

    def use(self, make_quota: MakeQuota) -> None:
        """Make quotas by *make_quota* from now on; called once, before any token comes."""

    def apply(self, jwt: Jwt | None) -> frozenset[str]:
        """Accept tokens as *jwt* says from now on; None: no token.

        Return the names of the callers that are no longer admitted.
        """

    def caller(self, token: bytes, digest: bytes) -> Caller:
        """Return the caller of *token*, whose SHA-256 is *digest*.

        Raises:
            Undecided: it has to be waited for the keys of the issuer.
            TokenRefused: the token is not good.
            PermissionDenied: its roles are not among those that are admitted.
            AuthUnavailable: the keys of the issuer cannot be had now.
            ServerAtCapacity: there are too many callers.
        """

    def of_session(self, name: str, role: str, signer: str, seconds: float) -> Caller | None:
        """Return the caller *name* with *role*, of a session that holds for *seconds* more; None
        if the role is no longer admitted, or *signer* signs for the issuer no more.

        Raises:
            Undecided, AuthUnavailable, ServerAtCapacity: as `caller`.
        """

    def current(self, caller: Caller) -> Caller | None:
        """Return *caller* as it is configured now; None if it is no longer admitted."""

    def quotas(self) -> Mapping[str, Quota]:
        """Return the quotas of all callers that are remembered, by their names."""

    def begin_day(self, day: str, spent: Mapping[str, int]) -> None:
        """Let the budgets of *day* begin at what these callers have *spent*, as the ledger has
        it.
        """

    @property
    def counts_days(self) -> bool:
        """Whether a role has a budget of a day."""

    @property
    def binding(self) -> bytes:
        """What sessions of tokens are bound to (`Sessions.make`): it changes with the settings. It
        is no secret.
        """

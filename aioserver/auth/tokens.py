"""The contract of tokens for access and guard, which a wing implements (wings/jwt).

A token may come wherever a key may. Its validity is known at once, unless it names a key of its
issuer that has not been fetched yet. Such a token is `Undecided`, and its request waits in the
middleware, before its body is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping

    from aioserver.auth.callers import Caller
    from aioserver.auth.keys import MakeQuota
    from aioserver.config.settings import Jwt
    from aioserver.limits.budget import Period
    from aioserver.limits.quota import Quota

# The prefix of the names of callers with a token; the name of a key has no colon.
PREFIX = "jwt:"


class Undecided(Exception):
    """The request must wait for the keys of the issuer.

    *caller* waits, for some seconds at most, and returns the caller of the token. It raises
    TokenRefused, PermissionDenied, AuthUnavailable or ServerAtCapacity. Cancelling it is safe.
    """

    def __init__(self, caller: Callable[[], Awaitable[Caller]]) -> None:
        super().__init__("the keys of the issuer are awaited")
        self.caller = caller


class Tokens(Protocol):
    """Finds the callers of tokens.

    Always: the callers of one name share one quota.
    """

    def use(self, make_quota: MakeQuota) -> None:
        """Make quotas by *make_quota* from now on; called once, before any token comes."""

    def apply(self, jwt: Jwt | None) -> frozenset[str]:
        """Accept tokens by the settings *jwt*; None: accept none.

        Return the names of the callers that are no longer admitted.
        """

    def caller(self, token: bytes, digest: bytes) -> Caller:
        """Return the caller of *token*, whose SHA-256 is *digest*.

        Raises:
            Undecided: the request must wait for the keys of the issuer.
            TokenRefused: the token is not valid.
            PermissionDenied: none of its roles is admitted.
            AuthUnavailable: the keys of the issuer are not available now.
            ServerAtCapacity: there are too many callers.
        """

    def of_session(self, name: str, role: str, signer: str, seconds: float) -> Caller | None:
        """Return the caller *name* with *role*, for a session that is valid for *seconds* more;
        None if the role is no longer admitted, or *signer* no longer signs for the issuer.

        Raises:
            Undecided, AuthUnavailable, ServerAtCapacity: as `caller`.
        """

    def current(self, caller: Caller) -> Caller | None:
        """Return *caller* with its present configuration; None if it is no longer admitted."""

    def quotas(self) -> Mapping[str, Quota]:
        """Return the quotas of all known callers, by their names."""

    def begin(self, now: float, spent: Mapping[str, Mapping[str, int]]) -> None:
        """Begin the budgets with the tokens that callers have *spent* by the ledger at the time
        *now*: by their names, and by the settings of the budgets.
        """

    @property
    def periods(self) -> Collection[Period]:
        """The periods for which a role has a budget."""

    @property
    def binding(self) -> bytes:
        """The binding of sessions for tokens (`Sessions.make`): it changes with the settings. It
        is not secret.
        """

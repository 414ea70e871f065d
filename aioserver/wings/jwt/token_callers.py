"""The callers of tokens: verified once, remembered, bounded.

A verified token is found by its SHA-256. Any other token is read, checked and verified (token.py)
with the keys of its issuer (issuer.py). Refused tokens are not remembered: an attacker would change
a byte each time. All tokens of one name share one quota, with the limits of the role in the newest
token.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from aioserver.auth.callers import SKEW
from aioserver.auth.keys import ENDED, caller_of, limit, quota_of
from aioserver.auth.tokens import PREFIX, Tokens, Undecided
from aioserver.config.schema import fields
from aioserver.config.settings import ClientKey, Limits
from aioserver.errors import AuthUnavailable, ServerAtCapacity, SessionEnded, TokenRefused
from aioserver.limits.budget import PERIODS
from aioserver.wings.jwt.token import Claims, read, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from aioserver.auth.callers import Caller
    from aioserver.auth.keys import MakeQuota
    from aioserver.config.settings import Jwt, Role
    from aioserver.limits.budget import Period
    from aioserver.limits.quota import Quota
    from aioserver.wings.jwt.issuer import Issuer

# The most tokens that are remembered as verified, and the most callers.
MAX_TOKENS, MAX_CALLERS = 4096, 10_000
# Seconds after which a caller may be forgotten: its body may be under way for as long, and a
# minute's starts are available again.
IDLE = 60.0
# The most callers that are examined to find a caller that may be forgotten.
LOOKS = 64


@dataclass
class _Person:
    """The state of one name; *used*: the time of its last token, by the monotonic clock."""

    quota: Quota
    role: str
    used: float = 0.0
    forgotten: bool = False


class _Verified(NamedTuple):
    """A token that was verified: *expiry* is in wall time."""

    caller: Caller
    person: _Person
    expiry: float


class TokenCallers(Tokens):
    """The callers of tokens, by the settings `auth.jwt`.

    Always: at most MAX_TOKENS tokens and MAX_CALLERS callers are remembered; a forgotten caller
    has nothing running, open or waiting, and its limits are those of a new caller.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        max_callers: int = MAX_CALLERS,
    ) -> None:
        # Wall time, in which tokens expire, and monotonic time.
        self._clock, self._monotonic = clock, monotonic
        self._max_callers = max_callers
        self._make_quota: MakeQuota = quota_of
        self._jwt: Jwt | None = None
        self._issuer: Issuer | None = None
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()
        # By name; the most recent one is the last.
        self._people: OrderedDict[str, _Person] = OrderedDict()
        # What the ledger knew at a time, by callers and settings.
        self._begun = 0.0
        self._spent: Mapping[str, Mapping[str, int]] = {}

    def use(self, make_quota: MakeQuota) -> None:
        """Make quotas by *make_quota* from now on."""
        self._make_quota = make_quota

    def use_issuer(self, issuer: Issuer | None) -> None:
        """Verify with the keys of *issuer* from now on."""
        self._issuer = issuer

    def apply(self, jwt: Jwt | None) -> frozenset[str]:
        """Accept tokens by *jwt* from now on; see `Tokens.apply`."""
        old, self._jwt = self._jwt, jwt
        if jwt == old:
            return frozenset()
        self._verified.clear()
        revoked = set()
        same = jwt is not None and old is not None and identity(jwt) == identity(old)
        for name, person in tuple(self._people.items()):
            role = jwt.limits.get(person.role) if jwt is not None and same else None
            if role is None:
                revoked.add(name)
                del self._people[name]
                person.forgotten = True
                person.quota.revoke()
            else:
                assert old is not None
                limit(person.quota, role)
                before = old.limits.get(person.role)
                if before is not None and before.admin and not role.admin:
                    person.quota.demote()
        return frozenset(revoked)

    def caller(self, token: bytes, digest: bytes) -> Caller:
        """Return the caller of *token*; see `Tokens.caller`."""
        verified = self._verified.get(digest)
        if verified is not None:
            caller, person, expiry = verified
            now = self._clock()
            good = self._issuer is not None and self._issuer.holds(caller.signer)
            if good and now < expiry + SKEW and not person.forgotten:
                self._verified.move_to_end(digest)
                person.used = self._monotonic()
                self._people.move_to_end(caller.name)
                return caller
            del self._verified[digest]
        if self._jwt is None:
            raise refused("tokens are not accepted here")
        unverified = read(token, self._jwt, self._clock())
        if self._issuer is None:
            raise AuthUnavailable("the keys of the token's issuer cannot be fetched now")
        keys = self._issuer.find(unverified.kid)
        if keys is None:
            self._issuer.check_worth_waiting()
            raise Undecided(partial(self._decide, self._issuer, token, digest, unverified.kid))
        return self._remember(digest, unverified.verified(keys))

    async def _decide(
        self, issuer: Issuer, token: bytes, digest: bytes, kid: str | None
    ) -> Caller:
        """Return the caller of *token*, once the keys of *kid* are known."""
        keys = await issuer.wait_for(partial(issuer.find, kid))
        # Other settings may have come into effect meanwhile.
        if self._jwt is None or issuer is not self._issuer:
            raise refused("tokens of this issuer are not accepted here")
        unverified = read(token, self._jwt, self._clock())
        return self._remember(digest, unverified.verified(keys))

    def _remember(self, digest: bytes, claims: Claims) -> Caller:
        """Return the caller of a token that was verified just now, and remember it.

        Raises:
            TokenRefused: its role has expired.
            ServerAtCapacity: as `_person`.
        """
        # A token ends with its role, even if the issuer has set a later expiry.
        assert self._jwt is not None
        until = self._jwt.limits[claims.role].expires_at
        if self._clock() >= until:
            raise refused(f"the role {claims.role} has expired")
        claims = claims._replace(expiry=min(claims.expiry, until - SKEW))
        person = self._person(PREFIX + claims.name, claims.role)
        caller = self._caller(claims, person)
        self._verified[digest] = _Verified(caller, person, claims.expiry)
        if len(self._verified) > MAX_TOKENS:
            self._verified.popitem(last=False)
        return caller

    def _caller(self, claims: Claims, person: _Person) -> Caller:
        assert self._jwt is not None
        name, role, exp, signer = claims
        limits, expires = self._jwt.limits[role], self._monotonic() + exp - self._clock()
        token = {"role": role, "expires": expires, "exp": exp, "signer": signer}
        return caller_of(PREFIX + name, limits, person.quota, **token)

    def _person(self, name: str, role: str) -> _Person:
        """Return the state of *name*, whose newest token has *role*.

        Raises:
            ServerAtCapacity: there are MAX_CALLERS callers, and none of them may be forgotten.
        """
        assert self._jwt is not None
        limits = self._jwt.limits[role]
        person = self._people.get(name)
        if person is None:
            if len(self._people) >= self._max_callers:
                self._forget_one()
            # Not the name itself: instances share no personal data.
            shared = f"{PREFIX}{hashlib.sha256(name.encode()).hexdigest()[:32]}"
            person = _Person(self._make_quota(_as_key(shared, limits)), role)
            if spent := self._spent.get(name):
                person.quota.budget.begin(self._still(spent))
            self._people[name] = person
        elif person.role != role:
            person.role = role
            limit(person.quota, limits)
        person.used = self._monotonic()
        self._people.move_to_end(name)
        return person

    def _forget_one(self) -> None:
        """Forget the least recent caller that is idle.

        Raises:
            ServerAtCapacity: none of the first LOOKS callers is idle.
        """
        now = self._monotonic()
        for _ in range(min(LOOKS, len(self._people))):
            name, person = next(iter(self._people.items()))
            if now - person.used < IDLE:
                break
            if person.quota.rested:
                del self._people[name]
                person.forgotten = True
                # In a cluster its places go to others.
                person.quota.revoke()
                return
            # The caller is active, although it has sent no token since.
            person.used = now
            self._people.move_to_end(name)
        raise ServerAtCapacity(
            f"{len(self._people)} callers with tokens are known, at most {self._max_callers}",
            retry_after=IDLE / 2,
        )

    def of_session(self, name: str, role: str, signer: str, seconds: float) -> Caller | None:
        """Return the caller of a session; see `Tokens.of_session`."""
        issuer = self._issuer
        if self._jwt is None or issuer is None or role not in self._jwt.limits:
            return None
        left = self._jwt.limits[role].expires_at - self._clock()
        if left <= 0:
            return None
        claims = Claims(name, role, self._clock() + min(seconds, left - SKEW), signer)
        if not issuer.holds(signer):
            # Another process may have seen the issuer's newest key already.
            try:
                issuer.check_worth_waiting()
            except TokenRefused:
                return None
            raise Undecided(partial(self._decide_session, issuer, claims))
        return self._caller(claims, self._person(PREFIX + name, role))

    async def _decide_session(self, issuer: Issuer, claims: Claims) -> Caller:
        """Return the caller of a session with *claims*, once its signer is known."""
        try:
            await issuer.wait_for(lambda: issuer.holds(claims.signer) or None)
        except TokenRefused:
            raise SessionEnded(ENDED) from None
        # Other settings may have come into effect meanwhile.
        if issuer is not self._issuer or not self._jwt or claims.role not in self._jwt.limits:
            raise SessionEnded(ENDED)
        return self._caller(claims, self._person(PREFIX + claims.name, claims.role))

    def current(self, caller: Caller) -> Caller | None:
        """Return *caller* as it is configured now; None if it is no longer admitted."""
        person = self._people.get(caller.name)
        limits = None if self._jwt is None else self._jwt.limits.get(caller.role)
        if person is None or limits is None or person.quota is not caller.quota:
            return None
        if self._issuer is not None and self._issuer.holds(caller.signer) is False:
            return None
        left = limits.expires_at - self._clock()
        if left <= 0:
            return None
        return caller_of(
            caller.name,
            limits,
            person.quota,
            role=caller.role,
            expires=min(caller.expires, self._monotonic() + left - SKEW),
            exp=caller.exp,
            signer=caller.signer,
        )

    def quotas(self) -> Mapping[str, Quota]:
        """Return the quotas of all remembered callers, by their names."""
        return {name: person.quota for name, person in self._people.items()}

    def begin(self, now: float, spent: Mapping[str, Mapping[str, int]]) -> None:
        """Start the budgets with the tokens that callers have *spent*; see `Tokens.begin`."""
        self._begun = now
        self._spent = {name: used for name, used in spent.items() if name.startswith(PREFIX)}
        for name, person in self._people.items():
            person.quota.budget.begin(self._still(self._spent.get(name, {})))

    def _still(self, spent: Mapping[str, int]) -> dict[str, int]:
        """Return what was *spent* in the periods that have not ended since."""
        now, begun = self._clock(), self._begun
        return {
            period.setting: spent[period.setting]
            for period in PERIODS
            if period.setting in spent and period.since(begun) == period.since(now)
        }

    @property
    def periods(self) -> Collection[Period]:
        """The periods for which a role has a budget."""
        roles = () if self._jwt is None else self._jwt.limits.values()
        return {
            period for period in PERIODS if any(getattr(role, period.setting) for role in roles)
        }

    @property
    def binding(self) -> bytes:
        """The settings to which sessions are bound: whose tokens are accepted, and which roles
        there are.

        The numbers of limits are left out, of which each worker may have a part.
        """
        jwt = self._jwt
        settings = jwt and (identity(jwt), [(name, r.admin) for name, r in jwt.limits.items()])
        return hashlib.sha256(repr(settings).encode()).digest()


def identity(jwt: Jwt) -> tuple[str | None, ...]:
    """Return the settings that decide whose tokens are accepted, and how they name
    their callers.
    """
    return (jwt.issuer, jwt.audience, jwt.jwks_url, jwt.jwks_file, jwt.caller, jwt.roles)


def _as_key(name: str, limits: Role) -> ClientKey:
    """Return *limits* as those of a key, of which quotas are made."""
    values = {field.name: getattr(limits, field.name) for field in fields(Limits)}
    return ClientKey(name=name, **values)

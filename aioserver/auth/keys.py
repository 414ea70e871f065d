"""API keys, and the sessions that browsers get for them.

Only the SHA-256 of a key is stored. A browser exchanges its key for a session (sessions.py), which
is bound to that hash: it ends with its key.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from math import inf
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.auth.callers import SKEW, Caller
from aioserver.auth.sessions import Sessions, name_in
from aioserver.errors import InvalidApiKey, SessionEnded
from aioserver.limits.budget import Budget
from aioserver.limits.fair_queue import BATCH
from aioserver.limits.quota import Quota

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aioserver.config.settings import ClientKey, Limits
    from aioserver.limits.scheduler import Scheduler

    # The signature of `quota_of`.
    MakeQuota = Callable[[ClientKey], Quota]

UNKNOWN = "this API key is not known"
EXPIRED = "this API key has expired"
ENDED = "this session has ended: log in again"


class _Key(msgspec.Struct, frozen=True):
    digest: bytes
    caller: Caller
    quota: Quota
    # The end of its validity, in wall time.
    expires: float

    def valid(self, clock: Callable[[], float]) -> bool:
        """Return whether the key is valid: it has not expired."""
        return clock() < self.expires


def quota_of(key: ClientKey, scheduler: Scheduler | None = None) -> Quota:
    """Return the quota of *key*; *scheduler* starts the requests that wait there."""
    return Quota(
        key.max_concurrent,
        key.requests_per_minute,
        max_connections=key.max_connections,
        queue_size=key.queue_size,
        budget=Budget(
            key.tokens_per_minute,
            key.tokens_per_day,
            per_week=key.tokens_per_week,
            per_month=key.tokens_per_month,
        ),
        scheduler=scheduler,
    )


def limit(quota: Quota, limits: Limits) -> None:
    """Apply *limits* to *quota*."""
    quota.apply(
        limits.max_concurrent,
        limits.requests_per_minute,
        limits.max_connections,
        limits.queue_size,
    )
    quota.budget.apply(
        limits.tokens_per_minute,
        limits.tokens_per_day,
        limits.tokens_per_week,
        limits.tokens_per_month,
    )
    quota.serve()


def caller_of(name: str, limits: Limits, quota: Quota, **token: Any) -> Caller:
    """Return the caller *name*, which has *limits* and *quota*; *token*: see `Caller`."""
    batch = limits.class_ == BATCH
    return Caller(
        name,
        priority=limits.priority,
        batch=batch,
        admin=limits.admin,
        quota=quota,
        models=limits.models,
        hold=limits.hold or "",
        **token,
    )


class Keys:
    """The valid keys, and their sessions.

    Always: there is one `Caller` for each key, made once, so that a request costs a hash, a
    look-up and a comparison. A name keeps its counts for as long as its key stays the same.
    """

    def __init__(
        self,
        sessions: Sessions | None = None,
        *,
        make_quota: MakeQuota = quota_of,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sessions = Sessions() if sessions is None else sessions
        # Wall time: keys expire by it.
        self._clock = clock
        self._make_quota = make_quota
        self._by_name: dict[str, _Key] = {}
        self._by_digest: dict[bytes, _Key] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def apply(self, keys: Iterable[ClientKey]) -> frozenset[str]:
        """Accept *keys* and no others. Return the names whose key was removed or replaced."""
        old, new = self._by_name, {}
        for settings in keys:
            assert settings.sha256 is not None, "config/ makes sha256 of key_env and key_file"
            digest, old_key = bytes.fromhex(settings.sha256), old.get(settings.name)
            if old_key is not None and old_key.digest == digest:
                quota = old_key.quota
                limit(quota, settings)
                if old_key.caller.admin and not settings.admin:
                    quota.demote()
            else:
                quota = self._make_quota(settings)
                if old_key is not None:
                    # The caller has another key now: its use so far stays counted.
                    quota.take_over(old_key.quota)
            expires = settings.expires_at
            # Both times are by our own clock, so connections need no SKEW.
            left = expires - self._clock() - SKEW
            caller = caller_of(settings.name, settings, quota, expires=time.monotonic() + left)
            new[settings.name] = _Key(digest, caller, quota, expires)
        self._by_name = new
        self._by_digest = {key.digest: key for key in new.values()}
        revoked = {
            name: key
            for name, key in old.items()
            if name not in new or new[name].digest != key.digest
        }
        for key in revoked.values():
            key.quota.revoke()
        return frozenset(revoked)

    def find(self, digest: bytes) -> Caller | None:
        """Return the caller with the key whose SHA-256 is *digest*; None if there is none.

        Raises:
            InvalidApiKey: the key has expired.
        """
        entry = self._by_digest.get(digest)
        # In constant time, although the time of a hash's look-up reveals no key.
        if entry is None or not hmac.compare_digest(entry.digest, digest):
            return None
        if entry.expires < inf and not entry.valid(self._clock):
            raise InvalidApiKey(EXPIRED)
        return entry.caller

    def caller(self, key: bytes) -> Caller:
        """Return the caller with the key *key*.

        Raises:
            InvalidApiKey: no caller has this key, or it has expired.
        """
        if (caller := self.find(hashlib.sha256(key).digest())) is None:
            raise InvalidApiKey(UNKNOWN)
        return caller

    def current(self, caller: Caller) -> Caller | None:
        """Return *caller* with its key's present configuration; None if that key is no longer
        valid.
        """
        key = self._by_name.get(caller.name)
        if key is None or key.quota is not caller.quota or not key.valid(self._clock):
            return None
        return key.caller

    def quotas(self) -> dict[str, Quota]:
        """Return the quotas of all valid keys, by their names."""
        return {name: key.quota for name, key in self._by_name.items()}

    def session(self, caller: Caller) -> tuple[str, int]:
        """Return a new session of *caller*, and the seconds for which it is valid.

        Raises:
            KeyError: *caller* has no key.
        """
        key = self._by_name[caller.name]
        until = None if key.expires == inf else key.expires
        return self._sessions.make(caller.name, key.digest, until)

    def resume(self, session: str) -> Caller:
        """Return the caller with the session *session*.

        Raises:
            SessionEnded: no caller has this session, it is too old, or its key is no longer valid.
        """
        key = self._by_name.get(name_in(session))
        if key is None or not key.valid(self._clock):
            raise SessionEnded(ENDED)
        if self._sessions.seconds(session, key.digest):
            return key.caller
        raise SessionEnded(ENDED)

"""API keys, and the sessions that browsers get for them.

Of a key only its SHA-256 is kept. A browser exchanges its key for a session of 12 hours, which it
holds in a cookie: `name.expiry.mac`, with an HMAC (RFC 2104) whose own key is made of the hash of
the API key and of a pepper. A session therefore ends with its key, outlives a restart, is valid in
every worker, and needs no setting.

The pepper is made of the providers' keys, which are in the environment and not in the file:
otherwise anybody who can read the hashes in the file could make sessions of them. If no provider
has a key, the pepper is random, and a restart ends all sessions; instances of a cluster agree on
one through its server.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.auth.callers import Caller
from aioserver.errors import InvalidApiKey, SessionEnded
from aioserver.limits.budget import Budget
from aioserver.limits.fair_queue import BATCH
from aioserver.limits.quota import Quota

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aioserver.config.settings import ClientKey, Limits, Llm
    from aioserver.limits.scheduler import Scheduler

    # Called as `quota_of` is.
    MakeQuota = Callable[[ClientKey], Quota]

SESSION_SECONDS = 12 * 3600
# Digits of an expiry at most: a longer number is no date, and int() is slow with thousands of
# digits.
MAX_EXPIRY_DIGITS = 15
UNKNOWN = "this API key is not known"
ENDED = "this session has ended: log in again"


class _Key(msgspec.Struct, frozen=True):
    digest: bytes
    caller: Caller
    quota: Quota


def quota_of(key: ClientKey, scheduler: Scheduler | None = None) -> Quota:
    """Return the quota of *key*; what waits there is started by *scheduler*."""
    return Quota(
        key.max_concurrent,
        key.requests_per_minute,
        max_connections=key.max_connections,
        queue_size=key.queue_size,
        budget=Budget(key.tokens_per_minute, key.tokens_per_day),
        scheduler=scheduler,
    )


def limit(quota: Quota, limits: Limits) -> None:
    """Let *quota* have *limits* from now on."""
    quota.apply(
        limits.max_concurrent,
        limits.requests_per_minute,
        limits.max_connections,
        limits.queue_size,
    )
    quota.budget.apply(limits.tokens_per_minute, limits.tokens_per_day)
    quota.serve()


def caller_of(name: str, limits: Limits, quota: Quota, **token: Any) -> Caller:
    """Return the caller *name*, which has *limits* and *quota*; *token*: see `Caller`."""
    batch = limits.class_ == BATCH
    return Caller(
        name, priority=limits.priority, batch=batch, admin=limits.admin, quota=quota, **token
    )


class Keys:
    """The valid keys, and the sessions made of them.

    Always: there is one `Caller` for each key, made once, so that a request costs a hash, a
    look-up and a comparison; a name keeps its counts for as long as its key stays the same.
    """

    def __init__(
        self,
        pepper: bytes = b"",
        clock: Callable[[], float] = time.time,
        *,
        make_quota: MakeQuota = quota_of,
    ) -> None:
        self._pepper = pepper
        self._make_quota = make_quota
        # Wall time: a session may be older than the process.
        self._clock = clock
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
                    # Another key of the same caller: what it has used today stays used.
                    quota.take_over(old_key.quota)
            caller = caller_of(settings.name, settings, quota)
            new[settings.name] = _Key(digest, caller, quota)
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
        """Return the caller with the key whose SHA-256 is *digest*; None if nobody has it."""
        entry = self._by_digest.get(digest)
        # In constant time, although the time that the look-up of a hash takes reveals no key.
        if entry is None or not hmac.compare_digest(entry.digest, digest):
            return None
        return entry.caller

    def caller(self, key: bytes) -> Caller:
        """Return the caller with the key *key*.

        Raises:
            InvalidApiKey: no caller has this key.
        """
        if (caller := self.find(hashlib.sha256(key).digest())) is None:
            raise InvalidApiKey(UNKNOWN)
        return caller

    def current(self, caller: Caller) -> Caller | None:
        """Return *caller* as its key is configured now; None if that key is no longer valid."""
        key = self._by_name.get(caller.name)
        return key.caller if key is not None and key.quota is caller.quota else None

    def quotas(self) -> dict[str, Quota]:
        """Return the quotas of all valid keys, by their names."""
        return {name: key.quota for name, key in self._by_name.items()}

    def session(self, caller: Caller) -> str:
        """Return a new session of *caller*, valid for SESSION_SECONDS.

        Raises:
            KeyError: *caller* has no key.
        """
        expiry = int(self._clock()) + SESSION_SECONDS
        secret = self._by_name[caller.name].digest
        return make_session(caller.name, expiry, secret, self._pepper)

    def resume(self, session: str) -> Caller:
        """Return the caller with the session *session*.

        Raises:
            SessionEnded: no caller has this session, it is too old, or its key is no longer valid.
        """
        name = session_name(session)
        key = self._by_name.get(name)
        if key is not None and read_session(session, key.digest, self._pepper, self._clock()):
            return key.caller
        raise SessionEnded(ENDED)


def make_session(name: str, expiry: int, secret: bytes, pepper: bytes) -> str:
    """Return a session of *name* until *expiry*, in wall time, which depends on *secret*."""
    return f"{name}.{expiry}.{_mac(f'{name}.{expiry}', secret, pepper)}"


def session_name(session: str) -> str:
    """Return the name in *session*, which may be a guess."""
    # A name may contain dots; the other two parts cannot.
    return session.rpartition(".")[0].rpartition(".")[0]


def read_session(session: str, secret: bytes, pepper: bytes, now: float) -> float:
    """Return the seconds for which *session* is valid after *now*; 0.0 if it is not."""
    text, _, mac = session.rpartition(".")
    expiry = text.rpartition(".")[2]
    if not (expiry.isascii() and expiry.isdigit() and len(expiry) <= MAX_EXPIRY_DIGITS):
        return 0.0
    expected = _mac(text, secret, pepper)
    if not hmac.compare_digest(expected.encode(), mac.encode("utf-8", "surrogatepass")):
        return 0.0
    return max(0.0, int(expiry) - now)


def _mac(text: str, secret: bytes, pepper: bytes) -> str:
    key = hmac.digest(secret, b"aioserver session" + pepper, "sha256")
    return hmac.digest(key, text.encode("utf-8", "surrogatepass"), "sha256").hex()


def pepper_of(llm: Llm) -> bytes:
    """Return a secret made of the providers' keys, or a random one if no provider has a key."""
    return known_pepper(llm) or secrets.token_bytes(32)


def known_pepper(llm: Llm) -> bytes | None:
    """Return the secret that every instance makes of the same providers' keys.

    None if no provider has a key.
    """
    provider_keys = sorted(
        provider.api_key.reveal()
        for provider in llm.providers.values()
        if provider.api_key is not None
    )
    if not provider_keys:
        return None
    return hashlib.sha256("\0".join(provider_keys).encode()).digest()

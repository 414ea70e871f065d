"""Who asks, and from which page.

With keys (`auth.keys`) the caller is who a key says it is; a browser exchanges its key for a cookie, a
session of 12 hours. Without keys all clients are one caller: ids are names within it. Fairness still
looks at the client's address, and within it at OpenAI's `user` where a request has one.

Of a key only its SHA-256 is here. A session is `name.expiry.mac` with an HMAC whose own key is made of
that hash and of a pepper: so it dies with its key, lives through a restart, holds in every worker, and
needs no setting. The pepper is made of what the environment keeps from the file (the providers' keys):
else who reads the hashes in a file could make sessions of them. Where no provider has a key it is made
by chance, and a restart ends all sessions.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import web

from aioserver.auth.hosts import Hosts, Proxies
from aioserver.errors import InvalidApiKey, OriginNotAllowed, SessionEnded
from aioserver.limits.quota import Quota

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from aioserver.config.settings import Auth, ClientKey, Llm

SESSION_SECONDS = 12 * 3600
NO_LIMITS = 1 << 31, 1 << 31


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose streams and conversations.

    *line*: in which of its lines it stands at a provider; *priority*: its weight there, 1 to 10;
    *quota*: what its key may use. Of the same name is the same caller.
    """

    name: str = ""
    line: str = field(default="", compare=False)
    priority: int = field(default=1, compare=False)
    admin: bool = field(default=False, compare=False)
    quota: Quota | None = field(default=None, compare=False, repr=False)

    @property
    def turn(self) -> str:
        """In whose turn it waits at a provider: its key's; without keys, its address's.

        So that nobody without a key gets more turns by naming more users.
        """
        return self.name or self.line.partition("\0")[0]

    def on_behalf_of(self, user: object) -> Caller:
        """The same caller, in the line of one of its users."""
        if isinstance(user, str) and user:
            return replace(self, line=f"{self.line}\0{user[:128]}")
        return self


CALLER = web.RequestKey("caller", Caller)  # whose request it is, once it was let in
ADDRESS = web.RequestKey("address", str)  # where it comes from, where a proxy may say so


@functools.lru_cache(maxsize=4096)
def anonymous(address: str | None) -> Caller:
    """A client without a key."""
    return Caller("", address or "")


@dataclass(frozen=True, slots=True)
class _Key:
    digest: bytes
    caller: Caller
    quota: Quota


class Keys:
    """The keys that let in, and the sessions that are made of them.

    Always: one `Caller` for each key, made once, so that a request costs a hash, a look-up and a
    compare; a name keeps its counts for as long as its key is the same.
    """

    def __init__(self, pepper: bytes = b"", clock: Callable[[], float] = time.time) -> None:
        self._pepper = pepper
        self._clock = clock  # wall time: a session is older than the process
        self._by_name: dict[str, _Key] = {}
        self._by_digest: dict[bytes, _Key] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def apply(self, given: Iterable[ClientKey]) -> frozenset[str]:
        """Use these keys from now on. Returns the names whose key is gone, or is another now."""
        before, now = self._by_name, {}
        for one in given:
            assert one.sha256 is not None, "config.py makes it of key_env and key_file"
            digest, known = bytes.fromhex(one.sha256), before.get(one.name)
            if known is not None and known.digest == digest:
                quota = known.quota
                quota.apply(one.max_concurrent, one.requests_per_minute)
                if known.caller.admin and not one.admin:
                    quota.demote()
            else:
                quota = Quota(one.max_concurrent, one.requests_per_minute)
            caller = Caller(one.name, priority=one.priority, admin=one.admin, quota=quota)
            now[one.name] = _Key(digest, caller, quota)
        self._by_name = now
        self._by_digest = {key.digest: key for key in now.values()}
        gone = {
            name: key
            for name, key in before.items()
            if name not in now or now[name].digest != key.digest
        }
        for key in gone.values():
            key.quota.revoke()
        return frozenset(gone)

    def caller(self, key: bytes) -> Caller:
        """Whose key it is.

        Raises:
            InvalidApiKey: nobody's.
        """
        digest = hashlib.sha256(key).digest()
        found = self._by_digest.get(digest)
        # In constant time, though what the look-up of a hash takes tells nothing of the key.
        if found is None or not hmac.compare_digest(found.digest, digest):
            raise InvalidApiKey("this API key is not known")
        return found.caller

    def renewed(self, caller: Caller) -> Caller | None:
        """*caller* as its key says now; None: that key is no longer valid."""
        key = self._by_name.get(caller.name)
        return key.caller if key is not None and key.quota is caller.quota else None

    def session(self, caller: Caller) -> str:
        """A session of *caller*, for SESSION_SECONDS."""
        expiry = str(int(self._clock()) + SESSION_SECONDS)
        return f"{caller.name}.{expiry}.{self._mac(self._by_name[caller.name], expiry)}"

    def resumed(self, session: str) -> Caller:
        """Whose session it is.

        Raises:
            SessionEnded: nobody's, or too old, or its key is gone.
        """
        name, _, rest = session.rpartition(".")[0].rpartition(".")
        mac = session.rpartition(".")[2]
        key = self._by_name.get(name)
        if key is not None and rest.isascii() and rest.isdigit() and len(rest) < 16:
            made = self._mac(key, rest)
            if hmac.compare_digest(made.encode(), mac.encode("utf-8", "surrogatepass")) and (
                int(rest) > self._clock()
            ):
                return key.caller
        raise SessionEnded("this session has ended: log in again")

    def _mac(self, key: _Key, expiry: str) -> str:
        secret = hmac.digest(key.digest, b"aioserver session" + self._pepper, "sha256")
        text = f"{key.caller.name}.{expiry}".encode()
        return hmac.digest(secret, text, "sha256").hex()


def pepper_of(llm: Llm) -> bytes:
    """What only this server's environment knows: made of its providers' keys, or else by chance."""
    known = sorted(
        one.api_key.reveal() for one in llm.providers.values() if one.api_key is not None
    )
    return hashlib.sha256("\0".join(known).encode()).digest() if known else secrets.token_bytes(32)


class Doors:
    """Who may come in: keys, else the Hosts of this machine, else everybody.

    The object stays when the configuration is read again; what it holds is replaced.
    """

    def __init__(self, given: Auth | None = None, pepper: bytes = b"") -> None:
        self.keys = Keys(pepper)
        self.nobody = Quota(*NO_LIMITS)  # of those without a key: for `held` alone
        self.apply(given)

    @property
    def keyed(self) -> bool:
        """Whether a client needs a key."""
        return len(self.keys) > 0

    def apply(self, given: Auth | None) -> frozenset[str]:
        """Use *given* from now on.

        Returns the names of the callers who may no longer come: their key is gone, or is another
        now; "" for those without a key where there are keys now.
        """
        open_before = not self.keyed
        gone = self.keys.apply(given.keys if given is not None else ())
        guarded = given is None or not (given.open or given.keys)
        self.hosts = Hosts(given.allowed_hosts if given is not None else ()) if guarded else None
        self.proxies = Proxies(given.trusted_proxies if given is not None else ())
        if not (open_before and self.keyed):
            return gone
        self.nobody.revoke()
        self.nobody = Quota(*NO_LIMITS)
        return gone | {""}

    def renewed(self, caller: Caller) -> Caller | None:
        """*caller* as it may come now; None: it may not."""
        if not caller.name:
            return None if self.keyed else caller
        return self.keys.renewed(caller)


class Origins:
    """The pages that may open a WebSocket and read our answers (`allow_origins`).

    CORS never guards a WebSocket: its handshake is refused here, before the upgrade.
    """

    def __init__(self, allowed: tuple[str, ...], *, credentials: bool) -> None:
        self.apply(allowed, credentials=credentials)

    def apply(self, allowed: tuple[str, ...], *, credentials: bool) -> None:
        """From now on these may; who is connected stays."""
        self._any = "*" in allowed
        self._allowed = frozenset(origin.rstrip("/").lower() for origin in allowed)
        self._credentials = credentials

    def allows(self, origin: str, host: str | None) -> bool:
        """Whether a page of *origin* may; our own pages (same host and port) always may."""
        return self._any or self.trusts(origin, host)

    def trusts(self, origin: str, host: str | None) -> bool:
        """Whether a cookie counts that comes from *origin*: our own page, or one that is named.

        A browser adds it by itself, so that "*" is not enough: every page on this machine could
        chat as who has logged in here, other ports being the same site for SameSite.
        """
        if origin.rstrip("/").lower() in self._allowed:
            return True
        try:
            own = urlsplit(origin).netloc.lower()
        except ValueError:  # "http://[": no address
            return False
        return bool(own) and host is not None and own == host.lower()

    def check(self, headers: Mapping[str, str]) -> None:
        """Refuse a handshake from a page that may not; who sends no Origin is no browser.

        Raises:
            OriginNotAllowed: said before the upgrade.
        """
        origin = headers.get("Origin")
        if origin is not None and not self.allows(origin, headers.get("Host")):
            raise OriginNotAllowed("this page may not connect: see chat.websocket.allow_origins")

    def cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The CORS headers of an answer to a request with these *headers*."""
        origin = headers.get("Origin")
        if origin is None or not origin.isprintable() or not origin.isascii():
            return {}
        if not self.allows(origin, headers.get("Host")):
            return {"Vary": "Origin"}
        cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if self._credentials:
            cors["Access-Control-Allow-Credentials"] = "true"
        return cors

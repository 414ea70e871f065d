"""Callers: the keys that requests come with, and the flows in which they wait.

With keys (`auth.keys`) each key is one caller, and so is each name in tokens (`auth.jwt`). Without
keys all clients are one caller, named "". Request ids and conversations are names within a caller.
Fair queueing distinguishes more: also the addresses of clients without a key, and the users that a
request may name (OpenAI's `user`).

The flows are the callers of limits/fair_queue, which share a provider's work by weight; the
subflows of a flow share its part evenly.
"""

from __future__ import annotations

import functools
from math import inf

import msgspec
from aiohttp import web
from msgspec.structs import force_setattr, replace

from aioserver.errors import InvalidApiKey, KeyExpired, TokenExpired
from aioserver.limits.quota import Quota

# Characters that count in the `user` of a request, or in its session: it may be any text, and
# becomes part of a queue's name.
MAX_USER = 256
# Seconds by which the clocks of an issuer and of this machine may differ: a token is accepted for
# so long after it has expired.
SKEW = 30.0


class Caller(msgspec.Struct, frozen=True, eq=False):
    """The owner of streams and conversations. Two objects of one name are the same caller.

    *models*: the names of models that it may use, which may end with `*`; None: all. *hold*: which
    events of its answers are held (`hold` in the settings), empty for the server's setting.
    *subflow*: the caller's queue within `flow`; *priority*: the weight of the flow, 1 to 10.
    *batch*: whether its requests use what others leave; *admin*: whether the caller may see the
    operating pages. *quota*: the limits of the caller's key, None without keys. *role*: that of
    its token, "" for a key. *expires*: the end of its token or key, by the monotonic clock; its
    connections are closed SKEW later. *exp*: the end of a token in Unix time, as the token has it;
    *signer*: the identity of the key that has signed it. The fields below are derived from these.
    """

    name: str = ""
    subflow: str = ""
    priority: int = 1
    batch: bool = False
    admin: bool = False
    quota: Quota | None = None
    role: str = ""
    expires: float = inf
    exp: float = inf
    signer: str = ""
    models: tuple[str, ...] | None = None
    hold: str = ""

    # The address of a client without a key; "" for a key, which is the same caller everywhere.
    address: str = ""
    # The flow in which requests wait at a provider: the caller's key, or its address without keys.
    # The user is not part of it: otherwise a client without a key would get a larger share by
    # naming more users.
    flow: str = ""
    # The caller's name in metrics, which must not contain names of people.
    label: str = ""

    def __post_init__(self) -> None:
        # Derived once, since each request reads them, and callers are rarely made.
        address = "" if self.name else self.subflow.partition("\0")[0]
        force_setattr(self, "address", address)
        force_setattr(self, "flow", self.name or address)
        force_setattr(self, "label", f"jwt:{self.role}" if self.role else self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Caller) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def may_ask(self, name: str) -> bool:
        """Return whether the caller may use the model *name*, under that name."""
        return self.models is None or any(
            name == each or (each.endswith("*") and name.startswith(each[:-1]))
            for each in self.models
        )

    def may_ask_all(self, start: str) -> bool:
        """Return whether the caller may use every model whose name begins with *start*."""
        return self.models is None or any(
            each.endswith("*") and start.startswith(each[:-1]) for each in self.models
        )

    def expired(self) -> InvalidApiKey:
        """Return the error of a connection whose key or token has expired."""
        if self.role:
            return TokenExpired("the token has expired: connect with a fresh one")
        return KeyExpired("this API key has expired")

    def on_behalf_of(self, user: object) -> Caller:
        """Return the same caller, with a subflow of its own for *user*, if that is a text."""
        if isinstance(user, str) and user:
            return replace(self, subflow=f"{self.subflow}\0{user[:MAX_USER]}")
        return self


# The caller of a request that does not come from a client.
NO_CALLER = Caller()
# The caller of a request that was admitted.
CALLER = web.RequestKey("caller", Caller)


class Peer(msgspec.Struct, frozen=True):
    """The client of a request that another instance has passed on, by the word of that instance:
    the client's *address*, and whether its connection is *secure*.
    """

    address: str
    secure: bool


# The client's address; set only if proxies are trusted, otherwise `request.remote` holds it.
ADDRESS = web.RequestKey("address", str)


@functools.lru_cache(maxsize=4096)
def anonymous(address: str | None) -> Caller:
    """Return the caller without a key whose requests come from *address*."""
    return Caller("", address or "")

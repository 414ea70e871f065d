"""A house that wants keys, and what a client does with one."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from aioserver.auth import guard
from aioserver.config.settings import Auth, ClientKey

if TYPE_CHECKING:
    from aiohttp import ClientResponse

    from tests.support.server import House

COOKIE = guard.COOKIE


def key_of(name: str) -> str:
    """The key of the caller *name*; `root` is an admin."""
    return f"aio-{name}-0123456789abcdef"


def entry(name: str, **limits: Any) -> dict[str, Any]:
    """The line of *name* under `auth.keys`."""
    digest = hashlib.sha256(key_of(name).encode()).hexdigest()
    return {"name": name, "sha256": digest, "admin": name == "root", **limits}


def keys_of(*names: str, **limits: Any) -> dict[str, Any]:
    """The changes of a house with these callers."""
    return {"auth.keys": [entry(name, **limits) for name in names]}


def auth_of(*names: str, **limits: Any) -> Auth:
    """The same as settings, for a change at run time."""
    return Auth(keys=tuple(ClientKey(**entry(name, **limits)) for name in names))


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(name)}"}


def cookie(session: str) -> dict[str, str]:
    return {"Cookie": f"{COOKIE}={session}"}


async def log_in(house: House, name: str, **headers: str) -> str:
    """The session that *name* gets for its key."""
    body = {"key": key_of(name)}
    async with house.session.post(f"{house.base}/session", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        session = response.cookies[COOKIE].value
    house.session.cookie_jar.clear()  # each request says itself what it brings
    return session


async def code_of(response: ClientResponse) -> str:
    """The code of our error body."""
    return str((await response.json())["error"]["code"])

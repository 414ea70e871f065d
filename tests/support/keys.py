"""A server that wants keys, and what a client does with one."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from aioserver.auth import guard
from aioserver.config.settings import Auth, ClientKey

if TYPE_CHECKING:
    from aiohttp import ClientResponse

    from tests.support.server import RunningServer

COOKIE = guard.COOKIE


def key_of(name: str) -> str:
    """The key of the caller *name*; `root` is an admin."""
    return f"aio-{name}-0123456789abcdef"


def entry(name: str, **limits: Any) -> dict[str, Any]:
    """The entry of *name* in `auth.keys`."""
    digest = hashlib.sha256(key_of(name).encode()).hexdigest()
    return {"name": name, "sha256": digest, "admin": name == "root", **limits}


def keys_of(*names: str, **limits: Any) -> dict[str, Any]:
    """The changes of a server with these callers."""
    return {"auth.keys": [entry(name, **limits) for name in names]}


def auth_of(*names: str, **limits: Any) -> Auth:
    """The settings `auth` with these callers, for a change at run time."""
    return Auth(keys=tuple(ClientKey(**entry(name, **limits)) for name in names))


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(name)}"}


def cookie(session: str) -> dict[str, str]:
    return {"Cookie": f"{COOKIE}={session}"}


async def log_in(server: RunningServer, name: str, **headers: str) -> str:
    """Log *name* in; returns its session."""
    body = {"key": key_of(name)}
    async with server.session.post(
        f"{server.base}/session", json=body, headers=headers
    ) as response:
        assert response.status == 200, await response.text()
        session = response.cookies[COOKIE].value
    # Each request of a test brings its own cookies.
    server.session.cookie_jar.clear()
    return session


async def code_of(response: ClientResponse) -> str:
    """The code of our error body."""
    return str((await response.json())["error"]["code"])

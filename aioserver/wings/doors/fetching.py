"""Where the keys of an issuer come from: its URL, or a file."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from aioserver import __version__
from aioserver.wings.doors.issuer import TIMEOUT, Issuer, Unreachable
from aioserver.wings.doors.signatures import MAX_BYTES, KeySet, read_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.config.settings import Jwt

HEADERS = {
    "Accept": "application/jwk-set+json, application/json",
    "User-Agent": f"aioserver/{__version__}",
}


def issuer_of(jwt: Jwt, report: Callable[[str, str], None]) -> Issuer:
    """Return the issuer whose keys are where *jwt* says; what it cannot have goes to *report*.

    Raises:
        UselessKeys, OSError: its file cannot be used.
    """
    if jwt.jwks_url is not None:
        return Issuer(partial(fetch, jwt.jwks_url), report)
    assert jwt.jwks_file is not None, "config/ checks that there is one of the two"
    issuer = Issuer(partial(_from_file, jwt.jwks_file), report)
    issuer.use(read_file(jwt.jwks_file))
    return issuer


async def fetch(url: str) -> bytes:
    """Return what is at *url*, and no more than a set may have.

    Raises:
        Unreachable: there is no such answer.
    """
    try:
        async with (
            aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT),
                connector=aiohttp.TCPConnector(limit=1, force_close=True),
                headers=HEADERS,
            ) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise Unreachable(f"status {response.status}")
            content = bytearray()
            async for data in response.content.iter_any():
                content += data
                if len(content) > MAX_BYTES:
                    break
            return bytes(content)
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        raise Unreachable(type(exc).__name__) from None


async def _from_file(path: str) -> bytes:
    try:
        return await asyncio.to_thread(_content, path)
    except (OSError, ValueError) as exc:
        raise Unreachable(type(exc).__name__) from None


def read_file(path: str) -> KeySet:
    """Return the keys in the file *path*.

    Raises:
        UselessKeys, OSError: it cannot be used.
    """
    return read_keys(_content(path))


def _content(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(MAX_BYTES + 1)

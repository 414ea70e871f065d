"""The credentials of a client: a key, or a function that is called for each connection, since
tokens do not live as long as programs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Key: TypeAlias = str | Callable[[], str | Awaitable[str]] | None

UNAUTHORIZED = 401


class Credentials:
    """The key of a client, or the function that returns one.

    *renewable*: whether there may be another key after the server has refused this one.
    """

    def __init__(self, key: Key) -> None:
        self._key = key
        self.renewable = callable(key)

    async def headers(self) -> dict[str, str]:
        """Return the headers of a request. An exception of the function is raised here."""
        key = self._key
        if callable(key):
            asked = key()
            key = await asked if inspect.isawaitable(asked) else asked
        return {"Authorization": f"Bearer {key}"} if key else {}

"""A hook that is asked, wherever it is: behind a URL (http_hook.py), or a class (python_hook.py)."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioserver.config import settings
    from aioserver.hook import Call, Refuse
    from aioserver.wings.doors.shown_log import Shown


class Asked(ABC):
    """A hook of these *settings*.

    Always: it is closed once, when it is retired and nobody uses it any more, or the server ends.
    """

    def __init__(self, settings: settings.Hook) -> None:
        self.settings = settings
        # How many use it now.
        self.users = 0
        # Set while nobody uses it.
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def name(self) -> str:
        """The name, in logs and metrics."""
        return self.settings.name

    @property
    def connections(self) -> int:
        """The number of its connections in use."""
        return 0

    def enter(self) -> None:
        """Count one user more."""
        self.users += 1
        self._idle.clear()

    def leave(self) -> None:
        """Count one user less."""
        self.users -= 1
        if not self.users:
            self._idle.set()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Count a user for as long as the `with` lasts."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    async def retire(self) -> None:
        """Wait until nobody uses it, and close it."""
        await self._idle.wait()
        await self.close()

    async def close(self) -> None:  # noqa: B027 - a class has nothing
        """Give back what it has."""

    @abstractmethod
    async def decide(self, call: Call) -> Refuse | bytes | None:
        """Return the decision about the request in *call*: a refusal, another body, or None if it
        goes on. Cancelling is safe.

        Raises:
            HookFault: there is none.
        """

    @abstractmethod
    async def decide_answer(self, call: Call, body: bytes) -> Refuse | None:
        """Return the decision about *body*, a whole answer: a refusal, or None. Cancelling is
        safe.

        Raises:
            HookFault: there is none.
        """

    @abstractmethod
    async def follow(self, call: Call, shown: Shown) -> Refuse | None:
        """Show the events in *shown*, until they end or the hook has decided; return its decision,
        as `decide_answer`.

        Raises:
            HookFault: there is none.
        """

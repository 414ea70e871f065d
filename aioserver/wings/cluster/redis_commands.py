"""The connection by which all wings send commands to the Redis or Valkey server."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from aioserver.wings.cluster.connection import CallFailed, Connection

# Commands that wait for the server.
MAX_COMMANDS = 10_000


class RedisCommands:
    """A connection for commands whose callers may stop waiting for the answers.

    Always: commands are carried out in the order of the calls, each at most once.
    """

    def __init__(self, url: str) -> None:
        self._connection = Connection(url)
        self._loop = asyncio.get_running_loop()
        self._asked: set[asyncio.Task[Any]] = set()
        self._opening = self._loop.create_task(self._open())

    @property
    def connected(self) -> bool:
        """Whether commands are carried out."""
        return self._connection.connected

    @property
    def heard(self) -> float:
        """When the server last answered anything."""
        return self._connection.heard

    def ask(self, *args: bytes | str | float) -> asyncio.Future[Any]:
        """Return the future answer to a command."""
        if len(self._asked) >= MAX_COMMANDS:
            refused: asyncio.Future[Any] = self._loop.create_future()
            refused.set_exception(CallFailed("too many commands wait for the server"))
            return refused
        answer = self._loop.create_task(self._connection.execute(*args))
        self._asked.add(answer)
        answer.add_done_callback(self._answered)
        return answer

    async def execute(self, *args: bytes | str | float) -> Any:
        """Return the answer to a command. Cancelling it only ends the wait.

        Raises:
            CallFailed: there is no answer within BOUND, or an error.
        """
        return await asyncio.shield(self.ask(*args))

    async def close(self) -> None:
        """Close the connection; commands without an answer get none."""
        self._opening.cancel()
        for asked in tuple(self._asked):
            asked.cancel()
        await asyncio.wait((self._opening, *self._asked))
        await self._connection.close()

    async def _open(self) -> None:
        # The connection keeps trying in the background.
        with contextlib.suppress(CallFailed):
            await self._connection.open()

    def _answered(self, answer: asyncio.Task[Any]) -> None:
        self._asked.discard(answer)
        if not answer.cancelled():
            # The asking task may not wait any more.
            answer.exception()

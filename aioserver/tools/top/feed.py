"""Follows a server's `/events` (WHATWG HTML 9.2), and connects again after a loss."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from aioserver.client.faults import Reconnection
from aioserver.protocol.eventstream import EventTooLong
from aioserver.tools import remote

if TYPE_CHECKING:
    from collections.abc import Callable

# Incidents that are kept: as many as the server keeps.
MAX_INCIDENTS = 100
# The most seconds between two attempts: a person waits.
MAX_DELAY = 4.0
# Seconds beyond the interval after which a server that sends no byte counts as lost.
SILENCE = 10.0


class LostError(Exception):
    """The connection ended, or could not be made; the message is one line for people."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class State:
    """The known state of the server.

    *problem* says why no events come; it is empty while they do. *lost_at*, of the first failure
    in a row, and *retry_at* are monotonic times.
    """

    url: str
    stats: dict[str, Any] | None = None
    incidents: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_INCIDENTS))
    problem: str = ""
    lost_at: float = 0.0
    retry_at: float = 0.0

    def take(self, name: bytes, data: Any) -> None:
        """Take an event of the server into account; an event of unknown form is ignored."""
        if not isinstance(data, dict):
            return
        if name == b"stats":
            self.stats = data
        elif name == b"history":
            # The server sends the whole history on every connection.
            self.incidents.clear()
            self.incidents.extend(
                incident for incident in data.get("incidents", ()) if isinstance(incident, dict)
            )
        elif name == b"incident":
            self.incidents.append(data)


class Feed:
    """Reads the events of one server. *changed* is called after each of them, and at a loss."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        state: State,
        interval: float,
        changed: Callable[[], None],
    ) -> None:
        self._session = session
        self._state = state
        self._interval = interval
        self._changed = changed

    async def first(self) -> None:
        """Read until the first snapshot.

        Raises:
            LostError: no snapshot came.
            Unreachable: the server answers, and refuses us.
        """
        try:
            async with asyncio.timeout(self._interval + SILENCE):
                await self._listen(until_snapshot=True)
        except TimeoutError:
            raise LostError("the server sent no snapshot in time") from None

    async def follow(self) -> None:
        """Read for ever; after a loss connect again, as the client library does, but within
        MAX_DELAY.

        Raises:
            Unreachable: the server answers, and refuses us.
        """
        state, reconnection = self._state, Reconnection(random.random)
        while True:
            last_stats = state.stats
            try:
                await self._listen()
            except LostError as lost:
                if state.stats is not last_stats:
                    reconnection.progressed()
                now = time.monotonic()
                if not state.problem:
                    state.lost_at = now
                state.problem = str(lost)
                wait = min(MAX_DELAY, reconnection.after_loss(None, lost.retry_after))
                state.retry_at = now + wait
                self._changed()
                await asyncio.sleep(wait)

    async def _listen(self, *, until_snapshot: bool = False) -> None:
        """Read one connection to its end.

        This returns only with *until_snapshot*.

        Raises:
            LostError: the connection failed or ended, or its data are not aioserver's events.
            Unreachable: the server answers, and refuses us.
        """
        timeout = aiohttp.ClientTimeout(
            total=None, connect=remote.CONNECT_TIMEOUT, sock_read=self._interval + SILENCE
        )
        headers = {"Accept": "text/event-stream"}
        url = f"{self._state.url}/events"
        params = {"interval": f"{self._interval:g}"}
        try:
            async with self._session.get(
                url, params=params, headers=headers, timeout=timeout
            ) as response:
                await self._check(response)
                async for event in remote.events(response):
                    self._state.take(event.event, orjson.loads(event.data))
                    if event.event == b"stats":
                        self._state.problem = ""
                        if until_snapshot:
                            return
                    self._changed()
        except (aiohttp.ClientError, OSError) as error:
            raise LostError(remote.describe(error)) from None
        except (EventTooLong, orjson.JSONDecodeError):
            raise LostError("the server does not send aioserver's events") from None
        raise LostError("the server closed the connection")

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        """Accept the head of a stream of events.

        Raises:
            LostError: 429 or 5xx, which another attempt may not meet.
            Unreachable: another status or content type, which every attempt would meet.
        """
        if response.status == 200:
            if response.content_type != "text/event-stream":
                raise remote.Unreachable(
                    f"{response.url.path} has no events: is this an aioserver?"
                )
            return
        error = await remote.read_error(response)
        reason = error.message or error.code
        if response.status >= 500 or response.status == 429:
            raise LostError(reason, retry_after=error.retry_after)
        hint = " (--key, or AIOSERVER_KEY)" if response.status in {401, 403} else ""
        raise remote.Unreachable(f"{response.url.path}: HTTP {response.status}: {reason}{hint}")

"""Follows a server's `/events`: the last snapshot, the last incidents, and the way back to it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from aioserver.commands import remote
from aioserver.protocol.eventstream import EventTooLong, Splitter, parse

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_INCIDENTS = 100  # kept; as many as the server keeps
MAX_EVENT_BYTES = 16 << 20  # ten minutes of history with many providers in one event
FIRST_PAUSE, MAX_PAUSE = 0.5, 4.0  # seconds between two tries, doubling
SILENCE = 10.0  # seconds beyond the interval without a byte: the server is lost


class LostError(Exception):
    """The connection to the server ended, or never was; the message is one line for people."""

    def __init__(self, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class State:
    """What is known of the server. *problem*: why nothing more is heard; "": all is well."""

    url: str
    stats: dict[str, Any] | None = None
    previous: dict[str, Any] | None = None  # the snapshot before, for what has grown since
    incidents: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_INCIDENTS))
    problem: str = ""
    lost_at: float = 0.0  # monotonic; of the first failure in a row
    retry_at: float = 0.0

    def take(self, name: bytes, data: Any) -> None:
        """One event of the server."""
        if not isinstance(data, dict):
            return
        if name == b"stats":
            self.previous, self.stats = self.stats, data
        elif name == b"history":
            self.incidents.clear()  # told anew after each way back
            self.incidents.extend(
                one for one in data.get("incidents", ()) if isinstance(one, dict)
            )
        elif name == b"incident":
            self.incidents.append(data)


class Feed:
    """The events of one server. *changed* is called after each of them, and at a loss."""

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
        """Until the first snapshot.

        Raises:
            LostError: none came.
            Unreachable: the server answers, and does not let us in.
        """
        try:
            async with asyncio.timeout(self._interval + SILENCE):
                await self._listen(until_snapshot=True)
        except TimeoutError:
            raise LostError("it sent no snapshot in time") from None

    async def follow(self) -> None:
        """For ever: a server that is lost is tried again, after a pause that doubles.

        Raises:
            Unreachable: the server answers, and does not let us in.
        """
        state, pause = self._state, FIRST_PAUSE
        while True:
            before = state.stats
            try:
                await self._listen()
            except LostError as lost:
                if state.stats is not before:
                    pause = FIRST_PAUSE
                now = time.monotonic()
                if not state.problem:
                    state.lost_at = now
                state.problem = str(lost)
                wait = max(pause, min(lost.retry_after, MAX_PAUSE))
                state.retry_at = now + wait
                self._changed()
                await asyncio.sleep(wait)
                pause = min(2 * pause, MAX_PAUSE)

    async def _listen(self, *, until_snapshot: bool = False) -> None:
        """One connection, to its end: it always ends with an exception, or with a snapshot."""
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
                await self._admitted(response)
                splitter = Splitter(MAX_EVENT_BYTES)
                async for data in response.content.iter_any():
                    for event in parse(splitter.feed(data)):
                        self._state.take(event.event, orjson.loads(event.data))
                        if event.event == b"stats":
                            self._state.problem = ""
                            if until_snapshot:
                                return
                        self._changed()
        except (aiohttp.ClientError, OSError) as error:
            raise LostError(remote.why(error)) from None
        except (EventTooLong, orjson.JSONDecodeError):
            raise LostError("what it sends are not aioserver's events") from None
        raise LostError("it closed the connection")

    async def _admitted(self, response: aiohttp.ClientResponse) -> None:
        """A 5xx passes, and is tried again; whatever else is not 200 will not change.

        Raises:
            LostError: later, perhaps.
            Unreachable: never.
        """
        if response.status == 200:
            if response.content_type != "text/event-stream":
                raise remote.Unreachable(f"{response.url.path} has no events: is it an aioserver?")
            return
        told = await remote.told(response)
        what = told.message or told.code
        if response.status >= 500 or response.status == 429:
            raise LostError(what, retry_after=told.retry_after or 0.0)
        hint = " (--key, or AIOSERVER_KEY)" if response.status in {401, 403} else ""
        raise remote.Unreachable(f"{response.url.path}: HTTP {response.status}: {what}{hint}")

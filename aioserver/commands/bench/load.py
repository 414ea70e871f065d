"""The run: so many clients come, ask again and again, and leave."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from aioserver.commands import remote
from aioserver.commands.bench.attempt import Attempt
from aioserver.commands.bench.clients import CLIENTS, NotUnderstoodError, Question
from aioserver.commands.bench.limits import Peaks, met
from aioserver.commands.bench.results import Results
from aioserver.protocol.eventstream import EventTooLong

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aioserver.commands.bench.clients import Client

ENDPOINTS = {"websocket": "/ws/chat", "sse": "/sse/chat", "openai": "/v1"}
MAX_PAUSE = (
    1.0  # seconds; a refused client comes back when the server said, but the run must go on
)
SHORT_PAUSE = 0.1  # where the server said nothing: a refused client must not spin
BUSY = 0.9  # of a core: from there on it is this process that is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do. One of *requests* (of each client) and *duration* is set; times in seconds."""

    url: str
    face: str
    clients: int
    question: Question
    requests: int | None = None
    duration: float | None = None
    ramp: float = 0.0
    timeout: float = 120.0
    key: str | None = None


@dataclass
class Run:
    """One run of a plan: `await run.to_the_end(stop)`, then `run.report()`."""

    plan: Plan
    results: Results = field(default_factory=Results)
    peaks: Peaks = field(default_factory=Peaks)
    stopped: bool = False
    _begun: float = 0.0
    _ended: float = 0.0
    _cpu: float = 0.0  # seconds of this process

    @property
    def seconds(self) -> float:
        """Since the first client came, until the last one left."""
        return (self._ended or time.perf_counter()) - self._begun if self._begun else 0.0

    async def to_the_end(
        self, stop: asyncio.Event, show: Callable[[Run], Coroutine[Any, Any, None]] | None = None
    ) -> None:
        """Run until all is done, or *stop* is set: what is under way then is given up.

        *show* is run beside it, from the moment the server has answered, and cancelled at the end.

        Raises:
            Unreachable: the server could not be reached at the start.
        """
        async with remote.session(self.plan.key) as session:
            url = self.plan.url + (await self._endpoints(session))[self.plan.face]
            self._begun, cpu = time.perf_counter(), time.process_time()
            work = asyncio.create_task(self._everybody(session, url))
            beside = [
                asyncio.create_task(self.peaks.watch(session, self.plan.url)),
                *([asyncio.create_task(show(self))] if show else []),
            ]
            stopping = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
                self.stopped = not work.done()
            finally:
                self._ended = time.perf_counter()
                self._cpu = time.process_time() - cpu
                tasks = (work, stopping, *beside)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            for task in (work, *beside):
                if not task.cancelled():
                    task.result()  # a bug of ours is not hidden

    async def _endpoints(self, session: aiohttp.ClientSession) -> dict[str, str]:
        """Where the faces are, as the server says; where it does not, the defaults."""
        try:
            async with (
                asyncio.timeout(remote.CONNECT_TIMEOUT),
                session.get(
                    f"{self.plan.url}/", headers={"Accept": "application/json"}
                ) as response,
            ):
                overview = await response.json()
        except (aiohttp.ContentTypeError, ValueError):
            return ENDPOINTS
        except (aiohttp.ClientError, OSError) as error:
            raise remote.Unreachable(
                f"{self.plan.url} cannot be reached: {remote.why(error)}"
            ) from None
        given = overview.get("endpoints") if isinstance(overview, dict) else None
        return {**ENDPOINTS, **given} if isinstance(given, dict) else ENDPOINTS

    async def _everybody(self, session: aiohttp.ClientSession, url: str) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self.plan.clients):
                client = CLIENTS[self.plan.face](session, url, self.plan.question)
                group.create_task(
                    self._client(client, self.plan.ramp * number / self.plan.clients)
                )

    async def _client(self, client: Client, delay: float) -> None:
        await asyncio.sleep(delay)
        try:
            asked = 0
            while True:
                attempt = Attempt(self.results)
                await self._ask(client, attempt)
                asked += 1
                pause = 0.0 if attempt.good else min(attempt.retry_after or SHORT_PAUSE, MAX_PAUSE)
                if self._enough(asked, pause):
                    return
                await asyncio.sleep(pause)
        finally:
            await client.close()

    def _enough(self, asked: int, pause: float) -> bool:
        if self.plan.duration is not None:
            return self.seconds + pause >= self.plan.duration
        return asked == self.plan.requests

    async def _ask(self, client: Client, attempt: Attempt) -> None:
        """One request; whatever happens to it, it is counted, unless this run is stopped."""
        try:
            async with asyncio.timeout(self.plan.timeout):
                await client.ask(attempt)
        except aiohttp.ConnectionTimeoutError:
            attempt.lost("cannot_connect", f"no connection within {remote.CONNECT_TIMEOUT:g} s")
        except TimeoutError:
            attempt.lost("timeout", f"no end within {self.plan.timeout:g} s")
        except aiohttp.WSServerHandshakeError as error:
            code = f"http_{error.status}"
            attempt.error(remote.Told(code, "the WebSocket handshake was refused"))
        except aiohttp.ClientConnectorError as error:
            attempt.lost("cannot_connect", remote.why(error))
        except (aiohttp.ClientError, OSError) as error:
            attempt.lost("connection_lost", remote.why(error))
        except (NotUnderstoodError, EventTooLong) as error:
            attempt.lost("not_understood", str(error))
        attempt.settle()
        if not attempt.good:
            await client.close()

    def report(self) -> dict[str, Any]:
        """Everything, as JSON: what the table shows."""
        plan = self.plan
        return {
            "url": plan.url,
            "face": plan.face,
            "clients": plan.clients,
            **self.results.numbers(self.seconds),
            "limit": met(self.results, self.peaks),
            "notes": [*self._notes()],
        }

    def _notes(self) -> list[str]:
        notes = []
        if self.stopped:
            under_way = self.results.begun - self.results.finished
            notes.append(f"stopped early, with {under_way} requests under way")
        if thinned := self.results.thinned():
            notes.append(f"percentiles from a sample of {', '.join(thinned)}: there were too many")
        if self.seconds > 1.0 and self._cpu / self.seconds > BUSY:
            notes.append(
                "this client used a whole core: the numbers are its own limit, not the server's"
            )
        return notes

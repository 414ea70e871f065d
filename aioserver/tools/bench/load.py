"""Carries out a plan: starts the clients, lets each send its requests, and waits for them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioserver.tools import remote
from aioserver.tools.bench.clients import FaceClient
from aioserver.tools.bench.limits import Peaks, find_limit
from aioserver.tools.bench.results import Attempt, Results

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import aiohttp

    from aioserver.tools.bench.clients import Question

# The most seconds that a refused client waits, even if the server asks for more: the run must go
# on.
MAX_DELAY = 1.0
# Seconds that a refused client waits if the server names no time: it must not spin.
DEFAULT_DELAY = 0.1
# The share of a core above which the run measures this process and not the server.
BUSY = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The work of the clients. Either *requests*, of each client, or *duration* is set.

    *duration*, *ramp* (over which the clients start) and *timeout* (of a request) are in seconds.
    """

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
    """One run of a plan: `await run.execute(stop)`, then `run.report()`."""

    plan: Plan
    results: Results = field(default_factory=Results)
    peaks: Peaks = field(default_factory=Peaks)
    stopped: bool = False
    _begun: float = 0.0
    _ended: float = 0.0
    # Seconds of CPU that this process used.
    _cpu: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the first client started, until the last one ended."""
        return (self._ended or time.perf_counter()) - self._begun if self._begun else 0.0

    async def execute(
        self, stop: asyncio.Event, show: Callable[[Run], Coroutine[Any, Any, None]] | None = None
    ) -> None:
        """Run until every client is done, or *stop* is set: requests that run then are cancelled.

        *show* runs meanwhile, in a task that starts after the first answer of the server and is
        cancelled at the end.

        Raises:
            Unreachable: the server did not answer at the start, or wants another key.
        """
        async with remote.session(self.plan.key) as session:
            paths = await remote.paths(session, self.plan.url) or remote.PATHS
            await remote.check_key(session, self.plan.url, self.plan.key)
            self._begun, cpu = time.perf_counter(), time.process_time()
            work = asyncio.create_task(self._run_clients(session, paths[self.plan.face]))
            background = [
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
                tasks = (work, stopping, *background)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            for task in (work, *background):
                if not task.cancelled():
                    # An exception that a bug has raised must not be lost.
                    task.result()

    async def _run_clients(self, session: aiohttp.ClientSession, path: str) -> None:
        plan = self.plan
        async with asyncio.TaskGroup() as group:
            for number in range(plan.clients):
                client = FaceClient(session, plan.face, plan.url, path, plan.question)
                group.create_task(self._run_client(client, plan.ramp * number / plan.clients))

    async def _run_client(self, client: FaceClient, delay: float) -> None:
        await asyncio.sleep(delay)
        try:
            finished = 0
            while True:
                error = await client.request(Attempt(self.results), self.plan.timeout)
                finished += 1
                delay = (
                    0.0 if error is None else min(error.retry_after or DEFAULT_DELAY, MAX_DELAY)
                )
                if self._last(finished, delay):
                    return
                await asyncio.sleep(delay)
        finally:
            await client.close()

    def _last(self, finished: int, delay: float) -> bool:
        if self.plan.duration is not None:
            return self.seconds + delay >= self.plan.duration
        return finished == self.plan.requests

    def report(self) -> dict[str, Any]:
        """Return the report: what `--json` prints and the table shows."""
        plan = self.plan
        return {
            "url": plan.url,
            "face": plan.face,
            "clients": plan.clients,
            **self.results.numbers(self.seconds),
            "limit": find_limit(self.results, self.peaks),
            "notes": [*self._notes()],
        }

    def _notes(self) -> list[str]:
        notes = []
        if self.stopped:
            under_way = self.results.begun - self.results.finished
            notes.append(f"stopped early, with {under_way} requests under way")
        if thinned := self.results.thinned():
            notes.append(f"percentiles of {', '.join(thinned)} are those of a random sample")
        if self.seconds > 1.0 and self._cpu / self.seconds > BUSY:
            notes.append(
                "this client used a whole core: the numbers show its own limit, not the server's"
            )
        return notes

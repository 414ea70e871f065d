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

    Show = Callable[["Run"], Coroutine[Any, Any, None]]

# The most seconds that a refused client waits, even if the server asks for more: the run must go
# on. And the seconds that it waits if the server names no time: it must not spin.
MAX_DELAY, DEFAULT_DELAY = 1.0, 0.1
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
    """One run of a plan: `await run.execute()`, then `run.report()`."""

    plan: Plan
    results: Results = field(default_factory=Results)
    peaks: Peaks = field(default_factory=Peaks)
    stopped: bool = False
    _begun: float = 0.0
    _ended: float = 0.0
    # Seconds of CPU that this process has used: before the run, then in it.
    _cpu: float = 0.0
    _clients: asyncio.Task[None] | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the first client started, until the last one ended."""
        return (self._ended or time.perf_counter()) - self._begun if self._begun else 0.0

    def stop(self) -> None:
        """End the run early: requests that run are cancelled."""
        self.stopped = True
        if self._clients is not None:
            self._end()
            self._clients.cancel()

    async def execute(self, show: Show | None = None) -> None:
        """Run until every client is done, or the run is stopped.

        *show* runs meanwhile, in a task that starts after the first answer of the server and is
        cancelled at the end.

        Raises:
            Unreachable: the server did not answer at the start, or wants another key.
        """
        async with remote.session(self.plan.key) as session:
            paths = await remote.paths(session, self.plan.url) or remote.PATHS
            await remote.check_key(session, self.plan.url, self.plan.key)
            if self.stopped:
                return
            self._begun, self._cpu = time.perf_counter(), time.process_time()
            async with asyncio.TaskGroup() as group:
                beside = [group.create_task(self.peaks.watch(session, self.plan.url))]
                if show is not None:
                    beside.append(group.create_task(show(self)))
                clients = self._run_clients(session, paths[self.plan.face])
                self._clients = group.create_task(clients)
                await asyncio.wait([self._clients])
                self._end()
                for task in beside:
                    task.cancel()

    def _end(self) -> None:
        if not self._ended:
            self._ended, self._cpu = time.perf_counter(), time.process_time() - self._cpu

    async def _run_clients(self, session: aiohttp.ClientSession, path: str) -> None:
        plan = self.plan
        async with asyncio.TaskGroup() as group:
            for number in range(plan.clients):
                client = FaceClient(session, plan.face, plan.url, path, plan.question)
                group.create_task(self._run_client(client, plan.ramp * number / plan.clients))

    async def _run_client(self, client: FaceClient, delay: float) -> None:
        await asyncio.sleep(delay)
        finished, plan = 0, self.plan
        try:
            while True:
                error = await client.request(Attempt(self.results), plan.timeout)
                finished += 1
                delay = (
                    0.0 if error is None else min(error.retry_after or DEFAULT_DELAY, MAX_DELAY)
                )
                if plan.duration is None:
                    if finished == plan.requests:
                        return
                elif self.seconds + delay >= plan.duration:
                    return
                await asyncio.sleep(delay)
        finally:
            await client.close()

    def report(self) -> dict[str, Any]:
        """Return the report: what `--json` prints and the table shows."""
        plan, results, notes = self.plan, self.results, list[str]()
        if self.stopped:
            under_way = results.begun - results.finished
            notes.append(f"stopped early, with {under_way} requests under way")
        if thinned := results.thinned():
            notes.append(f"percentiles of {', '.join(thinned)} are those of a random sample")
        if self.seconds > 1.0 and self._cpu / self.seconds > BUSY:
            notes.append(
                "this client used a whole core: the numbers show its own limit, not the server's"
            )
        return {
            "url": plan.url,
            "face": plan.face,
            "clients": plan.clients,
            **results.numbers(self.seconds),
            "limit": find_limit(results, self.peaks),
            "notes": notes,
        }

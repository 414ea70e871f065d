"""An instance in a process of its own: `python -m tests.support.cluster_instance URL LIMIT CLIENTS
TIMES…`.

It writes a line for each start and each end, and waits for a line after each end: the referee sees
an end before the place is given back, so that it never counts more than there are. The line of a
start is written in the step that takes the place: a process that is stopped can be between the two
with one start at most.
"""

from __future__ import annotations

import asyncio
import sys

from aioserver.wings.cluster.limits.lease_messages import Times
from aioserver.wings.cluster.limits.leased import LeasedCapacity
from aioserver.wings.cluster.limits.leases import Leases
from aioserver.wings.cluster.limits.renewer import Renewer
from tests.support.resources import Line


class Reported:
    """A rate that allows each start, and writes a line for it."""

    def delay(self, _cost: int, _ahead: int = 0) -> float:
        return 0.0

    def try_take(self, _cost: int) -> object:
        write("+")
        return True

    def settle(self, _taken: object, _spent: int | None) -> None:
        """Correct nothing."""


def write(word: str) -> None:
    """Write a line."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


async def main(url: str, limit: str, clients: str, *times: str) -> None:
    """Be the instance until stdin ends."""
    renewer = Renewer(
        lambda on_due: Leases("process", times=Times(*map(float, times)), on_due=on_due),
        url,
        "test",
    )
    leases = renewer.leases
    line = Line(0, queue_size=100, rate=Reported())
    LeasedCapacity(leases, line.scheduler, line.resource, "p:provider", int(limit))
    await renewer.open()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    acknowledged: list[asyncio.Future[None]] = []

    async def end() -> None:
        future = asyncio.get_running_loop().create_future()
        acknowledged.append(future)
        write("-")
        await future

    async def client() -> None:
        while True:
            grant = await line.enter()
            try:
                await asyncio.sleep(0.02)
                await end()
            finally:
                grant.release()

    tasks = [asyncio.create_task(client()) for _ in range(int(clients))]
    while await reader.readline():
        acknowledged.pop(0).set_result(None)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await renewer.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

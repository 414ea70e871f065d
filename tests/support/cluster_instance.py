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

from aioserver.errors import ServerAtCapacity
from aioserver.wings.cluster.lease_messages import Times
from aioserver.wings.cluster.leases import Leases
from aioserver.wings.cluster.renewer import Renewer
from aioserver.wings.cluster.shared_gate import SharedGate


class Reported(SharedGate):
    """A gate that writes a line for each start."""

    def _enter(self) -> None:
        write("+")
        super()._enter()


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
    gate = Reported(
        int(limit),
        queue_size=100,
        queue_timeout=30.0,
        full_error=lambda wait: ServerAtCapacity("full", retry_after=wait),
        timeout_error=lambda wait: ServerAtCapacity("late", retry_after=wait),
    )
    gate.share(leases, "p:provider")
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
            with await gate.enter():
                await asyncio.sleep(0.02)
                await end()

    tasks = [asyncio.create_task(client()) for _ in range(int(clients))]
    while await reader.readline():
        acknowledged.pop(0).set_result(None)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await renewer.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

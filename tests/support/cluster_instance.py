"""An instance in a process of its own: `python -m tests.support.cluster_instance URL LIMIT CLIENTS TIMES…`.

It writes a line for each start and each end, and waits for a line after each: the referee sees an end before the place is given
back, so that it never counts more than there are.
"""

from __future__ import annotations

import asyncio
import sys

from aioserver.cluster.messages import Times
from aioserver.cluster.settler import Settler
from aioserver.cluster.shared_gate import SharedGate
from aioserver.cluster.shares import Shares
from aioserver.errors import ServerAtCapacity


async def main(url: str, limit: str, clients: str, *times: str) -> None:
    """Be the instance until stdin ends."""
    shares = Shares("process", times=Times(*map(float, times)))
    gate = SharedGate(
        int(limit),
        queue_size=100,
        queue_timeout=30.0,
        full_error=lambda wait: ServerAtCapacity("full", retry_after=wait),
        timeout_error=lambda wait: ServerAtCapacity("late", retry_after=wait),
    )
    gate.share(shares, "p:provider")
    settler = Settler(shares, url, "test")
    await settler.open()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    acknowledged: list[asyncio.Future[None]] = []

    async def say(word: str) -> None:
        future = asyncio.get_running_loop().create_future()
        acknowledged.append(future)
        sys.stdout.write(word + "\n")
        sys.stdout.flush()
        await future

    async def client() -> None:
        while True:
            with await gate.enter():
                await say("+")
                await asyncio.sleep(0.02)
                await say("-")

    tasks = [asyncio.create_task(client()) for _ in range(int(clients))]
    while await reader.readline():
        acknowledged.pop(0).set_result(None)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await settler.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

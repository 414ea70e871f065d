"""One worker of several as a process: `python -m tests.support.worker CONFIG LOOP URL LOADS SLOT
WORKERS SOCKET FIRST`.

It says `ready` on stdout once it accepts, and ends in good order at SIGTERM or at the end of its
stdin. To each line on stdin it answers with its places: those that are taken, those that it may
use, how many clients wait, and whether places move. *URL* is that of the server through which the
workers share limits; `-` stands for none.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from typing import TYPE_CHECKING

from aioserver.commands.serve import loop_factory
from aioserver.config import Configuration
from aioserver.server.app import open_server
from aioserver.server.runner import Runner
from aioserver.wings.cluster.limits.lease_messages import Times
from aioserver.wings.cluster.membership import join
from aioserver.workers.loads import Loads
from aioserver.workers.worker import Worker
from tests.support.members import wings_of

if TYPE_CHECKING:
    from aioserver.faces.admission import ShareDoor

# Half of the usual times, or less.
TIMES = Times(lease=4.0, margin=0.5, beat=0.3, bound=0.5, pause=1.5, grace=0.9, gone=6.0)


async def serve(
    config: str, url: str, page: int, slot: int, workers: int, sock: int, first: int
) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server_url = None if url == "-" else url
    worker = Worker(slot, workers, 20.0, {}, server_url, first=bool(first), host="host")
    settings = worker.settings(Configuration.load(config, environ={}).settings)
    loads = Loads(page, slot)
    async with contextlib.AsyncExitStack() as stack:
        cluster = None
        share_door: ShareDoor | None = None
        if url == "-":
            share_door, balance = worker.door_sharer(loads), worker.balance(loads)
        else:
            fixed = worker.rank, workers
            cluster = await stack.enter_async_context(
                join(
                    url,
                    "workers",
                    times=TIMES,
                    fixed=fixed,
                    first=worker.first,
                    scope=worker.scope,
                )
            )
            loads.tell_instance(cluster.token)
            balance = worker.balance(loads, cluster.ended)
            await cluster.settled()
        server = await stack.enter_async_context(
            open_server(
                settings,
                share_door=share_door,
                scope=worker.scope,
                wings=wings_of(cluster),
            )
        )
        runner = Runner(server, balance)
        await runner.setup()
        await runner.listen([socket.socket(fileno=sock)])
        print("ready", flush=True)
        gate = server.context.admission.gate

        def tell() -> None:
            if not sys.stdin.readline():  # the tests have ended without a signal to it
                stop.set()
                return
            moves = cluster is not None and not cluster.leases.standing.grace
            print(gate.inside, gate.limit, gate.waiting, int(moves), flush=True)

        asyncio.get_running_loop().add_reader(0, tell)
        await stop.wait()
        asyncio.get_running_loop().remove_reader(0)
        await runner.end()
        await runner.cleanup()


if __name__ == "__main__":
    config, loop, url, *numbers = sys.argv[1:]
    with asyncio.Runner(loop_factory=loop_factory(loop)) as loop_runner:
        loop_runner.run(serve(config, url, *map(int, numbers)))

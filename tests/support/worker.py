"""One worker of several as a process: `python -m tests.support.worker CONFIG LOOP PAGE SLOT
WORKERS SOCKET`.

It says `ready` on stdout once it accepts, and ends in good order at SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

from aioserver.commands.serve import loop_factory
from aioserver.config import Configuration
from aioserver.server.app import open_server
from aioserver.server.runner import Runner
from aioserver.workers.shared_page import SharedPage
from aioserver.workers.slot import Slot


async def serve(config: str, page: int, slot: int, workers: int, sock: int) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    settings = Configuration.load(config, environ={}).settings
    async with open_server(settings, slot=Slot(SharedPage(page, slot), workers)) as server:
        runner = Runner(server)
        await runner.setup()
        await runner.listen([socket.socket(fileno=sock)])
        print("ready", flush=True)
        await stop.wait()
        await runner.end()
        await runner.cleanup()


if __name__ == "__main__":
    config, loop, *numbers = sys.argv[1:]
    with asyncio.Runner(loop_factory=loop_factory(loop)) as loop_runner:
        loop_runner.run(serve(config, *map(int, numbers)))

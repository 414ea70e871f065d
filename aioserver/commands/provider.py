"""`aioserver provider`: the simulated provider as a server of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

from aioserver.providers.simulator import Simulator

if TYPE_CHECKING:
    from aioserver.providers.simulator import Behaviour


def provider(host: str, port: int, behaviour: Behaviour) -> int:
    """Run the simulator until SIGINT or SIGTERM; returns the exit code. Port 0: a free one."""
    return asyncio.run(_run(host, port, behaviour))


async def _run(host: str, port: int, behaviour: Behaviour) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    simulator = Simulator(behaviour, keep=0)
    try:
        base_url = await simulator.start(host, port)
    except OSError as exc:
        # asyncio's own text is long; a failed look-up of the host has no positive number
        reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror
        print(f"cannot listen on {host}:{port}: {reason}", file=sys.stderr)
        return 1
    try:
        # flushed: whoever started us in a pipe waits for the first line
        print(f"simulated provider on {base_url} (Ctrl-C stops it)")
        print(
            "point aioserver at it: AIOSERVER__LLM__ACTIVE=local"
            f" AIOSERVER__LLM__PROVIDERS__LOCAL__BASE_URL={base_url} python -m aioserver",
            flush=True,
        )
        await stop.wait()
    finally:
        await simulator.close()
    return 0

"""`aioserver provider`: the simulated provider as a server of its own."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import os
import signal
import sys
from typing import TYPE_CHECKING

from aioserver.providers.simulator import faults
from aioserver.providers.simulator.model import BadRequest
from aioserver.providers.simulator.server import Simulator

if TYPE_CHECKING:
    from aioserver.providers.simulator.exchange import Behaviour


def provider(host: str, port: int, behaviour: Behaviour) -> int:
    """Run the simulator until SIGINT or SIGTERM; returns the exit code. Port 0: a free one."""
    return asyncio.run(_run(host, port, behaviour))


def fault(name: str) -> str:
    """*name* as `Behaviour` takes it.

    Raises:
        ValueError: the simulator has no such fault.
    """
    name = name.removeprefix(faults.PREFIX)
    try:
        if name:
            faults.find(faults.PREFIX + name)
    except BadRequest:
        near = difflib.get_close_matches(name, faults.FAULTS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no fault {name!r} ({hint}--list-faults prints all)") from None
    return name


def faults_table() -> str:
    """The faults by their names, and what each does."""
    table = inspect.getdoc(faults) or ""
    return "\n".join(
        [
            "The faults of the simulated provider: --fault NAME gives one to every model (to a share",
            "of the requests with --fail-rate); a model of that name gets it in any case.",
            *table.splitlines()[1:],
        ]
    )


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

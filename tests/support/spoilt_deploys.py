"""Runs `python -m aioserver …` with a fault in its deploys, as proof that a test notices it:
`SPOILT=answers python -m tests.support.spoilt_deploys serve`.

    answers    a process that is replaced does not keep its answers
    keys       a reload does not reach processes that were replaced
"""

from __future__ import annotations

import os
import runpy
from typing import TYPE_CHECKING

from aioserver.server.runner import Runner
from aioserver.workers.supervisor import Supervisor

if TYPE_CHECKING:
    import asyncio


async def keep_nothing(_runner: Runner, _stop: asyncio.Event) -> None:
    """Do nothing, so that the end follows at once."""


if __name__ == "__main__":
    match os.environ["SPOILT"]:
        case "answers":
            setattr(Runner, "retire", keep_nothing)  # noqa: B010 - it is no method for mypy
        case "keys":
            setattr(Supervisor, "_listening", getattr(Supervisor, "_serving"))  # noqa: B009, B010
    runpy.run_module("aioserver", run_name="__main__", alter_sys=True)

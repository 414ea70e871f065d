"""What signals do to work, and to the process."""

from __future__ import annotations

import re
import signal

from tests.support.process import Process

WORK = """
import asyncio, sys
from aioserver.tools.chat.asking import Interrupted, Interrupts, end_by

async def work():
    print("working", flush=True)
    try:
        await asyncio.sleep(100)
    finally:
        print("cleaning up", flush=True)
        if sys.argv[1] == "slow":
            await asyncio.sleep(100)

try:
    with asyncio.Runner() as runner:
        Interrupts(runner).run(work())
except Interrupted as interrupted:
    print("forced" if interrupted.forced else "ended", flush=True)
    end_by(interrupted.number)
"""
WORKING = re.compile("working\n")
CLEANING = re.compile("working\ncleaning up\n")


async def test_a_second_signal_does_not_wait_for_the_work() -> None:
    async with await Process.start("-c", WORK, "slow") as process:
        await process.prints(WORKING)
        process.signal(signal.SIGINT)
        await process.prints(CLEANING)
        process.signal(signal.SIGINT)

        assert await process.ended() == -signal.SIGINT
        assert process.out.endswith("forced\n")


async def test_an_ignored_signal_stays_ignored() -> None:
    """As with `nohup`, and for what a shell runs in the background."""
    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN){WORK}"
    async with await Process.start("-c", ignoring, "quick") as process:
        await process.prints(WORKING)
        process.signal(signal.SIGHUP)
        process.signal(signal.SIGTERM)

        assert await process.ended() == -signal.SIGTERM

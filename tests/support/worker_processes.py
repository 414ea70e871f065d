"""The workers of a server that has several, as processes (Linux)."""

from __future__ import annotations

import json
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.process import ServerProcess


def workers(process: ServerProcess) -> list[int]:
    """The process ids of the workers that live, in the order of their start."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if not gone(pid) and b"aioserver" in command(pid)]


async def incidents_of(
    process: ServerProcess, kind: str, headers: dict[str, str] | None = None
) -> list[str]:
    """The incidents of this *kind*, as a dashboard gets them."""
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"{process.base}/events") as events,
    ):
        async for line in events.content:
            if line.startswith(b'data: {"interval"') or b'"incidents"' in line:
                incidents = json.loads(line.removeprefix(b"data: "))["incidents"]
                return [each["text"] for each in incidents if each["kind"] == kind]
    raise AssertionError("the events have ended")


def command(pid: int) -> bytes:
    """The command line of a process: that of the workers' server names no `-m aioserver`."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"/tmp/aioserver-", b"")
    except (FileNotFoundError, ProcessLookupError):
        return b""


def state(pid: int) -> str:
    """The state of a process: `T` if it is stopped, `Z` if it is gone and not reaped; proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    return state(pid) in {"", "Z"}


@asynccontextmanager
async def alone(process: ServerProcess, worker: int) -> AsyncIterator[None]:
    """Stop the other workers, so that *worker* accepts every connection."""
    others = [pid for pid in workers(process) if pid != worker]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        await until(lambda: all(state(pid) == "T" for pid in others))
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)

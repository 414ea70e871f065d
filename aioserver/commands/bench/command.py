"""What is typed: the run, its bar, its table, its exit code."""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
from typing import TYPE_CHECKING

import orjson

from aioserver.commands import remote
from aioserver.commands.bench.load import Run

if TYPE_CHECKING:
    from types import ModuleType

    from aioserver.commands.bench.load import Plan

OWN_FILES = 64  # open in this process beside its clients


def bench(plan: Plan, *, as_json: bool) -> int:
    """Carry out *plan* and print what came of it; the bar goes to stderr.

    Returns the exit code: 0, 1 for an incomplete answer or a server that is not there, 2 usage.
    """
    drawing = _drawing()
    if drawing is None and not as_json:
        print(remote.RICH_MISSING, file=sys.stderr)
        return 2
    if (fitting := make_room(plan.clients)) < plan.clients:
        print(
            f"--clients {plan.clients} does not fit: this process may open as many files as"
            f" {fitting} clients need (ulimit -Hn raises it)",
            file=sys.stderr,
        )
        return 2
    return asyncio.run(_run(plan, drawing, as_json=as_json))


def _drawing() -> ModuleType | None:
    """The door to rich, an extra; None: it is not installed."""
    try:
        from aioserver.commands.bench import table  # noqa: PLC0415 - optional
    except ModuleNotFoundError:
        return None
    return table


def make_room(clients: int) -> int:
    """Raise the soft limit of open files for *clients*; returns how many of them fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = clients + OWN_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return clients
    possible = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    return max(0, possible - OWN_FILES)


async def _run(plan: Plan, drawing: ModuleType | None, *, as_json: bool) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    run = Run(plan)
    try:
        await run.to_the_end(stop, drawing.show_progress if drawing else None)
    except remote.Unreachable as error:
        print(error, file=sys.stderr)
        return 1
    report = run.report()
    if as_json:
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    elif drawing is not None:
        drawing.show(report)
    return 0 if report["complete"] else 1

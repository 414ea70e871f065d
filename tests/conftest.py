"""Fixtures of all tests: event loops, servers, and the check that nothing is left behind."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import logging
import os
import signal
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import uvloop

from tests.support.clock import FakeClock
from tests.support.jumping_loop import JumpingLoop
from tests.support.server import QUICK, MakeServer, RunningServer, running
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

    from tests.support.simulator import Behaviour

# Of the machine's time no test may make anything: a busy one is no fault.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")
# Folders whose tests run on uvloop, as production does: whole servers, their sockets and processes.
# All others hold rules, and time need not pass for them.
ON_UVLOOP = {
    "browser", "clients", "commands", "core", "deploy", "docs", "end_to_end", "faces", "server",
    "soak", "suites", "tools", "workers",
}  # fmt: skip


def _debugging() -> asyncio.AbstractEventLoop:
    return _debugged(asyncio.new_event_loop())


def _jumping() -> asyncio.AbstractEventLoop:
    return _debugged(JumpingLoop())


def _debugged(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    loop.set_debug(True)
    loop.slow_callback_duration = 10.0  # a busy machine is no fault
    return loop


# Bytecode is kept, whatever the environment says: without it each process of pytest takes three
# times as long to collect the tests, and each program that a test starts four times as long.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_configure(config: pytest.Config) -> None:
    """Heed the signals that a shell has its background jobs ignore: programs that tests interrupt
    would inherit that.
    """
    heeded: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGQUIT: signal.SIG_DFL,
        # Under nohup a process of the tests stays; a program that it executes has no handler.
        signal.SIGHUP: lambda *_: None,
    }
    for number, handler in heeded.items():
        of_worker = number == signal.SIGHUP and hasattr(
            config, "workerinput"
        )  # ends with its parent
        if of_worker or signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--both-loops",
        action="store_true",
        help="run each async test on both event loops, but those that wait for long times",
    )


def pytest_asyncio_loop_factories(
    config: pytest.Config,
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every async test runs on one loop: uvloop, or asyncio's in debug mode, on which time jumps.

    Tests of what the loops do differently have the mark `both_loops`.
    """
    marks = {mark.name for mark in item.iter_markers()}
    if "virtual_time" in marks:
        return {"asyncio": _jumping}
    asyncio_loop = _debugging if "real_time" in marks else _jumping
    both = {"asyncio": asyncio_loop, "uvloop": uvloop.new_event_loop}
    if "both_loops" in marks or config.getoption("both_loops"):
        return both
    folders = item.nodeid.partition("::")[0].split("/")
    name = "uvloop" if "real_time" in marks or not ON_UVLOOP.isdisjoint(folders) else "asyncio"
    return {name: both[name]}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect the tests without the collector: thousands of objects, all of which stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what lives as long as the session out of the collector's sight: each test collects."""
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """End an async test in its own loop, shortly before pytest-timeout ends the process.

    The traceback then shows the `await` that came to no end. An exception that pytest-timeout
    raised in a signal handler would be lost: both loops log what a callback raises, and go on.
    """
    usual = float(config.getoption("timeout") or config.getini("timeout"))
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            # To look for a marker of each test takes a second.
            marked = "timeout" in item.keywords
            marker = item.get_closest_marker("timeout") if marked else None
            item.obj = _bounded(item.obj, (marker.args[0] if marker else usual) * 0.9)


def _bounded(
    test: Callable[..., Awaitable[None]], seconds: float
) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*args: Any, **kwargs: Any) -> None:
        async with asyncio.timeout(seconds):
            await test(*args, **kwargs)

    return bounded


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Take back the log level of a server that has reloaded its settings: it is that of the whole
    process.
    """
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(autouse=True)
def watched(request: pytest.FixtureRequest) -> None:
    """Watch every async test with `nothing_left`, set up before and so torn down after all
    else.
    """
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("nothing_left")


@pytest.fixture
def lasting_tasks() -> Callable[[], set[asyncio.Task[Any]]]:
    """The tasks that may go on after a test: none."""
    return set


@pytest.fixture
async def nothing_left(
    lasting_tasks: Callable[[], set[asyncio.Task[Any]]],
) -> AsyncIterator[None]:
    """Fail the test that leaves a task behind; an unclosed socket is a warning, so a failure.

    What lives when the test begins is taken out of the collector's sight: to look at it again
    after each test would take as long as the test.
    """
    gc.collect()
    gc.freeze()
    yield
    mine = asyncio.current_task()

    def others() -> set[asyncio.Task[Any]]:
        return {task for task in asyncio.all_tasks() if task is not mine} - lasting_tasks()

    await until(lambda: not others(), 5.0, others)
    gc.collect()


@pytest.fixture
async def make_server(tmp_path: Path) -> AsyncIterator[MakeServer]:
    """Start a server: `await make_server(behaviour, **{"chat.streams.resume_window": 0})`."""
    async with AsyncExitStack() as stack:

        async def make(behaviour: Behaviour = QUICK, /, **changes: Any) -> RunningServer:
            return await stack.enter_async_context(
                running(tmp_path / "config.yaml", behaviour, changes)
            )

        yield make


@pytest.fixture
async def server(make_server: MakeServer) -> RunningServer:
    """A server with room for every client, and a provider that answers at once."""
    return await make_server()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()

"""Fixtures of all tests: both event loops, servers, and the check that nothing is left behind."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import logging
import signal
import zlib
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
# Folders whose tests are of other programs, to which the loop of the test makes no difference.
PROGRAMS = {"browser", "commands", "deploy", "docs"}


def _debugging() -> asyncio.AbstractEventLoop:
    return _debugged(asyncio.new_event_loop())


def _jumping() -> asyncio.AbstractEventLoop:
    return _debugged(JumpingLoop())


def _debugged(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    loop.set_debug(True)
    loop.slow_callback_duration = 10.0  # a busy machine is no fault
    return loop


def pytest_configure() -> None:
    """Heed Ctrl-C, which a shell has its background jobs ignore: programs that tests interrupt
    would inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories(
    config: pytest.Config,
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every async test runs on both loops, asyncio's in debug mode, but those of other programs.

    Time jumps on asyncio's where nothing but the test's process takes part.
    """
    folders = set(item.path.relative_to(config.rootpath).parts)
    if item.get_closest_marker("virtual_time"):
        return {"asyncio": _jumping}
    if item.get_closest_marker("one_loop") or PROGRAMS & folders:
        return {"uvloop": uvloop.new_event_loop}
    real = item.get_closest_marker("real_time")
    return {"asyncio": _debugging if real else _jumping, "uvloop": uvloop.new_event_loop}


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
    _spare(items)
    usual = float(config.getoption("timeout") or config.getini("timeout"))
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            # To look for a marker of each test takes a second.
            marked = "timeout" in item.keywords
            marker = item.get_closest_marker("timeout") if marked else None
            item.obj = _bounded(item.obj, (marker.args[0] if marker else usual) * 0.9)


def _spare(items: list[pytest.Item]) -> None:
    """Mark what asyncio's loop is spared of a test's forms: all have run on production's, and a
    quarter of them, the first among them, shows where the loops differ.

    What says how long something may take has all its forms: that holds in time that jumps alone.
    """
    begun = set[tuple[object, ...]]()
    for item in items:
        if isinstance(item, pytest.Function) and "[asyncio-" in item.name:
            test = (item.path, item.cls, item.originalname)
            spared = test in begun and zlib.crc32(item.name.encode()) % 4
            if spared and not {"patience", "within"} & vars(item.module).keys():
                item.add_marker(pytest.mark.other_form)
            begun.add(test)


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

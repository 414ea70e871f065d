"""Pages in a headless Chromium: one for all tests of a process, on the event loop of production.

What a page does is not changed by the loop of its server. All tests and fixtures of this folder
run on one loop, since a connection to a browser belongs to its loop. Private name of pytest-asyncio: the fixture `_function_scoped_runner`.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from tests.support.chat_page import ManualProvider
from tests.support.chromium import PROGRAM, Chromium
from tests.support.dashboard import Stand, standing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from playwright.async_api import Page


def pytest_asyncio_loop_factories(
    config: pytest.Config,
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test once."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def one_runner() -> Iterator[asyncio.Runner]:
    """The event loop of all tests of this folder."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


@pytest.fixture
def _function_scoped_runner(one_runner: asyncio.Runner) -> asyncio.Runner:
    """What pytest-asyncio runs each test and each fixture with."""
    return one_runner


@pytest.fixture(scope="session")
def chromium(one_runner: asyncio.Runner) -> Iterator[Chromium]:
    """The browser, which starts with the first page."""
    chromium = Chromium()
    yield chromium
    one_runner.run(chromium.close())


@pytest.fixture
def lasting_tasks(chromium: Chromium) -> Callable[[], set[asyncio.Task[Any]]]:
    """The tasks of the browser's connection go on from test to test."""
    return lambda: chromium.tasks


@pytest.fixture
async def page(one_runner: asyncio.Runner, chromium: Chromium) -> AsyncIterator[Page]:
    """A page in which nothing of another test is seen; it may report no error."""
    mine = asyncio.get_running_loop() is one_runner.get_loop()
    assert mine, "`_function_scoped_runner` means nothing to this pytest-asyncio"
    if PROGRAM is None:
        why = "no Chromium is installed"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    async with chromium.page() as page:
        yield page


@pytest.fixture
async def provider() -> AsyncIterator[ManualProvider]:
    """A provider whose answers a test dictates."""
    async with ManualProvider() as provider:
        yield provider


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    """A stand-in for a server, before whose dashboard the page is."""
    async with standing() as stand:
        yield stand


@pytest.fixture
async def blank(stand: Stand, page: Page) -> Page:
    """A page that can import the scripts of the server, and does nothing itself."""
    body = '<!doctype html><link rel="icon" href="data:,">'
    await page.route("**/blank", lambda route: route.fulfill(body=body, content_type="text/html"))
    await page.goto(stand.base + "/blank")
    return page

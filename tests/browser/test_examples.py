"""The pages of `examples/` and the scripts of `docs/client-js.md`, as they stand, in pages of
another origin.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from playwright.async_api import expect

from tests.support.chat_page import ManualProvider, cut, model_answer
from tests.support.client_page import BLANK, unwatched
from tests.support.simulator import Behaviour
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Page

    from tests.support.server import MakeServer, RunningServer

ROOT = Path(__file__).parents[2]
PAGES = [path.name for path in (ROOT / "examples").glob("*.html")]
SCRIPTS = re.findall(
    r"^```javascript\n(.+?)^```$",
    (ROOT / "docs/client-js.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
DOCUMENTED = "https://chat.example.com"


@asynccontextmanager
async def shown(page: Page, body: str, query: str = "") -> AsyncIterator[None]:
    """Show a page of another origin."""

    async def show(_request: web.BaseRequest) -> web.Response:
        return web.Response(text=body, content_type="text/html")

    async with RawTestServer(show, host="127.0.0.1") as other:
        await page.goto(f"{other.make_url('/')}{query}")
        yield
        await page.goto("about:blank")


@asynccontextmanager
async def example(page: Page, name: str, server: RunningServer) -> AsyncIterator[None]:
    body = (ROOT / "examples" / name).read_text()
    async with shown(page, body, f"?server={server.base}"):
        await page.get_by_label("Question").fill("Hello")
        await page.get_by_role("button", name="Ask").click()
        yield


def test_both_pages_are_there() -> None:
    assert sorted(PAGES) == ["eventsource.html", "page.html"]


@pytest.mark.parametrize("name", PAGES)
async def test_an_example_loses_nothing_of_an_answer_whose_connection_breaks(
    make_server: MakeServer, page: Page, name: str
) -> None:
    async with ManualProvider() as provider:
        server = await make_server(**provider.changes)
        async with example(page, name, server):
            provider.say("One", " two")
            await expect(page.locator("#answer")).to_have_text("One two")
            cut(server)
            provider.say(" three")
            provider.finish()

            await expect(page.get_by_role("status")).to_contain_text("Complete")
            await expect(page.locator("#answer")).to_have_text("One two three")
    assert provider.requests == 1


@pytest.mark.parametrize("name", PAGES)
async def test_an_example_tells_the_end_by_an_error(
    make_server: MakeServer, page: Page, name: str
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, cut_after=3))
    async with example(page, name, server):
        await expect(page.get_by_role("status")).to_contain_text("Failed: ")
        await expect(page.locator("#answer")).not_to_be_empty()


@pytest.mark.parametrize("name", PAGES)
async def test_an_example_says_that_the_server_does_not_allow_it(
    make_server: MakeServer, page: Page, name: str
) -> None:
    server = await make_server(**{"chat.websocket.allow_origins": ["https://chat.example.com"]})
    async with unwatched(page) as mine, example(mine, name, server):
        await expect(mine.get_by_role("status")).to_contain_text("does not allow http://127.0.0.1")


async def test_the_page_stops_an_answer(make_server: MakeServer, page: Page) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, stall_after=3))
    async with example(page, "page.html", server):
        await expect(page.locator("#answer")).not_to_be_empty()
        await page.get_by_role("button", name="Stop").click()

        await server.simulator.until(lambda stats: stats.aborted == 1)
        await expect(page.get_by_role("status")).to_have_text("Stopped")


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
async def test_a_documented_script_runs_as_it_stands(
    server: RunningServer, page: Page, number: int
) -> None:
    assert DOCUMENTED in SCRIPTS[number]
    script = SCRIPTS[number].replace(DOCUMENTED, server.base)
    body = f'{BLANK}<script type="module">{script}\nwindow.ended = true;</script>'
    async with shown(page, body):
        await page.wait_for_function("window.ended", timeout=1000 * LATE)
        text = await page.evaluate("document.body.textContent")
    if "append" in script:
        assert await model_answer(server, "Hello") in text

"""The examples of docs/clients.md, as they stand, in a browser: in a page of another origin."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from aioserver.providers.simulator.exchange import Behaviour
from tests.support.chat_page import ManualProvider, cut

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Page

    from tests.support.server import MakeServer

EXAMPLES = re.findall(
    r"^```javascript\n(.+?)^```$",
    (Path(__file__).parents[2] / "docs/clients.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
ASK, LISTEN = EXAMPLES


@asynccontextmanager
async def begun(page: Page, source: str, call: str) -> AsyncIterator[None]:
    """Run an example in a page of another origin; what it hands out is in `heard` and `ended`."""
    script = f"{source}\nvar heard = '', ended = [];\n{call}"
    body = f'<!doctype html><link rel="icon" href="data:,"><script>{script}</script>'

    async def show(_request: web.BaseRequest) -> web.Response:
        return web.Response(text=body, content_type="text/html")

    async with RawTestServer(show, host="127.0.0.1") as other:
        await page.goto(str(other.make_url("/")))
        yield


async def outcome(page: Page) -> tuple[str, list[Any]]:
    await page.wait_for_function("ended.length > 0", timeout=20_000)
    return await page.evaluate("heard"), await page.evaluate("ended")


TAKE = "(piece) => { heard += piece; }, (frame) => { ended.push(frame); }"


@pytest.mark.parametrize("example", ["ask", "listen"])
async def test_an_example_loses_nothing_of_an_answer_whose_connection_breaks(
    example: str, make_server: MakeServer, page: Page
) -> None:
    async with ManualProvider() as provider:
        server = await make_server(**provider.changes)
        source, url = {"ask": (ASK, server.ws), "listen": (LISTEN, server.base)}[example]
        async with begun(page, source, f"{example}('{url}', 'Hello', {TAKE})"):
            provider.say("One", " two")
            await page.wait_for_function("heard === 'One two'", timeout=20_000)
            cut(server)
            provider.say(" three")
            provider.finish()

            text, ended = await outcome(page)

    assert text == "One two three"
    assert [frame["status"] for frame in ended] == ["complete"]
    assert provider.requests == 1


async def test_the_eventsource_example_tells_our_error_from_the_browser_s(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, cut_after=3))
    async with begun(page, LISTEN, f"listen('{server.base}', 'Hello', {TAKE})"):
        _, ended = await outcome(page)

        assert [frame["status"] for frame in ended] == ["error"]
        assert ended[0]["chunk"]["code"] == "provider_disconnected"
        assert ended[0]["event_id"] > 1

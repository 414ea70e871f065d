"""A page of another origin that has imported `/client.js`, and a window whose errors are
expected.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.test_utils import RawTestServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Page

BLANK = '<!doctype html><link rel="icon" href="data:,">'
# In a page: `read(answer)` reads an answer to its end, and returns what came and how it ended.
READ = """
window.read = async (answer, each = () => {}) => {
  const outcome = { text: "", numbers: [], events: [], error: null };
  try {
    for await (const event of answer.events()) {
      if (event.type === "text") outcome.text += event.text;
      if (event.number) outcome.numbers.push(event.number);
      outcome.events.push(event);
      if (each(event) === "leave") break;
    }
  } catch (error) {
    const { name, code, message, retryable, retryAfter, requestId, text } = error;
    outcome.error = { name, code, message, retryable, retryAfter, requestId, text };
  }
  return outcome;
};
"""


@contextlib.asynccontextmanager
async def page_elsewhere(page: Page, base: str, body: str = BLANK) -> AsyncIterator[str]:
    """Show a page of another origin, which this yields. The module of the server at *base* is in
    its variable `aio`.
    """

    async def show(_request: web.BaseRequest) -> web.Response:
        return web.Response(text=body, content_type="text/html")

    async with RawTestServer(show, host="127.0.0.1") as other:
        await page.goto(str(other.make_url("/")))
        await page.evaluate(READ)
        await page.evaluate(
            "async (base) => { window.aio = await import(`${base}/client.js`); }", base
        )
        yield str(other.make_url("/")).rstrip("/")
        await page.goto("about:blank")


@contextlib.asynccontextmanager
async def unwatched(page: Page) -> AsyncIterator[Page]:
    """A page of its own browser window: Chromium reports each 401 or 503 as an error of the
    page.
    """
    assert page.context.browser is not None
    context = await page.context.browser.new_context(viewport={"width": 1280, "height": 800})
    try:
        yield await context.new_page()
    finally:
        await context.close()


async def run(page: Page, script: str, *arguments: Any) -> Any:
    """Run the body of an asynchronous function in *page*; its arguments are `a`, `b`, `c`."""
    return await page.evaluate(f"async ([a, b, c]) => {{ {script} }}", list(arguments))

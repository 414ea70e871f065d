"""One headless Chromium for all tests of a process: pages in it share nothing, and may report no
error.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from playwright.async_api import Error, async_playwright

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser, Page, Playwright

# Debian's, or None. The shell has the same engine and no window around it: a page takes less than
# half the CPU time.
PROGRAM = (
    shutil.which("chromium-headless-shell")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
)
LOCAL = {"127.0.0.1", "localhost"}
# Reports each text that a script of a page makes markup of.
WATCH_MARKUP = """
for (const [kind, name] of [
  [Element, "innerHTML"], [Element, "outerHTML"], [ShadowRoot, "innerHTML"],
  [Element, "insertAdjacentHTML"], [Document, "write"], [Document, "writeln"],
  [Range, "createContextualFragment"],
]) {
  const own = Object.getOwnPropertyDescriptor(kind.prototype, name);
  const called = own.set ? "set" : "value";
  const original = own[called];
  own[called] = function (...texts) {
    console.error(`${name} is written: ${texts}`);
    return original.apply(this, texts);
  };
  Object.defineProperty(kind.prototype, name, own);
}
"""


class Chromium:
    """Starts with its first page, and anew when it has died.

    Always: a page has a browser context of its own (storage, cookies, permissions, clock), which
    ends with the page's test. One event loop owns it. It ends with its process, however that ends:
    its driver, which is Playwright's, ends it when the pipe to the process is closed.
    """

    def __init__(self) -> None:
        # Tasks of Playwright, which go on from test to test.
        self.tasks: set[asyncio.Task[Any]] = set()
        self._playwright: Playwright | None = None
        self._browser: Browser | None = None

    async def browser(self) -> Browser:
        """Return the running browser; start it if there is none."""
        if self._browser is None or not self._browser.is_connected():
            await self.close()
            before = asyncio.all_tasks()
            self._playwright = await async_playwright().start()
            self._browser = await self._playwright.chromium.launch(
                executable_path=PROGRAM, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            self.tasks = asyncio.all_tasks() - before
        return self._browser

    async def close(self) -> None:
        """End the browser and its driver."""
        if self._browser is not None:
            with contextlib.suppress(Error):
                await self._browser.close()
        if self._playwright is not None:
            await self._playwright.stop()
        self._playwright = self._browser = None

    @contextlib.asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """Open a page of 1280 x 800; `page.context` makes more of them, watched as well.

        Raises:
            AssertionError: a page reported an error, made markup of a text, or asked anything but
                this machine; raised at the end of the block.
        """
        faults: list[str] = []
        browser = await self.browser()
        context = await browser.new_context(viewport={"width": 1280, "height": 800})
        context.on("page", lambda page: _watch(page, faults))
        await context.add_init_script(WATCH_MARKUP)
        page = await context.new_page()
        yield page
        for each in browser.contexts:
            await each.close()
        # A server that is gone on purpose is no fault of the page: Chromium reports it by itself.
        unexpected = [
            fault
            for fault in faults
            if "net::ERR_" not in fault and "WebSocket connection to" not in fault
        ]
        assert not unexpected, unexpected


def _watch(page: Page, faults: list[str]) -> None:
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("crash", lambda _page: faults.append("the page has crashed"))
    page.on(
        "console",
        lambda line: faults.append(line.text) if line.type in ("error", "warning") else None,
    )
    page.on(
        "request",
        lambda request: (
            None
            if urlsplit(request.url).hostname in LOCAL or request.url.startswith("data:")
            else faults.append(f"asks {request.url}")
        ),
    )

"""One headless Chromium for all tests of a process, and one page where nothing of a test stays in
it: a page may report no error.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from playwright.async_api import Error, async_playwright

from tests.support.waiting import LATE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from playwright.async_api import Browser, Page, Playwright, Request

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
# What Playwright's page, context and clock cannot take back, or would have to be told to.
ALTERS = (
    *("add_init_script", "route_web_socket", "expose_binding", "expose_function", "on", "once"),
    *("emulate_media", "set_viewport_size", "set_offline", "grant_permissions", "install"),
)


class Chromium:
    """Starts with its first page, and anew when it has died.

    Always: nothing of a test is left in the page of the next. Its cookies and what its scripts have
    stored are cleared; where a test has altered more (ALTERS) or closed the page, the context ends
    with it. One event loop owns it. It ends with its process, however that ends: its driver, which
    is Playwright's, ends it when the pipe to the process is closed.
    """

    def __init__(self) -> None:
        self._page: Page | None = None
        # Of the page's test: what its pages have reported, where they have been, and whether it
        # has altered what would stay.
        self._faults: list[str] = []
        self._origins: set[str] = set()
        self._altered = False
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
        self._playwright = self._browser = self._page = None

    @contextlib.asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """Open a page of 1280 x 800; `page.context` makes more of them, watched as well.

        Raises:
            AssertionError: a page reported an error, made markup of a text, or asked anything but
                this machine; raised at the end of the block.
        """
        browser = await self.browser()
        if self._page is None or self._page.is_closed():
            context = await browser.new_context(viewport={"width": 1280, "height": 800})
            context.set_default_timeout(1000 * LATE)  # milliseconds
            context.on("page", self._watch)
            await context.add_init_script(WATCH_MARKUP)
            self._page = await context.new_page()
            for each in (self._page, context, context.clock):
                self._heed(each)
        yield self._page
        await self._clear(self._page)
        faults, self._faults = self._faults, []
        # A server that is gone on purpose is no fault of the page: Chromium reports it by itself.
        unexpected = [
            fault
            for fault in faults
            if "net::ERR_" not in fault and "WebSocket connection to" not in fault
        ]
        assert not unexpected, unexpected

    def _heed(self, one: object) -> None:
        """Notice a call of *one* that alters what would stay."""

        def heeded(method: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(method)
            def call(*args: Any, **kwargs: Any) -> Any:
                self._altered = True
                return method(*args, **kwargs)

            return call

        for name in ALTERS:
            if method := getattr(one, name, None):
                setattr(one, name, heeded(method))

    async def _clear(self, page: Page) -> None:
        """Take out of *page* what its test has left, or close its context."""
        context = page.context
        origins, self._origins = self._origins, set()
        altered, self._altered = self._altered, False
        if altered or page.is_closed():
            await context.close()
            self._page = None
            return
        for other in context.pages:
            if other is not page:
                await other.close()
        await page.unroute_all()
        await page.goto("about:blank")
        await context.clear_cookies()
        session = await context.new_cdp_session(page)
        for origin in origins:
            await session.send(
                "Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"}
            )
        await session.detach()

    def _watch(self, page: Page) -> None:
        def asks(request: Request) -> None:
            url = urlsplit(request.url)
            if url.hostname in LOCAL:
                self._origins.add(f"{url.scheme}://{url.netloc}")
            elif url.scheme != "data" and request.url != "about:blank":
                self._faults.append(f"asks {request.url}")

        page.on("pageerror", lambda error: self._faults.append(f"error: {error}"))
        page.on("crash", lambda _page: self._faults.append("the page has crashed"))
        page.on(
            "console",
            lambda line: (
                self._faults.append(line.text) if line.type in ("error", "warning") else None
            ),
        )
        page.on("request", asks)

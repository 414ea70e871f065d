"""Pages in a headless Chromium, Debian's: no page may report an error or ask anything but its server."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.support.dashboard import Stand, standing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LOCAL = {"127.0.0.1", "localhost"}


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    """A page of 1280 x 800; `page.context` makes more of them, watched as well."""
    if CHROMIUM is None:
        why = "no Chromium is installed"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    from playwright.async_api import async_playwright

    faults: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        context = await browser.new_context(viewport={"width": 1280, "height": 800})

        def watch(one: Page) -> None:
            one.on("pageerror", lambda error: faults.append(f"error: {error}"))
            one.on(
                "console",
                lambda line: (
                    faults.append(line.text) if line.type in ("error", "warning") else None
                ),
            )
            one.on(
                "request",
                lambda asked: (
                    None
                    if urlsplit(asked.url).hostname in LOCAL or asked.url.startswith("data:")
                    else faults.append(f"asks {asked.url}")
                ),
            )

        context.on("page", watch)
        yield await context.new_page()
        await browser.close()
    # A server that is gone on purpose is no fault of the page: Chromium reports it by itself.
    unexpected = [
        one for one in faults if "net::ERR_" not in one and "WebSocket connection to" not in one
    ]
    assert not unexpected


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    """A stand-in for a server, before whose dashboard the page is."""
    async with standing() as stand:
        yield stand

"""The dashboard and a server that is gone, silent, or refuses it: it says so, and comes back by
itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aiohttp import web
from playwright.async_api import expect

from tests.support.dashboard import OPEN, Stand, opened, shown, verdict
from tests.support.waiting import until

if TYPE_CHECKING:
    from playwright.async_api import Page

# Milliseconds without data after which the page says so: after the connection was lost, and with
# it.
LOST_AFTER, SILENT_AFTER = 1_000, 3_000


async def later(page: Page, milliseconds: int) -> None:
    """Let the page's clock show a later time from now on; its timers run as before."""
    await page.evaluate(
        "more => { const now = Date.now; Date.now = () => now.call(Date) + more; }", milliseconds
    )


async def test_a_server_that_is_gone_is_reported_and_found_again(stand: Stand, page: Page) -> None:
    stand.say(connections__active=3)
    await page.add_init_script("Math.random = () => 0")  # the shortest time between two attempts
    await opened(page, stand)

    await stand.close()
    await later(page, LOST_AFTER)
    await verdict(
        page,
        "Disconnected",
        re.compile(r"The server has been unreachable for \d+\ss, next attempt in"),
    )
    await expect(page.locator("body")).to_have_class("stale")
    await expect(page.locator("#updated")).to_have_text(re.compile(r"\d+\ss old"))
    await expect(shown(page, "connections.active")).to_have_text("3")  # the last that is known

    stand.say(verdict={**OPEN, "text": "Room for 95 more"})
    await stand.open()
    await verdict(page, "Open", "Room for 95 more")
    await expect(page.locator("body")).not_to_have_class("stale")
    await expect(page.locator("#incident-list p").first).to_have_text(
        re.compile(r"this page received no data for \d+\ss")
    )


async def test_a_server_that_only_keeps_the_line_is_lost_too(stand: Stand, page: Page) -> None:
    await opened(page, stand)

    stand.silent = True
    await later(page, SILENT_AFTER)
    await verdict(page, "Disconnected", re.compile(r"The server has sent no data for \d+\ss"))
    await expect(page.locator("body")).to_have_class("stale")

    stand.silent = False
    await verdict(page, "Open", "Room for 100 more")


async def test_a_server_that_was_never_there_is_reported_too(stand: Stand, page: Page) -> None:
    await page.route("**/events", lambda route: route.abort())
    await page.goto(stand.base + "/dashboard")
    await verdict(page, "Disconnected", re.compile("The server has been unreachable for"))
    await expect(page.locator("#board")).to_be_hidden()

    await page.unroute("**/events")
    await verdict(page, "Open", "Room for 100 more")


async def test_a_refused_page_says_why_and_asks_again(stand: Stand, page: Page) -> None:
    stand.refusal = web.json_response(
        {"error": {"message": "256 watchers at most"}}, status=503, headers={"Retry-After": "1"}
    )
    # Chromium reports a 503 as an error of the page, so this one is not watched.
    assert page.context.browser
    context = await page.context.browser.new_context()
    mine = await context.new_page()
    await mine.goto(stand.base + "/dashboard")
    await verdict(
        mine, "Disconnected", re.compile("The server rejects this page, next attempt in")
    )
    await expect(mine.locator("#verdict-detail")).to_have_text("Its message: 256 watchers at most")

    stand.refusal = None
    await verdict(mine, "Open", "Room for 100 more")
    await context.close()


async def test_a_page_nobody_sees_lets_go_of_the_server(stand: Stand, page: Page) -> None:
    await opened(page, stand)
    assert stand.watchers == 1
    see = """hidden => {
      Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""

    await page.evaluate(see, True)
    await until(lambda: stand.watchers == 0)

    await page.evaluate(see, False)
    await until(lambda: stand.watchers == 1)
    await verdict(page, "Open", "Room for 100 more")

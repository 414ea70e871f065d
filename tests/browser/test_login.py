"""The form that asks for a key: logging in with the right one, errors with a wrong one, and
logging out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from playwright.async_api import expect

from aioserver.server import reload
from tests.support.chat_page import answer, ask, connected, is_now
from tests.support.client_page import unwatched
from tests.support.keys import COOKIE, auth_of, key_of, keys_of
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from playwright.async_api import Locator, Page

    from tests.support.server import MakeServer, RunningServer


LOST = re.compile("Connecting|Disconnected")
ENDLESS = Behaviour(ttft=0, interval=0.02, tokens=100_000)


def form(page: Page) -> Locator:
    return page.get_by_role("dialog")


def key(page: Page) -> Locator:
    return form(page).get_by_label("Key")


def fault(page: Page) -> Locator:
    return form(page).get_by_role("alert")


async def enter_key(page: Page, name: str) -> None:
    await key(page).fill(key_of(name))
    await key(page).press("Enter")


async def watches(page: Page, server: RunningServer) -> None:
    """Wait until the dashboard is fed; what it says of a busy machine is not of interest."""
    await expect(page.locator("#board")).to_be_visible()
    await until(lambda: server.watchers == 1)
    await expect(page.locator("#verdict-word")).not_to_have_text(LOST)
    await expect(page.locator("body")).not_to_have_class("stale")


async def test_a_server_without_keys_asks_for_none(make_server: MakeServer, page: Page) -> None:
    server = await make_server()
    await page.goto(server.base + "/")
    await connected(page)
    await expect(form(page)).to_have_count(0)
    await expect(page.get_by_role("button", name="Log out")).to_be_hidden()
    await page.goto(server.base + "/dashboard")
    await watches(page, server)
    await expect(form(page)).to_have_count(0)
    await expect(page.get_by_role("button", name="Log out")).to_be_hidden()


async def test_one_chats_with_a_key_and_logs_out(make_server: MakeServer, page: Page) -> None:
    server = await make_server(**keys_of("web"))
    await page.goto(server.base + "/")

    await expect(form(page)).to_be_visible()
    await expect(key(page)).to_be_focused()
    await enter_key(page, "web")
    await expect(form(page)).to_have_count(0)
    await connected(page)
    await ask(page, "Hello")
    await is_now(page, "complete")
    (cookie,) = await page.context.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (COOKIE, True, "Strict")
    assert COOKIE not in str(await page.evaluate("document.cookie"))
    stored = await page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    assert key_of("web") not in stored + page.url + await page.content()

    await page.reload()
    await connected(page)  # the cookie is enough
    await ask(page, "Hello again")
    await is_now(page, "complete")
    await page.get_by_role("button", name="Log out").click()
    await page.get_by_role("button", name="Log out, and keep them").click()
    await expect(form(page)).to_be_visible()
    await until(lambda: not server.context.sockets)
    assert await page.context.cookies() == []
    await enter_key(page, "web")
    await connected(page)
    await ask(page, "Once more")
    await is_now(page, "complete")


@pytest.mark.parametrize("way", ["remove", "keep"])
async def test_the_next_person_at_this_browser_sees_nothing_of_the_one_before(
    make_server: MakeServer, page: Page, way: str
) -> None:
    # The second name is how an entry of the first one would go on.
    server = await make_server(**keys_of("ann", "ann.conversation"))
    await page.goto(server.base + "/")
    await enter_key(page, "ann")
    await connected(page)
    await ask(page, "apples")
    await is_now(page, "complete")
    await page.get_by_role("textbox", name="Message").fill("a draft")
    stored = await page.evaluate("Object.keys(localStorage).join()")
    assert "conversation" in stored

    await page.get_by_role("button", name="Log out").click()
    await page.get_by_role("button", name=f"Log out, and {way} them").click()
    await expect(form(page)).to_be_visible()
    await expect(page.locator(".lists li")).to_have_count(0)
    await expect(page.get_by_role("article")).to_have_count(0)
    left = await page.evaluate("JSON.stringify({...localStorage})")
    assert ("apples" in left) == (way == "keep")

    await page.reload()
    await expect(page.locator(".lists li")).to_have_count(0)
    await enter_key(page, "ann.conversation")
    await connected(page)
    await expect(page.locator(".lists li")).to_have_count(0)
    assert "apples" not in await page.content()
    assert await page.get_by_role("textbox", name="Message").input_value() == ""
    await page.get_by_role("button", name="Log out").click()

    # What the server keeps is there again in both ways.
    await enter_key(page, "ann")
    await connected(page)
    await expect(page.locator(".lists li")).to_have_count(1)
    await expect(page.locator(".lists li")).to_contain_text("apples")


async def test_an_answer_that_runs_ends_with_the_log_out(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(ENDLESS, **keys_of("ann", "bob"))
    await page.goto(server.base + "/")
    await enter_key(page, "ann")
    await connected(page)
    await ask(page, "apples")
    await is_now(page, "running")

    await page.get_by_role("button", name="Log out").click()
    await page.get_by_role("button", name="Log out, and remove them").click()
    await enter_key(page, "bob")
    await connected(page)

    await server.simulator.until(lambda stats: stats.active == 0)
    await expect(page.get_by_role("article")).to_have_count(0)
    assert "apples" not in await page.evaluate("JSON.stringify({...localStorage})")


async def test_a_wrong_key_says_so_and_there_is_no_way_around(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(**keys_of("web"))
    async with unwatched(page) as mine:
        await mine.goto(server.base + "/")
        await form(mine).get_by_role("button", name="Log in").click()
        await expect(form(mine)).to_be_visible()
        assert server.context.metrics.auth_failures["missing_key"].value == 0, "none was sent"
        await enter_key(mine, "nobody")

        await expect(fault(mine)).to_have_text("The server does not know this key.")
        await expect(key(mine)).to_be_focused()
        for _ in range(3):
            await mine.keyboard.press("Escape")
        await expect(form(mine)).to_be_visible()
        await form(mine).get_by_role("button", name="Log in").click()
        await expect(fault(mine)).to_have_text("The server does not know this key.")
        assert not server.context.sockets
        await enter_key(mine, "web")
        await connected(mine)


async def test_the_dashboard_wants_an_admins_key(make_server: MakeServer, page: Page) -> None:
    server = await make_server(**keys_of("web", "root"))
    await page.goto(server.base + "/dashboard")
    await expect(form(page)).to_be_visible()
    await expect(page).to_have_title("Key required · aioserver dashboard")

    await enter_key(page, "web")
    await expect(fault(page)).to_have_text(
        "This key may chat, but this page requires an admin key."
    )
    await page.reload()  # the session of `web` is there, and is not enough
    await expect(fault(page)).to_contain_text("requires an admin key")
    await enter_key(page, "root")

    await expect(form(page)).to_have_count(0)
    await watches(page, server)
    await page.get_by_role("button", name="Log out").click()
    await expect(form(page)).to_be_visible()
    await until(lambda: not server.watchers)
    await enter_key(page, "root")
    await watches(page, server)


async def test_one_log_in_is_enough_for_all_windows(make_server: MakeServer, page: Page) -> None:
    server = await make_server(**keys_of("root"))
    other = await page.context.new_page()
    await other.goto(server.base + "/dashboard")
    await expect(form(other)).to_be_visible()
    await page.goto(server.base + "/")
    await enter_key(page, "root")
    await connected(page)

    # A window behind another is not hidden in a headless browser: tell it that it is seen again.
    await other.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    await expect(form(other)).to_have_count(0)
    await watches(other, server)


async def test_a_revoked_key_asks_for_another(make_server: MakeServer, page: Page) -> None:
    server = await make_server(ENDLESS, **keys_of("web"))
    await page.goto(server.base + "/")
    await enter_key(page, "web")
    await connected(page)
    await ask(page, "Hello")
    await is_now(page, "running")

    await reload.apply_auth(server.owners, auth_of("other"))

    await expect(form(page)).to_be_visible()
    await expect(page.get_by_role("article")).to_have_count(0)
    await reload.apply_auth(server.owners, auth_of("web"))
    await enter_key(page, "web")
    await connected(page)
    await page.get_by_role("button", name="Hello", exact=True).click()
    await is_now(page, "failed")
    await expect(answer(page).locator(".fault")).to_contain_text("Your key was withdrawn")


async def test_a_revoked_watcher_is_asked_for_another(make_server: MakeServer, page: Page) -> None:
    server = await make_server(**keys_of("root"))
    await page.goto(server.base + "/dashboard")
    await enter_key(page, "root")
    await watches(page, server)

    await reload.apply_auth(server.owners, auth_of("web"))
    await expect(form(page)).to_be_visible()

    await reload.apply_auth(server.owners, auth_of("root"))
    await enter_key(page, "root")
    await watches(page, server)


async def test_the_form_hides_what_is_behind_it_and_fits_a_phone(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(**keys_of("web"))
    await page.set_viewport_size({"width": 360, "height": 640})
    for path in ("/", "/dashboard"):
        await page.goto(server.base + path)
        await expect(form(page)).to_be_visible()
        await page.emulate_media(color_scheme="light")
        await _hides_and_fits(page)
        await page.emulate_media(color_scheme="dark")
        await _hides_and_fits(page)


async def _hides_and_fits(page: Page) -> None:
    box = await form(page).bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    backdrop = await page.evaluate(
        "getComputedStyle(document.getElementById('login'), '::backdrop').backgroundColor"
    )
    assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", backdrop), "opaque"
    contrast = await page.evaluate(
        """() => {
          const light = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).map((part) => {
              const share = part / 255;
              return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const dialog = document.getElementById("login");
          const pairs = [[dialog, "h2"], [dialog, "#login-hint"], [dialog, "label"], [dialog, "#login-error"]];
          const ratio = (over, under) => {
            const [a, b] = [light(getComputedStyle(over).color), light(getComputedStyle(under).backgroundColor)];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          };
          const button = dialog.querySelector("button");
          const ratios = pairs.map(([under, name]) => ratio(dialog.querySelector(name), under));
          return Math.min(ratio(button, button), ...ratios);
        }"""
    )
    assert contrast >= 4.5

"""The chat page and the conversations that the server keeps: found again in another browser, and
deleted in both.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from playwright.async_api import expect

from aioserver.client import Client
from tests.support.chat_page import answer, ask, enter, is_now, lose, model_answer, shows
from tests.support.client_page import unwatched
from tests.support.history import sql
from tests.support.process import serving
from tests.support.server import QUICK
from tests.support.simulator import Simulator
from tests.support.waiting import until_result

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.async_api import Locator, Page

    from tests.support.server import RunningServer


def listed(page: Page) -> Locator:
    """The conversations in both lists."""
    return page.locator(".lists li")


async def open_elsewhere(page: Page) -> None:
    """Show the list of what this browser has not begun."""
    await page.get_by_text("Elsewhere").click()


async def kept(server: RunningServer) -> list[str]:
    """The titles of the conversations that the server keeps."""
    async with server.session.get(server.base + "/conversations") as response:
        return [conversation["title"] for conversation in (await response.json())["conversations"]]


async def test_a_conversation_is_found_again_in_another_browser_and_goes_on(
    server: RunningServer, page: Page
) -> None:
    await enter(page, server)
    await ask(page, "apples")
    await is_now(page, "complete")
    async with unwatched(page) as other:
        await enter(other, server)
        await open_elsewhere(other)
        await other.get_by_role("button", name="apples", exact=True).click()
        await expect(other.locator("#elsewhere")).to_be_hidden()
        await shows(other, await model_answer(server, "apples"))
        await expect(other.locator(".question")).to_contain_text("apples")
        await ask(other, "pears")
        await expect(other.get_by_role("article")).to_have_count(2)
        await is_now(other, "complete")
        asked = server.simulator.bodies[-1]["messages"]
        assert [message["content"] for message in asked if message["role"] == "user"] == [
            "apples",
            "pears",
        ]

        await other.reload()
        await expect(other.get_by_role("article")).to_have_count(2)
        await shows(other, await model_answer(server, "pears"))

    await page.reload()
    await expect(page.get_by_role("article")).to_have_count(1)
    await page.get_by_role("button", name="apples", exact=True).click()
    await expect(page.get_by_role("article")).to_have_count(2)
    await shows(page, await model_answer(server, "pears"))
    await expect(listed(page)).to_have_count(1)


async def test_a_conversation_is_found_again_after_its_server_was_killed(
    tmp_path: Path, page: Page
) -> None:
    """In another browser, and it goes on there: the new process knows what was said before."""
    file, changes = tmp_path / "config.yaml", sql(tmp_path / "events.db")
    async with Simulator(QUICK) as simulator:
        async with serving(file, simulator.base_url, changes=changes) as process:
            await process.ready()
            await page.goto(process.base)
            await ask(page, "apples")
            await is_now(page, "complete")
            process.signal(signal.SIGKILL)
            await process.ended()
        async with (
            serving(file, simulator.base_url, changes=changes) as process,
            unwatched(page) as other,
        ):
            await process.ready()
            await other.goto(process.base)
            await open_elsewhere(other)
            await other.get_by_role("button", name="apples", exact=True).click()
            await expect(other.get_by_role("article")).to_contain_text("apples")
            await ask(other, "pears")
            await expect(other.get_by_role("article")).to_have_count(2)
            await is_now(other, "complete")

    asked = simulator.bodies[-1]["messages"]
    assert [message["content"] for message in asked if message["role"] == "user"] == [
        "apples",
        "pears",
    ]


async def test_what_is_deleted_is_deleted_at_the_server(server: RunningServer, page: Page) -> None:
    await enter(page, server)
    for name in ("apples", "pears"):
        await page.get_by_role("button", name="New conversation").click()
        await ask(page, name)
        await is_now(page, "complete")
    await page.evaluate("localStorage.clear()")
    await page.reload()
    await expect(listed(page)).to_have_count(2)
    await open_elsewhere(page)

    await page.get_by_role("button", name="Delete: apples").click()
    await page.get_by_role("button", name="Really delete: apples").click()

    await until_result(lambda: kept(server), lambda titles: titles == ["pears"])
    await expect(listed(page)).to_have_count(1)
    await page.reload()
    await expect(listed(page)).to_have_count(1)


async def test_what_programs_begin_is_told_apart_and_closed(
    server: RunningServer, page: Page
) -> None:
    async with Client(server.base) as client:
        for number in range(3):
            await client.chat(f"program {number}").text()
    await enter(page, server)
    await ask(page, "apples")
    await is_now(page, "complete")

    await expect(page.locator("#conversations li")).to_contain_text(["apples"])
    await expect(page.locator("#elsewhere li")).to_have_count(3)
    await expect(page.get_by_text("program 0")).to_be_hidden()
    await open_elsewhere(page)
    await expect(page.get_by_text("program 0")).to_be_visible()


async def test_a_deletion_without_a_connection_is_told_to_the_server_later(
    server: RunningServer, page: Page
) -> None:
    await enter(page, server)
    await ask(page, "apples")
    await is_now(page, "complete")
    await lose(page, server)
    await page.get_by_role("button", name="Delete: apples").click()
    await page.get_by_role("button", name="Really delete: apples").click()
    await expect(listed(page)).to_have_count(0)
    assert await kept(server) == ["apples"]

    await page.context.set_offline(False)

    await until_result(lambda: kept(server), lambda titles: not titles)
    await expect(listed(page)).to_have_count(0)


async def test_a_server_that_cannot_show_a_conversation_costs_only_that(
    server: RunningServer, page: Page
) -> None:
    await enter(page, server)
    await ask(page, "apples")
    await is_now(page, "complete")
    async with unwatched(page) as other:
        await enter(other, server)
        await expect(listed(other)).to_have_count(1)
        await other.route("**/conversations/*", lambda route: route.fulfill(status=503, body="{}"))
        await open_elsewhere(other)
        await other.get_by_role("button", name="apples", exact=True).click()
        await expect(other.locator("#notice")).to_contain_text("cannot show this conversation")
        await ask(other, "pears")
        await is_now(other, "complete")
        await expect(answer(other)).to_contain_text("pears")


async def test_people_who_share_an_address_are_not_shown_each_other_s_conversations(
    server: RunningServer, page: Page
) -> None:
    await enter(page, server)
    shown = await page.evaluate(
        """async () => {
          const { personal } = await import("/assets/chat/history.js");
          const hosts = ["localhost", "127.0.0.1", "[::1]", "chat.example.com", "localhost.example.com"];
          return [null, "web"].map((name) => hosts.map((host) => personal({ name }, host)));
        }"""
    )

    assert shown == [[True, True, True, False, False], [True] * 5]

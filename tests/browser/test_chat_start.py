"""What the chat page offers before the first question: prompts, the dashboard, and whether a model
answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from playwright.async_api import expect

from tests.support.chat_page import answer, box, enter, is_now
from tests.support.keys import key_of, keys_of
from tests.support.server import HTTP_CLIENT

if TYPE_CHECKING:
    from playwright.async_api import Page

    from tests.support.server import MakeServer, RunningServer

NOTE = "The chosen provider is simulated"
DEMO = {"simulated": True, "model": "demo-model", "http_client": {**HTTP_CLIENT}}


async def test_a_prompt_is_asked_by_a_click(server: RunningServer, page: Page) -> None:
    await enter(page, server)
    prompts = page.get_by_role("group", name="Questions to start with").get_by_role("button")
    await expect(prompts).to_have_count(3)
    text = await prompts.first.text_content()

    await prompts.first.click()

    await is_now(page, "complete")
    await expect(page.locator(".question")).to_contain_text(text or "-")
    await expect(prompts.first).to_be_hidden()
    await expect(box(page)).to_be_focused()
    assert server.simulator.bodies[-1]["messages"][-1]["content"] == text
    await expect(answer(page).locator("table, pre, ol")).to_have_count(3)
    link = answer(page).get_by_role("link")
    await expect(link).to_have_attribute("rel", "noopener noreferrer")
    await expect(link).to_have_attribute("target", "_blank")


async def test_the_dashboard_is_one_link_away(server: RunningServer, page: Page) -> None:
    await enter(page, server)
    await expect(page.get_by_role("link", name="Dashboard")).to_be_visible()
    await page.set_viewport_size({"width": 390, "height": 844})
    await page.get_by_role("button", name="Conversations").click()

    await page.get_by_role("link", name="Dashboard").click()

    await expect(page.locator("#board")).to_be_visible()


async def test_a_simulated_provider_is_named_as_one(make_server: MakeServer, page: Page) -> None:
    server = await make_server(**{"llm.providers.somebody": DEMO})
    await enter(page, server)
    note = page.get_by_text(NOTE)
    await expect(note).to_be_hidden()  # the active provider is not

    await page.get_by_label("Model").select_option(label="demo-model")
    await expect(note).to_be_visible()
    groups = page.get_by_label("Model").locator("optgroup")
    assert await groups.evaluate_all("all => all.map(one => one.label)") == [
        "sim",
        "somebody, simulated",
    ]
    await page.get_by_label("Model").select_option(label="Default (sim)")
    await expect(note).to_be_hidden()


async def test_a_simulated_default_is_named_with_keys_and_without(
    make_server: MakeServer, page: Page
) -> None:
    only = {"llm.active": "somebody", "llm.providers": {"somebody": DEMO}}
    await enter(page, await make_server(**only))
    await expect(page.get_by_text(NOTE)).to_be_visible()
    await expect(page.get_by_label("Model").locator("option").first).to_have_text(
        "Default (somebody, simulated)"
    )

    server = await make_server(**only, **keys_of("web"))
    await page.goto(server.base + "/")
    await page.get_by_role("dialog").get_by_label("Key").fill(key_of("web"))
    await page.keyboard.press("Enter")

    await expect(page.get_by_text(NOTE)).to_be_visible()

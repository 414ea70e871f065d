"""The chat page in a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.async_api import Page

    from tests.house import House


async def test_a_message_is_answered(house: House, page: Page) -> None:
    await page.goto(house.base + "/")
    assert "aioserver" in await page.title()

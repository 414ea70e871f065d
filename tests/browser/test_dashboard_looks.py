"""The dashboard for every eye and none: small screens, contrast, headings, keyboards, motion."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files
from typing import TYPE_CHECKING

import pytest
from playwright.async_api import expect

from tests.support.dashboard import CROWDED, QUEUEING, Stand, card, opened, provider

if TYPE_CHECKING:
    from playwright.async_api import Page


async def test_a_phone_needs_no_sideways_scrolling(stand: Stand, page: Page) -> None:
    await page.set_viewport_size({"width": 390, "height": 844})
    stand.say(
        **CROWDED,
        **QUEUEING,
        tokens_per_second=1.2e9,
        first_token={"p50": 99.9, "p95": 119.0, "p99": 300.0, "count": 99999},
        connections__rejected=10**9,
        connections__opened=10**12,
        providers__groq__model="a-model-with-a-very-long-name-" * 4,
        providers__groq__faults__http_5xx=10**8,
        rejections={"a_code_that_nobody_thought_of_and_that_has_many_words": 10**9},
    )
    stand.stats["providers"]["provider-with-a-very-long-name-" * 3] = provider(requests=1)
    await opened(page, stand)
    stand.happen("w" * 300)

    await expect(page.locator("#incident-list p")).to_have_count(1)
    wide = await page.evaluate("""() => Array.from(document.querySelectorAll("body *"))
      .filter(el => !el.closest(".hidden, .uplot, canvas") && el.getClientRects().length)
      .filter(el => el.getBoundingClientRect().right > innerWidth + 0.5)
      .map(el => el.tagName + "#" + el.id + "." + el.className + " " + el.textContent.slice(0, 40))""")
    assert wide == []
    assert await page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [390, 600])
async def test_on_a_phone_incidents_come_before_charts(
    stand: Stand, page: Page, width: int
) -> None:
    await page.set_viewport_size({"width": width, "height": 844})
    await opened(page, stand)

    tops = await page.evaluate(
        """() => ["now", "providers", "incidents", "history", "details"]
          .map(id => document.getElementById(id).getBoundingClientRect().top)"""
    )
    assert tops == sorted(tops)


async def test_dashboard_can_be_read_without_eyes_or_mouse(stand: Stand, page: Page) -> None:
    stand.say(providers__other=provider(requests=5))
    await opened(page, stand)
    await expect(card(page, "other")).to_be_visible()

    assert await page.evaluate("document.documentElement.lang") == "en"
    for landmark in ("banner", "main", "navigation"):
        await expect(page.get_by_role(landmark)).to_have_count(1)
    nameless = await page.evaluate("""() => Array.from(document.querySelectorAll("section, article"))
      .filter(el => !el.querySelector("h2, h3")?.textContent.trim()).map(el => el.id)""")
    assert nameless == []
    levels = await page.evaluate(
        "() => Array.from(document.querySelectorAll('h1, h2, h3'), el => Number(el.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert await page.evaluate(
        "() => Array.from(document.querySelectorAll('[tabindex]')).every(el => el.tabIndex <= 0)"
    )
    assert await page.evaluate(
        "() => Array.from(document.querySelectorAll('canvas'))"
        ".every(el => el.closest('[role=img][aria-label], [aria-hidden=true]'))"
    )
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.textContent") == "Chat"


async def test_still_where_motion_is_not_wanted(stand: Stand, page: Page) -> None:
    await page.emulate_media(reduced_motion="reduce")
    await opened(page, stand)
    moving = await page.evaluate("""() => Array.from(document.querySelectorAll("*"))
      .filter(el => getComputedStyle(el).transitionDuration !== "0s" || getComputedStyle(el).animationName !== "none")
      .map(el => el.outerHTML.slice(0, 80))""")
    assert moving == []


def _luminance(colour: str) -> float:
    """The relative luminance of `#rrggbb`, as WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(color: str, other: str) -> float:
    low, high = sorted((_luminance(color), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_colours_stand_out(dark: bool) -> None:
    sheet = files("aioserver.faces").joinpath("assets", "theme.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", sheet, re.DOTALL)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", blocks[dark]))

    for background in ("background", "panel"):
        for text in (
            "text",
            "muted",
            "accent-text",
            "good-text",
            "warning-text",
            "bad-text",
            "neutral-text",
        ):
            assert _contrast(colours[text], colours[background]) >= 4.5, (text, background)
        for mark in ("accent", "good", "warning", "bad", "neutral"):
            assert _contrast(colours[mark], colours[background]) >= 3, (mark, background)
    for tone in ("good", "warning", "bad", "neutral"):
        for text in ("text", "muted", f"{tone}-text"):
            assert _contrast(colours[text], colours[f"{tone}-soft"]) >= 4.5, (text, tone)
        assert _contrast(colours[tone], colours[f"{tone}-soft"]) >= 3, tone

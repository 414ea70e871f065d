"""The numbers of the dashboard: how they are written, and what has been counted lately."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.dashboard import Stand, opened

if TYPE_CHECKING:
    from playwright.async_api import Page

DASH = "\u2013"


async def test_numbers_are_short_and_carry_their_unit(stand: Stand, page: Page) -> None:
    await opened(page, stand)
    said = await page.evaluate("""async () => {
      const { count, rate, seconds, bytes, share } = await import("/assets/dashboard/numbers.js");
      return [
        [0, 1990, 99999, 100000, 1234567, 9e15, null, NaN].map(count),
        [0, 0.01, 0.25, 3, 12.7, 123456].map(rate),
        [0, 0.0001, 0.21, 0.99994, 2.14, 9.97, 119, 121, 7300, 200000, undefined].map(seconds),
        [0, 999, 1024, 268435456, 5e12, 5e18, null].map(bytes),
        [0, 0.126, 2].map(share),
      ].map(said => said.map(one => one.replace("\\u00a0", " ")));
    }""")

    assert said == [
        ["0", "1,990", "99,999", "100K", "1.23M", "9000T", DASH, DASH],
        ["0", "<0.1", "0.3", "3", "13", "123K"],
        ["0 s", "<1 ms", "210 ms", "1.0 s", "2.1 s", "10 s", "119 s", "2 min", "2 h", "2 d", DASH],
        ["0 B", "999 B", "1.0 KiB", "256 MiB", "4.5 TiB", "4.55M TiB", DASH],
        ["0 %", "13 %", "200 %"],
    ]


async def test_all_counts_of_a_young_server_are_of_the_last_minute(
    stand: Stand, page: Page
) -> None:
    await opened(page, stand)
    grown = await page.evaluate("""async () => {
      const { Recent } = await import("/assets/dashboard/recent.js");
      return [[12, 10], [100, 99]].map(([uptime, before]) => {
        const recent = new Recent();
        recent.add({ time: before, uptime: before, rejections: { code: 70 } });
        recent.add({ time: uptime, uptime, rejections: { code: 75 } });
        return recent.growth(60).rejections.code;
      });
    }""")

    # What an older server counted before the page was opened is not known to be recent.
    assert grown == [75, 5]

"""The numbers of the dashboard: how they are written, and what has been counted lately."""

from __future__ import annotations

from typing import TYPE_CHECKING

from playwright.async_api import expect

from tests.support.dashboard import Stand, group, opened

if TYPE_CHECKING:
    from playwright.async_api import Page

DASH = "\u2013"


async def test_each_group_has_a_row_and_each_member_a_cell(stand: Stand, page: Page) -> None:
    await opened(page, stand)
    section = page.locator("#groups")
    await expect(section).to_be_hidden()

    members = (("gpu1", "well"), ("gpu2", "cooling"), ("gpu3", "dead"))
    qwen = group(*members, waiting=3, oldest_wait=1.5, cached_share=0.62)
    qwen["members"][0] |= {"in_flight": 8, "limit": 8}
    stand.say(groups={"fast": group(("gpu1", "well")), "qwen": qwen}, active_group="qwen")
    rows = section.locator("tbody tr")
    await expect(rows).to_have_count(2)
    await expect(rows.nth(1).locator("th")).to_have_text("qwen active")
    cells = [
        text.replace("\u00a0", " ") for text in await rows.nth(1).locator("li").all_inner_texts()
    ]
    assert [" ".join(cell.split()) for cell in cells] == [
        "gpu1 8 of 8, full",
        "gpu2 2 of 8, cools down",
        "gpu3 2 of 8, dead",
    ]
    tones = [
        await cell.get_attribute("data-tone") for cell in await rows.nth(1).locator("li").all()
    ]
    assert tones == ["warning", "warning", "bad"]
    await expect(rows.nth(1).locator("td").nth(1)).to_have_text("3, oldest 1.5\u00a0s")
    await expect(rows.nth(1).locator("td").nth(2)).to_have_text("62\u00a0%")
    await expect(page.locator("#groups-summary")).to_be_empty()

    # One that has gone, a member less, and nobody who can start anything.
    stand.say(groups={"qwen": group(("gpu2", "cooling"), ("gpu3", "dead"))})
    await expect(rows).to_have_count(1)
    await expect(rows.nth(0).locator("li")).to_have_count(2)
    await expect(page.locator("#groups-summary")).to_have_text(
        "1 without a member that can start anything"
    )
    await expect(rows.nth(0).locator("td").nth(2)).to_have_text("\u2013")

    many = {f"g{number}": group(("gpu1", "well")) for number in range(60)}
    stand.say(groups=many)
    await expect(rows).to_have_count(50)
    await expect(page.locator("#groups-summary")).to_have_text("the first 50 of 60")


async def test_lost_caches_are_shown_by_cause_with_the_three_worst_regions(
    stand: Stand, page: Page
) -> None:
    await opened(page, stand)
    section = page.locator("#losses")
    await expect(section).to_be_hidden()

    regions = {"tools[7]": 10, "messages[3]": 31200, "system[0]": 4000, "messages[9]": 9}
    stand.say(
        cache_losses={"last_hour": {"evicted": 500, "changed": 35219}, "regions": regions},
    )

    rows = section.locator("tbody tr")
    await expect(rows).to_have_text(["changed35,219", "evicted500"])
    await expect(page.locator("#losses-summary")).to_have_text(
        "first difference: messages[3] 31,200, system[0] 4,000, tools[7] 10"
    )
    stand.say(cache_losses={"last_hour": {}, "regions": {}})
    await expect(section).to_be_hidden()


async def test_each_caller_has_a_row_with_what_it_has_spent(stand: Stand, page: Page) -> None:
    await opened(page, stand)
    section = page.locator("#callers")
    await expect(section).to_be_hidden()

    day = {"limit": 50_000, "used": 40_000, "reserved": 6_000, "remaining": 4_000, "reset": 9.0}
    minute = {"limit": 9_000, "used": 0, "reserved": 0, "remaining": 8_000, "reset": 0.0}
    budgets = {"tokens_per_day": day, "tokens_per_minute": minute}
    month = {"limit": 60_000, "used": 60_000, "reserved": 0, "remaining": 0, "reset": 9.0}
    key = {"running": 2, "limit": 20, "waiting": 0, "queue_size": 9, "budgets": {}}
    keys = {
        "quiet": {**key, "tokens_today": 7},
        "job": {**key, "tokens_today": 9, "budgets": {**budgets, "tokens_per_month": month}},
        "<b>web": {**key, "waiting": 3, "tokens_today": 46_000, "budgets": budgets},
    }
    stand.say(keys=keys)
    rows = section.locator("tbody tr")
    await expect(rows).to_have_count(3)
    first, spent, quiet = [
        [cell.replace("\u00a0", " ") for cell in await row.locator("th, td").all_inner_texts()]
        for row in await rows.all()
    ]
    assert first == ["<b>web", "46,000", "92 % of 50,000 a day", "8,000", "2 of 20", "3"]
    assert spent == ["job", "9", "100 % of 60,000 a month", "8,000", "2 of 20", "0"]
    assert quiet == ["quiet", "7", DASH, DASH, "2 of 20", "0"]

    stand.say(keys={f"k{number}": {**key, "tokens_today": number} for number in range(60)})
    await expect(rows).to_have_count(50)
    await expect(page.locator("#callers-summary")).to_have_text("the first 50 of 60")


async def test_numbers_are_short_and_carry_their_unit(blank: Page) -> None:
    children = await blank.evaluate("""async () => {
      const { count, rate, seconds, bytes, share } = await import("/assets/dashboard/numbers.js");
      return [
        [0, 1990, 99999, 100000, 1234567, 9e15, null, NaN].map(count),
        [0, 0.01, 0.25, 3, 12.7, 123456].map(rate),
        [0, 0.0001, 0.21, 0.99994, 2.14, 9.97, 119, 121, 7300, 200000, undefined].map(seconds),
        [0, 999, 1024, 268435456, 5e12, 5e18, null].map(bytes),
        [0, 0.126, 2].map(share),
      ].map(said => said.map(one => one.replace("\\u00a0", " ")));
    }""")

    assert children == [
        ["0", "1,990", "99,999", "100K", "1.23M", "9000T", DASH, DASH],
        ["0", "<0.1", "0.3", "3", "13", "123K"],
        ["0 s", "<1 ms", "210 ms", "1.0 s", "2.1 s", "10 s", "119 s", "2 min", "2 h", "2 d", DASH],
        ["0 B", "999 B", "1.0 KiB", "256 MiB", "4.5 TiB", "4.55M TiB", DASH],
        ["0 %", "13 %", "200 %"],
    ]


async def test_all_counts_of_a_young_server_are_of_the_last_minute(blank: Page) -> None:
    grown = await blank.evaluate("""async () => {
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


async def test_each_instance_has_a_row_with_its_share(stand: Stand, page: Page) -> None:
    share = {
        "connections": 30,
        "connections_limit": 55,
        "running": 12,
        "tokens_per_second": 400.2,
        "lag_max": 0.004,
        "cpu": 0.63,
        "rss_bytes": 1 << 26,
        "uptime": 90.0,
    }
    await opened(page, stand)
    section = page.locator("#instances")
    await expect(section).to_be_hidden()

    stand.say(instances={"host-1-a": share, "host-2-b": None})
    rows = section.locator("tbody tr")
    await expect(rows).to_have_count(2)
    cells = [
        text.replace("\u00a0", " ")
        for text in await rows.nth(0).locator("th, td").all_text_contents()
    ]
    assert cells == ["host-1-a", "30 of 55", "12", "400", "4 ms", "63 %", "64 MiB", "90 s"]
    await expect(rows.nth(1)).to_contain_text("does not answer")
    await expect(page.locator("#instances-summary")).to_have_text(
        "2 together, of which 1 does not answer"
    )

    former = [
        {"answers": 2, "longest": 241.0, "until": 1e9},
        {"answers": 1, "longest": 5.0, "until": 2},
    ]
    stand.say(instances={"host-1-a": share}, former=former)
    await expect(page.locator("#instances-summary")).to_contain_text(
        "3 answers still run in 2 former processes, longest 4\u00a0min, until"
    )

    stand.say(instances={"host-2-b": share})
    await expect(rows).to_have_count(1)
    await expect(rows.nth(0)).to_contain_text("host-2-b")

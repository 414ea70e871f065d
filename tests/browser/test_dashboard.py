"""The dashboard in a browser: it shows what the server sends, and notices when the server sends
nothing more.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from playwright.async_api import expect

from tests.support.dashboard import (
    OPEN,
    TOKEN,
    Stand,
    card,
    opened,
    provider,
    shown,
    verdict,
)

if TYPE_CHECKING:
    from playwright.async_api import Page

    from tests.support.server import RunningServer

DEAD: dict[str, Any] = {
    "kind": "dead",
    "word": "Dead",
    "since": 0.0,
    "text": "groq cannot be reached: 57 of 60 attempts failed in the last minute",
    "detail": "It began 42 s ago; it is tried again in 3 s; no fallback is set",
    "advice": "Check that groq runs.",
    "severity": "error",
}
VERDICT: dict[str, Any] = {
    "level": "error",
    "state": "trouble",
    "word": "Dead",
    "text": DEAD["text"],
    "detail": "It began 42 s ago. 250 requests wait for groq, the longest for 8.2 s.",
    "advice": "Check that groq runs.",
    "about": "groq",
}
DASH = "\u2013"


async def test_the_numbers_move_with_the_events(stand: Stand, page: Page) -> None:
    await opened(page, stand)
    await expect(shown(page, "connections.active")).to_have_text("0")

    stand.say(
        connections__active=42,
        connections__active_by_face={"websocket": 30, "sse": 11, "openai": 1},
        first_token=TOKEN,
        tokens_per_second=812.4,
        rejections__server_at_capacity=7,
        requests__outcomes__ok=1990,
        streams__bytes=134217728,
        process__rss_bytes=52428800,
        providers__groq__in_flight=12,
        providers__groq__requests=999,
    )

    await expect(shown(page, "connections.active")).to_have_text("42")
    await expect(page.locator("[data-list='connections.active_by_face']")).to_have_text(
        "30 WebSocket, 11 SSE, 1 OpenAI"
    )
    await expect(shown(page, "first_token.p50")).to_have_text("210 ms")
    await expect(shown(page, "tokens_per_second")).to_have_text("812")
    await expect(
        page.locator("[data-counters=rejections] tr[data-code=server_at_capacity]")
    ).to_have_text("server at capacity77")
    await expect(
        page.locator("[data-counters='requests.outcomes'] tr[data-code=ok] td").last
    ).to_have_text("1,990")
    await expect(shown(page, "streams.bytes")).to_have_text("128 MiB")
    await expect(shown(page, "process.rss_bytes")).to_have_text("50 MiB")
    await expect(card(page, "groq").locator("[data-show=in_flight]")).to_have_text("12")
    await expect(card(page, "groq").locator(".condition b")).to_have_text("Working")
    width = (
        "el => Math.round(el.getBoundingClientRect().width / el.parentElement.clientWidth * 100)"
    )
    fill = page.locator("[data-bar='connections.active'] i")
    await page.wait_for_function(
        f"() => ({width})(document.querySelector(\"[data-bar='connections.active'] i\")) === 42"
    )
    assert await fill.evaluate(width) == 42


VERDICTS = {
    "open": ("ok", "circle", "good"),
    "busy": ("warning", "triangle", "warning"),
    "full": ("warning", "square", "warning"),
    "rejecting": ("error", "octagon", "bad"),
    "trouble": ("error", "diamond", "bad"),
    "closed": ("error", "square", "bad"),
}


async def test_the_verdict_is_the_servers_by_word_shape_and_colour_and_its_states_are_spoken(
    stand: Stand, page: Page
) -> None:
    await opened(page, stand)
    await verdict(page, "Open", "Room for 100 more")
    await expect(page.locator("#verdict-advice")).to_be_hidden()
    spoken = page.locator("#announcer")
    await expect(spoken).to_have_text("Open. Room for 100 more")
    stand.say(verdict={**OPEN, "text": "Room for 97 more"})
    await verdict(page, "Open", "Room for 97 more")
    await expect(spoken).to_have_text("Open. Room for 100 more")
    for state, (level, shape, tone) in VERDICTS.items():
        word = f"Dead {state}"

        stand.say(verdict={**VERDICT, "state": state, "level": level, "word": word})

        await verdict(page, word, VERDICT["text"])
        await expect(spoken).to_have_text(f"{word}. {VERDICT['text']}")
        await expect(page.locator("#verdict-detail")).to_have_text(VERDICT["detail"])
        await expect(page.locator("#verdict-advice")).to_have_text(f"To do {VERDICT['advice']}")
        await expect(page.locator("#verdict > .mark")).to_have_attribute("data-shape", shape)
        assert word in await page.title()
        colours = await page.evaluate(
            """tone => {
          const root = getComputedStyle(document.documentElement);
          const mine = getComputedStyle(document.getElementById("verdict"));
          return [mine.getPropertyValue("--tone"), root.getPropertyValue(`--${tone}`)];
        }""",
            tone,
        )
        assert colours[0] == colours[1], state
    assert await page.locator("[aria-live], [role=status], [role=alert]").count() == 1


async def test_a_page_that_opens_shows_the_last_ten_minutes(stand: Stand, page: Page) -> None:
    now = time.time()
    stand.past = {
        "interval": 1.0,
        "time": [now - 600 + second for second in range(600)],
        "series": {
            name: [float(offset % 98) for offset in range(600)]
            for name in ("active", "waiting", "rejected_per_second", "requests_per_second")
        }
        | {"tokens_per_second": [7e6] * 600, "lag_max": [0.01] * 600}
        | {name: [None] * 300 + [0.5] * 300 for name in ("first_token_p50", "first_token_p95")},
        "providers": {"groq": {"in_flight": [5] * 600, "waiting": [0] * 600}},
        "incidents": [
            {
                "time": now - 60 + number,
                "kind": "breaker",
                "severity": "error",
                "text": f"breaker {number}",
                "provider": "groq",
            }
            for number in range(3)
        ],
    }
    await opened(page, stand)

    connections = page.get_by_role("img", name=re.compile("^Connections over 10 minutes"))
    await expect(connections).to_have_attribute("aria-label", re.compile("active .* highest 97;"))
    tokens = page.get_by_role("img", name=re.compile("^Tokens a second"))
    await expect(tokens).to_have_attribute("aria-label", re.compile("highest 7.00M"))
    assert await page.locator("#charts canvas").count() == 6
    drawn = """el => {
      const { width, height } = el;
      return el.toDataURL() !== Object.assign(document.createElement("canvas"), { width, height }).toDataURL();
    }"""
    for canvas in await page.locator("#charts canvas, .card canvas").all():
        await canvas.scroll_into_view_if_needed()
        await page.wait_for_function(drawn, arg=await canvas.element_handle())
    texts = await page.locator("#incident-list p").all_inner_texts()
    assert texts == [f"groq: breaker {number}" for number in (2, 1, 0)]


async def test_the_charts_follow_the_pointer_and_the_scheme(stand: Stand, page: Page) -> None:
    stand.say(connections__active=3)
    now = time.time()
    stand.past.update(
        time=[now - 300, now - 299],
        series={"active": [42, 42], "lag_max": [0.0, 0.0]},
    )
    await opened(page, stand)
    value = page.locator("#charts figure").first.locator(".legend b").first
    await expect(value).to_have_text("3")

    plot = page.locator("#charts figure").first.locator(".u-over")
    await plot.scroll_into_view_if_needed()
    box = await plot.bounding_box()
    assert box
    await page.mouse.move(box["x"] + 1, box["y"] + 20)
    await expect(value).to_have_text("42")
    times = await page.locator("#charts [role=img]").evaluate_all(
        "all => all.map(el => el.dataset.time)"
    )
    assert len(set(times)) == 1  # one pointer for all charts
    assert times[0]

    await page.emulate_media(color_scheme="dark")
    await page.mouse.move(1, 1)
    await expect(value).to_have_text("3")
    assert await page.locator("#charts canvas").count() == 6


async def test_an_incident_is_put_on_top(stand: Stand, page: Page) -> None:
    await opened(page, stand)
    await expect(page.locator("#incident-list li")).to_have_text(
        ["There was no incident in the last ten minutes."]
    )

    stand.happen("12 connections refused in 1 s")
    stand.happen("groq: breaker opened", "error", "groq")

    await expect(page.locator("#incident-list p")).to_have_text(
        ["groq: breaker opened", "12 connections refused in 1 s"]
    )
    first = page.locator("#incident-list li").first
    await expect(first.locator("b")).to_have_text("error")
    await expect(first.locator(".mark")).to_have_attribute("data-shape", "diamond")


async def test_an_absent_value_is_not_shown_null_is_a_dash_and_an_old_one_is_old(
    stand: Stand, page: Page
) -> None:
    stand.say(process=dict.fromkeys(("open_fds", "max_fds", "rss_bytes", "tasks", "cpu")))
    await opened(page, stand)

    await expect(shown(page, "process.rss_bytes")).to_have_text(DASH)
    await expect(shown(page, "first_token.p50")).to_have_text(DASH)
    for late in ("trouble", "cooling", "retries"):
        await expect(card(page, "groq").locator(f"[data-needs={late}]")).to_be_hidden()

    stand.say(
        providers__groq__retries=3,
        providers__groq__failovers=2,
        providers__groq__pace={"per_minute": 3500, "left": 12, "cooling": 0.0},
    )
    await expect(card(page, "groq").locator("[data-show='pace.per_minute']")).to_have_text("3,500")
    for late in ("state", "pace", "retries"):
        await expect(card(page, "groq").locator(f"[data-needs={late}]")).to_be_visible()
    await expect(card(page, "groq").locator("[data-needs=retries]")).to_have_text(
        re.compile(r"retries\s*3\s+and 2 failovers")
    )
    await expect(card(page, "groq").locator("[data-needs=cooling]")).to_be_hidden()

    stand.say(first_token={**TOKEN, "age": 0.4})
    await expect(shown(page, "first_token.p50")).not_to_have_text(DASH)
    under = page.locator("[data-needs=first_token].under")
    await expect(page.locator("[data-needs=stale]")).to_be_hidden()

    stand.say(first_token={**TOKEN, "age": 13.2})
    await expect(under).to_have_text("answers in the last minute: 57, the newest 13 s ago")


async def test_a_card_says_what_is_wrong_and_when_its_provider_is_asked(
    stand: Stand, page: Page
) -> None:
    await opened(page, stand)
    asked = card(page, "groq").locator("[data-show=asked]")
    mark = card(page, "groq").locator(".mark")
    await expect(asked).to_have_text("as usual")

    stand.say(providers__groq__trouble={**DEAD, "kind": "silent", "word": "Stalled"})
    await expect(card(page, "groq").locator(".trouble")).to_have_text(DEAD["text"])
    await expect(card(page, "groq").locator(".condition b")).to_have_text("Stalled")
    await expect(mark).to_have_attribute("data-tone", "bad")
    await expect(asked).to_have_text("as usual")

    stand.say(
        providers__groq__state="sick",
        providers__groq__trouble={**DEAD, "kind": "sick", "word": "Sick", "severity": "warning"},
        providers__groq__trial={"interval": 4.0, "row": 1, "needed": 3},
    )
    trials = card(page, "groq").locator("small[data-needs=trial]")
    await expect(mark).to_have_attribute("data-tone", "warning")
    await expect(asked).to_have_text("as usual")  # there is no other
    await expect(trials).to_be_hidden()

    stand.say(fallbacks=["other"])
    await expect(asked).to_have_text("after the others")
    await expect(trials).to_have_text(re.compile(r"trials 4\ss apart,\s+1 of\s+3 good in a row"))

    stand.say(providers__groq__state="well", providers__groq__trial=None)
    await expect(trials).to_be_hidden()

    budget = card(page, "groq").locator("[data-needs=retry_budget]")
    await expect(budget).to_be_hidden()

    stand.say(
        providers__groq__state="dead",
        providers__groq__next_try=2.5,
        providers__groq__retry_budget={"used": 4, "limit": 10, "refused": 7},
        providers__groq__silent={"longest": 6.2, "stalled": 3, "unanswered": 1, "under_way": 5},
    )

    await expect(budget).to_have_text(re.compile(r"retry budget\s*4\s+of 10 in 10 s, 7 refused"))
    state = card(page, "groq").locator("[data-needs=state]")
    await expect(state).to_have_text(
        re.compile(r"is asked\s*for trials only\s+next try in 2\.5\ss")
    )
    await expect(card(page, "groq").locator("[data-needs=silent]")).to_have_text(
        re.compile(r"silent for\s*6\.2\ss\s+now, 4 of\s+5 answers stalled")
    )


async def test_providers_come_and_go_and_of_many_those_in_trouble_come_first(
    stand: Stand, page: Page
) -> None:
    await opened(page, stand)
    stand.say(providers__other=provider(requests=5), providers__spare=provider(usable=False))

    await expect(card(page, "other")).to_be_visible()
    await expect(page.locator("#unused")).to_have_text(
        "Without a request so far: spare (not usable)"
    )

    del stand.stats["providers"]["other"], stand.stats["providers"]["spare"]
    stand.say()
    await expect(card(page, "other")).to_have_count(0)
    await expect(page.locator("#unused")).to_be_hidden()

    many = {f"p{offset:02}": provider(requests=10, in_flight=offset % 20) for offset in range(100)}
    many["p77"].update(waiting=9, oldest_wait=1.5, in_flight=20)
    many["p88"]["trouble"] = {**DEAD, "text": "p88 is dead"}
    stand.say(providers=many)

    await expect(page.locator(".card")).to_have_count(12)
    await expect(page.locator(".card h3").first).to_have_text("p88")
    await expect(page.locator(".card h3").nth(1)).to_have_text("p77")
    await expect(page.locator("#providers-summary")).to_have_text(
        "1 dead, 1 queueing, 93 working, 5 idle"
    )

    await page.get_by_role("button", name="Show all 100").click()
    await expect(page.locator(".card")).to_have_count(100)
    await page.get_by_role("button", name="Show 12").click()
    await expect(page.locator(".card")).to_have_count(12)


async def test_text_of_the_server_stays_text(stand: Stand, page: Page) -> None:
    name = "<img src=x onerror=document.title='run'>"
    stand.say(
        providers={name: provider(active=True, model="<b>m</b>")},
        rejections={"<i>code</i>": 3},
    )
    await opened(page, stand)
    stand.happen("<script>document.title='run'</script>")

    await expect(page.locator("#incident-list p")).to_have_text(
        "<script>document.title='run'</script>"
    )
    await expect(page.locator(".card h3")).to_have_text(name)
    await expect(page.locator("[data-counters=rejections] tbody th")).to_have_text("<i>code</i>")
    assert "run" not in (await page.title()).split()


async def test_a_real_server_feeds_it(server: RunningServer, page: Page) -> None:
    # On a busy machine the server's loop may have been late: then the verdict says that, too.
    word = re.compile("Open|Slow")
    await page.goto(server.base + "/dashboard")
    await verdict(page, word, re.compile("^Room for 50 more"))

    async with server.connect():
        await verdict(page, word, re.compile("^Room for 49 more"))
        await expect(shown(page, "connections.active")).to_have_text("1")
    await verdict(page, word, re.compile("^Room for 50 more"))

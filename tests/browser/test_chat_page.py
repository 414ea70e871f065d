"""The chat page in a browser: nothing of an answer is lost or doubled, and a person knows what to
do.
"""

from __future__ import annotations

import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from playwright.async_api import expect

from aioserver.errors import ServerShutdown
from tests.support.chat import cancel, chat, to_end
from tests.support.chat_page import (
    ManualProvider,
    answer,
    ask,
    box,
    connected,
    cut,
    enter,
    is_now,
    lose,
    model_answer,
    shows,
    status,
)
from tests.support.server import HTTP_CLIENT, QUICK, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import ClientWebSocketResponse
    from playwright.async_api import Page, WebSocketRoute

    from tests.support.server import RunningServer


STALLED = Behaviour(ttft=0, interval=0, stall_after=5)
ONE_PLACE = {
    "chat.websocket.concurrency.max_connections": 1,
    "chat.websocket.concurrency.connection_queue_size": 1,
}
ONE_REQUEST = {"llm.providers.sim.http_client.concurrent_requests": 1}


def choosing(*models: str, **changes: Any) -> dict[str, Any]:
    """The changes that make these models available."""
    return {"llm.providers.sim.models": list(models), **changes}


# Asking and reading.


async def test_an_answer_is_shown_as_it_comes(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    await enter(page, await make_server(**provider.changes))

    await ask(page, "Hello")
    provider.say("One", " two,\n\n")
    await shows(page, "One two,\n\n")
    await is_now(page, "running")
    provider.say("  three")
    provider.finish()

    await is_now(page, "complete")
    await shows(page, "One two,\n\n  three")
    await expect(status(page)).to_have_text("manual · manual-model")
    await expect(page.get_by_text("Hello", exact=True).last).to_be_visible()
    assert await page.title() == "aioserver chat"
    assert provider.requests == 1


async def test_chat_is_written_and_stopped_by_keys_and_by_a_button(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(STALLED)
    await enter(page, server)

    await expect(box(page)).to_be_focused()
    await box(page).press_sequentially("one")
    await box(page).press("Shift+Enter")
    await box(page).press_sequentially("two")
    await box(page).press("Enter")
    await expect(answer(page).locator(".text")).not_to_be_empty()
    await page.keyboard.press("Escape")

    await is_now(page, "stopped")
    await expect(status(page)).to_have_text("Stopped")
    await expect(answer(page).get_by_role("button", name="Ask again")).to_be_hidden()
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert server.simulator.bodies[-1]["messages"][-1]["content"] == "one\ntwo"
    await server.simulator.until(lambda stats: stats.aborted == 1)

    await ask(page, "Hello")
    await expect(page.get_by_role("article")).to_have_count(2)
    await expect(answer(page).locator(".text")).not_to_be_empty()
    await page.get_by_role("button", name="Stop").click()

    await is_now(page, "stopped")
    await server.simulator.until(lambda stats: stats.aborted == 2)
    await expect(answer(page).get_by_role("button", name="Copy")).to_be_visible()


async def test_reasoning_and_tool_calls_are_folded(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    await enter(page, await make_server(**provider.changes))
    await ask(page, "Hello")

    provider.delta(reasoning_content="Let me ")
    provider.delta(reasoning_content="think.")
    provider.delta(
        tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]
    )
    provider.delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a":'}}])
    provider.delta(tool_calls=[{"index": 0, "function": {"arguments": " 1}"}}])
    provider.say("Done.")
    provider.finish()

    await shows(page, "Done.")
    for name, text in (("Reasoning", "Let me think."), ("Tool calls", 'f({"a": 1})')):
        inside = answer(page).get_by_text(text, exact=True)
        await expect(inside).to_be_hidden()
        await answer(page).get_by_text(name, exact=True).click()
        await expect(inside).to_be_visible()


async def test_no_index_of_a_tool_call_breaks_the_page(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    odd: list[Any] = [
        "__proto__",
        "length",
        "constructor",
        4294967295,
        -1,
        1.5,
        True,
        {},
        [0],
        None,
    ]
    await enter(page, await make_server(**provider.changes))
    await ask(page, "Hello")

    provider.delta(tool_calls=[{"index": 3, "function": {"name": "last", "arguments": "{}"}}])
    for index in odd:
        call = {"index": index, "function": {"name": "odd", "arguments": "{}"}}
        provider.delta(tool_calls=[call])
    provider.delta(tool_calls=[None, "x", {"index": 1}, {"index": 2, "function": {"name": {}}}])
    provider.delta(tool_calls=[{"index": 1, "function": {"name": "first", "arguments": "{}"}}])
    provider.say("Done.")
    provider.finish("constructor")
    await shows(page, "Done.")
    await is_now(page, "complete")

    await expect(status(page)).to_have_text("manual · manual-model")
    calls = answer(page).locator(".tools p")
    await expect(calls).to_contain_text("first({})")
    await expect(calls).to_contain_text("last({})")
    made = await page.evaluate("[[].name, [].arguments, ({}).name, [].length]")
    assert made == [None, None, None, 0]
    await page.reload()
    await shows(page, "Done.")
    await expect(calls).to_contain_text("last({})")


async def test_text_is_text_and_a_fence_makes_code(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    await enter(page, await make_server(**provider.changes))
    await ask(page, "<b>bold</b>")

    provider.say("<img src=x onerror=alert(1)>\n\n``", "`py\nif a <", " b:\n    c\n``", "`\n\nSo.")
    provider.finish()

    await is_now(page, "complete")
    assert await answer(page).locator(".text > p").all_text_contents() == [
        "<img src=x onerror=alert(1)>",
        "So.",
    ]
    assert await answer(page).locator("pre").text_content() == "if a < b:\n    c"
    await expect(page.locator("#turns img, #turns b")).to_have_count(0)


async def test_an_answer_is_copied_as_the_model_wrote_it_and_code_by_itself(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await enter(page, await make_server(**provider.changes))
    await ask(page, "Hello")
    code = "".join(f"\tline {number}\n" for number in range(1000))
    text = f"a\n```py\n{code}```\nb"
    provider.say(text)
    provider.finish()
    await is_now(page, "complete")

    await answer(page).get_by_role("button", name="Copy", exact=True).click()

    await expect(answer(page).get_by_role("button", name="Copied")).to_be_visible()
    assert await page.evaluate("navigator.clipboard.readText()") == text

    await answer(page).get_by_role("button", name="Copy this code").click()

    await expect(answer(page).locator(".code > button[data-copied]")).to_have_count(1)
    assert await page.evaluate("navigator.clipboard.readText()") == code.removesuffix("\n")
    await expect(answer(page).locator(".code > button[data-copied]")).to_have_count(0)


async def test_enter_while_an_answer_runs_says_why_nothing_is_sent(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(STALLED)
    await page.context.clock.install()
    await enter(page, server)
    other = await page.context.new_page()
    await enter(other, server)
    await ask(page, "Hello")
    await expect(answer(page).locator(".text")).not_to_be_empty()
    await other.get_by_role("button", name="Hello").first.click()
    await expect(answer(other).locator(".text")).not_to_be_empty()
    keys = "Enter sends, Shift+Enter starts a new line, Esc stops the answer."

    for window in (page, other):
        await window.bring_to_front()
        await expect(window.locator("#shortcuts")).to_have_text(keys)
        await box(window).fill("more")
        await box(window).press("Enter")

        told = "An answer is still running. Escape stops it."
        await expect(window.locator("#shortcuts")).to_have_text(told)
        await expect(window.locator("#announcer")).to_have_text(told)
        await expect(box(window)).to_have_value("more")
        await page.context.clock.fast_forward(5_000)  # milliseconds
        await expect(window.locator("#shortcuts")).to_have_text(keys)
    assert server.simulator.stats().requests == 1
    await other.close()
    await page.keyboard.press("Escape")


async def test_a_screen_reader_hears_the_whole_and_not_each_piece(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    await enter(page, await make_server(**provider.changes))
    voice = page.locator("#announcer")
    await expect(voice).to_have_attribute("aria-live", "polite")
    await ask(page, "Hello")

    provider.say("One", " two")
    await shows(page, "One two")
    await expect(voice).to_have_text("The answer starts.")
    await expect(answer(page)).to_have_attribute("aria-busy", "true")
    provider.finish()

    await expect(voice).to_have_text("One two")
    await expect(answer(page)).to_have_attribute("aria-busy", "false")


# Coming back.


async def test_a_reload_loses_and_doubles_nothing(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    await enter(page, await make_server(**provider.changes))
    await ask(page, "Hello")
    provider.delta(reasoning_content="Let me think.")
    provider.say("One", " two")
    await shows(page, "One two")

    for number in range(2):
        provider.say(f" {number}")  # on its way, seen before the reload or after it
        await page.reload()
        await shows(page, "One two" + "".join(f" {n}" for n in range(number + 1)))
    provider.say(" end")
    provider.finish()

    await is_now(page, "complete")
    await shows(page, "One two 0 1 end")
    assert await answer(page).locator(".reasoning p").text_content() == "Let me think."
    await page.reload()
    await shows(page, "One two 0 1 end")
    assert provider.requests == 1


async def test_a_long_answer_survives_cuts_and_reloads(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0, tokens=400))
    whole = await model_answer(server, "Hello")
    server.simulator.behaviour = Behaviour(ttft=0, interval=0.005, tokens=400)
    await enter(page, server)
    await ask(page, "Hello")

    for size in range(240, 1440, 240):
        await page.wait_for_function(
            "(size) => document.querySelector('.answer .text')?.textContent.length > size",
            arg=size,
        )
        if size % 480:
            cut(server)
        else:
            await page.reload()

    await is_now(page, "complete")
    await shows(page, whole)
    assert server.simulator.stats().requests == 2  # one of them asked for the whole


async def test_a_reload_before_the_first_word_asks_nobody_again(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    await enter(page, await make_server(**provider.changes))
    await ask(page, "Hello")
    await until(lambda: provider.requests == 1)

    await page.reload()
    await connected(page)
    provider.say("One")
    provider.finish()

    await is_now(page, "complete")
    await shows(page, "One")
    assert provider.requests == 1


async def test_a_message_written_without_a_connection_is_sent_later(
    server: RunningServer, page: Page
) -> None:
    await enter(page, server)
    await lose(page, server)

    await ask(page, "Hello")
    await expect(status(page)).to_have_text("It is sent when the connection is back")
    assert server.simulator.stats().requests == 0
    await page.context.set_offline(False)

    await is_now(page, "complete")
    await expect(page.get_by_text("The connection to the server is lost.")).to_be_hidden()
    assert server.simulator.stats().requests == 1


async def test_a_restart_is_reported_and_survived(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    server = await make_server(**provider.changes)
    await page.add_init_script("Math.random = () => 0.99")  # the next try is in 10 s
    await enter(page, server)
    await ask(page, "Hello")
    provider.say("One")
    await shows(page, "One")

    sockets: list[Any] = [*server.context.sockets]
    for socket in sockets:
        socket.end(ServerShutdown("the server is stopping"))
    await expect(page.get_by_text("The server restarts.")).to_be_visible()
    await expect(status(page)).to_have_text("It continues when the connection is back")
    await page.get_by_role("button", name="Try now").click()
    provider.say(" two")
    provider.finish()

    await is_now(page, "complete")
    await shows(page, "One two")
    assert provider.requests == 1


async def test_a_connection_that_died_in_silence_is_found_out(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    server = await make_server(**provider.changes)
    dead = False

    def between(here: WebSocketRoute) -> None:
        there = here.connect_to_server()
        here.on_message(lambda message: None if dead else there.send(message))
        there.on_message(lambda message: None if dead else here.send(message))

    await page.route_web_socket(re.compile("/ws/"), between)
    await page.clock.install()
    await enter(page, server)
    await ask(page, "Hello")
    provider.say("One")
    await shows(page, "One")

    dead = True
    for _ in range(3):
        await page.clock.fast_forward(15_000)  # milliseconds
    await expect(page.get_by_text("The connection to the server is lost.")).to_be_visible()
    dead = False
    provider.say(" two")
    provider.finish()
    await page.clock.fast_forward(16_000)  # the try that began in between is given up
    await page.clock.fast_forward(2_000)

    await is_now(page, "complete")
    await shows(page, "One two")
    assert provider.requests == 1


async def test_an_answer_that_is_gone_says_so_and_is_asked_again(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(STALLED, **{"chat.streams.resume_window": 0.1})
    await enter(page, server)
    await ask(page, "Hello")
    await is_now(page, "running")
    await server.simulator.until(lambda stats: stats.requests == 1)  # else leaving ends it before
    await page.goto("about:blank")
    await server.nothing_held()
    await until(lambda: server.owners.streams.stats().finished == 0)
    server.simulator.behaviour = QUICK

    await enter(page, server)
    await page.get_by_role("button", name="Hello").first.click()
    await is_now(page, "failed")
    await expect(answer(page)).to_contain_text("the server has lost the rest of this answer")
    await answer(page).get_by_role("button", name="Ask again").click()

    await is_now(page, "complete")
    await expect(answer(page).locator(".fault")).to_be_hidden()
    await expect(answer(page).locator(".text")).to_contain_text("You wrote “Hello”")
    assert server.simulator.stats().requests == 2


# Waiting.


async def test_a_full_server_is_shown_and_tried_again(make_server: MakeServer, page: Page) -> None:
    server = await make_server(**ONE_PLACE, **{"chat.websocket.concurrency.queue_timeout": 0})
    await page.set_viewport_size({"width": 390, "height": 844})
    await page.clock.install()
    async with server.connect() as inside:
        await page.goto(server.base + "/")
        await expect(page.get_by_text("The server is at capacity")).to_be_visible()
        await expect(page.get_by_text("max_connections=1 reached")).to_be_visible()
        await expect(page.get_by_text("The next attempt is in")).to_be_in_viewport(ratio=1)
        # The server has said when.
        await expect(page.get_by_role("button", name="Try now")).to_be_hidden()
        await ask(page, "Hello")
        await expect(status(page)).to_have_text("It is sent when the connection is back")
        await inside.close()
    await until(lambda: server.held()["places"] == 0)

    await page.clock.fast_forward(10_000)  # milliseconds

    await connected(page)
    await is_now(page, "complete")
    assert server.simulator.stats().requests == 1


async def test_the_position_in_the_queue_of_the_server_is_shown(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(**ONE_PLACE, **{"chat.websocket.concurrency.queue_timeout": 50})
    async with server.connect():
        await page.goto(server.base + "/")
        await expect(
            page.get_by_text("In the connection queue: position 1, about 1 s")
        ).to_be_visible()
        await ask(page, "Hello")
        await expect(status(page)).to_have_text("In the connection queue: position 1, about 1 s")

    await is_now(page, "complete")
    assert server.simulator.stats().requests == 1


@asynccontextmanager
async def busy_provider(
    make_server: MakeServer,
) -> AsyncIterator[tuple[RunningServer, ClientWebSocketResponse]]:
    """A server whose provider has one place, and the client whose request "r1" has taken it."""
    server = await make_server(STALLED, **ONE_REQUEST)
    async with server.connect() as other:
        await other.send_json(chat("r1"))
        await server.simulator.until(lambda stats: stats.requests == 1)
        yield server, other


async def test_a_reloaded_page_goes_on_waiting_for_the_provider(
    make_server: MakeServer, page: Page
) -> None:
    async with busy_provider(make_server) as (server, other):
        await enter(page, server)
        await ask(page, "Hello")
        await expect(status(page)).to_have_text("In the provider's queue: position 1, about 1 s")
        await page.reload()
        await connected(page)
        await expect(status(page)).to_contain_text("queue: position 1")
        server.simulator.behaviour = QUICK
        await other.send_json(cancel("r1"))

        await is_now(page, "complete")
    await shows(page, await model_answer(server, "Hello"))
    assert server.simulator.stats().requests == 3


async def test_a_waiting_message_is_stopped_before_it_is_sent(
    make_server: MakeServer, page: Page
) -> None:
    async with busy_provider(make_server) as (server, other):
        await enter(page, server)
        await ask(page, "Hello")
        await expect(status(page)).to_contain_text("queue: position 1")

        await page.keyboard.press("Escape")

        await expect(status(page)).to_have_text("Stopped before it started")
        await other.send_json(cancel("r1"))
    assert server.simulator.stats().requests == 1


# Faults.


async def test_a_fault_says_what_to_do(make_server: MakeServer, page: Page) -> None:
    advice = {
        "fault-status-401": "The operator of this server has to correct this",
        "fault-status-400": "Change it, or choose another model above.",
        "fault-status-500": "Ask again; if the error persists",
    }
    server = await make_server(**choosing(*advice))
    await enter(page, server)
    for number, (model, text) in enumerate(advice.items(), 1):
        await page.get_by_label("Model").select_option(label=model)
        await ask(page, "Hello")

        await expect(page.get_by_role("article")).to_have_count(number)
        await is_now(page, "failed")
        await expect(answer(page).locator(".fault")).to_contain_text(text)
        await page.get_by_label("Model").select_option(label="sim-model")
        await server.forgive()  # else it would be left alone for some time
        await answer(page).get_by_role("button", name="Ask again").click()

        await is_now(page, "complete")
        await expect(answer(page).locator(".fault")).to_be_hidden()


async def test_text_from_before_a_fault_stays(make_server: MakeServer, page: Page) -> None:
    server = await make_server(**choosing("fault-cut-5"))
    whole = await model_answer(server, "Hello")
    await enter(page, server)
    await page.get_by_label("Model").select_option(label="fault-cut-5")

    await ask(page, "Hello")

    await is_now(page, "failed")
    text = await answer(page).locator(".text").text_content()
    assert text
    assert whole.startswith(text)
    await expect(answer(page).locator(".fault")).to_contain_text("Ask again")


async def test_a_gap_is_reported_and_not_skipped(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    server = await make_server(**provider.changes, **{"chat.streams.max_stream_bytes": 4096})
    await enter(page, server)
    await ask(page, "Hello")
    provider.say("One")
    await shows(page, "One")
    await lose(page, server)

    provider.say(*(f" {number:0100}" for number in range(200)))
    provider.finish()
    await until(lambda: server.owners.streams.stats().running == 0)
    await page.context.set_offline(False)

    await is_now(page, "failed")
    await expect(answer(page).locator(".fault")).to_contain_text("is no longer kept")
    await shows(page, "One")


async def test_a_number_that_is_taken_is_asked_under_another(
    server: RunningServer, page: Page
) -> None:
    await enter(page, server)
    await lose(page, server)
    await ask(page, "Hello")
    await is_now(page, "unsent")
    stored = await page.evaluate(
        "Object.entries(localStorage).find(([key]) => /tion/.test(key))[1]"
    )
    async with server.connect() as other:
        await other.send_json(chat(json.loads(stored)["turns"][0]["id"], "Something else"))
        await to_end(other)

    await page.context.set_offline(False)
    await is_now(page, "failed")
    await expect(answer(page).locator(".fault")).to_contain_text("under a new id")
    await answer(page).get_by_role("button", name="Ask again").click()

    await is_now(page, "complete")
    await shows(page, await model_answer(server, "Hello"))


async def test_a_question_that_found_no_room_is_asked_again_by_itself(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    server = await make_server(**provider.changes, **{"chat.streams.max_kept_bytes": 4096})
    await page.clock.install()
    await enter(page, server)
    await ask(page, "apples")
    provider.say("a" * 8192)
    await shows(page, "a" * 8192)

    await page.get_by_role("button", name="New conversation").click()
    await ask(page, "pears")
    await expect(status(page)).to_contain_text("The server is at capacity. The next attempt is in")
    provider.finish()
    provider.say("Pears.")
    provider.finish()
    await until(lambda: server.owners.streams.stats().running == 0)
    await page.clock.fast_forward(91_000)  # milliseconds

    await is_now(page, "complete")
    await shows(page, "Pears.")
    assert provider.requests == 2


async def test_a_connection_that_was_closed_unused_is_opened_by_a_question(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(
        **{"chat.websocket.idle_timeout": 0.05, "chat.websocket.ping_interval": 0.2}
    )
    await page.goto(server.base + "/")
    await expect(page.get_by_text("since it was not used")).to_be_visible()

    await ask(page, "Hello")

    await is_now(page, "complete")
    await shows(page, await model_answer(server, "Hello"))


async def test_a_message_over_the_limit_is_reported(make_server: MakeServer, page: Page) -> None:
    server = await make_server(**{"chat.websocket.max_message_size": 1000})
    await enter(page, server)

    await ask(page, "x" * 2000)

    await is_now(page, "failed")
    await expect(answer(page).locator(".fault")).to_contain_text("Shorten the message.")
    await ask(page, "Hello")  # opens the connection again
    await expect(page.get_by_role("article")).to_have_count(2)
    await is_now(page, "complete")


# Conversations and choices.


async def test_conversations_keep_apart(server: RunningServer, page: Page) -> None:
    await enter(page, server)
    await ask(page, "apples")
    await is_now(page, "complete")
    await page.get_by_role("button", name="New conversation").click()
    await expect(page.get_by_role("article")).to_have_count(0)
    await ask(page, "pears")
    await is_now(page, "complete")
    assert [message["content"] for message in server.simulator.bodies[-1]["messages"]] == ["pears"]

    await page.reload()
    await expect(page.get_by_role("article")).to_have_count(1)
    await shows(page, await model_answer(server, "pears"))
    await page.get_by_role("button", name="apples").first.click()
    await expect(page.locator(".question")).to_contain_text("apples")
    await connected(page)
    await ask(page, "more")
    await expect(page.get_by_role("article")).to_have_count(2)
    await is_now(page, "complete")

    asked = server.simulator.bodies[-1]["messages"]
    assert [message["content"] for message in asked if message["role"] == "user"] == [
        "apples",
        "more",
    ]


async def test_answers_of_two_conversations_run_at_once(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(STALLED)
    await enter(page, server)
    await ask(page, "apples")
    await is_now(page, "running")
    await page.get_by_role("button", name="New conversation").click()
    await ask(page, "pears")
    await is_now(page, "running")
    apples = page.get_by_role("button", name=re.compile("^apples.*answering"))
    await expect(apples).to_be_visible()

    await page.keyboard.press("Escape")
    await is_now(page, "stopped")
    await apples.click()
    await is_now(page, "running")
    await page.keyboard.press("Escape")
    await is_now(page, "stopped")


async def test_a_conversation_is_deleted_by_two_presses(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(STALLED)
    await enter(page, server)
    await ask(page, "apples")
    await is_now(page, "running")

    await page.get_by_role("button", name="Delete: apples").click()
    await page.get_by_role("button", name="Really delete: apples").click()

    await expect(page.get_by_role("button", name="apples")).to_have_count(0)
    await expect(page.get_by_role("article")).to_have_count(0)
    await server.simulator.until(lambda stats: stats.aborted == 1)
    await page.reload()
    await connected(page)
    await expect(page.get_by_role("button", name="apples")).to_have_count(0)


async def test_the_chosen_model_is_asked_and_remembered(
    make_server: MakeServer, page: Page
) -> None:
    second = {"base_url": "http://127.0.0.1:9/v1", "model": "gone", "http_client": {**HTTP_CLIENT}}
    keyless = {
        **second,
        "http_client": {**HTTP_CLIENT},  # not the same: YAML would write an alias
        "api_key_env": "A_KEY_THAT_NOBODY_HAS",
    }
    server = await make_server(
        **choosing("bigger"), **{"llm.providers.second": second, "llm.providers.third": keyless}
    )
    await enter(page, server)
    model = page.get_by_label("Model")
    assert await model.locator("option").all_text_contents() == [
        "Default (sim)",
        "gone",
        "sim-model",
        "bigger",
    ]
    assert await model.locator("optgroup").evaluate_all(
        "(groups) => groups.map((one) => [one.label, one.disabled])"
    ) == [["second", False], ["sim", False], ["third (not set up)", True]]

    await model.select_option(label="bigger")
    await ask(page, "Hello")
    await is_now(page, "complete")
    await expect(status(page)).to_contain_text("sim · bigger")
    assert server.simulator.bodies[-1]["model"] == "bigger"
    await page.reload()
    await connected(page)
    await expect(model).to_have_value("sim/bigger")
    await model.select_option(label="Default (sim)")
    await ask(page, "Hello")

    await expect(page.get_by_role("article")).to_have_count(2)
    await is_now(page, "complete")
    assert server.simulator.bodies[-1]["model"] == "sim-model"


async def test_two_windows_show_the_same(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    server = await make_server(**provider.changes)
    await enter(page, server)
    other = await page.context.new_page()
    await enter(other, server)

    await ask(page, "Hello")
    await other.get_by_role("button", name="Hello").first.click()
    provider.say("One")
    await shows(page, "One")
    await shows(other, "One")
    provider.finish()
    await is_now(page, "complete")
    await is_now(other, "complete")
    assert provider.requests == 1
    await other.get_by_role("button", name="Delete: Hello").click()
    await other.get_by_role("button", name="Really delete: Hello").click()

    await expect(page.get_by_role("article")).to_have_count(0)


async def test_old_conversations_make_room(server: RunningServer, page: Page) -> None:
    await enter(page, server)
    await page.evaluate(
        """() => {
            for (let n = 0; n < 50; n++) {
                const turns = [{ id: `r${n}`, question: `old ${n}`, state: "complete" }];
                const one = JSON.stringify({ id: `c${n}`, used: n + 1, turns });
                localStorage.setItem(`aioserver.chat.conversation.c${n}`, one);
            }
            localStorage.setItem("aioserver.chat.conversation.broken", "{");
        }"""
    )
    await page.reload()
    await connected(page)
    await expect(page.locator("#conversations li")).to_have_count(50)

    await ask(page, "Hello")

    await is_now(page, "complete")
    await expect(page.locator("#conversations li")).to_have_count(50)
    await expect(page.get_by_text("old 0", exact=True)).to_have_count(0)
    await expect(page.get_by_text("old 49", exact=True)).to_have_count(1)


async def test_a_long_conversation_keeps_its_newest_turns(
    server: RunningServer, page: Page
) -> None:
    await enter(page, server)
    await page.evaluate(
        """() => {
            const turns = Array.from({ length: 100 }, (_, n) =>
                ({ id: `r${n}`, question: `old ${n}`, state: "complete" }));
            const one = JSON.stringify({ id: "c", used: 1, turns });
            localStorage.setItem("aioserver.chat.conversation.c", one);
        }"""
    )
    await page.reload()
    await connected(page)
    await page.get_by_role("button", name="old 0").first.click()
    await expect(page.get_by_role("article")).to_have_count(100)

    await ask(page, "Hello")

    await is_now(page, "complete")
    await expect(page.get_by_role("article")).to_have_count(100)
    await expect(page.locator(".question").first).to_contain_text("old 1")


async def test_a_long_answer_does_not_drive_out_the_others(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    await enter(page, await make_server(**provider.changes))
    for name in ("apples", "pears"):
        await page.get_by_role("button", name="New conversation").click()
        await ask(page, name)
        provider.say(name)
        provider.finish()
        await is_now(page, "complete")
    long = "0123456789" * 30_000

    await ask(page, "Hello")
    for start in range(0, len(long), 10_000):
        provider.say(long[start : start + 10_000])
    await shows(page, long)
    await page.reload()
    await shows(page, long)  # read again from its start
    provider.finish()
    await is_now(page, "complete")
    await page.reload()

    await expect(status(page)).to_contain_text("stored only the beginning")
    kept = await answer(page).locator(".text").text_content()
    assert kept
    assert long.startswith(kept)
    await expect(page.locator("#conversations li")).to_have_count(2)
    assert provider.requests == 3


async def test_a_full_storage_is_reported_and_stops_nothing(
    server: RunningServer, page: Page
) -> None:
    await enter(page, server)
    await page.evaluate(
        """() => {
            const old = { id: "c", used: 1, turns: [{ id: "r", question: "old", state: "complete" }] };
            localStorage.setItem("aioserver.chat.conversation.c", JSON.stringify(old));
            for (let size = 1 << 22; size >= 1; size >>= 1) {
                for (let n = 0; ; n++) {
                    try { localStorage.setItem(`full.${size}.${n}`, "x".repeat(size)); }
                    catch { break; }
                }
            }
        }"""
    )
    await page.reload()
    await connected(page)

    await ask(page, "Hello")

    await is_now(page, "complete")
    await shows(page, await model_answer(server, "Hello"))
    await expect(page.locator("#notice")).to_contain_text("The browser's storage is full")
    await expect(page.get_by_role("button", name="old")).to_have_count(0)


# Looks.


async def test_nothing_is_wider_than_the_window(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    await enter(page, await make_server(**provider.changes))
    await ask(page, "x" * 500)
    provider.say("y" * 500, "\n```\n", "z" * 500, "\n```\n")
    provider.finish()
    await is_now(page, "complete")

    for width in (320, 390, 1280, 2560):
        await page.set_viewport_size({"width": width, "height": 844})
        menu = page.get_by_role("button", name="Conversations")
        if width < 400:
            await expect(page.get_by_role("button", name="New conversation")).to_be_hidden()
            await menu.click()
            await expect(page.get_by_role("button", name="New conversation")).to_be_visible()
            await page.keyboard.press("Escape")
            await expect(menu).to_be_focused()
        for element in ("document.documentElement", "document.getElementById('conversation')"):
            assert await page.evaluate(f"{element}.scrollWidth <= {element}.clientWidth"), width


async def test_the_page_is_light_or_dark_as_the_system_is(
    server: RunningServer, page: Page
) -> None:
    await enter(page, server)
    colours = {}
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        colours[scheme] = await page.evaluate(
            """() => ["backgroundColor", "color"].map((name) =>
                getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3)
                    .reduce((sum, one) => sum + Number(one), 0))"""
        )

    for scheme, (paper, ink) in colours.items():
        assert (paper > ink) is (scheme == "light")
        assert abs(paper - ink) > 500  # of 765

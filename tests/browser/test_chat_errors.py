"""What the chat page does by itself after an error: it waits and asks again, or reads on, and says
so.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import expect

from tests.support.chat import cancel, chat
from tests.support.chat_page import (
    ManualProvider,
    answer,
    ask,
    connected,
    enter,
    is_now,
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
ONE_OF_EACH = {
    "llm.providers.sim.http_client": {
        **HTTP_CLIENT,
        "concurrent_requests": 1,
        "queue_size": 1,
    }
}
LATER = re.compile(r"^The provider has too much to do\. The next attempt is in \d+ s$")


@contextlib.asynccontextmanager
async def full(server: RunningServer) -> AsyncIterator[ClientWebSocketResponse]:
    """The only place of the provider and of its queue are taken, by the questions r1 and r2 on
    this socket.
    """
    async with server.connect() as other:
        for name in ("r1", "r2"):
            await other.send_json(chat(name))
        await until(lambda: server.held()["sim waiting"] == 1)
        yield other


async def test_a_question_that_found_a_full_queue_is_asked_again_by_itself(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(STALLED, **ONE_OF_EACH)
    await page.clock.install()
    async with full(server) as other:
        await enter(page, server)
        await ask(page, "Hello")
        await expect(status(page)).to_have_text(LATER)
        await is_now(page, "unsent")

        server.simulator.behaviour = QUICK
        for name in ("r1", "r2"):
            await other.send_json(cancel(name))
        await until(lambda: server.held()["sim waiting"] == server.held()["sim places"] == 0)
        await page.clock.fast_forward(91_000)  # milliseconds

        await is_now(page, "complete")
    await shows(page, await model_answer(server, "Hello"))


async def test_it_is_asked_again_a_few_times_and_can_be_stopped(
    make_server: MakeServer, page: Page
) -> None:
    server = await make_server(STALLED, **ONE_OF_EACH)
    await page.clock.install()
    async with full(server):
        await enter(page, server)
        rejections = server.context.metrics.rejections["provider_queue_full"]
        await ask(page, "Hello")
        for tries in range(1, 6):
            await until(lambda tries=tries: rejections.value == tries)  # type: ignore[misc]
            await expect(status(page)).to_have_text(LATER)
            await page.clock.fast_forward(91_000)  # milliseconds

        await is_now(page, "failed")
        await expect(answer(page).locator(".fault")).to_contain_text("then ask again, or choose")
        assert rejections.value == 6

        await answer(page).get_by_role("button", name="Ask again").click()
        await expect(status(page)).to_have_text(LATER)
        await page.keyboard.press("Escape")
        await expect(status(page)).to_have_text("Stopped before it started")
        await page.clock.fast_forward(91_000)
        assert rejections.value == 7


# The id of a ping behind a resume.
BEHIND = "behind"


class Dropping:
    """Stands between the page and the server: it drops the page as a slow reader when it is
    told.
    """

    def __init__(self) -> None:
        self.dropped = False
        self.resumes: list[int] = []
        self.pongs = 0
        # The resumes that the server has read: it answers them with nothing while nothing is new.
        self.resumed = 0
        self._id: str | None = None

    async def install(self, page: Page) -> None:
        await page.route_web_socket(re.compile("/ws/"), self._between)

    def _between(self, here: WebSocketRoute) -> None:
        self._here = here
        there = here.connect_to_server()

        def to_server(message: str | bytes) -> None:
            frame = json.loads(message)
            # A ping has no id, and on a busy machine there may be one before the drop.
            self._id = frame.get("request_id", self._id)
            if frame["action"] == "resume":
                self.resumes.append(frame["payload"]["last_event_id"])
                self.dropped = self.dropped and len(self.resumes) < self.until
            there.send(message)
            if frame["action"] == "resume":
                there.send(json.dumps({"action": "ping", "request_id": BEHIND}))

        here.on_message(to_server)

        def to_page(message: str | bytes) -> None:
            # The socket lives: its pings are answered.
            frame = json.loads(message)
            pong = frame["status"] == "pong"
            if pong and frame.get("request_id") == BEHIND:
                self.resumed += 1
                return
            self.pongs += pong
            if pong or not self.dropped:
                here.send(message)

        there.on_message(to_page)

    def drop(self, until: int = 1) -> None:
        """Send `slow_client`, and no event more until the resume with this number."""
        self.dropped, self.until = True, until
        fault: dict[str, Any] = {"error": "too slow", "code": "slow_client", "retryable": True}
        frame = {"request_id": self._id, "status": "error", "chunk": fault}
        self._here.send(json.dumps(frame))


async def test_a_page_that_was_dropped_as_slow_reads_on(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    between = Dropping()
    await between.install(page)
    await enter(page, await make_server(**provider.changes))
    await ask(page, "Hello")
    provider.say("One", " two")
    await shows(page, "One two")

    between.drop()
    await until(lambda: between.resumed == 1)
    provider.say(" three")
    provider.finish()

    await is_now(page, "complete")
    await shows(page, "One two three")
    assert (provider.requests, len(between.resumes)) == (1, 1)


@pytest.mark.parametrize("pings", [0, 1])
async def test_a_page_that_is_dropped_again_with_nothing_read_says_so(
    make_server: MakeServer, provider: ManualProvider, page: Page, pings: int
) -> None:
    """On a busy machine the page has sent a ping before."""
    between = Dropping()
    await between.install(page)
    await page.clock.install()
    await enter(page, await make_server(**provider.changes))
    await ask(page, "Hello")
    provider.say("One")
    await shows(page, "One")

    async def ping() -> None:
        for _ in range(pings):
            before = between.pongs
            await page.clock.fast_forward(15_500)  # milliseconds
            await until(lambda before=before: between.pongs > before)  # type: ignore[misc]

    await ping()
    between.drop(until=2)
    await until(lambda: len(between.resumes) == 1)
    await ping()
    between.drop(until=2)

    await is_now(page, "failed")
    await expect(answer(page).locator(".fault")).to_contain_text("could not read as fast")
    await shows(page, "One")
    assert len(between.resumes) == 1
    await connected(page)


async def test_tool_calls_of_an_answer_are_bounded(
    make_server: MakeServer, provider: ManualProvider, page: Page
) -> None:
    await enter(page, await make_server(**provider.changes))
    await ask(page, "Hello")

    for index in range(130):
        name = {"name": f"f{index}", "arguments": "{}"}
        provider.delta(tool_calls=[{"index": index, "function": name}])
    provider.say("Done.")
    provider.finish()
    await shows(page, "Done.")

    calls = answer(page).locator(".tools p")
    await expect(calls).to_contain_text("f127({})")
    await expect(calls).not_to_contain_text("f128")


async def test_a_code_of_any_name_is_an_unknown_one(server: RunningServer, page: Page) -> None:
    await enter(page, server)
    said = await page.evaluate(
        """async () => {
          const { advice, waitingFor } = await import("/assets/chat/errors.js");
          return ["constructor", "unheard_of"].map((code) => [advice({ code }), waitingFor(code)]);
        }"""
    )

    assert said[0] == said[1]

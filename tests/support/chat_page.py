"""The chat page as a person uses it, and a provider that answers what the test says."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

import orjson
from playwright.async_api import expect

from tests.support.scripted_provider import DONE, EVENT_STREAM, LAST_CHUNK, ScriptedProvider, chunk
from tests.support.server import provider_entry
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from types import TracebackType

    from playwright.async_api import Locator, Page

    from tests.support.scripted_provider import Peer
    from tests.support.server import RunningServer

expect.set_options(timeout=1000 * LATE)  # milliseconds


class ManualProvider:
    """The provider `manual`: it answers what the test says, when the test says it."""

    def __init__(self) -> None:
        self.requests = 0
        self._events: asyncio.Queue[bytes] = asyncio.Queue()
        self._played = ScriptedProvider(self._play)

    @property
    def changes(self) -> dict[str, Any]:
        """The changes that make a server ask it."""
        # A browser on a busy machine may take seconds for what a test waits for before it says
        # more.
        entry = provider_entry(self._played.url, "manual-model", read_timeout=60.0)
        return {"llm.active": "manual", "llm.providers.manual": entry}

    def say(self, *words: str) -> None:
        """Send *words* as pieces of the text."""
        for word in words:
            self.delta(content=word)

    def delta(self, **delta: Any) -> None:
        """Send a piece of any kind."""
        self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def finish(self, reason: str = "stop") -> None:
        """End the answer."""
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        self._events.put_nowait(b"")

    def _event(self, data: dict[str, Any]) -> None:
        self._events.put_nowait(b"data: %b\n\n" % orjson.dumps(data))

    async def _play(self, peer: Peer) -> None:
        while True:
            await peer.request()
            self.requests += 1
            await peer.send(EVENT_STREAM)
            while event := await self._events.get():
                await peer.send(chunk(event))
            await peer.send(chunk(DONE) + LAST_CHUNK)

    async def __aenter__(self) -> Self:
        await self._played.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._played.__aexit__(kind, exc, trace)


async def enter(page: Page, server: RunningServer) -> None:
    """Open the page and wait until the server has admitted its WebSocket."""
    await page.goto(server.base + "/")
    await connected(page)


async def connected(page: Page) -> None:
    await expect(page.locator("#state")).to_have_text("Connected")


def box(page: Page) -> Locator:
    """The text box."""
    return page.get_by_role("textbox", name="Message")


async def ask(page: Page, text: str) -> None:
    await box(page).fill(text)
    await box(page).press("Enter")


def answer(page: Page) -> Locator:
    """The last answer."""
    return page.get_by_role("article").last


async def shows(page: Page, text: str) -> None:
    """Wait until the last answer looks as the whole of *text* does, which is Markdown."""
    await page.wait_for_function(
        """async (text) => {
            if (window.expected?.text !== text) {
                const { MarkdownView } = await import("/assets/chat/markdown.js");
                const whole = document.createElement("div");
                new MarkdownView(whole).update(text);
                window.expected = { text, html: whole.innerHTML };
            }
            const shown = [...document.querySelectorAll(".answer .text")].at(-1);
            return shown?.innerHTML === window.expected.html;
        }""",
        arg=text,
        timeout=1000 * LATE,
    )


async def is_now(page: Page, state: str) -> None:
    """Wait until the last answer is in *state*."""
    await expect(answer(page)).to_have_attribute("data-state", state)


def status(page: Page) -> Locator:
    """The line under the last answer."""
    return answer(page).locator(".status")


async def model_answer(server: RunningServer, text: str) -> str:
    """The simulated model's answer to *text*. This sends it a request."""
    body = {"messages": [{"role": "user", "content": text}]}
    async with server.session.post(server.v1 + "/chat/completions", json=body) as response:
        return str((await response.json())["choices"][0]["message"]["content"])


def cut(server: RunningServer) -> None:
    """Cut every connection of the clients, as a broken cable would."""
    for connection in server.http_server.connections:
        if connection.transport is not None:
            connection.transport.abort()


async def lose(page: Page, server: RunningServer) -> None:
    """Cut the connection, until the context of *page* is no longer offline."""
    await page.context.set_offline(True)
    cut(server)
    await expect(page.get_by_text("The connection to the server is lost.")).to_be_visible()

"""A stand-in for a server whose dashboard is opened: its `/events` says what a test wants seen."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web
from playwright.async_api import expect

from aioserver.faces import pages

if TYPE_CHECKING:
    import re
    from collections.abc import AsyncIterator

    from playwright.async_api import Locator, Page

CODES = ("server_at_capacity", "provider_queue_full", "rate_limit_exceeded", "server_shutdown")
OUTCOMES = (
    "ok",
    "client_error",
    "rejected",
    "provider_error",
    "client_left",
    "slow_client",
    "cancelled",
    "internal_error",
)
FAULTS = ("connect_error", "timeout", "http_429", "http_4xx", "http_5xx", "tls", "cancelled")
# What the face would use of a server: its pages need nothing of it.
NO_CONTEXT: Any = None
TOKEN = {"p50": 0.21, "p95": 0.5, "p99": 0.9, "count": 57, "age": 0.4}
OPEN = {
    "level": "ok",
    "state": "open",
    "word": "Open",
    "text": "Room for 100 more",
    "detail": "0 of 100 places are taken, 0 answers under way.",
    "advice": "",
    "about": "",
}
QUEUEING = {
    "providers__groq__in_flight": 20,
    "providers__groq__waiting": 35,
    "providers__groq__oldest_wait": 3.2,
    "providers__groq__requests": 900,
}
CROWDED = {
    "connections__active": 100,
    "connections__waiting": 40,
    "connections__oldest_wait": 2.1,
}


def provider(**changes: Any) -> dict[str, Any]:
    """A provider that was never asked, as `/stats` shows it."""
    return {
        "usable": True,
        "active": False,
        "model": "demo",
        "in_flight": 0,
        "limit": 20,
        "waiting": 0,
        "waiting_by_class": {"interactive": 0, "batch": 0},
        "queue_size": 200,
        "oldest_wait": 0.0,
        "pool": {"open": 0, "idle": 0, "limit": 25, "waiting": 0},
        "requests": 0,
        "faults": dict.fromkeys(FAULTS, 0),
        "pace": {"per_minute": 3500, "left": 25, "cooling": 0.0},
        "state": "well",
        "next_try": None,
        "flagged": False,
        "silent": {"longest": 0.0, "stalled": 0, "unanswered": 0, "under_way": 0},
        "trouble": None,
        "requests_per_second": 0.0,
        "tokens_per_second": 0.0,
        "first_token": None,
        **changes,
    }


def group(*members: tuple[str, str], **changes: Any) -> dict[str, Any]:
    """A group of *members*, providers with their states."""
    return {
        "choose": "least_busy",
        "affinity": "prefix",
        "members": [
            {
                "provider": name,
                "model": f"{name}-model",
                "state": state,
                "in_flight": 2,
                "limit": 8,
                "starts": 12,
            }
            for name, state in members
        ],
        "waiting": 0,
        "oldest_wait": 0.0,
        "held_back": 0,
        "homes": {"home": 0, "other": 0, "new": 0},
        "known_share": None,
        "cached_share": None,
        **changes,
    }


def snapshot() -> dict[str, Any]:
    """The `/stats` of an idle server."""
    return {
        "time": 0.0,
        "name": "aioserver",
        "version": "0.1.0",
        "uptime": 0.0,
        "ready": True,
        "verdict": OPEN,
        "active_provider": "groq",
        "active_group": None,
        "fallbacks": [],
        "connections": {
            "active": 0,
            "limit": 100,
            "waiting": 0,
            "queue_size": 500,
            "oldest_wait": 0.0,
            "active_by_face": {"websocket": 0, "sse": 0, "openai": 0, "other": 0},
            "opened": 0,
            "rejected": 0,
            "rejected_per_second": 0.0,
        },
        "rejections": dict.fromkeys(CODES, 0),
        "requests": {
            "total": 0,
            "per_second": 0.0,
            "running": 0,
            "outcomes": dict.fromkeys(OUTCOMES, 0),
        },
        "bugs": {"total": 0, "last_minute": 0},
        "first_token": None,
        "tokens_per_second": 0.0,
        "streams": {
            "detached": 0,
            "max_detached": 100,
            "finished": 0,
            "responses": 0,
            "held": {"answers": 0, "bytes": 0},
            "bytes": 0,
            "max_bytes": 268435456,
        },
        "history": {"storage": "memory", "waiting": 0, "written": 0, "lost": 0, "trouble": None},
        "slow_clients": 0,
        "providers": {"groq": provider(active=True, model="llama-3.3-70b")},
        "groups": {},
        "keys": {},
        "loop": {"lag": 0.0004, "lag_max": 0.001},
        "process": {
            "open_fds": 40,
            "max_fds": 65536,
            "rss_bytes": 52000000,
            "tasks": 20,
            "cpu": 0.02,
        },
        "watchers": 1,
        "endpoints": {"websocket": "/ws/chat", "sse": "/sse/chat", "openai": "/v1"},
    }


class Stand:
    """Serve the real pages; `/events` sends `stats` at each change and twice a second."""

    def __init__(self) -> None:
        self.stats = snapshot()
        self.past: dict[str, Any] = {
            "interval": 1.0,
            "time": [],
            "series": {},
            "providers": {},
            "incidents": [],
        }
        self.refusal: web.Response | None = None
        # Sends nothing more, and stays connected.
        self.silent = False
        self.port = 0
        self._asked: set[asyncio.Queue[tuple[str, Any] | None]] = set()
        self._started = time.time()
        self._runner: web.AppRunner | None = None

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def watchers(self) -> int:
        return len(self._asked)

    async def open(self) -> None:
        """Listen; after `close` on the same port again."""
        app = web.Application()
        app.add_routes(
            [
                *pages.routes(NO_CONTEXT),
                web.get("/session", _open),
                web.get("/events", self._events),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """End every feed and stop listening."""
        if self._runner:
            for queue in self._asked:
                queue.put_nowait(("end", None))
            await self._runner.cleanup()
        self._runner = None

    def say(self, **changes: Any) -> None:
        """Change the snapshot by path (`connections__active=3`) and send it."""
        for dotted, value in changes.items():
            at = self.stats
            *way, last = dotted.split("__")
            for step in way:
                at = at[step]
            at[last] = value
        for queue in self._asked:
            queue.put_nowait(("stats", copy.deepcopy(self.stats)))

    def happen(self, text: str, severity: str = "warning", name: str | None = None) -> None:
        """Send an incident."""
        incident = {"kind": "dead", "severity": severity, "text": text, "provider": name}
        for queue in self._asked:
            queue.put_nowait(("incident", {"time": time.time(), **incident}))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self.refusal:
            return self.refusal
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._asked.add(queue)
        try:
            await response.write(_event("history", self.past))
            event: tuple[str, Any] = ("stats", copy.deepcopy(self.stats))
            while event[0] != "end":
                if event[0] == "stats":
                    now = time.time()
                    event[1].update(time=now, uptime=now - self._started)
                if not self.silent:
                    await response.write(_event(*event))
                try:
                    event = await asyncio.wait_for(queue.get(), 0.5)
                except TimeoutError:
                    event = ("stats", copy.deepcopy(self.stats))
        finally:
            self._asked.discard(queue)
        return response


async def _open(_request: web.Request) -> web.Response:
    return web.json_response({"key_required": False, "name": None, "admin": False})


def _event(name: str, data: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps(data))


@contextlib.asynccontextmanager
async def standing() -> AsyncIterator[Stand]:
    """Run a stand-in until the end of the block."""
    stand = Stand()
    await stand.open()
    try:
        yield stand
    finally:
        await stand.close()


async def opened(page: Page, stand: Stand) -> None:
    """Open the dashboard and wait for its first snapshot."""
    await page.goto(stand.base + "/dashboard")
    await expect(page.locator("#board")).to_be_visible()


async def verdict(page: Page, word: str | re.Pattern[str], text: str | re.Pattern[str]) -> None:
    """Wait for a verdict, 10 s long: a lost server is noticed after seconds of silence only."""
    await expect(page.locator("#verdict-word")).to_have_text(word)
    await expect(page.locator("#verdict-text")).to_have_text(text)


def shown(page: Page, path: str) -> Locator:
    """The element that shows the server's number at *path*."""
    return page.locator(f"main > #board [data-show='{path}']").first


def card(page: Page, name: str) -> Locator:
    """The card of the provider *name*."""
    return page.locator(f".card[data-provider='{name}']")

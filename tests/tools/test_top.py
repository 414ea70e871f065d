"""The `top` command, against a stand-in that says what `/events` says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from rich.console import Console

from aioserver.tools import remote
from aioserver.tools.top.feed import Feed, LostError, State
from aioserver.tools.top.screen import render
from tests.support.dashboard import group
from tests.support.process import WITHOUT_RICH, run_command
from tests.support.terminal import CTRL_C, terminal
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import RunningServer

STATS: dict[str, Any] = {
    "time": 1764021000.123,
    "name": "aioserver",
    "version": "0.1.0",
    "uptime": 4000.4,
    "ready": True,
    "verdict": {
        "level": "ok",
        "state": "open",
        "word": "Open",
        "text": "Room for 97 more",
        "detail": "3 of 100 places are taken, 5 answers under way.",
        "advice": "",
        "about": "",
    },
    "active_provider": "demo",
    "connections": {
        "active": 3,
        "limit": 100,
        "waiting": 0,
        "queue_size": 500,
        "oldest_wait": 0.0,
        "active_by_face": {"websocket": 2, "sse": 1, "openai": 0},
        "opened": 1234,
        "rejected": 7,
        "rejected_per_second": 0.0,
    },
    "rejections": {"server_at_capacity": 7, "provider_queue_full": 0},
    "requests": {
        "total": 999,
        "per_second": 12.0,
        "running": 5,
        "outcomes": {"ok": 990, "rejected": 7, "provider_error": 0},
    },
    "first_token": {"p50": 0.21, "p95": 0.5, "p99": 0.9, "count": 57},
    "tokens_per_second": 812.0,
    "streams": {
        "detached": 0,
        "max_detached": 100,
        "finished": 12,
        "responses": 3,
        "bytes": 12345,
        "max_bytes": 268435456,
    },
    "history": {"storage": "memory", "waiting": 0, "written": 0, "lost": 0, "trouble": None},
    "slow_clients": 0,
    "providers": {
        "demo": {
            "usable": True,
            "active": True,
            "model": "demo",
            "in_flight": 1,
            "limit": 200,
            "waiting": 0,
            "queue_size": 2000,
            "oldest_wait": 0.0,
            "pool": {"open": 3, "idle": 2, "limit": 250, "waiting": 0},
            "requests": 999,
            "faults": {"connect_error": 0, "http_5xx": 2},
            "requests_per_second": 12.0,
            "tokens_per_second": 812.0,
            "first_token": {"p50": 0.2, "p95": 0.4, "p99": 0.8, "count": 57},
        },
        "a-provider-with-a-long-name": {
            "usable": False,
            "active": False,
            "model": "m",
            "in_flight": 200,
            "limit": 200,
            "waiting": 1999,
            "waiting_by_class": {"interactive": 1, "batch": 1998},
            "queue_size": 2000,
            "oldest_wait": 12.3,
            "pool": {"open": 250, "idle": 0, "limit": 250, "waiting": 0},
            "requests": 5,
            "faults": {},
            "requests_per_second": 0.0,
            "tokens_per_second": 0.0,
            "first_token": None,
            "learned": {"messages": "bridge"},
            "state": "sick",
            "trial": {"interval": 2.0, "row": 1, "needed": 3},
            "pace": {"per_minute": 3500, "left": 1200},
            "retries": 3,
            "retry_budget": {"used": 2, "limit": 10, "refused": 4},
        },
    },
    "loop": {"lag": 0.001, "lag_max": 0.004},
    "process": {"open_fds": 40, "max_fds": None, "rss_bytes": 52000000, "tasks": 20, "cpu": 0.12},
    "watchers": 1,
    "endpoints": {"websocket": "/ws/chat", "sse": "/sse/chat", "openai": "/v1"},
}
INCIDENT = {
    "time": 1764021000.0,
    "kind": "rejections",
    "severity": "warning",
    "text": "12 connections refused in 1 s: server_at_capacity \x1b[2J[bold]",
    "provider": None,
}
HISTORY = {"interval": 1.0, "time": [], "series": {}, "providers": {}, "incidents": [INCIDENT]}

STALLED = {
    "level": "error",
    "state": "trouble",
    "word": "Stalled",
    "text": "demo has said nothing for 6 s in 25 answers",
    "detail": "It began 9 s ago. 250 requests wait for demo, the longest for 8.2 s.",
    "advice": "Look at the log and the load of demo.",
    "about": "demo",
}


def changed(**values: Any) -> dict[str, Any]:
    """STATS with other values, by a path with `__` for each step."""
    stats: dict[str, Any] = json.loads(json.dumps(STATS))
    for path, value in values.items():
        at = stats
        *way, last = path.split("__")
        for step in way:
            at = at[step]
        at[last] = value
    return stats


class StandIn:
    """A stand-in for a server's `/events`; a test may make it refuse, or close."""

    def __init__(self) -> None:
        self.keys: list[str | None] = []
        self.intervals: list[str | None] = []
        self.status = 200
        self.base = ""
        self.closing = asyncio.Event()

    async def events(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("Authorization"))
        self.intervals.append(request.query.get("interval"))
        if self.status != 200:
            error = {"error": {"message": "256 watch already", "code": "too_many"}}
            return web.json_response(error, status=self.status, headers={"Retry-After": "1"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for name, data in (("history", HISTORY), ("stats", STATS), ("stats", STATS)):
            await response.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
        await self.closing.wait()
        return response


@asynccontextmanager
async def standing_in() -> AsyncIterator[StandIn]:
    server = StandIn()
    app = web.Application()
    app.router.add_get("/events", server.events)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.base = f"http://{host}:{port}"
    try:
        yield server
    finally:
        server.closing.set()
        await runner.cleanup()


def drawn(state: State, width: int = 80, **console: Any) -> str:
    shown = Console(width=width, **console)
    with shown.capture() as capture:
        shown.print(render(state))
    return capture.get()


def test_the_picture_has_everything_in_eighty_columns() -> None:
    state = State("http://127.0.0.1:8000")
    state.take(b"history", HISTORY)
    state.take(b"stats", STATS)

    text = drawn(state)

    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    text = " ".join(text.split())  # whatever was wrapped
    for part in (
        "aioserver 0.1.0",
        "up 1 h 6 min",
        "+ Open: Room for 97 more 3 of 100 places are taken, 5 answers under way. connections",
        "3 of 100",
        "0 of 500",
        "websocket 2",
        "*demo",
        "1/200",
        "3/250",
        "1999/2000",
        "12.3s",
        "812",
        "200ms",
        "400ms",
        "http_5xx 2",
        "sick, 1 of 3 trials good in a row, 2.0s apart, 1998 of 1999 in its",
        "queue are batch, messages: bridge, pace",
        "pace 3500 a minute, 1200 now",
        "3 retries",
        "2 of 10 affordable retries in 10 s",
        "4 retries not affordable",
        "server_at_capacity 7",
        "lag 1ms, worst 4ms",
        "40 of - descriptors",
        "50 MiB",
        "12 connections refused in 1 s",
    ):
        assert part in text, part


def test_data_from_the_server_is_shown_as_text() -> None:
    state = State("http://x")
    state.take(b"incident", INCIDENT)

    text = drawn(state, width=120)

    assert "server_at_capacity  [2J[bold]" in text
    assert "\x1b" not in text


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    state = State("http://x")
    state.take(b"stats", changed(verdict=STALLED))

    text = drawn(state, force_terminal=True)

    assert "\x1b[31m" not in text
    assert ";31m" not in text
    assert "x Stalled" in text


def test_a_provider_that_is_only_configured_takes_no_row() -> None:
    unused = {"usable": False, "active": False, "requests": 0, "limit": 25}
    state = State("http://x")
    state.take(b"stats", changed(providers__openai=unused, providers__groq=unused))

    text = drawn(state)

    assert " not usable: openai, groq\n" in text
    assert " 0/25 " not in text


def test_one_of_a_kind_is_named_as_one() -> None:
    state = State("http://x")
    name = "providers__a-provider-with-a-long-name__retries"
    state.take(b"stats", changed(slow_clients=1, process__tasks=1, **{name: 1}))

    text = " ".join(drawn(state).split())

    assert "1 slow client dropped" in text
    assert "12%, 1 task " in text
    assert "1 retry," in text


@pytest.mark.parametrize(("days", "shown"), [(None, False), (20, False), (5.01, True)])
def test_certificate_has_a_line_in_its_last_days(days: float | None, *, shown: bool) -> None:
    expires = None if days is None else time.time() + days * 86400
    state = State("http://x", stats={"tls": {"expires": expires}})

    assert ("certificate" in drawn(state)) == shown
    assert ("in 5 days" in drawn(state)) == shown


def test_a_snapshot_with_nothing_in_it_is_drawn() -> None:
    state = State("http://x")
    state.take(b"stats", {})
    state.take(b"stats", [])

    assert "! Unknown: the server sends no verdict" in drawn(state)


@pytest.mark.parametrize(("level", "mark"), [("ok", "+"), ("warning", "!"), ("error", "x")])
def test_the_verdict_is_the_servers_with_what_is_felt_and_what_to_do(
    level: str, mark: str
) -> None:
    state = State("http://x")
    state.take(b"stats", changed(verdict={**STALLED, "level": level}))

    lines = [line.rstrip() for line in drawn(state, width=120).splitlines()]

    assert lines[1:5] == [
        f"{mark} Stalled: demo has said nothing for 6 s in 25 answers",
        "  It began 9 s ago. 250 requests wait for demo, the longest for 8.2 s.",
        "  To do: Look at the log and the load of demo.",
        "",
    ]


def test_a_verdict_of_another_server_is_text_as_well() -> None:
    state = State("http://x")
    hostile = dict.fromkeys(STALLED, "a\x1b[2J\nb")
    state.take(b"stats", changed(verdict=hostile))

    assert "\x1b" not in drawn(state)
    assert "! a [2J b: a [2J b\n" in "\n".join(map(str.rstrip, drawn(state).splitlines()))


async def test_one_snapshot_is_taken_with_the_key() -> None:
    async with standing_in() as server, remote.session("k") as session:
        state = State(server.base)
        await Feed(session, state, 1.0, lambda: None).first()

        assert state.stats == STATS
        assert list(state.incidents) == [INCIDENT]
        assert server.keys == ["Bearer k"]


async def test_a_real_server_is_drawn(server: RunningServer) -> None:
    async with server.connect() as ws, remote.session(None) as session:
        await ws.send_json({"action": "ping"})
        await ws.receive()
        state = State(server.base)
        pictures = [""]
        follow = Feed(session, state, 1.0, lambda: pictures.append(drawn(state))).follow()
        feed = asyncio.create_task(follow)
        try:
            await until(lambda: "websocket 1" in pictures[-1], 30.0, lambda: pictures[-1])
        finally:
            feed.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await feed

    text = next(picture for picture in pictures if "websocket 1" in picture)
    # On a busy machine this loop may have been late: then that is the verdict.
    assert "+ Open: Room for 49 more" in text or "! Slow: Room for 49 more" in text
    assert "1 of 50" in text
    assert "*sim" in text


async def test_a_server_that_was_lost_is_found_again() -> None:
    async with standing_in() as server, remote.session(None) as session:
        state = State(server.base)
        feed = asyncio.create_task(Feed(session, state, 5.0, lambda: None).follow())
        try:
            await until(lambda: state.stats is not None)

            server.status = 503
            server.closing.set()
            await until(lambda: "256 watch already" in state.problem)
            server.status = 200
            server.closing.clear()
            await until(lambda: not state.problem)
        finally:
            feed.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await feed

        assert set(server.intervals) == {"5"}
        assert len(state.incidents) == 1, "history is told anew, not added"


def test_a_lost_server_is_reported() -> None:
    state = State("http://x")
    state.take(b"stats", STATS)
    state.problem = "Connection refused"

    text = drawn(state, width=200)

    assert "no server for" in text
    assert "Connection refused; next try in 0 s; below are its last numbers" in text


@pytest.mark.parametrize(("status", "kind"), [(503, LostError), (401, remote.Unreachable)])
async def test_a_refusal_is_an_error_with_the_servers_words(
    status: int, kind: type[Exception]
) -> None:
    async with standing_in() as server, remote.session(None) as session:
        server.status = status

        with pytest.raises(kind, match="256 watch already"):
            await Feed(session, State(server.base), 1.0, lambda: None).first()


# As a process.


async def test_without_a_terminal_one_snapshot_is_printed() -> None:
    async with standing_in() as server:
        code, out, err = await run_command("top", server.base)

    assert (code, err) == (0, "")
    assert "+ Open: Room for 97 more" in out
    assert "\x1b" not in out


async def test_a_server_that_is_not_there_is_one_line() -> None:
    code, out, err = await run_command("top", "127.0.0.1:1", "--once")

    assert (code, out) == (1, "")
    assert err == "http://127.0.0.1:1: Connection refused\n"


async def test_without_rich_the_way_to_install_it_is_reported() -> None:
    code, out, err = await run_command("top", program=WITHOUT_RICH)

    assert (code, out) == (2, "")
    assert err == f"{remote.RICH_MISSING}\n"


@pytest.mark.parametrize("key", [CTRL_C, "q", "xxQ"])
async def test_a_terminal_is_drawn_on_until_ctrl_c_or_q(key: str) -> None:
    """The terminal is a real one: the screen must be as it was before."""
    async with (
        standing_in() as server,
        terminal("-m", "aioserver", "top", server.base, lines=40) as shown,
    ):
        await shown.shows("3 of 100")
        shown.type(key)

        assert await shown.ended() == 0
        await until(lambda: "\x1b[?1049l" in shown.seen)
        assert shown.as_before
        assert "Traceback" not in shown.seen


def test_each_instance_has_a_line_with_its_share() -> None:
    share = {
        "connections": 30,
        "connections_limit": 55,
        "running": 12,
        "tokens_per_second": 400.2,
        "cpu": 0.63,
    }
    state = State("http://x")
    state.take(b"stats", changed(instances={"host-1-a": share, "host-2-b": None}))

    text = drawn(state, width=120)

    assert "host-1-a: 30 of 55 connections, 12 answers, 400 tokens/s, CPU 63 %" in text
    assert "host-2-b: does not answer" in text


def test_answers_in_former_processes_have_a_line() -> None:
    state = State("http://localhost:8000")
    former = [
        {"worker": worker, "answers": answers, "longest": longest, "until": 1e9}
        for worker, answers, longest in ((0, 2, 241.0), (1, 1, 5.0))
    ]
    state.take(b"stats", changed(former=former))

    at = time.strftime("%H:%M", time.localtime(1e9))
    line = f"3 answers still run in 2 former processes, longest 4 min, until {at} at the latest"
    assert line in drawn(state, 100)


def test_each_group_has_a_row_with_its_members() -> None:
    members = (("gpu1", "well"), ("gpu2", "key_refused"), ("gpu3[bold]", "sick"))
    groups = {
        "qwen": group(*members, waiting=3, cached_share=0.62),
        **{f"g{number}": group(("gpu1", "well")) for number in range(11)},
    }

    text = drawn(State("http://127.0.0.1:1", stats={**STATS, "groups": groups}))

    assert "gpu1 2/8, gpu2 2/8 key refused, gpu3[bold] 2/8 sick" in " ".join(text.split())
    (row,) = [line for line in text.splitlines() if "qwen" in line]
    assert row.split()[-2:] == ["3", "62%"]
    assert "g8" in text
    assert "g9" not in text
    assert "and 2 groups more" in text
    assert max(map(len, text.splitlines())) <= 80
    # Without groups there is no such part.
    assert "members" not in drawn(State("http://127.0.0.1:1", stats=STATS))


def test_each_caller_has_a_row_with_what_it_has_spent_and_has_left() -> None:
    day = {"limit": 50_000, "used": 40_000, "reserved": 6_000, "remaining": 4_000, "reset": 9.0}
    minute = {"limit": 9_000, "used": 0, "reserved": 0, "remaining": 9_000, "reset": 0.0}
    spent = {"limit": 60_000, "used": 60_000, "reserved": 0, "remaining": 0, "reset": 9.0}
    longer = {"tokens_per_day": day, "tokens_per_month": spent, "tokens_per_week": day}
    key = {"running": 2, "limit": 20, "waiting": 3, "queue_size": 9}
    keys = {
        "quiet": {**key, "waiting": 0, "tokens_today": 0, "budgets": {}},
        "web[bold]": {
            **key,
            "tokens_today": 46_000,
            "budgets": {"tokens_per_day": day, "tokens_per_minute": minute},
        },
        "job": {**key, "tokens_today": 45_000, "budgets": longer},
        **{f"k{n}": {**key, "tokens_today": 1, "budgets": {}} for n in range(10)},
    }

    text = drawn(State("http://127.0.0.1:1", stats={**STATS, "keys": keys}))

    (row,) = [line for line in text.splitlines() if "web[bold]" in line]
    assert row.split() == ["web[bold]", "46,000", "92%", "day", "9,000", "2/20", "3"]
    # Of several periods the one of which most is used is shown.
    (row,) = [line for line in text.splitlines() if "job" in line]
    assert row.split() == ["job", "45,000", "100%", "month", "-", "2/20", "3"]
    # The ones that have spent least are left out.
    assert "quiet" not in text
    assert "and 3 callers more" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "tokens today" not in drawn(State("http://127.0.0.1:1", stats=STATS))

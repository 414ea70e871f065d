"""`/client.js` and its connection: lost, refused, blocked, with a key and with a session, and
servers that go and come.
"""

from __future__ import annotations

import json
import re
import signal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.errors import ServerShutdown
from tests.support.chat_page import ManualProvider, model_answer
from tests.support.client_page import page_elsewhere, run, unwatched
from tests.support.fault_proxy import FaultProxy
from tests.support.keys import key_of, keys_of
from tests.support.process import serving
from tests.support.server import ENDLESS
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import LATE, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from playwright.async_api import Page, WebSocketRoute

    from tests.support.server import MakeServer, RunningServer

PACED = Behaviour(ttft=0, interval=0.01, tokens=30)
ONE_PLACE = {
    "chat.websocket.concurrency.max_connections": 1,
    "chat.websocket.concurrency.connection_queue_size": 1,
}
TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "sse"])
# Begins to read an answer; how it ends is in `outcome`.
BEGIN = """
  Object.assign(window, { text: "", waiting: [] });
  window.client = new aio.Client(a, b);
  window.outcome = read(client.chat("Hello", c ?? {}), (event) => {
    if (event.type === "text") text += event.text;
    if (event.type === "waiting") waiting.push(event);
  });
"""


async def text_is(page: Page, text: str) -> None:
    """Wait until *text* has come."""
    await page.wait_for_function(
        "(wanted) => window.text === wanted", arg=text, timeout=1000 * LATE
    )


async def outcome(page: Page) -> Any:
    """How the answer ended."""
    return await run(page, "return await outcome")


async def played(page: Page, answer: Callable[[WebSocketRoute, dict[str, Any]], None]) -> None:
    """Let *answer* play the server on each WebSocket of *page*, except that pings are answered."""

    def between(here: WebSocketRoute) -> None:
        def take(message: str | bytes) -> None:
            frame = json.loads(message)
            if frame["action"] == "ping":
                here.send(json.dumps({"request_id": None, "status": "pong", "chunk": {}}))
            else:
                answer(here, frame)

        here.on_message(take)

    await page.route_web_socket(re.compile("/ws/"), between)


def say(here: WebSocketRoute, asked: dict[str, Any], status: str, **fields: Any) -> None:
    """Send a frame of the answer to *asked*."""
    frame = {"request_id": asked["request_id"], "status": status, "chunk": {}, **fields}
    here.send(json.dumps(frame))


# Restarts.


@TRANSPORTS
async def test_an_answer_goes_on_after_a_restart_that_keeps_it(
    make_server: MakeServer, page: Page, transport: str
) -> None:
    async with ManualProvider() as provider:
        server = await make_server(**provider.changes)
        async with FaultProxy(server.port, lambda: None) as proxy, unwatched(page) as mine:
            await mine.add_init_script("Math.random = () => 0")  # it comes back after 1 s
            async with page_elsewhere(mine, server.base):
                await run(mine, BEGIN, proxy.url, {"transport": transport})
                provider.say("One")
                await text_is(mine, "One")
                sockets: list[Any] = [*server.context.sockets]
                for socket in sockets:
                    socket.end(ServerShutdown("the server is stopping"))
                if transport == "sse":
                    await proxy.cut()
                provider.say(" two")
                provider.finish()
                result = await outcome(mine)

    assert (result["text"], result["error"]) == ("One two", None)
    assert provider.requests == 1


async def test_a_server_that_is_killed_and_started_again(tmp_path: Path, page: Page) -> None:
    """The part of a running answer is kept, and a question waits for the next server."""
    file = tmp_path / "config.yaml"
    async with (
        Simulator(ENDLESS) as simulator,
        unwatched(page) as mine,
        serving(file, simulator.base_url) as process,
    ):
        await process.ready()
        async with page_elsewhere(mine, process.base):
            await run(mine, BEGIN, process.base, {})
            await mine.wait_for_function("text.length > 20")
            process.signal(signal.SIGKILL)
            await process.ended()
            await simulator.until(lambda stats: stats.active == 0)
            simulator.behaviour = PACED
            await run(mine, "window.next = read(client.chat('Hello'))")
            same = ("--port", str(process.port))
            async with serving(file, simulator.base_url, *same) as second:
                await second.ready()
                lost, whole = await outcome(mine), await run(mine, "return await next")
    assert lost["error"]["code"] == "stream_not_found"
    assert "the server has lost the rest of this answer" in lost["error"]["message"]
    assert lost["error"]["text"] == lost["text"] != ""
    assert (whole["error"], whole["events"][-1]["type"]) == (None, "complete")
    assert simulator.stats().requests == 2


# A server that is full, or not there.


@TRANSPORTS
async def test_a_full_server_is_asked_again_when_it_says(
    make_server: MakeServer, page: Page, transport: str
) -> None:
    server = await make_server(**ONE_PLACE, **{"chat.websocket.concurrency.queue_timeout": 0})
    async with unwatched(page) as mine:
        await mine.clock.install()
        async with page_elsewhere(mine, server.base):
            async with server.connect():
                await run(mine, BEGIN, server.base, {"transport": transport})
                await mine.wait_for_function("client.state.name === 'lost' || waiting.length > 0")
                state, waiting = await run(mine, "return [client.state, waiting]")
            await until(lambda: server.held()["places"] == 0)
            await mine.clock.fast_forward(90_000)  # milliseconds
            result = await outcome(mine)

    if transport == "websocket":
        assert (state["code"], state["fault"]["code"]) == (1013, "server_at_capacity")
    else:
        assert [event["code"] for event in waiting] == ["server_at_capacity"]
        assert 1 <= waiting[0]["seconds"] <= 70
    assert result["error"] is None
    assert server.simulator.stats().requests == 1


@TRANSPORTS
async def test_the_position_in_the_queue_of_the_server_is_an_event(
    make_server: MakeServer, page: Page, transport: str
) -> None:
    server = await make_server(**ONE_PLACE, **{"chat.websocket.concurrency.queue_timeout": 50})
    async with page_elsewhere(page, server.base):
        async with server.connect():
            await run(page, BEGIN, server.base, {"transport": transport})
            await until(lambda: server.held()["waiting"] == 1)
            if transport == "websocket":
                await page.wait_for_function("client.state.name === 'queued'")
        result = await outcome(page)

    assert result["error"] is None
    if transport == "websocket":
        queued = [event for event in result["events"] if event["type"] == "queued"]
        assert queued[0]["position"] == 1
    assert server.simulator.stats().requests == 1


@TRANSPORTS
async def test_a_server_that_never_comes_back_is_one_error(
    make_server: MakeServer, page: Page, transport: str
) -> None:
    async with ManualProvider() as provider:
        server = await make_server(**provider.changes)
        async with FaultProxy(server.port, lambda: None) as proxy, unwatched(page) as mine:
            async with page_elsewhere(mine, server.base):
                await run(mine, BEGIN, proxy.url, {"transport": transport}, {"deadline": 2})
                provider.say("One")
                await text_is(mine, "One")
                proxy.target = 9  # nothing listens there
                await proxy.cut()
                result = await outcome(mine)
            provider.finish()

    error = result["error"]
    assert (error["code"], error["text"]) == ("deadline_exceeded", "One")
    assert "within 2 s" in error["message"]


# No WebSocket.


async def test_where_no_websocket_opens_answers_come_by_events(
    server: RunningServer, page: Page
) -> None:
    endpoints = "client.endpoints.websocket = '/nothing';"
    async with unwatched(page) as mine, page_elsewhere(mine, server.base):
        result, another = await run(
            mine,
            f"""
            const client = new aio.Client(a);
            {endpoints}
            return [await read(client.chat("Hello")), await read(client.chat("Hello"))];
            """,
            server.base,
        )

    assert (result["error"], another["error"]) == (None, None)
    assert result["text"] == await model_answer(server, "Hello")
    assert server.simulator.stats().requests == 3


async def test_an_event_is_given_out_once_and_a_gap_is_an_error(
    server: RunningServer, page: Page
) -> None:
    extra = [1, 2, 5]

    def answer(here: WebSocketRoute, frame: dict[str, Any]) -> None:
        for event in (1, 2, extra[0], 3):
            say(here, frame, "chunk", event_id=event, chunk={"type": "text", "data": str(event)})
        say(here, frame, "complete", event_id=4)

    await played(page, answer)
    async with page_elsewhere(page, server.base):
        for _again in range(2):
            await run(page, BEGIN, server.base, {})
            result = await outcome(page)
            assert (result["text"], result["error"]) == ("123", None)
            del extra[0]
        await run(page, BEGIN, server.base, {})
        result = await outcome(page)

    assert result["error"]["code"] == "protocol_error"
    assert result["error"]["text"] == result["text"] == "12"


async def test_what_a_slow_page_has_not_read_is_bounded_and_asked_for_again(
    server: RunningServer, page: Page
) -> None:
    word, count = "x" * 100_000, 60
    resumes: list[int] = []

    def answer(here: WebSocketRoute, frame: dict[str, Any]) -> None:
        after = frame["payload"].get("last_event_id", 0)
        if frame["action"] == "resume":
            resumes.append(after)
        for number in range(after + 1, count + 1):
            say(here, frame, "chunk", event_id=number, chunk={"type": "text", "data": word})
        say(here, frame, "complete", event_id=count + 1)

    await played(page, answer)
    async with page_elsewhere(page, server.base):
        size, numbers, error = await run(
            page,
            """
            let status = null; // of the newest frame of the answer
            window.WebSocket = class extends WebSocket {
              constructor(...all) {
                super(...all);
                this.addEventListener("message", ({ data }) => {
                  const frame = JSON.parse(data);
                  if (frame.event_id) status = frame.status;
                });
              }
            };
            const client = new aio.Client(a, { transport: "websocket" }), numbers = [];
            const answer = client.chat("Hello");
            let size = 0, error = null;
            try {
              for await (const event of answer.events()) {
                if (event.type === "text") size += event.text.length;
                if (event.number) numbers.push(event.number);
                // It takes nothing more until all that was asked for has come.
                while (status !== "complete") await new Promise((done) => setTimeout(done, 1));
              }
            } catch (caught) {
              error = caught.message;
            }
            return [size, numbers, error];
            """,
            server.base,
        )

    assert error is None
    assert size == len(word) * count
    assert numbers == [*range(1, count + 2)]
    # 1 MiB are ten words and a part of another, and one is read while they come.
    assert len(resumes) >= 4
    assert {later - before for before, later in pairwise([0, *resumes])} <= {11, 12}


@pytest.mark.parametrize(("seconds", "action"), [(0, "chat"), (26, "resume")])
async def test_a_question_that_may_have_arrived_is_sent_again_while_the_server_knows_its_id(
    server: RunningServer, page: Page, seconds: int, action: str
) -> None:
    frames: list[dict[str, Any]] = []
    sockets: list[WebSocketRoute] = []

    def answer(here: WebSocketRoute, frame: dict[str, Any]) -> None:
        frames.append(frame)
        sockets.append(here)
        if len(frames) > 1:
            fault = {"error": "it is gone", "code": "stream_not_found", "retryable": False}
            say(here, frame, "error", chunk=fault)

    await played(page, answer)
    await page.clock.install()
    async with page_elsewhere(page, server.base):
        await run(page, BEGIN, server.base, {})
        await until(lambda: len(frames) == 1)
        await page.clock.fast_forward(seconds * 1000)
        await sockets[0].close(code=1011)
        result = await outcome(page)

    assert [frame["action"] for frame in frames] == ["chat", action]
    assert frames[0]["request_id"] == frames[1]["request_id"]
    assert result["error"]["code"] == "stream_not_found"


@pytest.mark.parametrize("garbage", ["no JSON", "null", '{"status":"pong"', b"\x00"])
async def test_what_is_no_frame_is_one_error(
    server: RunningServer, page: Page, garbage: str | bytes
) -> None:
    def between(here: WebSocketRoute) -> None:
        here.on_message(lambda _message: here.send(garbage))

    await page.route_web_socket(re.compile("/ws/"), between)
    async with page_elsewhere(page, server.base):
        await run(page, BEGIN, server.base, {"deadline": 20})
        result = await outcome(page)

    assert result["error"]["code"] == "protocol_error"


# Keys and sessions, from a page of another origin.


@pytest.mark.parametrize("transport", [None, "websocket", "sse"])
async def test_a_key_is_sent_and_a_wrong_one_is_one_error(
    make_server: MakeServer, page: Page, transport: str | None
) -> None:
    server = await make_server(**keys_of("web"))
    options = {"transport": transport} if transport else {}
    async with unwatched(page) as mine, page_elsewhere(mine, server.base):
        results = [
            await run(
                mine,
                "return await read(new aio.Client(a, b).chat('Hello', { deadline: 20 }))",
                server.base,
                {**options, **key},
            )
            for key in ({"key": key_of("web")}, {"key": key_of("nobody")}, {})
        ]

    assert [result["error"] and result["error"]["code"] for result in results] == [
        None,
        "invalid_api_key",
        "missing_api_key",
    ]
    assert server.simulator.stats().requests == 1


@TRANSPORTS
async def test_a_session_of_another_origin_is_enough(
    make_server: MakeServer, page: Page, transport: str
) -> None:
    server = await make_server(**keys_of("web"))
    async with page_elsewhere(page, server.base) as origin:
        assert await server.change(**{**keys_of("web"), "chat.websocket.allow_origins": [origin]})
        result = await run(
            page,
            """
            await fetch(`${a}/session`, {
              method: "POST", credentials: "include", headers: { "Content-Type": "application/json" },
              body: JSON.stringify({ key: b }),
            });
            return await read(new aio.Client(a, { session: true, transport: c }).chat("Hello"));
            """,
            server.base,
            key_of("web"),
            transport,
        )

    assert result["error"] is None
    assert result["text"]


# The waits.


async def test_the_delay_before_a_try(server: RunningServer, page: Page) -> None:
    async with page_elsewhere(page, server.base):
        delays = await run(
            page,
            """
            const all = (wait) => Array.from({ length: 1000 }, wait);
            const range = (wait) => [Math.min(...all(wait)), Math.max(...all(wait))];
            const after = (...given) => range(() => aio.reconnectDelay(...given));
            return {
              ends: [1002, 1003, 1007, 1008].map((code) => aio.reconnectDelay(code, 0)),
              first: after(1006, 0), second: after(1006, 1), fifth: after(1006, 4), late: after(1006, 20),
              restart: after(1012, 9), full: after(1013, 1), told: after(1013, 1, 20), absurd: after(1013, 1, 1e12),
              asked: range(() => aio.backoff(1, 0, 1)), again: range(() => aio.backoff(1, 20, 1)),
            };
            """,
        )

    assert delays.pop("ends") == [None] * 4
    bounds = {
        "first": (0, 0),
        "second": (0, 0.5),
        "fifth": (0, 4),
        "late": (0, 30),
        "restart": (1, 10),
        "full": (5, 5.5),
        "told": (20, 20.5),
        "absurd": (3600, 3600.5),
        "asked": (1, 2),
        "again": (1, 9),
    }
    for name, (least, most) in bounds.items():
        shortest, longest = delays[name]
        quarter = (most - least) / 4
        assert least <= shortest <= least + quarter, name
        assert most - quarter <= longest <= most, name


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_key_that_is_a_function_is_asked_again_after_a_401(
    make_server: MakeServer, page: Page, transport: str
) -> None:
    server = await make_server(**keys_of("web"))
    async with unwatched(page) as other, page_elsewhere(other, server.base):
        assert await server.change(
            **{**keys_of("web"), "chat.websocket.allow_origins": [other.url.rstrip("/")]}
        )
        text, asked = await other.evaluate(
            """async ([a, transport, key]) => {
              const keys = ["aio-old"];
              let asked = 0;
              const next = async () => (asked++, keys.shift() ?? key);
              const client = new aio.Client(a, { transport, key: next });
              const { text } = await read(client.chat("Hello"));
              return [text, asked];
            }""",
            [server.base, transport, key_of("web")],
        )

    assert text
    assert asked >= 2

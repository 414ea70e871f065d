"""Responses over WebSocket, over real sockets."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import WSMsgType

from aioserver.faces.websocket import ChatSocket
from aioserver.protocol import eventstream
from aioserver.wings.responses import lanes
from aioserver.wings.responses.lanes import MAX_NAMED_LANES, MAX_RUNNING, MAX_WAITING
from aioserver.wings.responses.socket import ResponsesSocket
from tests.support import responses
from tests.support.keys import bearer, key_of, keys_of
from tests.support.raw import BINARY, CLOSE, PING, TEXT, Raw, closing, masked
from tests.support.responses import connect, create, kinds, next_event, text_of, to_end, to_ends
from tests.support.server import CONCURRENCY, ENDLESS, PACED, SILENT, SLOW
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

FACE = "responses_ws"


class Responses(Raw):
    """A raw connection to this face."""

    def __init__(self, server: RunningServer, **kwargs: Any) -> None:
        super().__init__(server, **kwargs)
        self._path = "/v1/responses"


async def to_close(raw: Raw) -> list[tuple[int, bytes]]:
    """The frames up to the close frame."""
    frames = [await raw.frame()]
    while frames[-1][0] != CLOSE:
        frames.append(await raw.frame())
    return frames


def data_lines(body: bytes) -> list[bytes]:
    return [event.data for event in eventstream.parse(body)]


async def over_http(server: RunningServer, **fields: Any) -> list[bytes]:
    """The data of the events of a POST."""
    body = {"input": "Hello", "stream": True, **fields}
    async with server.session.post(f"{server.v1}/responses", json=body) as response:
        return data_lines(await response.read())


def without_ids(events: list[bytes]) -> list[Any]:
    """*events* without what differs from one response to the next."""
    stripped = []
    for event in events:
        fields = json.loads(event)
        identity = (fields.get("response") or {}).get("id") or fields.get("item_id") or ""
        number = identity.partition("_")[2] or (fields.get("item") or {}).get("id", "_")[4:]
        text = event.replace(number.encode(), b"ID")
        response = fields.get("response") or {}
        for name in ("created_at", "completed_at"):
            text = text.replace(f'"{name}":{response.get(name)}'.encode(), b"")
        stripped.append(text)
    return stripped


# Events.


@pytest.mark.parametrize(
    ("behaviour", "lane", "store"),
    [(Behaviour(ttft=0, interval=0), None, True), (PACED, "a.b-c_1", False)],
    ids=["burst", "paced"],
)
async def test_frames_are_the_data_lines_of_the_answer_over_http(
    make_server: MakeServer, behaviour: Behaviour, lane: str | None, store: bool
) -> None:
    server = await make_server(behaviour)
    lines = await over_http(server, store=store)

    async with Responses(server) as raw:
        assert (await raw.upgrade()).status == 101
        await raw.send_json(create(lane=lane, store=store))
        frames = [await raw.frame() for _ in lines]

    assert {opcode for opcode, _ in frames} == {TEXT}
    end = b"}" if lane is None else b',"stream_id":"%b"}' % lane.encode()
    assert all(payload.endswith(end) for _, payload in frames)
    events = [payload.removesuffix(end) + b"}" for _, payload in frames]
    assert without_ids(events) == without_ids(lines)


@pytest.mark.parametrize("kind", [ChatSocket, ResponsesSocket])
def test_an_idle_socket_has_no_dictionary(kind: type) -> None:
    """Beyond 30 members each would have one of its own, of 1.5 KiB."""
    assert kind.__dictoffset__ == 0


async def test_the_provider_gets_the_clients_bytes_and_its_trace(server: RunningServer) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with Responses(server) as raw:
        await raw.upgrade(f"traceparent: {trace}")
        await raw.send_frame(
            TEXT,
            b'{"type":"response.create","stream_id":"x","model":"m","input":"Hi","n":1.50,"u":{}}',
        )
        while (json.loads((await raw.frame())[1]))["type"] != "response.completed":
            pass

    request = server.simulator.requests[-1]
    assert request.body == b'{"stream":true,"model":"m","input":"Hi","n":1.50,"u":{}}'
    assert request.path == "/v1/responses"
    assert request.headers["traceparent"].startswith(trace[:36])


async def test_a_response_is_counted_and_logged_as_any_other(server: RunningServer) -> None:
    async with connect(server) as ws:
        await ws.send_json(create())
        await to_end(ws)
        metrics = server.context.metrics
        assert metrics.faces[FACE].connections == 1

    assert (await server.counted("requests", "face", "outcome"))[FACE, "ok"] == 1
    await until(lambda: metrics.faces[FACE].closed["1000"].value == 1)


# Lanes.


async def test_lanes_are_answered_at_once_and_each_in_its_order(make_server: MakeServer) -> None:
    server = await make_server(PACED)
    async with connect(server) as ws:
        for lane in (None, "a", "b"):
            for turn in range(2):
                await ws.send_json(create(f"{lane} {turn}", lane))
        events = await to_ends(ws, 6)

    assert server.simulator.stats().peak_active == 3
    for lane in (None, "a", "b"):
        own = [event for event in events if event.get("stream_id") == lane]
        half = kinds(own).index("completed") + 1
        for part, turn in ((own[:half], 0), (own[half:], 1)):
            assert responses.whole(part)
            assert f"{lane} {turn}" in text_of(part)


async def test_only_so_many_responses_are_under_way_and_the_lane_that_waited_longest_is_next(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT)
    async with connect(server) as ws:
        for number in range(MAX_RUNNING + 2):
            await ws.send_json(create(f"first {number}", f"l{number}"))
        await ws.send_json(create("second", "l0"))
        await server.simulator.until(lambda stats: stats.active == MAX_RUNNING)
        await ws.send_json({"type": "response.cancel", "stream_id": "l0"})
        assert (await next_event(ws))["stream_id"] == "l0"
        await server.simulator.until(lambda stats: stats.requests == MAX_RUNNING + 1)
        assert server.simulator.bodies[-1]["input"] == f"first {MAX_RUNNING}"
        await ws.send_json({"type": "response.cancel", "stream_id": "l1"})
        await server.simulator.until(lambda stats: stats.requests == MAX_RUNNING + 2)
        assert server.simulator.bodies[-1]["input"] == f"first {MAX_RUNNING + 1}"
        await ws.send_json({"type": "response.cancel", "stream_id": "l2"})
        await server.simulator.until(lambda stats: stats.requests == MAX_RUNNING + 3)
        assert server.simulator.bodies[-1]["input"] == "second"


async def test_what_waits_on_a_connection_is_bounded_counted_and_let_go(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT)
    async with connect(server) as ws:
        await ws.send_json(create())
        await server.simulator.until(lambda stats: stats.active == 1)
        for _ in range(MAX_WAITING + 1):
            await ws.send_json(create("x" * 1000))
        event = await next_event(ws)

        assert (event["status"], event["error"]["code"]) == (429, "concurrency_exceeded")
        assert event["error"]["headers"]["retry-after"] == "1"
        assert server.held()["body_bytes"] > MAX_WAITING * 1000
        await ws.send_json({"type": "response.cancel"})
        assert (await next_event(ws))["type"] == "error"
        await server.simulator.until(lambda stats: stats.requests == 2)
    await server.nothing_held()

    assert server.simulator.stats().requests == 2


async def test_what_waits_for_an_end_on_other_lanes_is_bounded_too(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT)
    async with connect(server) as ws:
        for number in range(MAX_RUNNING):
            await ws.send_json(create(lane=f"l{number}"))
        await server.simulator.until(lambda stats: stats.active == MAX_RUNNING)
        for _ in range(MAX_WAITING):
            await ws.send_json(create(lane="l0"))
        await ws.send_json(create(lane="idle"))
        await ws.send_json({"type": "response.cancel", "stream_id": "l1"})
        event = await next_event(ws)

    assert (event["status"], event["stream_id"]) == (429, "idle")
    assert event["error"]["code"] == "concurrency_exceeded"


async def test_only_so_many_bytes_wait_on_a_connection(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "MAX_WAITING_BYTES", 10_000)
    server = await make_server(SILENT)
    async with connect(server) as ws:
        await ws.send_json(create())
        # The first that waits may be larger: else a frame of max_message_size might never be
        # answered.
        for size in (20_000, 100):
            await ws.send_json(create("x" * size, generate=False))
        refusal = await next_event(ws)
        await ws.send_json({"type": "response.cancel"})
        ends = [await to_end(ws) for _ in range(2)]

    assert (refusal["status"], refusal["error"]["code"]) == (429, "concurrency_exceeded")
    assert refusal["error"]["headers"]["retry-after"] == "1"
    assert [end[-1]["type"] for end in ends] == ["error", "response.completed"]


async def test_a_connection_has_only_so_many_named_lanes(server: RunningServer) -> None:
    async with connect(server) as ws:
        for number in range(MAX_NAMED_LANES):
            await ws.send_json(create(lane=str(number), generate=False))
            await to_end(ws, str(number))
        await ws.send_json(create(lane="more"))
        (refusal,) = await to_end(ws, "more")
        for lane in (None, "0"):
            await ws.send_json(create(lane=lane))
            assert responses.whole(await to_end(ws, lane))

    assert refusal["error"]["code"] == "websocket_stream_limit_reached"
    assert (refusal["status"], refusal["error"]["param"]) == (400, "stream_id")


async def test_a_refusal_comes_in_the_order_of_its_lane(make_server: MakeServer) -> None:
    server = await make_server(PACED)
    async with connect(server) as ws:
        await ws.send_json(create(lane="a"))
        await ws.send_json(create(lane="a", background=True))
        await ws.send_json(create(lane="a", model="fault-status-400"))
        await ws.send_json(create(lane="a"))
        events = await to_ends(ws, 4)

    ends = [kind for kind in kinds(events) if kind in {"completed", "error"}]
    assert ends == ["completed", "error", "error", "completed"]


async def test_the_next_turn_is_within_the_limits_that_the_last_one_was_within(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("ann", max_concurrent=1))
    async with connect(server, headers=bearer("ann")) as ws:
        for _ in range(5):
            await ws.send_json(create())
        events = await to_ends(ws, 5)

    assert kinds(events).count("completed") == 5


# Frames that are not for a provider.


async def test_faulty_frames_get_an_error_and_the_socket_stays(server: RunningServer) -> None:
    async with connect(server) as ws:
        for frame in ("{", "[]", "null", '{"type":"chat"}', '{"type":"response.create","input":'):
            await ws.send_str(frame)
            event = await next_event(ws)
            assert (event["type"], event["status"]) == ("error", 400)
        await ws.send_json({"type": "response.processed", "response_id": "r"})
        await ws.send_json({"type": "response.steer", "previous_response_id": "r", "input": "x"})
        assert (await next_event(ws))["type"] == "response.steer.failed"
        await ws.send_json(create(lane="a b"))
        assert (await next_event(ws))["error"]["code"] == "invalid_stream_id"
        await ws.send_json(create())
        assert responses.whole(await to_end(ws))


@pytest.mark.parametrize(
    ("opcode", "payload", "code"),
    [
        (BINARY, b"{}", 1003),
        (TEXT, b'{"type":"response.create","x":"\xff"}', 1007),
        (TEXT, b'{"type":"response.create","input":"%b"}' % (40_000 * b"x"), 1009),
    ],
    ids=["binary", "not UTF-8", "too large"],
)
async def test_frames_that_close_the_socket(
    make_server: MakeServer, opcode: int, payload: bytes, code: int
) -> None:
    server = await make_server(**{"chat.websocket.max_message_size": 32_768})
    async with Responses(server) as raw:
        await raw.upgrade()
        await raw.send_frame(opcode, payload)
        frames = await to_close(raw)

    assert closing(frames[-1][1])[0] == code


# Faults.


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("fault-status-500", 502, "provider_error"),
        ("fault-status-429", 429, "provider_rate_limited"),
        ("fault-status-404", 404, "model_not_found"),
        ("fault-drop", 502, "provider_disconnected"),
    ],
)
async def test_a_fault_before_the_first_event_is_an_error_frame(
    server: RunningServer, model: str, status: int, code: str
) -> None:
    async with connect(server) as ws:
        for lane in (None, "a"):
            await ws.send_json(create(lane=lane, model=model))
            (event,) = await to_end(ws, lane)

            assert (event["type"], event["status"]) == ("error", status)
            assert event["error"]["code"] == code
            assert ("retry-after" in event.get("headers", {})) == (status == 429)


async def test_a_fault_between_events_is_the_same_as_over_http(server: RunningServer) -> None:
    lines = await over_http(server, model="fault-cut-3", store=False)

    async with connect(server) as ws:
        await ws.send_json(create(model="fault-cut-3"))
        events = await to_end(ws)
        await ws.send_json(create())
        assert responses.whole(await to_end(ws))

    assert kinds(events) == [json.loads(line)["type"].removeprefix("response.") for line in lines]
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["error"]["code"] == "provider_disconnected"
    assert events[-1]["sequence_number"] == len(events) - 1


# Handshakes.


async def test_a_browser_presents_its_key_as_a_subprotocol(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("ann"))
    for offered, selected in [
        (("realtime", "openai-insecure-api-key.{key}"), "realtime"),
        (("responses", "openai-insecure-api-key.{key}"), "responses"),
        (("openai-insecure-api-key.{key}", "responses", "realtime"), "responses"),
        (("aioserver", "aioserver.key.{key}"), "aioserver"),
        (("realtime", "aioserver", "aioserver.key.{key}"), "aioserver"),
    ]:
        protocols = [name.format(key=key_of("ann")) for name in offered]
        async with connect(server, protocols=protocols) as ws:
            assert ws.protocol == selected, offered
            await ws.send_json(create())
            assert responses.whole(await to_end(ws)), offered


async def test_a_full_server_says_so_in_a_frame_and_closes(make_server: MakeServer) -> None:
    limits = {f"{CONCURRENCY}.max_connections": 1, f"{CONCURRENCY}.connection_queue_size": 1}
    server = await make_server(**limits)
    async with connect(server), connect(server), connect(server) as third:
        event = await next_event(third)
        message = await third.receive(timeout=patience(20))

    assert (event["type"], event["status"]) == ("error", 503)
    assert event["error"]["code"] == "server_at_capacity"
    assert "retry-after" in event["error"]["headers"]
    assert (message.type, third.close_code) == (WSMsgType.CLOSE, 1013)


async def test_a_connection_that_waits_for_its_place_may_send_already(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{f"{CONCURRENCY}.max_connections": 1})
    first = await connect(server)
    async with connect(server) as second:
        await second.send_json(create())
        queued = json.loads(await second.receive_str(timeout=patience(20)))
        assert queued["type"] == "aioserver:queued"
        await first.close()
        assert responses.whole(await to_end(second))


@pytest.mark.virtual_time
async def test_a_pong_may_take_thirty_seconds(make_server: MakeServer) -> None:
    pings = {"chat.websocket.ping_interval": 1.0, "chat.websocket.ping_timeout": 1.0}
    server = await make_server(**pings)
    loop = asyncio.get_running_loop()
    async with Responses(server) as raw:
        await raw.upgrade()
        assert (await raw.frame())[0] == PING
        pinged_at = loop.time()
        opcode, reason = await raw.frame()

    assert (opcode, closing(reason)) == (CLOSE, (1011, b"keepalive ping timeout"))
    assert 30.0 <= loop.time() - pinged_at < 32.0


# Leaving.


@pytest.mark.parametrize("own", [True, False])
async def test_a_client_that_leaves_ends_its_responses_at_once(
    make_server: MakeServer, own: bool
) -> None:
    server = await make_server(ENDLESS, **{"llm.providers.sim.responses": own})
    async with connect(server) as ws:
        for lane in (None, "a"):
            await ws.send_json(create(lane=lane))
        await server.simulator.until(lambda stats: stats.tokens_sent > 10)
    await server.simulator.until(lambda stats: stats.aborted == 2)

    assert (await server.counted("requests", "face", "outcome"))[FACE, "client_left"] == 2


async def test_a_cancelled_response_ends_for_its_client_and_the_lane_goes_on(
    make_server: MakeServer,
) -> None:
    server = await make_server(SLOW)
    async with connect(server) as ws:
        await ws.send_json(create(lane="a"))
        await ws.send_json(create("next", lane="a", store=True))
        first = await next_event(ws)
        response_id = first["response"]["id"]
        await ws.send_json({"type": "response.cancel", "response_id": response_id})
        events = [first, *await to_end(ws, "a")]
        await server.simulator.until(lambda stats: stats.aborted == 1)
        assert (await next_event(ws))["type"] == "response.created"
        await ws.send_json({"type": "response.cancel", "stream_id": "a"})
        await to_end(ws, "a")
        for missing in ({"stream_id": "a"}, {"response_id": response_id}, {}):
            await ws.send_json({"type": "response.cancel", **missing})
            assert (await next_event(ws))["error"]["code"] == "stream_not_found"

    assert events[-1]["type"] == "response.failed"
    assert events[-1]["error"]["code"] == "stream_not_found"
    assert (await server.counted("requests", "outcome"))["cancelled",] == 2


@pytest.mark.parametrize("how", ["http", "socket"])
async def test_a_stored_response_is_read_on_elsewhere(make_server: MakeServer, how: str) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.005))
    async with connect(server) as ws:
        await ws.send_json(create(lane="a", store=True))
        seen = [await next_event(ws) for _ in range(6)]
    response_id, number = seen[0]["response"]["id"], seen[-1]["sequence_number"]

    if how == "http":
        query = f"{response_id}?stream=true&starting_after={number}"
        async with server.session.get(f"{server.v1}/responses/{query}") as response:
            rest = [json.loads(line) for line in data_lines(await response.read())]
    else:
        async with connect(server) as ws:
            await ws.send_json(
                {"type": "response.resume", "response_id": response_id, "starting_after": number}
            )
            rest = await to_end(ws)
            await ws.send_json(
                {"type": "response.resume", "response_id": response_id, "stream_id": "b"}
            )
            again = await to_end(ws, "b")
        assert [{**event, "stream_id": "a"} for event in again] == [
            *seen,
            *({**event, "stream_id": "a"} for event in rest),
        ]

    assert responses.whole([*seen, *rest])
    assert server.simulator.stats().requests == 1


async def test_only_ones_own_stored_responses_can_be_resumed(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("ann", "bob"))
    async with connect(server, headers=bearer("ann")) as ann:
        await ann.send_json(create(store=True))
        stored = (await to_end(ann))[0]["response"]["id"]
        await ann.send_json(create(store=False))
        unstored = (await to_end(ann))[0]["response"]["id"]
        for frame in (
            {"response_id": unstored},
            {"response_id": "resp_none"},
            {"response_id": stored, "starting_after": 10_000},
        ):
            await ann.send_json({"type": "response.resume", **frame})
            (event,) = await to_end(ann)
            assert event["error"]["code"] in {"stream_not_found", "resume_gap"}
    async with connect(server, headers=bearer("bob")) as bob:
        await bob.send_json({"type": "response.resume", "response_id": stored})
        (event,) = await to_end(bob)

    assert (event["status"], event["error"]["code"]) == (404, "stream_not_found")


# The end of the server.


async def test_a_server_that_stops_closes_idle_sockets_and_lets_responses_finish(
    make_server: MakeServer,
) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.005))
    async with connect(server) as idle, connect(server) as busy:
        await busy.send_json(create())
        await busy.send_json(create("never asked"))
        seen = [await next_event(busy)]
        server.owners.drain()

        assert (await idle.receive(timeout=patience(20))).type == WSMsgType.CLOSE
        seen += await to_end(busy)
        (refusal,) = await to_end(busy)
        assert (await busy.receive(timeout=patience(20))).type == WSMsgType.CLOSE

    assert responses.whole(seen)
    assert refusal["error"]["code"] == "server_shutdown"
    assert (idle.close_code, busy.close_code) == (1012, 1012)
    assert server.simulator.stats().requests == 1


async def test_a_socket_that_closes_begins_nothing_more(server: RunningServer) -> None:
    async with Responses(server) as raw:
        await raw.upgrade()
        warm_up = masked(TEXT, json.dumps(create(generate=False)).encode())
        question = masked(TEXT, json.dumps(create()).encode())
        await raw.send(warm_up + question + masked(BINARY, b""))
        assert (await raw.frames())[-1][0] == CLOSE

    assert await server.counted("requests", "face") == {}


async def test_clients_that_come_and_go_leave_nothing_behind(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.001, tokens=10))

    async def visit(number: int) -> None:
        async with Responses(server) as raw:
            await raw.upgrade()
            for turn in range(4):
                await raw.send_json(create(lane=f"l{turn % 3}", store=turn == 1))
            for _ in range(number):
                await raw.frame()
            if number % 2:
                raw.reset()

    await asyncio.gather(*(visit(number) for number in range(12)))
    await server.nothing_held()


# Continuing.


def item(text: str) -> dict[str, str]:
    return {"type": "message", "role": "user", "content": text}


async def answered(ws: Any, *args: Any, **fields: Any) -> dict[str, Any]:
    """The response object with which a response ends."""
    await ws.send_json(create(*args, **fields))
    lane = args[1] if len(args) > 1 else fields.get("stream_id")
    end = (await to_end(ws, lane))[-1]
    assert end["type"] == "response.completed", end
    response: dict[str, Any] = end["response"]
    return response


async def test_a_connection_continues_what_nobody_stores(server: RunningServer) -> None:
    async with connect(server) as ws:
        first = await answered(ws, "one", store=False)
        second = await answered(ws, "two", store=False, previous_response_id=first["id"])
        third = await answered(ws, "three", "fork", previous_response_id=second["id"])

    bodies = [*server.simulator.bodies]
    assert [body["store"] for body in bodies[:2]] == [False, False]
    assert not any("previous_response_id" in body for body in bodies)
    assert bodies[1]["input"] == [item("one"), *first["output"], item("two")]
    assert bodies[2]["input"] == [*bodies[1]["input"], *second["output"], item("three")]
    assert third["status"] == "completed"


async def test_only_the_latest_response_of_a_lane_is_kept_without_a_store(
    server: RunningServer,
) -> None:
    async with connect(server) as ws:
        first = await answered(ws, "one", store=False)
        await answered(ws, "two", store=False)
        other = await answered(ws, "three", "a", store=False)
        await answered(ws, "four", store=False, previous_response_id=first["id"])
        await answered(ws, "five", store=False, previous_response_id=other["id"])
    async with connect(server) as ws:
        await answered(ws, "six", previous_response_id=other["id"])

    bodies = [*server.simulator.bodies][3:]
    # A provider may know an id that nobody knows here.
    assert bodies[0]["previous_response_id"] == first["id"]
    assert bodies[1]["input"] == [item("three"), *other["output"], item("five")]
    assert bodies[2]["previous_response_id"] == other["id"]


async def test_a_response_that_was_continued_in_vain_is_forgotten(server: RunningServer) -> None:
    async with connect(server) as ws:
        for model in ("fault-status-400", "fault-status-500"):
            kept = await answered(ws, "one", "a", store=False)
            await ws.send_json(
                create("two", "b", model=model, store=False, previous_response_id=kept["id"])
            )
            (event,) = await to_end(ws, "b")
            assert event["type"] == "error"
            await answered(ws, "three", store=False, previous_response_id=kept["id"])

            assert server.simulator.bodies[-1]["previous_response_id"] == kept["id"]

        kept = await answered(ws, "one", "a", store=False)
        await ws.send_json(create(model="fault-cut-3", previous_response_id=kept["id"]))
        assert (await to_end(ws))[-1]["type"] == "response.failed"
        await answered(ws, "again", store=False, previous_response_id=kept["id"])

    assert server.simulator.bodies[-1]["input"] == [item("one"), *kept["output"], item("again")]


async def test_a_warm_up_is_continued_here_and_on_another_connection(
    server: RunningServer,
) -> None:
    async with connect(server) as ws:
        warm = await answered(ws, "warm", "w", generate=False, store=False)
        stored = await answered(ws, "more", "w", generate=False, previous_response_id=warm["id"])
        await answered(ws, "go", previous_response_id=stored["id"])
        await ws.send_json(create("x", generate=False, previous_response_id="resp_none"))
        (refusal,) = await to_end(ws)
    async with connect(server) as ws:
        await answered(ws, "go", previous_response_id=stored["id"])

    expected = [item("warm"), item("more"), item("go")]
    assert [body["input"] for body in server.simulator.bodies] == [expected, expected]
    assert (refusal["status"], refusal["error"]["code"]) == (400, "previous_response_not_found")
    assert refusal["error"]["param"] == "previous_response_id"


async def test_what_a_connection_keeps_is_counted_and_let_go(server: RunningServer) -> None:
    before = server.owners.streams.stats().bytes
    async with connect(server) as ws:
        for lane in (None, "a", "b"):
            for _ in range(3):
                await answered(ws, "x" * 10_000, lane, store=False)
        kept = server.owners.streams.stats().bytes - before

    assert 30_000 < kept < 40_000
    await until(lambda: server.owners.streams.stats().bytes == before)


async def test_a_warm_up_is_an_answer_for_the_limits_of_its_key(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("ann", requests_per_minute=2))
    async with connect(server, headers=bearer("ann")) as ws:
        ends = []
        for _ in range(3):
            await ws.send_json(create(generate=False))
            ends.append((await to_end(ws))[-1])

    assert kinds(ends) == ["completed", "completed", "error"]
    assert (ends[-1]["status"], ends[-1]["error"]["code"]) == (429, "rate_limit_exceeded")


async def test_a_second_reader_that_leaves_holds_up_no_lane(make_server: MakeServer) -> None:
    server = await make_server(Behaviour(ttft=0, interval=0.005, tokens=40))
    async with connect(server) as first:
        await first.send_json(create(store=True))
        await first.send_json(create("next"))
        seen = [await next_event(first)]
        async with connect(server) as second:
            resume = {"type": "response.resume", "response_id": seen[0]["response"]["id"]}
            await second.send_json(resume)
            await next_event(second)
        seen += await to_end(first)

        assert responses.whole(seen)
        assert responses.whole(await to_end(first))


async def test_what_connections_hold_gives_way_to_others(make_server: MakeServer) -> None:
    room = 1_000_000
    server = await make_server(
        **{"chat.streams.max_kept_bytes": room, "chat.streams.max_stream_bytes": room // 2}
    )
    async with connect(server) as ws, connect(server) as other:
        held = [
            await answered(ws, "x" * (room // 10), f"l{number}", generate=False, store=False)
            for number in range(12)
        ]
        stats = server.owners.streams.stats()
        assert room // 2 < stats.bytes <= room
        kept = await answered(other, "y" * (room // 10), store=False)
        await answered(other, previous_response_id=kept["id"])
        await answered(ws, "go", previous_response_id=held[-1]["id"])
        await ws.send_json(create(generate=False, previous_response_id=held[0]["id"]))
        (refusal,) = await to_end(ws)

    assert refusal["error"]["code"] == "previous_response_not_found"

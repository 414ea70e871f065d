"""The WebSocket face, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from aioserver.faces import socket as sockets
from tests.support.chat import (
    big,
    cancel,
    chat,
    numbers,
    resume,
    text_of,
    to_end,
    until_status,
    whole,
)
from tests.support.raw import BINARY, CLOSE, PING, PONG, SMALL, TEXT, Raw, closing, masked
from tests.support.server import PACED, QUICK, SILENT, SLOW, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until, within

if TYPE_CHECKING:
    from tests.support.server import RunningServer


async def closed_with(ws: aiohttp.ClientWebSocketResponse) -> tuple[int | None, list[Any]]:
    """The close code, and the frames before it."""
    frames = []
    while (message := await ws.receive(timeout=patience(20))).type == WSMsgType.TEXT:
        frames.append(json.loads(message.data))
    assert message.type in {WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED}, message
    return ws.close_code, frames


# Answers.


async def test_an_answer_has_numbered_events_and_the_truth_about_its_end(
    server: RunningServer,
) -> None:
    async with server.connect() as ws:
        await ws.send_json(
            chat("r1", conversation_id="c1", options={"stream_options": {"include_usage": True}})
        )
        frames = await to_end(ws)

    assert numbers(frames) == list(range(1, len(frames) + 1))
    assert frames[0] == {
        "request_id": "r1",
        "event_id": 1,
        "status": "processing",
        "chunk": {
            "metadata": {
                "processing": True,
                "provider": "sim",
                "model": "sim-model",
                "conversation_id": "c1",
            }
        },
    }
    assert frames[1]["chunk"]["type"] == "text"
    assert frames[1]["chunk"]["metadata"] == {}
    metadata = frames[-1]["chunk"]["metadata"]
    assert (metadata["finish_reason"], metadata["provider"]) == ("stop", "sim")
    assert metadata["usage"]["completion_tokens"] > 0


async def test_an_answer_that_is_not_streamed_has_one_chunk(server: RunningServer) -> None:
    async with server.connect() as ws:
        await ws.send_json(chat("r1", streaming=True))
        streamed = await to_end(ws)
        await ws.send_json(chat("r2", streaming=False, conversation_id="other"))
        frames = await to_end(ws)

    assert [frame["status"] for frame in frames] == ["processing", "chunk", "complete"]
    assert text_of(frames) == text_of(streamed)
    assert not server.simulator.bodies[-1].get("stream")


async def test_options_are_merged_into_the_body_and_configured_values_fill_the_rest(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **{
            "llm.providers.sim.temperature": 0.7,
            "llm.providers.sim.max_tokens": 512,
            "chat.service.system_prompt": "Be brief.",
        }
    )
    async with server.connect() as ws:
        await ws.send_json(chat("r1", model="other", options={"temperature": 0.2, "seed": 7}))
        await to_end(ws)
        await ws.send_json(chat("r2", messages=[{"role": "user", "content": "Hi"}]))
        await to_end(ws)

    first, second = server.simulator.bodies
    assert (first["model"], first["temperature"], first["seed"]) == ("other", 0.2, 7)
    assert (first["max_tokens"], first["stream"]) == (512, True)
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert second["model"] == "sim-model"
    assert {"role": "user", "content": "Hi"} in second["messages"]


async def test_tool_calls_come_as_chunks_of_their_own(server: RunningServer) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    async with server.connect() as ws:
        await ws.send_json(chat("r1", "call a tool", options={"tools": tools}))
        frames = await to_end(ws)

    chunks = [frame["chunk"] for frame in frames if frame["status"] == "chunk"]
    assert {chunk["type"] for chunk in chunks} == {"tool_calls"}
    assert chunks[0]["data"][0]["function"]["name"] == "weather"
    assert frames[-1]["chunk"]["metadata"]["finish_reason"] == "tool_calls"


async def test_ping_is_answered_with_pong(server: RunningServer) -> None:
    async with server.connect() as ws:
        await ws.send_json({"action": "ping"})
        assert await ws.receive_json() == {"request_id": None, "status": "pong", "chunk": {}}
        await ws.send_json({"action": "ping", "request_id": "p1"})
        assert (await ws.receive_json())["request_id"] == "p1"


async def test_several_answers_run_at_once_on_one_socket(make_server: MakeServer) -> None:
    server = await make_server(PACED)

    async with server.connect() as ws:
        for number in range(5):
            await ws.send_json(chat(f"r{number}", conversation_id=f"c{number}"))
        ended: dict[str, list[Any]] = {f"r{number}": [] for number in range(5)}
        while any(not got or got[-1]["status"] != "complete" for got in ended.values()):
            frame = await ws.receive_json(timeout=patience(20))
            ended[frame["request_id"]].append(frame)

    assert server.simulator.stats().peak_active == 5
    for frames in ended.values():
        assert numbers(frames) == list(range(1, len(frames) + 1))


async def test_the_33rd_answer_on_one_socket_is_refused(make_server: MakeServer) -> None:
    server = await make_server(SILENT)
    async with server.connect() as ws:
        for number in range(32):
            await ws.send_json(chat(f"r{number}"))
        await ws.send_json(chat("r32"))
        frames = await until_status(ws, "error")
        assert frames[-1]["request_id"] == "r32"
        assert frames[-1]["chunk"]["code"] == "concurrency_exceeded"
        assert frames[-1]["chunk"]["retry_after"] == 1.0

        await ws.send_json(chat("r0"))  # a running one may be asked for again
        await ws.send_json({"action": "ping"})
        replies = await until_status(ws, "pong")
        assert "error" not in {frame["status"] for frame in replies}

        await ws.send_json(cancel("r0"))
        await until_status(ws, "cancelled")
        await ws.send_json(chat("r33"))
        await ws.send_json({"action": "ping"})
        replies = await until_status(ws, "pong")
        assert "error" not in {frame["status"] for frame in replies}
        for number in (*range(1, 32), 33):
            await ws.send_json(cancel(f"r{number}"))


async def test_a_request_waiting_for_its_provider_is_told_its_position(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        SILENT,
        **{
            "llm.providers.sim.http_client.concurrent_requests": 1,
            "llm.providers.sim.http_client.queue_size": 2,
        },
    )
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until_status(ws, "processing")
        await ws.send_json(chat("r2"))
        frame = await ws.receive_json()
        assert (frame["request_id"], frame["status"]) == ("r2", "queued")
        assert frame["chunk"]["position"] == 1
        assert frame["chunk"]["eta"] >= 0
        assert "event_id" not in frame
        await ws.send_json(chat("r3"))
        await ws.send_json(chat("r4"))
        frames = await until_status(ws, "error")
        assert frames[-1]["request_id"] == "r4"
        assert frames[-1]["chunk"]["code"] == "provider_queue_full"
        assert frames[-1]["chunk"]["retry_after"] >= 1

        await ws.send_json(cancel("r1"))
        frames = await until_status(ws, "processing")
        assert frames[-1]["request_id"] == "r2"
        for name in ("r2", "r3"):
            await ws.send_json(cancel(name))
        await until(lambda: server.held()["running"] == 0)
    assert server.simulator.stats().requests <= 3


# What is no command.


# Of each fault one: tests/protocol/test_client_frames.py has all that a frame may be.
NO_COMMANDS: list[tuple[str, str, str | None]] = [
    ("{", "invalid_json", None),
    ("[" * 100_000, "invalid_json", None),
    ("[]", "invalid_request", None),
    ('{"action":"sing","request_id":"r1"}', "invalid_request", "r1"),
    ('{"action":"chat","request_id":"\\ud800"}', "invalid_request", "\ufffd"),
    ('{"action":"chat","request_id":""}', "invalid_request", ""),
    ('{"action":"chat","request_id":"r1","payload":{"text":7}}', "invalid_request", "r1"),
    (
        '{"action":"chat","request_id":"r1","payload":{"text":"x","provider":"nobody"}}',
        "model_not_found",
        "r1",
    ),
    ('{"action":"cancel","request_id":"nobody"}', "stream_not_found", "nobody"),
    ('{"action":"resume","request_id":"nobody"}', "stream_not_found", "nobody"),
]


async def test_a_frame_that_is_no_command_gets_an_error_frame_and_the_socket_stays(
    server: RunningServer,
) -> None:
    async with server.connect() as ws:
        for frame, code, request_id in NO_COMMANDS:
            await ws.send_str(frame)
            answer = await ws.receive_json()
            assert answer["status"] == "error", frame
            assert answer["request_id"] == request_id, frame
            assert answer["chunk"]["code"] == code, frame
            assert answer["chunk"]["retryable"] is False, frame

        await ws.send_json({"action": "ping"})
        assert (await ws.receive_json())["status"] == "pong"
    assert server.simulator.stats().requests == 0


async def test_a_deeply_nested_question_is_answered_or_refused_and_the_socket_stays(
    server: RunningServer,
) -> None:
    async with server.connect() as ws:
        for depth in (100, 200, 252, 254, 255, 300, 1000, 1023):
            deep = "[" * depth + "]" * depth
            payload = f'{{"text":"x","options":{{"x":{deep}}}}}'
            await ws.send_str(f'{{"action":"chat","request_id":"r{depth}","payload":{payload}}}')
            end = (await to_end(ws))[-1]
            if end["status"] == "error":
                assert depth > 200
                assert end["chunk"]["code"] in {"invalid_request", "invalid_json"}

        await ws.send_json({"action": "ping"})
        assert (await ws.receive_json())["status"] == "pong"


# Frames after which the server closes, by its code.
CLOSES = {
    1002: (
        b"\xc1\x80\0\0\0\0",  # a reserved bit
        b"\x83\x80\0\0\0\0",  # a reserved opcode
        b"\x09\x80\0\0\0\0",  # a ping in fragments
        masked(PING, b"x" * 126),  # a long control frame
    ),
    1003: (masked(BINARY, b"x"),),
    1007: (masked(TEXT, b'{"action":"\xff"}'),),
    1009: tuple(
        b"\x81\xff" + size.to_bytes(8, "big") + b"\0\0\0\0" + b"x" * 1000
        for size in (2**62, 2**63 - 1)
    ),
}


async def test_each_fault_closes_with_its_code_and_is_counted_by_it(server: RunningServer) -> None:
    for code, faults in CLOSES.items():
        for data in faults:
            async with Raw(server) as raw:
                await raw.upgrade()
                await raw.send(data)
                opcode, payload = await raw.frame()
                assert (opcode, closing(payload)[0]) == (CLOSE, code), data
                await raw.send_frame(CLOSE, payload)
    await server.nothing_held()

    counted = await server.counted("connections_closed", "face", "code")
    assert counted == {("websocket", str(code)): len(faults) for code, faults in CLOSES.items()}


async def test_compression_that_a_client_offers_is_not_taken(server: RunningServer) -> None:
    async with Raw(server) as raw:
        head = await raw.upgrade("Sec-WebSocket-Extensions: permessage-deflate")
        await raw.send(b"\xc1\x80\0\0\0\0")  # a message that is marked as compressed
        opcode, payload = await raw.frame()

    assert (head.status, "sec-websocket-extensions" in head.headers) == (101, False)
    assert (opcode, closing(payload)[0]) == (CLOSE, 1002)


@pytest.mark.parametrize(
    "count", [150, pytest.param(1000, marks=[pytest.mark.stress, pytest.mark.timeout(120)])]
)
async def test_many_requests_one_after_the_other_on_one_socket_leave_nothing(
    make_server: MakeServer, count: int
) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0, tokens=2), **{"chat.streams.resume_window": 0}
    )
    async with server.connect() as ws:
        for number in range(count):
            await ws.send_json(chat(f"r{number}"))
            assert (await to_end(ws))[-1]["status"] == "complete"
            if number >= 150:  # below the bound of a flood
                await asyncio.sleep(0.01)
        kept = server.owners.streams.stats()
        assert (kept.running, kept.finished) == (0, 0)

    assert await server.counted("requests", "outcome") == {("ok",): count}
    assert server.provider.stats().pool.open == 1
    await server.nothing_held()


@pytest.mark.parametrize("cut", [False, True])
async def test_the_limit_of_a_message_is_inclusive_and_counts_bytes(
    make_server: MakeServer, cut: bool
) -> None:
    server = await make_server(**{"chat.websocket.max_message_size": 1000})
    empty = len(json.dumps({"action": "ping", "x": ""}, ensure_ascii=False).encode())

    async def send(raw: Raw, size: int, letter: str) -> None:
        text = letter * ((size - empty) // len(letter.encode()))
        text += "x" * (size - empty - len(text.encode()))
        frame = json.dumps({"action": "ping", "x": text}, ensure_ascii=False).encode()
        assert len(frame) == size
        if cut:
            await raw.send_frame(TEXT, frame[:500], fin=False)
            await raw.send_frame(0, frame[500:])
        else:
            await raw.send_frame(TEXT, frame)

    for letter in ("x", "é"):
        async with Raw(server) as raw:
            await raw.upgrade()
            await send(raw, 1000, letter)
            assert (await raw.json_frame())["status"] == "pong"
            await send(raw, 1001, letter)
            frames = [await raw.frame()]
            while frames[-1][0] == TEXT:
                assert json.loads(frames[-1][1])["chunk"]["code"] == "request_too_large"
                frames.append(await raw.frame())
            opcode, payload = frames[-1]
            assert opcode == CLOSE
            assert closing(payload)[0] == 1009


@pytest.mark.parametrize("opcode", [TEXT, PING])
async def test_a_flood_of_frames_closes_with_1008(server: RunningServer, opcode: int) -> None:
    payload = b'{"action":"ping"}' if opcode == TEXT else b""
    async with Raw(server) as raw:
        await raw.upgrade()
        began = time.monotonic()
        await raw.send(masked(opcode, payload) * 2000)
        frames: list[tuple[int, bytes]] = []
        while not frames or frames[-1][0] != CLOSE:
            frames.append(await raw.frame())
        took = time.monotonic() - began
        # The server has read enough of the flood, and may have reset the connection.
        with contextlib.suppress(ConnectionError):
            await raw.send_frame(CLOSE, frames[-1][1])
        rest = await raw.frames()

    assert closing(frames[-1][1])[0] == 1008
    # A slow server may answer some more pings between its error and its close frame.
    last_text = [payload for kind, payload in frames if kind == TEXT][-1]
    assert json.loads(last_text)["chunk"]["retry_after"] == 1.0
    assert json.loads(last_text)["chunk"]["code"] == "rate_limit_exceeded"
    assert 150 < len(frames) < 300 + 100 * took, "a burst of 200, and 100 a second"
    assert rest == []


async def test_a_burst_within_the_bound_is_no_flood(server: RunningServer) -> None:
    async with server.connect() as ws:
        for _ in range(150):
            await ws.send_json({"action": "ping"})
        for _ in range(150):
            assert (await ws.receive_json())["status"] == "pong"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (masked(TEXT, b"x" * 5_000_000), 1009),  # refused at its first bytes
        (masked(TEXT, b"x" * 900) * 8000, 1008),
        (masked(BINARY, b"x" * 900) * 8000, 1003),
    ],
)
async def test_a_client_that_is_closed_while_it_sends_learns_why(
    make_server: MakeServer, data: bytes, code: int
) -> None:
    server = await make_server(**{"chat.websocket.max_message_size": 1000})
    async with Raw(server) as raw:
        await raw.upgrade()
        await raw.send(data)  # not met by a reset, which could destroy the close frame
        frames: list[tuple[int, bytes]] = []
        while not frames or frames[-1][0] != CLOSE:
            frames.append(await raw.frame())
        assert closing(frames[-1][1])[0] == code
        await raw.send_frame(CLOSE, frames[-1][1])
        assert await raw.frames() == []
        await server.nothing_held(1)


@pytest.mark.parametrize(
    ("fault", "code"), [(masked(TEXT, b"\xff"), 1007), (masked(BINARY, b"x"), 1003)]
)
async def test_nothing_follows_a_close_frame(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch, fault: bytes, code: int
) -> None:
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.3)
    server = await make_server(Behaviour(ttft=0, interval=0.002, tokens=5000))
    async with Raw(server) as raw:
        await raw.upgrade()
        await raw.send_json(chat("r1"))
        for _ in range(10):
            await raw.frame()
        await raw.send(fault)
        frames = await raw.frames()  # the close is not answered: the server gives up waiting

    opcodes = [opcode for opcode, _ in frames]
    assert opcodes.index(CLOSE) == len(frames) - 1
    assert closing(frames[-1][1])[0] == code
    async with server.connect() as ws:
        await ws.send_json(cancel("r1"))
        await to_end(ws)


async def test_a_close_does_not_wait_for_all_that_a_client_leaves_unread(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "CLOSE_TIMEOUT", 0.3)
    server = await make_server(
        **{"chat.streams.send_timeout": 30.0, "chat.streams.max_stream_bytes": 1 << 26}
    )
    async with Raw(server, receive_buffer=SMALL) as raw:
        await raw.upgrade()
        await raw.send_json(chat("r1", **big(30_000, 200)))
        await server.simulator.until(lambda stats: stats.completed == 1)
        await raw.send_frame(BINARY, b"x")

        await until(lambda: server.held()["places"] == 0, 5)
        raw.widen()
        assert len(await raw.frames()) < 200


# The same request again.


async def test_the_same_request_replays_and_is_asked_of_the_provider_once(
    make_server: MakeServer,
) -> None:
    server = await make_server(PACED)
    async with server.connect() as first, server.connect() as second:
        await first.send_json(chat("r1"))
        await until_status(first, "chunk")
        await second.send_json(chat("r1"))  # while it runs, from elsewhere
        again = await to_end(second)
        await to_end(first)
        await first.send_json(chat("r1"))  # and when it has ended
        replayed = await to_end(first)

    assert numbers(again) == list(range(1, len(again) + 1))
    assert replayed == again
    assert server.simulator.stats().requests == 1


async def test_another_payload_under_a_known_request_id_is_a_conflict(
    server: RunningServer,
) -> None:
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await to_end(ws)
        await ws.send_json(chat("r1", "Something else"))
        answer = await ws.receive_json()

    assert (answer["request_id"], answer["status"]) == ("r1", "error")
    assert answer["chunk"]["code"] == "request_conflict"
    assert server.simulator.stats().requests == 1


# Cancel.


@pytest.mark.virtual_time
async def test_cancel_closes_the_providers_socket_at_once(make_server: MakeServer) -> None:
    server = await make_server(SLOW)
    loop = asyncio.get_running_loop()
    async with server.connect() as ws, server.connect() as other:
        await ws.send_json(chat("r1"))
        await until_status(ws, "chunk")
        await other.send_json(resume("r1"))
        await until_status(other, "chunk")

        begun = loop.time()
        await ws.send_json(cancel("r1"))
        await server.simulator.until(lambda stats: stats.aborted == 1)
        assert within(1.0, begun)
        assert (await to_end(ws))[-1]["status"] == "cancelled"
        end = (await to_end(other))[-1]  # for every reader
        assert (end["status"], end["chunk"]) == ("cancelled", {})

        await ws.send_json(cancel("r1"))  # again: its end is the answer
        assert await ws.receive_json() == end
    assert server.provider.stats().pool.open == 0  # never reused half-read


async def test_cancel_after_the_end_says_how_it_ended(server: RunningServer) -> None:
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        frames = await to_end(ws)
        await ws.send_json(cancel("r1"))

        assert await ws.receive_json() == frames[-1]


# Resume.


async def test_resume_from_any_event_gives_exactly_the_rest(server: RunningServer) -> None:
    server.simulator.behaviour = Behaviour(ttft=0, interval=0, tokens=30)
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        frames = await to_end(ws)
        for after in range(len(frames)):
            await ws.send_json(resume("r1", after))
            assert await to_end(ws) == frames[after:]
        await ws.send_json(resume("r1", len(frames) + 1))
        gap = await ws.receive_json()
        await ws.send_json(resume("nobody"))
        unknown = await ws.receive_json()

    assert gap["chunk"]["code"] == "resume_gap"
    assert unknown["chunk"]["code"] == "stream_not_found"
    counted = await server.counted("resumes", "outcome")
    assert counted == {("ok",): len(frames), ("gap",): 1, ("not_found",): 1}


async def test_a_resume_that_fails_leaves_the_running_answer_alone(
    make_server: MakeServer,
) -> None:
    server = await make_server(PACED)
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until_status(ws, "chunk")
        await ws.send_json(resume("r1", 10_000))
        await until_status(ws, "error")

        assert (await to_end(ws))[-1]["status"] == "complete"


# Leaving.


@pytest.mark.parametrize("politely", [True, False])
async def test_a_client_that_left_in_mid_answer_misses_nothing(
    make_server: MakeServer, politely: bool
) -> None:
    server = await make_server(PACED)
    async with Raw(server) as raw:
        await raw.upgrade()
        await raw.send_json(chat("r1"))
        seen = [await raw.json_frame() for _ in range(8)]
        if politely:
            await raw.send_frame(CLOSE, b"\x03\xe8")
            frames = await raw.frames()
            assert closing(frames[-1][1])[0] == 1000
            seen += [json.loads(data) for opcode, data in frames if opcode == TEXT]
        else:
            raw.reset()
        await until(lambda: server.held()["detached"] == 1)

    after = seen[-1]["event_id"]
    async with server.connect() as ws:
        await ws.send_json(resume("r1", after))
        rest = await to_end(ws)
    by_sse = await whole(server, "r1", after)

    assert rest == by_sse
    assert numbers(seen + rest) == list(range(1, rest[-1]["event_id"] + 1))
    assert rest[-1]["status"] == "complete"
    assert server.simulator.stats().requests == 1
    assert server.simulator.stats().aborted == 0


@pytest.mark.virtual_time
async def test_a_stream_that_nobody_reads_is_cancelled_at_the_end_of_its_window(
    make_server: MakeServer,
) -> None:
    server = await make_server(SLOW, **{"chat.streams.resume_window": 0.3})
    loop = asyncio.get_running_loop()
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await until_status(ws, "chunk")
    begun = loop.time()

    await server.simulator.until(lambda stats: stats.aborted == 1)

    assert loop.time() - begun > 0.2
    assert within(3.0, begun)
    await server.nothing_held()


async def test_coming_back_in_time_stops_the_window(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0.02, tokens=60), **{"chat.streams.resume_window": 0.4}
    )
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        frames = await until_status(ws, "chunk")
    await until(lambda: server.held()["detached"] == 1)
    async with server.connect() as ws:
        await ws.send_json(resume("r1", frames[-1]["event_id"]))
        assert (await to_end(ws))[-1]["status"] == "complete"  # 1.2 s: longer than the window

    assert server.simulator.stats().aborted == 0


async def test_a_detached_stream_gives_its_place_to_a_waiter(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **{"llm.providers.sim.http_client.concurrent_requests": 1})
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        await server.simulator.until(lambda stats: stats.active == 1)
    await until(lambda: server.held()["detached"] == 1)
    server.simulator.behaviour = QUICK

    async with server.connect() as ws:
        await ws.send_json(chat("r2"))
        assert (await to_end(ws))[-1]["status"] == "complete"
        await ws.send_json(resume("r1", 0))
        assert (await to_end(ws))[-1]["status"] == "cancelled"


async def test_there_are_at_most_max_detached_streams_without_a_reader(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT, **{"chat.streams.max_detached": 2})
    async with server.connect() as ws:
        for number in range(4):
            await ws.send_json(chat(f"r{number}"))
        await server.simulator.until(lambda stats: stats.active == 4)

    await server.simulator.until(lambda stats: stats.aborted == 2)
    assert server.held()["detached"] == 2
    async with server.connect() as ws:
        for number in range(4):
            await ws.send_json(cancel(f"r{number}"))
        ends = [(await to_end(ws))[-1]["status"] for _ in range(4)]
    assert ends == ["cancelled"] * 4


# Conversations.


async def history(server: RunningServer) -> list[tuple[str, str]]:
    """The messages that the provider was sent last."""
    return [
        (message["role"], message["content"])
        for message in server.simulator.bodies[-1]["messages"]
    ]


async def test_turns_of_one_socket_share_their_history(server: RunningServer) -> None:
    async with server.connect() as ws:
        await ws.send_json(chat("r1", "one"))
        answer_text = text_of(await to_end(ws))
        await ws.send_json(chat("r2", "two"))
        await to_end(ws)
        assert await history(server) == [
            ("user", "one"),
            ("assistant", answer_text),
            ("user", "two"),
        ]

        await ws.send_json(chat("r3", "three", conversation_id="c1"))
        await to_end(ws)
        assert await history(server) == [("user", "three")]
    async with server.connect() as ws:
        await ws.send_json(chat("r4", "four"))
        await to_end(ws)
        assert await history(server) == [("user", "four")]  # another socket
        await ws.send_json(chat("r5", "five", conversation_id="c1"))
        await to_end(ws)
        assert [text for role, text in await history(server) if role == "user"] == [
            "three",
            "five",
        ]


async def test_messages_neither_use_nor_write_the_history(server: RunningServer) -> None:
    async with server.connect() as ws:
        await ws.send_json(chat("r1", "one", conversation_id="c1"))
        await to_end(ws)
        await ws.send_json(
            chat("r2", messages=[{"role": "user", "content": "all"}], conversation_id="c1")
        )
        await to_end(ws)
        assert await history(server) == [("user", "all")]
        await ws.send_json(chat("r3", "two", conversation_id="c1"))
        await to_end(ws)

    assert [text for role, text in await history(server) if role == "user"] == ["one", "two"]


# Pings and idleness.

BRISK = {"chat.websocket.ping_interval": 0.4, "chat.websocket.ping_timeout": 0.2}


# In the machine's time a busy one might be taken for a client that is gone.
@pytest.mark.virtual_time
async def test_a_live_client_is_pinged_and_kept(make_server: MakeServer) -> None:
    server = await make_server(**BRISK)
    async with server.connect(autoping=False) as ws:
        for _ in range(3):
            message = await ws.receive(timeout=patience(5))
            assert message.type == WSMsgType.PING
            await ws.pong(message.data)
        await ws.send_json({"action": "ping"})
        assert (await ws.receive_json())["status"] == "pong"


@pytest.mark.virtual_time
async def test_a_client_that_does_not_pong_is_closed_with_1011(make_server: MakeServer) -> None:
    server = await make_server(SILENT, **BRISK)
    loop = asyncio.get_running_loop()
    async with Raw(server) as raw:
        begun = loop.time()
        await raw.upgrade()
        await raw.send_json(chat("r1"))  # data does not replace a pong
        await raw.json_frame()
        opcode, payload = await raw.frame()
        assert opcode == PING
        await raw.send_frame(PONG, payload + b"?")  # another one's
        opcode, payload = await raw.frame()
        assert opcode == CLOSE
        assert closing(payload) == (1011, b"keepalive ping timeout")
        assert await raw.frames() == []
        assert loop.time() - begun > 0.4
        assert within(5.0, begun)
        await until(lambda: server.held()["sockets"] == 0)
    counted = await server.counted("connections_closed", "face", "code")
    assert counted == {("websocket", "1011"): 1}
    async with server.connect() as ws:
        await ws.send_json(cancel("r1"))
        await to_end(ws)


@pytest.mark.virtual_time
async def test_an_idle_client_is_closed_after_idle_timeout(make_server: MakeServer) -> None:
    server = await make_server(
        PACED,
        **{
            "chat.websocket.idle_timeout": 0.3,
            "chat.websocket.ping_interval": 0.2,
            "chat.websocket.ping_timeout": 0.2,
        },
    )
    async with server.connect() as ws:
        await ws.send_json(chat("r1"))
        assert (await to_end(ws))[-1]["status"] == "complete"  # 0.4 s: not idle while it runs
        code, _ = await closed_with(ws)

    assert code == 1000


@pytest.mark.parametrize("payload", [b"", b"\x03\xe9", b"\x03\xe8bye"])
async def test_a_close_frame_is_answered_and_frees_the_place(
    server: RunningServer, payload: bytes
) -> None:
    async with Raw(server) as raw:
        await raw.upgrade()
        await raw.send_frame(CLOSE, payload)
        frames = await raw.frames()

    assert [opcode for opcode, _ in frames] == [CLOSE]
    await server.nothing_held(2)


# The handshake.


async def test_a_foreign_origin_is_refused_before_the_upgrade(make_server: MakeServer) -> None:
    server = await make_server(**{"chat.websocket.allow_origins": ["http://good.example"]})
    async with Raw(server) as raw:
        head = await raw.upgrade("Origin: http://evil.example")
        body = json.loads(await raw.exactly(int(head.headers["content-length"])))
        assert head.status == 403
        assert body["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in head.headers
    for origin in ("http://good.example", "HTTP://GOOD.example", "http://x"):  # x: our own Host
        async with Raw(server) as raw:
            assert (await raw.upgrade(f"Origin: {origin}")).status == 101
    async with Raw(server) as raw:
        assert (await raw.upgrade()).status == 101  # no browser

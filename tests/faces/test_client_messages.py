"""What a client sends on a WebSocket is counted frame by frame, and refused where aiohttp would
not.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import struct
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from aiohttp._websocket.reader import WebSocketDataQueue
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser
from aiohttp.http_websocket import WebSocketReader

from aioserver.faces import client_messages, intake
from aioserver.faces.client_messages import ClientMessages, sendable
from tests.support.chat import chat, until_status
from tests.support.memory import uncollected
from tests.support.raw import BINARY, CLOSE, PING, PONG, TEXT, Raw, closing, masked
from tests.support.server import CONCURRENCY, SILENT, MakeServer
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.errors import AioserverError
    from tests.support.server import RunningServer

CONTINUATION = 0
PING_COMMAND = b'{"action":"ping"}'
MAX_MESSAGE = "chat.websocket.max_message_size"


@contextlib.asynccontextmanager
async def upgraded(server: RunningServer) -> AsyncIterator[Raw]:
    async with Raw(server) as raw:
        assert (await raw.upgrade()).status == 101
        yield raw


async def end_of(raw: Raw) -> tuple[list[tuple[int, bytes]], int]:
    """Read to the close frame; returns the frames before it and its code."""
    frames = []
    while (frame := await raw.frame())[0] != CLOSE:
        frames.append(frame)
    return frames, closing(frame[1])[0]


def code_of(frames: list[tuple[int, bytes]]) -> str:
    """The code of the error in the last text frame."""
    return str(
        json.loads([payload for kind, payload in frames if kind == TEXT][-1])["chunk"]["code"]
    )


# Frames that are refused.


async def test_a_frame_that_is_not_masked_closes_with_1002_and_is_not_carried_out(
    server: RunningServer,
) -> None:
    for opcode, size in [
        *((TEXT, 20), (TEXT, 200), (TEXT, 70_000), (BINARY, 20), (BINARY, 70_000)),
        *((PING, 2), (PONG, 2), (CLOSE, 2)),
    ]:
        payload = PING_COMMAND.ljust(size) if opcode == TEXT else b"\x03\xe8".ljust(size)
        if size < 126:
            head = bytes([size])
        else:
            head = struct.pack("!BH", 126, size) if size < 65536 else struct.pack("!BQ", 127, size)
        async with upgraded(server) as raw:
            # What came before it is answered.
            await raw.send(masked(TEXT, PING_COMMAND) + bytes([0x80 | opcode]) + head + payload)
            frames, code = await end_of(raw)

        assert code == 1002, opcode
        assert [json.loads(frame)["status"] for _, frame in frames] == ["pong"], opcode
        await server.nothing_held()


def test_codes_that_may_be_sent() -> None:
    allowed = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}

    assert {code for code in range(65536) if sendable(code)} == allowed


async def test_a_close_frame_with_a_code_that_is_none_closes_with_1002(
    server: RunningServer,
) -> None:
    for code in [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535]:
        for mask in [b"\0\0\0\0", b"\x12\x34\x56\x78"]:
            payload = struct.pack("!H", code) + b"bye"
            sent = bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
            async with upgraded(server) as raw:
                await raw.send(bytes([0x88, 0x80 | len(sent)]) + mask + sent)
                _, answered = await end_of(raw)

            assert answered == 1002, code


async def test_a_close_frame_with_a_good_code_is_answered(server: RunningServer) -> None:
    for code in [1000, 1001, 1011, 1014, 3000, 4999]:
        async with upgraded(server) as raw:
            frame = masked(CLOSE, struct.pack("!H", code) + b"bye")
            # In pieces.
            await raw.send(frame[:7])
            await raw.send(frame[7:])
            _, answered = await end_of(raw)

        assert answered == 1000, code


# Floods.


@pytest.mark.parametrize(
    "frame",
    [
        masked(PONG, b""),
        masked(PONG, b"x" * 125),
        masked(CONTINUATION, b"", fin=False),
        masked(CONTINUATION, b"x" * 500, fin=False),
    ],
    ids=["empty pongs", "pongs", "empty parts", "small parts"],
)
async def test_frames_that_nobody_sees_are_a_flood_too(
    server: RunningServer, frame: bytes
) -> None:
    begin = masked(TEXT, b"x", fin=False) if frame[0] == CONTINUATION else b""
    async with upgraded(server) as raw:
        await raw.send(begin + frame * 2000)
        frames, code = await end_of(raw)

    assert code == 1008
    assert code_of(frames) == "rate_limit_exceeded"
    await server.nothing_held()


async def test_a_large_message_in_parts_is_no_flood(server: RunningServer) -> None:
    text = b'{"action":"ping","x":"%b"}' % (b"x" * 2_000_000)
    size = 4096
    first, *parts = [text[start : start + size] for start in range(0, len(text), size)]
    async with upgraded(server) as raw:
        await raw.send(masked(TEXT, first, fin=False))
        for part in parts:
            await raw.send(masked(CONTINUATION, part, fin=part is parts[-1]))

        assert (await raw.json_frame())["status"] == "pong"
    assert len(parts) > client_messages.FRAMES_BURST


@pytest.mark.parametrize("line", ["Content-Length: 5", "Transfer-Encoding: chunked"])
async def test_a_large_message_is_read_after_a_handshake_that_announced_a_body(
    server: RunningServer, line: str
) -> None:
    async with Raw(server) as raw:
        assert (await raw.upgrade(line)).status == 101
        await raw.send_json(chat("large", text="x" * 600_000))

        assert (await raw.json_frame())["request_id"] == "large"


@pytest.mark.parametrize("parts", [1, 3])
async def test_more_bytes_than_a_burst_are_a_flood(make_server: MakeServer, parts: int) -> None:
    server = await make_server(**{MAX_MESSAGE: 30_000})
    command = b'{"action":"ping","x":"%b"}' % (b"x" * 29_000)
    cut = len(command) // parts
    pieces = [command[start : start + cut] for start in range(0, len(command), cut)]
    message = b"".join(
        masked(TEXT if not number else CONTINUATION, piece, fin=number == len(pieces) - 1)
        for number, piece in enumerate(pieces)
    )
    async with upgraded(server) as raw:
        for _ in range(2):
            await raw.send(message)
            assert (await raw.json_frame())["status"] == "pong"
        # A second and more would have to pass before the next.
        with contextlib.suppress(ConnectionError):
            await raw.send(message * 4)
        frames, code = await end_of(raw)

    assert code == 1008
    assert code_of(frames) == "rate_limit_exceeded"
    await server.nothing_held()


# Unfinished messages.


@pytest.mark.parametrize("kind", ["frame", "parts"])
async def test_an_unfinished_message_counts_until_it_is_whole_or_its_client_leaves(
    make_server: MakeServer, kind: str
) -> None:
    server = await make_server(SILENT)
    question = json.dumps(chat("r1", messages=[{"role": "user", "content": "x" * 5000}])).encode()
    cut = len(question) - 100
    if kind == "frame":
        whole = masked(TEXT, question)
        first, rest = whole[: len(whole) - 100], whole[len(whole) - 100 :]
    else:
        first = masked(TEXT, question[:cut], fin=False)
        rest = masked(CONTINUATION, question[cut:])
    async with upgraded(server) as raw:
        await raw.send(first)
        await until(lambda: server.held()["body_bytes"] == cut)
        await raw.send(rest)
        # It counts on, until the provider begins to answer.
        await server.simulator.until(lambda stats: stats.active == 1)
        assert server.held()["body_bytes"] == len(question)
        await raw.send(first)
        await until(lambda: server.held()["body_bytes"] == len(question) + cut)
    await until(lambda: server.held()["body_bytes"] <= len(question))
    async with server.connect() as ws:
        await ws.send_json({"action": "cancel", "request_id": "r1"})
        await until_status(ws, "cancelled")
    await server.nothing_held()


async def test_unfinished_messages_beyond_the_bound_close_with_1013(
    make_server: MakeServer,
) -> None:
    server = await make_server(**{f"{CONCURRENCY}.max_body_bytes": 10_000})
    half = masked(TEXT, b"x" * 9000)[:6000]
    async with upgraded(server) as first, upgraded(server) as second:
        await first.send(half)
        await until(lambda: server.held()["body_bytes"] > 5000)
        await second.send(half)
        frames, code = await end_of(second)
        assert code == 1013
        assert code_of(frames) == "server_at_capacity"
        assert f"{CONCURRENCY}.max_body_bytes=10000" in json.loads(frames[-1][1])["chunk"]["error"]
        # The first goes on.
        await first.send(masked(TEXT, b"x" * 9000)[6000:])
        assert code_of([await first.frame()]) == "invalid_json"
    await server.nothing_held()


async def test_an_unfinished_message_of_a_waiting_socket_has_room_for_1_mib(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **{f"{CONCURRENCY}.max_connections": 1, f"{CONCURRENCY}.queue_timeout": 30.0}
    )
    mib = 1 << 20
    async with upgraded(server), upgraded(server) as waiting:
        assert (await waiting.json_frame())["status"] == "queued"
        await waiting.send(masked(TEXT, b"x" * 4 * mib)[: mib - 1000])
        await until(lambda: server.held()["body_bytes"] > mib - 2000)
        await waiting.send(b"x" * 2000)
        frames, code = await end_of(waiting)
        assert code == 1008
        assert code_of(frames) == "rate_limit_exceeded"
    await server.nothing_held()


UNFINISHED = {
    "frame": masked(TEXT, b"x" * 500)[:100],
    "parts": masked(TEXT, b"x", fin=False),
    "head": masked(TEXT, b"x" * 500)[:3],
    "first byte": b"\x81",
    "ping": masked(PING, b"x" * 100)[:50],
}


@pytest.mark.parametrize("kind", UNFINISHED)
async def test_a_message_that_is_not_whole_in_time_closes_with_1008(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(intake, "BODY_TIMEOUT", 0.3)
    server = await make_server()
    async with upgraded(server) as raw:
        await raw.send(masked(TEXT, PING_COMMAND) + UNFINISHED[kind])
        frames, code = await end_of(raw)

    assert code == 1008
    assert json.loads(frames[0][1])["status"] == "pong"
    assert code_of(frames) == "request_timeout"
    await server.nothing_held()


async def test_dripping_does_not_prolong_a_message(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "BODY_TIMEOUT", 0.5)
    server = await make_server()

    async def drip(raw: Raw) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await raw.send(b"x")
                await asyncio.sleep(0.01)

    async with upgraded(server) as raw:
        await raw.send(masked(TEXT, b"x" * 100_000)[:100])
        dripping = asyncio.ensure_future(drip(raw))
        frames, code = await end_of(raw)
        dripping.cancel()

    assert (code, code_of(frames)) == (1008, "request_timeout")


@pytest.mark.virtual_time
async def test_a_whole_message_has_no_deadline(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "BODY_TIMEOUT", 0.2)
    server = await make_server()
    message = masked(TEXT, PING_COMMAND)
    async with upgraded(server) as raw:
        await raw.send(message[:5])
        await raw.send(message[5:])
        assert (await raw.json_frame())["status"] == "pong"
        await asyncio.sleep(0.4)  # what would be too late
        await raw.send(message)
        assert (await raw.json_frame())["status"] == "pong"


# Every cut.


class Recorder:
    """Aiohttp's reader and the socket, as far as they are needed."""

    def __init__(self) -> None:
        self.data = b""
        self.errors: list[AioserverError] = []
        self.gone = 0

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        self.gone += 1

    def break_off(self, error: AioserverError) -> None:
        self.errors.append(error)

    def client_gone(self) -> None:
        self.gone += 1


async def test_the_reader_gets_the_same_bytes_at_every_cut(server: RunningServer) -> None:
    dice = random.Random(3)
    script = b"".join(
        [
            *(masked(TEXT, b"x" * size) for size in (0, 1, 125, 126, 300, 65_536)),
            masked(TEXT, b"ab", fin=False) + masked(PING, b"p"),
            masked(CONTINUATION, b"", fin=False) + masked(CONTINUATION, b"c"),
            *(masked(BINARY, b"\0"), masked(PONG, b""), masked(CLOSE, b"\x03\xe8bye")),
        ]
    )
    sizes = [0, 1, 125, 126, 300, 65_536, 3, 1]
    for number in range(60):
        cuts = sorted(dice.sample(range(len(script)), number and 40))
        if number == 1:
            cuts = list(range(len(script) - 200, len(script)))
        recorder = Recorder()
        messages = ClientMessages(server.context.admission.hold, 1 << 20)
        messages.wrap(recorder)  # type: ignore[arg-type]
        messages.feed_data(script[:2])
        messages.start(recorder)
        for start, end in zip([2, *cuts], [*cuts, len(script)], strict=True):
            if end > 2:
                messages.feed_data(script[max(2, start) : end])

        assert recorder.data == script
        holds = [messages.take_hold() for _ in sizes]
        assert [hold.size for hold in holds] == sizes
        for hold in holds:
            hold.release()
        messages.close()
        assert not recorder.errors
    assert server.held()["body_bytes"] == 0


@pytest.mark.parametrize("piece", [1, 100, 5000])
async def test_an_unfinished_message_costs_little_more_than_its_bytes(
    server: RunningServer, piece: int
) -> None:
    count, size = (1, 20_000) if piece == 1 else (4, 50_000)
    parts = [masked(TEXT, b"x" * (size // 2), fin=False), masked(CONTINUATION, b"x" * size)]
    stream = b"".join(parts)[: size + size // 4]
    queue = WebSocketDataQueue(
        BaseProtocol(asyncio.get_running_loop()), 1 << 16, loop=asyncio.get_running_loop()
    )
    unfinished = []
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(count):
            messages = ClientMessages(server.context.admission.hold, 1 << 24)
            messages.wrap(WebSocketReader(queue, 1 << 24, compress=False, decode_text=False))
            messages.start(Recorder())
            for start in range(0, len(stream), piece):
                messages.feed_data(stream[start : start + piece])
            unfinished.append(messages)
        real = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    counted = server.held()["body_bytes"]
    for messages in unfinished:
        messages.close()

    assert counted > count * size
    assert real < 1.5 * counted
    await server.nothing_held()


async def test_a_flood_behind_a_large_frame_ends_after_the_messages_before_it(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT, **{MAX_MESSAGE: 40_000})
    whole = masked(TEXT, json.dumps({"action": "ping", "request_id": "x" * 30_000}).encode())
    async with upgraded(server) as raw:
        await raw.send(whole[:-10])
        await until(lambda: server.held()["body_bytes"] > 29_000)
        # The rest of the frame, and one that is refused: it is not masked.
        await raw.send(whole[-10:] + b"\x81\x02{}")
        frames, code = await end_of(raw)

    assert code == 1002
    assert len(frames) == 1, "what came before is answered"
    await server.nothing_held()


# What an idle socket keeps.


async def test_an_idle_socket_keeps_nothing_that_only_its_handshake_needed(
    server: RunningServer,
) -> None:
    def kept() -> int:
        return sum(
            isinstance(found_object, HttpRequestParser) for found_object in gc.get_objects()
        )

    with uncollected():
        before = kept()
        async with upgraded(server) as raw:
            await raw.send(masked(TEXT, PING_COMMAND))
            assert (await raw.json_frame())["status"] == "pong"

            assert kept() == before

            await raw.send(masked(PING, b"ping") + masked(CLOSE, b"\x03\xe8"))
            frames, code = await end_of(raw)

    assert (frames, code) == ([(PONG, b"ping")], 1000)
    await server.nothing_held()

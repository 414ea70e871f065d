"""A reader that falls behind, and comes back by the `sequence_number` of the event that told
it.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import anonymous
from aioserver.errors import ResumeGap
from aioserver.protocol.eventstream import parse
from aioserver.streams.cursor import Cursor
from aioserver.streams.entries import CHUNK
from aioserver.streams.formats import RAW
from aioserver.streams.stream import Stream
from aioserver.wings.responses.events import ResponseEvents
from tests.support.passing import settings_for
from tests.support.raw import Raw
from tests.support.responses import connect, create, next_event
from tests.support.scripted_provider import (
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.waiting import until

if TYPE_CHECKING:
    from aioserver.protocol.openai import Shape
    from tests.support.server import MakeServer, RunningServer

# Events of a long answer, and the bytes of text of each: more than a socket takes.
FILLING, BIG = 9, 100_000


def event(kind: str, sequence: int, **fields: Any) -> bytes:
    content = {"type": f"response.{kind}", "sequence_number": sequence, **fields}
    return b"event: response.%b\ndata: %b\n\n" % (kind.encode(), json.dumps(content).encode())


# On its own.


class Writer:
    """A writer that writes nothing by itself."""

    blocked = True

    def write_now(self, _data: bytes) -> bool:
        return False

    def open_fast_path(self, _cursor: Cursor, _shape: Shape | None) -> None:
        return None

    def notify(self, cursor: Cursor) -> None:
        pass

    def send(self, data: bytes) -> None:
        pass

    def drop(self, cursor: Cursor) -> None:
        cursor.removed = True
        cursor.stream.remove_reader(cursor)


def sequences(parts: list[bytes]) -> list[int]:
    return [json.loads(each.data)["sequence_number"] for each in parse(b"".join(parts))]


@pytest.mark.parametrize("seed", range(30))
def test_whoever_comes_back_misses_no_event_and_has_none_twice(seed: int) -> None:
    dice = random.Random(seed)
    stream = Stream("r1", "me", window=30.0, max_bytes=dice.choice((2000, 5000)))
    stream.events = events = ResponseEvents()
    first = sequence = dice.choice((0, 0, 1))
    stream.append_processing()
    cursor = Cursor(Writer(), stream, 0, RAW, lambda _cursor: None)
    stream.add_reader(cursor)
    seen: list[bytes] = []
    while not cursor.removed:
        count = dice.choice((1, 1, 2, 3))
        block = b"".join(
            event("delta", sequence + number, delta="x" * 200) for number in range(count)
        )
        sequence += count
        events.note(block, stream.last + 1)
        stream.append(CHUNK, data=block, count=count)
        if dice.random() < 0.6:
            cursor.render(seen, dice.choice((1, 1, 400)))
    last_seen = sequences(seen)[-1] if seen and b"".join(seen) else -1

    (told,) = sequences([cursor.farewell])
    assert told == last_seen, seed

    number = events.event_before(told, stream.last)
    assert number is not None
    again: list[bytes] = []
    try:
        late = Cursor(Writer(), stream, number, RAW, lambda _cursor: None)
    except ResumeGap:
        oldest = sequences([entry.data for entry in stream.entries if entry.data])[0]
        assert oldest > max(told + 1, first), seed
    else:
        late.render(again, 1 << 20)
        assert sequences(again) == [*range(max(told + 1, first), sequence)], seed


def test_nothing_has_come_yet_for_who_has_seen_nothing() -> None:
    events = ResponseEvents()

    assert events.event_before(-1, 1) == 0
    assert events.event_before(0, 1) is None


# On a whole server.


class Story:
    """A provider whose first answer fills a socket, and whose second one has an event for each of
    `texts`, until one of them is empty.
    """

    def __init__(self) -> None:
        self.texts: asyncio.Queue[str] = asyncio.Queue()
        for _ in range(FILLING):
            self.texts.put_nowait("x" * BIG)
        self.texts.put_nowait("")

    async def play(self, peer: Peer) -> None:
        while True:
            request = await peer.request()
            name = "resp_b" if b'"b"' in request else "resp_a"
            response = {"id": name, "object": "response", "output": []}
            await peer.send(EVENT_STREAM, chunk(event("created", 0, response=response)))
            number = 0
            while text := await self.texts.get():
                number += 1
                peer.write(chunk(event("output_text.delta", number, delta=text)))
                await peer.writer.drain()
            done = {**response, "status": "completed"}
            await peer.send(chunk(event("completed", number + 1, response=done)), LAST_CHUNK)


@pytest.mark.real_time
@pytest.mark.parametrize("how", ["http", "websocket"])
async def test_a_reader_that_is_dropped_before_its_first_event_comes_back_to_it(
    make_server: MakeServer, how: str
) -> None:
    story = Story()
    async with ScriptedProvider(story.play) as provider:
        server = await make_server(
            **settings_for(provider, **{"chat.streams.max_stream_bytes": 1 << 20})
        )
        store, dropped = server.owners.streams, server.context.metrics.slow_clients
        async with Raw(server, receive_buffer=4096) as raw:
            await raw.upgrade(path="/v1/responses")
            await raw.send_json(create("a", store=True, stream_id="a"))
            await until(lambda: store.stats().running == 0 and store.stats().bytes > 8 * BIG)
            # Its socket takes nothing more now.
            await raw.send_json(create("b", store=True, stream_id="b"))
            await until(lambda: store.stats().running == 1)
            (stream,) = [each for each in store.owned_by(anonymous("127.0.0.1")) if not each.ended]
            story.texts.put_nowait("x")
            await until(lambda: stream.last == 3)
            before = stream.bytes
            story.texts.put_nowait("x" * BIG)
            await until(lambda: stream.last == 4)
            # As much as fits, and a little more: the least that can be is discarded.
            overhead = stream.bytes - before - BIG
            story.texts.put_nowait("x" * (stream.max_bytes - stream.bytes - overhead + 10))
            await until(lambda: dropped.value == 1)
            raw.widen()
            told = await raw.json_frame()
            while told.get("stream_id") != "b" or told["type"] == "aioserver:queued":
                told = await raw.json_frame()

        following = await FIRST[how](server, "resp_b", told["sequence_number"])

    assert (told["type"], told["error"]["code"]) == ("response.failed", "slow_client")
    assert (following["type"], following["sequence_number"]) == ("response.created", 0)


async def by_http(server: RunningServer, name: str, sequence: int) -> Any:
    url = f"{server.v1}/responses/{name}?stream=true&starting_after={sequence}"
    async with server.session.get(url) as response:
        assert response.status == 200, await response.text()
        return json.loads((await response.content.readuntil(b"\n\n")).partition(b"data: ")[2])


async def by_websocket(server: RunningServer, name: str, sequence: int) -> Any:
    async with connect(server) as ws:
        await ws.send_json(
            {"type": "response.resume", "response_id": name, "starting_after": sequence}
        )
        return await next_event(ws)


# The first event that comes behind the one with a sequence number.
FIRST = {"http": by_http, "websocket": by_websocket}

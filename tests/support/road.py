"""The way of one answer in memory: the provider's connection, a log and a client's socket, with
nothing but our code between them.

What comes in which turn of the loop is said by the caller: `async with Road("sse") as road: await
road.say(EVENT_STREAM, word(1))`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self, cast

import orjson
import pytest

from aioserver.errors import AioserverError
from aioserver.protocol import eventstream
from aioserver.protocol.openai import Reading
from aioserver.protocol.request_headers import PREAMBLE
from aioserver.protocol.steps import at_once
from aioserver.providers.connections import ConnectionProtocol
from aioserver.providers.exchange import Exchange
from aioserver.providers.holding import Holding
from aioserver.providers.reading_sinks import ChatSink
from aioserver.providers.request import CHAT, ProviderRequest
from aioserver.streams.entries import CANCELLED
from aioserver.streams.fast_path import FastPath, TextPath
from aioserver.streams.formats import EVENTS, MESSAGES, RAW
from aioserver.streams.outbox import Outbox
from aioserver.streams.store import StreamStore
from aioserver.streams.writer import Writer
from aioserver.wings.anthropic.api import MESSAGES as MESSAGE_API
from aioserver.wings.anthropic.bridge.events import MessageWriter
from aioserver.wings.anthropic.bridge.request import chat_request
from aioserver.wings.anthropic.path import MessagePath
from aioserver.wings.anthropic.sink import BridgeSink
from aioserver.wings.responses.api import RESPONSES
from aioserver.wings.responses.bridge.events import ResponseWriter
from aioserver.wings.responses.bridge.output import Frame
from aioserver.wings.responses.bridge.request import chat_request as response_request
from aioserver.wings.responses.path import RESPONSES as RESPONSE_MESSAGES
from aioserver.wings.responses.path import ResponsePath, response_messages
from aioserver.wings.responses.sinks import BridgeSink as ResponseBridgeSink
from tests.support.scripted_provider import chunk
from tests.support.transport import FakeTransport
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aioserver.providers.connections import PooledConnection
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.stream import Stream

FACES = ("openai", "sse", "websocket")
# Beside them there are Messages, as "messages", and BRIDGES.
QUESTION = b'{"model":"m","max_tokens":100,"messages":[{"role":"user","content":"Hello"}]}'
RESPONSE_QUESTION = b'{"model":"m","input":"Hello","stream":true}'
# The faces of the Responses API: over HTTP, and on a WebSocket without and with a lane.
RESPONSES_FACES = ("responses", "responses_ws", "lane")
# Messages and responses that are translated from chat completions.
BRIDGES = ("bridge", "bridged_response", "bridged_response_ws")

# What a provider says.


def event(answer: object) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(answer)


def choice(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish}


def chunk_of(text: str | None, finish: str | None = None, **more: Any) -> bytes:
    """An event that says *text*."""
    return event(
        {"id": "c1", "model": "m", "choices": [choice({"content": text}, finish)], **more}
    )


def raw(text: bytes) -> bytes:
    """An event with *text* between its quotes as it is."""
    return chunk_of("?").replace(b"?", text)


END = chunk_of(None, "stop")
COMPLETED_AT = re.compile(rb'"completed_at":\d+,')


def word(number: int) -> bytes:
    return chunk(chunk_of(f"w{number} "))


# The road.


class Wire:
    """The part of aiohttp's connection that an exchange uses, around a transport in memory."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.protocol = ConnectionProtocol(loop, Outbox(loop))
        self.transport = FakeTransport()
        self.protocol.connection_made(self.transport)
        self.kept = self.closed = 0

    def release(self) -> None:
        self.kept += 1

    def close(self) -> None:
        self.closed += 1
        self.protocol.abort()


@dataclass(frozen=True)
class Seen:
    """All the effects of an answer."""

    body: bytes
    last: int
    status: bytes
    error: str
    text: str
    finish: str | None
    usage: object
    kept: bool
    # What is remembered of the events of a response.
    remembered: object = None


class Road:
    """One answer from a provider to a client: `async with Road("sse") as road: await
    road.say(EVENT_STREAM, word(1))`.
    """

    def __init__(
        self,
        face: str,
        *,
        wire: Wire | None = None,
        window: float = 30.0,
        most: int = 1 << 30,
        slow: bool = False,
        hold: str = PREAMBLE,
    ) -> None:
        self.wire = wire or Wire()
        self.protocol = self.wire.protocol
        bridged = face in BRIDGES
        responses = face in (*RESPONSES_FACES, *BRIDGES[1:])
        messages = face in {"messages", "bridge"}
        private = responses or messages or face == "openai"
        self.streams = StreamStore(max_stream_bytes=most, max_kept_bytes=1 << 30)
        self.stream = self.streams.open(
            "r1", "me", window=0.0 if private else window, private=private
        )
        self.stream.outcome.provider, self.stream.outcome.model = "sim", "m"
        self.stream.append_processing()
        self.reading = Reading()
        self.stream.api = api = RESPONSES if responses else MESSAGE_API if messages else CHAT
        self.sink: StreamSink = (
            bridge(face, self.stream)
            if bridged
            else api.sink(self.stream)
            if private
            else ChatSink(self.stream, self.reading)
        )
        self.held: Holding | None = None
        if hold != PREAMBLE:
            request = ProviderRequest(api, lambda *_: b"{}", streamed=True)
            request.hold = self.stream.outcome.hold = hold
            parts = CHAT.parts if bridged else api.parts
            self.held = Holding(request, self.stream, self.sink, parts, lambda: None, None)
            self.sink.hold(self.held, self.held)
        self.stream.events = self.events = api.events()
        self.outbox = Outbox(asyncio.get_running_loop())
        self.dropped: list[str] = []
        self.look = {
            "openai": RAW,
            "messages": RAW,
            "bridge": RAW,
            "bridged_response": RAW,
            "bridged_response_ws": RESPONSE_MESSAGES,
            "sse": EVENTS,
            "websocket": MESSAGES,
            "responses": RAW,
            "responses_ws": RESPONSE_MESSAGES,
            "lane": response_messages("a"),
        }[face]
        self.chunked = not face.endswith(("websocket", "_ws", "lane"))
        self.socket = FakeTransport(slow=slow)
        self.writer = self.another(self.socket)
        self.cursor = self.writer.follow(self.stream, 0, self.look)
        self.exchange = Exchange(
            cast("PooledConnection", self.wire),
            read_timeout=30.0,
            write_timeout=30.0,
            on_head=lambda _status, _headers: self.sink,
        )
        self.task = asyncio.create_task(self._produce())

    async def __aenter__(self) -> Self:
        await ticks()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.protocol.connection_lost(None)
        await self.task
        await ticks()
        self.writer.close()
        self.socket.lose()
        await ticks()

    def another(self, socket: FakeTransport) -> Writer:
        """A writer to *socket*, of the same face."""
        return Writer(
            socket,
            socket.drain,
            self.outbox,
            send_timeout=30.0,
            chunked=self.chunked,
            on_drop=self.dropped.append,
        )

    async def _produce(self) -> None:
        try:
            await self.exchange.run([b""])
        except AioserverError as error:
            if not self.stream.ended:
                self.stream.fail(error)
        except asyncio.CancelledError:
            self.stream.end(CANCELLED, {})

    def hear(self, *reads: bytes) -> None:
        """Let *reads* come in this turn of the loop."""
        for read in reads:
            self.protocol.data_received(read)

    async def say(self, *reads: bytes) -> None:
        """Let *reads* come, each in a turn of its own."""
        for read in reads:
            self.protocol.data_received(read)
            await ticks(2)

    async def over(self) -> None:
        """End the provider's connection if the answer has no end, and let the client read
        everything.
        """
        if not self.task.done():
            await ticks()
        if not self.task.done():
            self.protocol.connection_lost(None)
        await self.task
        await ticks()

    @property
    def body(self) -> bytes:
        """The bytes that the client has got, without the framing of chunks."""
        return joined(self.socket.written) if self.chunked else self.socket.written

    @property
    def seen(self) -> Seen:
        error = self.stream.error
        return Seen(
            self.body,
            self.stream.last,
            self.stream.end_status,
            error.message if error else "",
            self.reading.text,
            self.reading.finish_reason,
            self.reading.usage,
            bool(self.wire.kept) and not self.wire.closed,
            self.events.state(),
        )


def bridge(face: str, stream: Stream) -> StreamSink:
    """The sink of the bridge *face*, which fills *stream*."""
    if face == "bridge":
        message = at_once(chat_request(QUESTION))
        return BridgeSink(stream, MessageWriter(message, "0" * 32, stream.max_bytes))
    asked = at_once(response_request(RESPONSE_QUESTION))
    frame = Frame("resp_1", 1, "m", asked.repeated)
    return ResponseBridgeSink(stream, ResponseWriter(asked, frame, stream.max_bytes))


def joined(chunks: bytes) -> bytes:
    """The body that *chunks* are; they must be whole."""
    parts = []
    while chunks:
        size, line_end, rest = chunks.partition(b"\r\n")
        length = int(size, 16)
        assert line_end
        assert length
        assert rest[length : length + 2] == b"\r\n"
        parts.append(rest[:length])
        chunks = rest[length + 2 :]
    return b"".join(parts)


@contextlib.contextmanager
def taking() -> Iterator[list[bytes]]:
    """The reads that fast paths take meanwhile."""
    taken: list[bytes] = []

    def watched(take: Callable[[Any, bytes], bool]) -> Callable[[Any, bytes], bool]:
        def asked(path: FastPath, read: bytes) -> bool:
            took = take(path, read)
            if took:
                taken.append(read)
            return took

        return asked

    with pytest.MonkeyPatch.context() as patch:
        for kind in (FastPath, MessagePath, ResponsePath, TextPath):
            patch.setattr(kind, "forward", watched(kind.forward))
        yield taken


async def play(face: str, reads: Iterable[bytes], **changes: Any) -> Seen:
    """The effects of *reads*, each of which comes in a turn of its own."""
    async with Road(face, **changes) as road:
        await road.say(*reads)
        await road.over()
        return road.seen


async def play_bytes(face: str, data: bytes, **changes: Any) -> Seen:
    """The effects of *data* byte for byte, all of which goes the long way."""
    with taking() as taken:
        async with Road(face, **changes) as road:
            road.hear(*(data[at : at + 1] for at in range(len(data))))
            await road.over()
            assert not taken
            return road.seen


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    return [data[a:b] for a, b in pairwise([0, *sorted(set(places)), len(data)]) if a < b]


def assert_same(face: str, answer: Seen, other: Seen) -> None:
    # The second at which a response ends.
    bodies = [COMPLETED_AT.sub(b"", seen.body) for seen in (answer, other)]
    if face in {"openai", "responses"} and any(
        odd in b"".join(bodies) for odd in (b'"error"', b"\n\n:", b"\r", b"\n\n\n")
    ):
        # A block with an error object, or an end, loses its comments; of CRLF the last LF may
        # never come, nor may a blank line behind that of the last event.
        assert eventstream.parse(bodies[0]) == eventstream.parse(bodies[1])
    else:
        assert bodies[0] == bodies[1]
    assert (answer.last, answer.status, answer.error) == (other.last, other.status, other.error)
    assert (answer.text, answer.finish, answer.usage) == (other.text, other.finish, other.usage)
    assert COMPLETED_AT.sub(b"", repr(answer.remembered).encode()) == COMPLETED_AT.sub(
        b"", repr(other.remembered).encode()
    )
    # Not `kept`: what comes behind an end is part of it, or closes the connection, by when it
    # comes.

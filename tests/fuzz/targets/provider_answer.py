"""The bytes of a provider's answer (RFC 9112), whatever they are, on a connection that may break.

The request ends with an answer or with an error that clients may see, the connection is released
or closed, and what clients get does not depend on the reads.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import orjson

from aioserver.config import settings
from aioserver.protocol import eventstream
from aioserver.protocol.openai import Reading
from aioserver.provider_errors import ProviderFault
from aioserver.providers.attempt import Attempt
from aioserver.providers.backpressure import Backpressure
from aioserver.providers.capacity import Capacity
from aioserver.providers.exchange import Exchange
from aioserver.providers.health import Health
from aioserver.providers.http1 import MAX_HEAD_BYTES
from aioserver.providers.request import CHAT, Capabilities, ProviderRequest
from aioserver.streams.store import StreamStore
from aioserver.telemetry.metrics import NO_METER
from aioserver.wings.responses.api import RESPONSES
from tests.fuzz.inputs import parts
from tests.support.road import Wire
from tests.support.schedulers import scheduler
from tests.support.scripted_provider import LIMITS
from tests.support.virtual_loop import run_virtually
from tests.support.waiting import ticks

if TYPE_CHECKING:
    from aioserver.auth.callers import Caller
    from aioserver.limits.estimate import Estimate
    from aioserver.providers.connections import PooledConnection
    from aioserver.streams.stream import Stream

WORDS = (
    *(
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.0 ",
        b" 100 ",
        b" 101 ",
        b" 204 ",
        b" 304 ",
        b" 429 ",
        b" 503 ",
    ),
    *(
        b"Content-Length: ",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"Connection: Upgrade\r\n",
    ),
    *(
        b"Content-Type: text/event-stream\r\n",
        b"Content-Type: application/json\r\n",
        b"Retry-After: ",
    ),
    *(
        b"Content-Encoding: gzip\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"x-ratelimit-a: ",
        b"\r\n\r\n",
        b"5\r\nhello\r\n",
        b";a=b\r\n",
    ),
    *(
        b'"choices":[',
        b'"delta":{',
        b'"content":"',
        b'"finish_reason":"stop"',
        b'"usage":{}',
        b'"index":',
    ),
)
MAX_BODY = 2000
# Path, streamed, whether the answer is read for frames.
KINDS = (
    (CHAT, True, True),
    (CHAT, True, False),
    (CHAT, False, True),
    (CHAT, False, False),
    (RESPONSES, True, False),
)

M = TypeVar("M", bound=Capabilities)


class Costs:
    """Estimates nothing: no request waits."""

    def estimate(self, request: ProviderRequest, model: str) -> Estimate:
        raise AssertionError("it never waits")

    def tokens_per_byte(self, model: str, caller: Caller | None = None) -> float:
        return 0.25


class Provider:
    """The provider of an attempt, which learns nothing."""

    name = "sim"
    meter = NO_METER
    settings = settings.Provider(
        name="sim", base_url="http://127.0.0.1:9/v1", model="m", http_client=LIMITS
    )
    max_response_bytes = MAX_BODY
    backpressure = Backpressure(lambda: 0)

    def __init__(self) -> None:
        self.scheduler, self.costs = scheduler(), Costs()
        health = Health(self.name, NO_METER)
        self.capacity = Capacity(self.name, LIMITS, health, self.scheduler, time.monotonic)

    def head_received(self, attempt: Attempt) -> None:
        pass

    def answered(self, attempt: Attempt) -> None:
        pass

    def capabilities(self, kind: type[M]) -> M:
        return kind(self.settings)


class Outcome(NamedTuple):
    """What the client of a request gets, and what becomes of the connection."""

    fault: str
    status: int
    body: bytes
    events: list[Any]
    end: bytes


def run(data: bytes) -> None:
    """Answer a request with the content in pieces, at once, and byte for byte."""
    case = parts(data)
    kind, lost = case.choice % len(KINDS), case.choice // 16 % 3
    whole, *others = (run_virtually(_answer(kind, lost, reads)) for reads in case.reads())
    for other in others:
        assert other == whole, f"what is read depends on the reads: {other} {whole}"


async def _answer(kind: int, lost: int, reads: list[bytes]) -> Outcome:
    api, streamed, framed = KINDS[kind]
    store = StreamStore(max_stream_bytes=1 << 20, max_kept_bytes=1 << 20)
    stream = store.open("r1", "me", window=30.0) if streamed or framed else None
    if stream is not None:
        stream.outcome.provider, stream.outcome.model = "sim", "m"
        stream.append_processing()
        stream.events = api.events()
    request = ProviderRequest(
        api,
        lambda _settings, _model: b"{}",
        streamed=streamed,
        reading=Reading() if framed else None,
    )
    request.hold_answer = store.hold
    attempt = Attempt(Provider(), request, stream)
    wire = Wire()
    exchange = Exchange(
        cast("PooledConnection", wire),
        read_timeout=30.0,
        write_timeout=30.0,
        on_head=attempt.head_received,
    )
    task = asyncio.create_task(exchange.run([b""]))
    await ticks(2)
    for read in reads:
        if wire.transport.closing:
            break
        wire.protocol.data_received(read)
        under_way = wire.protocol.exchange is not None
        assert not (under_way and wire.protocol.response_parser.parts), "bytes that nobody takes"
        assert store.stats().bytes <= MAX_HEAD_BYTES + 50 * MAX_BODY
    if lost and not wire.transport.closing:
        wire.protocol.connection_lost(ConnectionResetError() if lost == 2 else None)
    fault = ""
    try:
        await task
        attempt.conclude()
    except ProviderFault as error:
        # A client may see it, so its frame can be written.
        orjson.dumps(error.as_chunk())
        fault = f"{type(error).__name__}: {error.message}"
        if stream is not None and not stream.ended:
            stream.fail(error)
    assert wire.protocol.exchange is None
    assert wire.protocol.fast_path is None
    assert wire.kept + wire.closed == 1, "the connection is released or closed, once"
    # What follows the answer on a connection that was released aborts it.
    assert wire.transport.aborted or wire.protocol.transport is None or not wire.closed
    wire.protocol.connection_lost(None)
    answer = attempt.answer
    request.let_answer_go()
    return Outcome(
        fault,
        attempt.status,
        answer.body if answer is not None else b"",
        [] if stream is None else _events(stream, framed=framed),
        b"" if stream is None else stream.end_status,
    )


def _events(stream: Stream, *, framed: bool) -> list[Any]:
    """Return the events of a log, which must be whole."""
    if not framed:
        body = b"".join(entry.data for entry in stream.entries)
        assert not body or body.endswith((b"\n\n", b"\r", b"\r\n", b"\n")), "half an event"
        return eventstream.parse(body)
    frames = [orjson.loads(frame) for entry in stream.entries for frame in stream.frames(entry)]
    assert [frame["event_id"] for frame in frames] == list(range(1, stream.last + 1))
    return [(frame["status"], frame["chunk"]) for frame in frames]

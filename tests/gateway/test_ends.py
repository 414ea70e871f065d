"""Answers end for everybody who waits for them, whatever goes wrong at the end."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import anonymous
from aioserver.errors import InternalError, ServerShutdown
from aioserver.gateway.groups import Group
from aioserver.gateway.producers import Producers
from aioserver.gateway.request import Calls, Request, Route
from aioserver.providers.request import CHAT, Answer, ProviderRequest
from aioserver.streams.contracts import AnswerEvents
from aioserver.streams.entries import CHUNK, COMPLETE
from aioserver.streams.store import StreamStore
from aioserver.telemetry.loop_lag import LoopLag
from aioserver.telemetry.metrics import Metrics
from aioserver.telemetry.request_log import RequestLog
from tests.support.chat import read_frames
from tests.support.keys import bearer, keys_of
from tests.support.server import SLOW
from tests.support.waiting import patience, ticks, until

if TYPE_CHECKING:
    from aioserver.errors import AioserverError
    from aioserver.streams.contracts import Queued
    from aioserver.streams.stream import Stream
    from tests.support.server import MakeServer, RunningServer

KEYED = keys_of("web", "root", max_concurrent=1)
WEB = bearer("web")


class Broken:
    """A reader with a bug, which shows at the end of its stream."""

    next_index = 0

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def write_now(self, _data: bytes) -> bool:
        return False

    def open_fast_path(self, _shape: object) -> None:
        """Return None."""

    def notify(self) -> None:
        if self._stream.ended:
            raise RuntimeError("a bug")

    def drop(self, _seen: int) -> None:
        """Do nothing."""

    def report_position(self, _queued: Queued) -> None:
        """Do nothing."""


class BrokenEvents(AnswerEvents):
    """The form of an answer's errors, with a bug."""

    def render(self, error: AioserverError, seen: int | None = None) -> bytes:
        raise RuntimeError("a bug")


async def asked(server: RunningServer) -> tuple[Any, Stream]:
    """A client that reads the answer r1 by SSE, and the stream."""
    body = {"request_id": "r1", "text": "Hello"}
    response = await server.session.post(server.sse, json=body, headers=WEB)
    assert response.status == 200
    (stream,) = server.owners.streams.running()
    await until(lambda: stream.answered)
    return response, stream


async def settled(server: RunningServer, outcomes: dict[tuple[str, ...], int]) -> None:
    """Assert that nothing is held, and that there was one bug."""
    await server.nothing_held()
    server.session.headers.update(bearer("root"))
    assert await server.counted("requests", "outcome") == outcomes
    assert server.context.metrics.bugs.value == 1
    # The key has one answer at once.
    more = {"request_id": "r2", "text": "?"}
    async with server.session.post(server.sse, json=more, headers=WEB) as response:
        assert response.status == 200
        # A client that leaves before that ends its answer.
        await until(lambda: [stream.sent for stream in server.owners.streams.running()] == [True])
    async with server.session.delete(f"{server.sse}/r2", headers=WEB) as deleted:
        assert deleted.status == 204


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the server has logged, but the incidents, which a tick may have found or not.

    asyncio says that a step was slow, on a busy machine.
    """
    return [
        record.getMessage()
        for record in caplog.records
        if record.name not in {"aioserver.monitoring", "asyncio"}
    ]


async def test_a_reader_with_a_bug_keeps_no_other_from_its_end(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(SLOW, **KEYED)
    response, stream = await asked(server)
    broken = Broken(stream)
    stream.readers.insert(0, broken)

    with caplog.at_level(logging.ERROR):
        async with server.session.delete(f"{server.sse}/r1", headers=WEB) as deleted:
            assert deleted.status == 204
        frames = await asyncio.wait_for(read_frames(response), patience(10))
        stream.remove_reader(broken)

    assert frames[-1]["status"] == "cancelled"
    await settled(server, {("cancelled",): 1})
    assert logged(caplog) == ["bug in an answer"]


async def test_an_answer_whose_error_cannot_be_written_ends_with_another(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(SLOW, **KEYED)
    response, stream = await asked(server)
    stream.events = BrokenEvents()
    stream.cancel_reason = ServerShutdown("over")

    with caplog.at_level(logging.ERROR):
        server.context.gateway.lifetime.end(stream)
        frames = await asyncio.wait_for(read_frames(response), patience(10))

    assert frames[-1]["status"] == "error"
    assert frames[-1]["chunk"]["code"] == "internal_error"
    await settled(server, {("internal_error",): 1})
    assert logged(caplog) == ["bug in an answer"]


@pytest.mark.parametrize("sent", [False, True])
async def test_a_bug_after_the_provider_was_asked_is_not_to_be_repeated(
    sent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An SDK repeats a 500, and each time the model's answer is paid for."""
    provider: Any = SimpleNamespace(name="sim", settings=SimpleNamespace(model="m", models=()))
    metrics = Metrics({"sim": provider.settings})
    request_log = RequestLog(metrics, LoopLag(asyncio.get_running_loop(), metrics.loop_lag))
    asked = ProviderRequest(CHAT, lambda _provider, _model: b"", streamed=False)
    route = Route(provider, None, Group("", []))

    async def ask(request: Request) -> Answer:
        request.provider_request.outcome.sent_at = 1.0 if sent else 0.0
        raise RuntimeError("a bug")

    with pytest.raises(InternalError) as caught:
        await Calls(request_log).answer(Request(route, asked, "openai", "r1"), ask)

    assert caught.value.headers().get("x-should-retry") == ("false" if sent else None)
    assert metrics.bugs.value == 1
    assert metrics.outcomes["internal_error"].value == 1
    assert [record.getMessage() for record in caplog.records] == ["bug in an answer"]


class Slow:
    """A keeper whose answer is never kept."""

    def __init__(self) -> None:
        self.kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def keep(self, _stream: Stream) -> asyncio.Future[None]:
        return self.kept


@pytest.mark.parametrize("stopping", [False, True])
async def test_nothing_follows_the_last_event_of_an_answer_that_is_cancelled_while_it_is_kept(
    stopping: bool,
) -> None:
    """A response has its end in its own last event, which its client may have read by then."""
    request_log: Any = SimpleNamespace(finish=lambda *_args, **_kwargs: None)
    producers = Producers(request_log)
    stream = StreamStore(max_stream_bytes=1 << 20, max_kept_bytes=1 << 20).open(
        "r", anonymous("127.0.0.1"), window=9
    )
    keeper: Any = Slow()
    stream.keeper = keeper

    async def produce() -> None:
        stream.append(CHUNK, [b"{}"], data=b"data: the last one\n\n")
        stream.finish({})
        await stream.finished()

    producers.start(stream, produce(), lambda: None)
    await ticks()
    assert not stream.ended

    if stopping:
        await producers.end(lambda: ServerShutdown("the server stops", retry_after=1.0))
    else:
        stream.cancel()
        await until(lambda: stream.ended)

    assert (stream.end_status, stream.error) == (COMPLETE, None)
    assert b"".join(entry.data for entry in stream.entries) == b"data: the last one\n\n"

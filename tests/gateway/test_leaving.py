"""Random leavings by the ten thousand, in memory: all but the network is real."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import NO_CALLER, anonymous
from aioserver.config import settings
from aioserver.errors import AioserverError
from aioserver.gateway.calls import kept_answer
from aioserver.gateway.gateway import Gateway
from aioserver.gateway.request import Request
from aioserver.limits.resource import Ticket
from aioserver.providers.api import CHAT
from aioserver.providers.request import ProviderRequest
from aioserver.streams import entries, stream
from aioserver.streams.lifetime import Lifetime
from aioserver.telemetry.loop_lag import LoopLag
from aioserver.telemetry.metrics import Metrics
from aioserver.telemetry.request_log import RequestLog
from tests.support.outage import JSON, ScriptedExchange
from tests.support.routers import router_of
from tests.support.scripted_provider import LIMITS
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from aioserver.providers.attempt import Attempt
    from aioserver.streams.contracts import Queued

PLACES = 2  # of the provider


class Fake(ScriptedExchange):
    """A provider whose answers take as many turns of the loop as the dice say."""

    def __init__(self, dice: random.Random, lifetime: Lifetime) -> None:
        limits = replace(LIMITS, concurrent_requests=PLACES, queue_size=1000, queue_timeout=60.0)
        super().__init__("sim", limits, dice, lifetime=lifetime)

    async def turns(self) -> None:
        await ticks(self._dice.randrange(5))

    async def exchange(self, attempt: Attempt) -> None:
        request, stream = attempt.request, attempt.stream
        assert self.capacity.inside <= PLACES
        await self.turns()
        self.sent(attempt)
        if request.whole:
            await self.turns()
            attempt.head_received(200, JSON).feed(b"{}")
            return
        assert stream is not None
        stream.mark_answered()
        for _ in range(self._dice.randrange(4)):
            await self.turns()
            stream.append(entries.CHUNK, data=b"data: {}\n\n")
        stream.end(entries.COMPLETE, {})


class Reader:
    """Reads all there is at once."""

    def __init__(self, stream: stream.Stream) -> None:
        self.next_index = 0
        self._stream = stream
        self.notify()

    def write_now(self, _data: bytes) -> bool:
        return False

    def open_fast_path(self, _shape: object) -> None:
        return None

    def notify(self) -> None:
        self.next_index = self._stream.offset + len(self._stream.entries)

    def drop(self, _seen: int) -> None:
        pass

    def report_position(self, _queued: Queued) -> None:
        pass


@pytest.mark.parametrize(
    "count", [2000, pytest.param(100_000, marks=[pytest.mark.stress, pytest.mark.timeout(300)])]
)
async def test_random_leavings_in_memory_give_everything_back(count: int) -> None:
    asyncio.get_running_loop().set_debug(False)  # it remembers where each task was made: slow
    seed = random.randrange(1 << 30)
    print("seed", seed)
    dice = random.Random(seed)
    bounds = settings.Streams(
        resume_window=0.05, max_detached=10, max_stream_bytes=1 << 20, max_kept_bytes=1 << 26
    )
    lifetime = Lifetime(bounds)
    store = lifetime.store
    fake = Fake(dice, lifetime)
    nothing: Any = None
    provider: Any = SimpleNamespace(model="m", models=())
    metrics = Metrics({"sim": provider})
    lag = LoopLag(asyncio.get_running_loop(), metrics.loop_lag)
    gateway = Gateway(
        router_of({"sim": fake}, "sim"),
        lifetime,
        nothing,
        nothing,
        bounds,
        RequestLog(metrics, lag),
    )
    route = router_of({"sim": fake}, "sim").route(None, caller=NO_CALLER)

    async def follow(request: Request, key: str | None) -> None:
        caller = request.caller
        stream = gateway.relay(request)
        reader = Reader(stream)
        stream.add_reader(reader)
        gateway.lifetime.reader_added(stream)
        try:
            for _ in range(3):
                await fake.turns()
            if key is not None and dice.random() < 0.2:
                gateway.cancel(caller, key)
        finally:
            stream.remove_reader(reader)
            gateway.lifetime.reader_removed(stream)

    async def whole(request: Request) -> None:
        if request.resumable:
            async with kept_answer(gateway.keep(request), gateway.lifetime):
                return
        await gateway.call(request)

    async def live(number: int) -> None:
        key = f"{dice.randrange(count)}" if dice.random() < 0.5 else None
        streamed = dice.random() < 0.5
        caller = anonymous(f"line {number % 7}") if streamed else anonymous(None)
        asked = ProviderRequest(
            CHAT, lambda _provider, _model: b"", streamed=streamed, caller=caller
        )
        living: asyncio.Future[Any]
        if streamed:
            request = Request(route, asked, "openai", "private", key)
            living = asyncio.ensure_future(follow(request, key))
        else:
            request = Request(route, asked, "openai", "r", key and f"whole {key}")
            living = asyncio.ensure_future(whole(request))
        for _ in range(2):
            await fake.turns()
        if dice.random() < 0.5:
            living.cancel()
        await asyncio.wait((living,))
        if not living.cancelled() and (fault := living.exception()) is not None:
            assert isinstance(fault, AioserverError), fault

    async def many(worker: int) -> None:
        for number in range(count // 20):
            await live(worker + number)

    async with asyncio.TaskGroup() as group:
        for worker in range(20):
            group.create_task(many(worker))

    await until(lambda: not store.stats().running, state=store.stats)
    capacity = fake.capacity
    await until(lambda: not (capacity.inside or capacity.waiting), state=capacity.stats)
    await until(lambda: not store.stats().finished, state=store.stats)
    lag.close()
    assert (store.stats().bytes, gateway.lifetime.detached) == (0, 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a producer is left"
    assert not fake.scheduler.waiting
    assert not capacity.resource.slots
    assert all(capacity.resource.try_start(Ticket()) for _ in range(PLACES))
    await gateway.close()
    await fake.close()

"""Random leavings by the ten thousand, in memory: only the gate, the gateway and the logs are
real.
"""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import NO_CALLER, anonymous
from aioserver.config import settings
from aioserver.errors import AioserverError
from aioserver.gateway.calls import kept_answer
from aioserver.gateway.gateway import Gateway
from aioserver.gateway.request import Request
from aioserver.limits.estimate import Estimate
from aioserver.limits.gate import Gate
from aioserver.provider_errors import ProviderQueueFull, ProviderQueueTimeout
from aioserver.providers.api import CHAT
from aioserver.providers.budget import Budget
from aioserver.providers.request import Answer, ProviderRequest
from aioserver.streams import entries, stream
from aioserver.streams.lifetime import Lifetime
from aioserver.telemetry.loop_lag import LoopLag
from aioserver.telemetry.metrics import Metrics, ProviderMeter
from aioserver.telemetry.request_log import RequestLog
from tests.support.routers import router_of
from tests.support.scripted_provider import LIMITS
from tests.support.waiting import ticks, until

if TYPE_CHECKING:
    from aioserver.providers.attempt import Attempt
    from aioserver.streams.contracts import Queued

PLACES = 2  # of the provider


class Fake:
    """A provider whose answers take as many turns of the loop as the dice say."""

    def __init__(self, dice: random.Random, lifetime: Lifetime) -> None:
        self.name = "sim"
        self.settings = SimpleNamespace(
            models=(),
            usable=True,
            model="m",
            http_client=LIMITS,
            pass_headers=(),
            continuation="none",
        )
        self.budget = Budget()
        self.meter = ProviderMeter()
        self.lifetime = lifetime
        self.gate = Gate(
            PLACES,
            queue_size=1000,
            queue_timeout=60.0,
            full_error=lambda wait: ProviderQueueFull("full", retry_after=wait),
            timeout_error=lambda wait: ProviderQueueTimeout("late", retry_after=wait),
        )
        self._dice = dice

    def estimate(self, _request: object, _model: object) -> Estimate:
        return Estimate(10, 10, 10)

    @property
    def waiting(self) -> int:
        return self.gate.waiting

    async def turns(self) -> None:
        await ticks(self._dice.randrange(5))

    async def answer(self, attempt: Attempt) -> None:
        request = attempt.request
        if (place := self.gate.try_enter()) is None:
            self.lifetime.make_room(self.name)
            place = await self.gate.enter(
                request.caller.name, request.caller.subflow, on_position=attempt.queued
            )
        with place:
            try:
                await self._answer(attempt)
            finally:
                attempt.ended()

    async def _answer(self, attempt: Attempt) -> None:
        request, stream = attempt.request, attempt.stream
        assert self.gate.inside <= PLACES
        attempt.started()
        await self.turns()
        attempt.sending()
        if request.whole:
            await self.turns()
            attempt.answer = Answer(200, b"{}", "application/json", request.outcome)
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
    fake: Any = Fake(dice, lifetime)
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
    await until(lambda: not fake.gate.inside and not fake.gate.waiting, state=fake.gate.stats)
    await until(lambda: not store.stats().finished, state=store.stats)
    lag.close()
    assert (store.stats().bytes, gateway.lifetime.detached) == (0, 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a producer is left"
    assert all(fake.gate.try_enter() for _ in range(PLACES))
    await gateway.close()

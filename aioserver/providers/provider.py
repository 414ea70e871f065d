"""One provider behind its guards: one queue, one pool, and the meaning of what it answers.

    enter the queue → place taken: `processing` → connection → POST → sinks fill the log

The place and the connection are given back the moment the provider is done, however slow the
client is. A provider knows no face: it is given an `Ask` and fills a `Stream`, or gives an `Answer`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from aioserver.protocol.openai import BadEvent, ErrorEvent, Reading, usage_of
from aioserver.provider_errors import (
    NoProvider,
    ProviderBadResponse,
    ProviderFault,
    ProviderRateLimited,
    StaleConnection,
)
from aioserver.providers.budget import Budget
from aioserver.providers.error_mapping import (
    check_json,
    check_plain,
    event_fault,
    is_of,
    judge,
    passing,
)
from aioserver.providers.exchange import Exchange, Sink
from aioserver.providers.health import Health
from aioserver.providers.pools import Pools
from aioserver.providers.queueing import Line
from aioserver.providers.request import Answer, Ask
from aioserver.providers.sinks import BodySink, ChatSink, EventSink, complete
from aioserver.streams import entries
from aioserver.telemetry.metrics import ProviderMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config import settings
    from aioserver.errors import AioserverError
    from aioserver.limits.gate import GateStats, Place
    from aioserver.providers.pool import PoolStats
    from aioserver.streams.stream import Stream

MAX_ERROR_BYTES = 1 << 20  # of an error's body
BYTES_PER_TOKEN = 4  # of a request, about
WORTH_WAITING = 1.0  # seconds that a provider may rest; for more another is asked, if there is one


@dataclass(frozen=True, slots=True)
class PaceStats:
    """A pace at one moment: starts a minute, how many could start now, seconds of rest."""

    per_minute: int
    left: int
    cooling: float


@dataclass(frozen=True, slots=True)
class ProviderStats:
    """A provider at one moment."""

    name: str
    usable: bool
    queue: GateStats
    pool: PoolStats
    pace: PaceStats
    breaker: str
    flagged: bool


class Provider:
    """One provider.

    Always: `concurrent_requests` requests are under way at most; what was taken for a request is
    free again when `fill` or `call` has ended, however they ended.
    """

    def __init__(
        self,
        given: settings.Provider,
        base_url: str,
        *,
        max_response_bytes: int,
        meter: ProviderMeter | None = None,
    ) -> None:
        self.name = given.name
        self.settings = given
        self.meter = ProviderMeter() if meter is None else meter
        self.on_wait: Callable[[Provider], None] = lambda _provider: None
        self._max_response_bytes = max_response_bytes
        self._gate = Line(given.name, given.http_client)
        self._pace = self._gate.pace
        self._pools = Pools(given, base_url, demand=lambda: self._coming)
        self._health = Health(given.name, self.meter)
        self.budget = Budget()  # of retries
        self._coming = 0  # who waits, or has a place and has not run since: the gate counts less
        self._left: asyncio.Event | None = None  # taken out; set when the last answer has ended

    def prepare(
        self, given: settings.Provider, base_url: str, *, max_response_bytes: int
    ) -> Callable[[], None]:
        """What puts *given* in the place of the settings now. Until it is called nothing changes.

        What is under way ends as it began; places and pace go on with their counts, and the breaker
        does at the same address. One that had refused our key is asked again, and one that wanted a
        rest, where the key or the address is another.

        Raises:
            ConfigurationError: `ca_file` cannot be read, or holds no certificate.
        """
        elsewhere = base_url != self._pools.base_url
        put_pool = self._pools.prepare(given, base_url)

        other_key = given.api_key != self.settings.api_key

        def put() -> None:
            put_pool()
            self.settings = given
            self._max_response_bytes = max_response_bytes
            self._left = None
            self._health.renew(elsewhere=elsewhere, other_key=other_key)
            if elsewhere or other_key:
                self._pace.forget()
            self._gate.adopt(given.http_client)

        return put

    async def fill(self, stream: Stream, ask: Ask) -> None:
        """Ask, and append the answer to *stream*, its end included.

        Raises:
            ProviderFault: no good answer; `stream.answered` tells whether some of it is in the log.
        """
        stream.meter = self.meter
        seen: list[Sink | int] = []
        headers_seen: dict[str, str] = {}

        def on_head(status: int, headers: Mapping[str, str]) -> Sink:
            seen.append(status)
            headers_seen.update(headers)
            self._heard(status, headers, ask)
            stream.headers = passing(headers)
            streamed = status == 200 and ask.streamed and is_of(headers, "text/event-stream")
            sink: Sink
            if streamed and ask.frames:
                sink = ChatSink(stream, ask.reading or Reading())
            elif streamed:
                sink = EventSink(stream, responses=ask.path.endswith("responses"))
            else:
                sink = BodySink(self._max_response_bytes if status == 200 else MAX_ERROR_BYTES)
            seen.append(sink)
            check_plain(headers)
            return sink

        def started() -> None:
            stream.append_processing(self.name, ask.model or self.settings.model)

        def sending() -> None:
            stream.sent = True

        await self._exchange(ask, on_head, stream.queued, started, sending)
        ask.usage, ask.events = stream.usage, stream.last
        ask.fault = stream.error if isinstance(stream.error, ProviderFault) else None
        status, sink = seen
        if not isinstance(sink, BodySink):
            return
        assert isinstance(status, int)
        body = sink.body
        self._judge(ask, status, headers_seen, body)
        if ask.streamed:
            raise ProviderBadResponse("the provider's answer is no event stream")
        check_json(headers_seen, body)
        reading = ask.reading or Reading()
        try:
            chunks = reading.read(body)
        except (BadEvent, ErrorEvent) as exc:
            raise event_fault(exc) from exc
        stream.answer()
        if chunks:
            stream.append(entries.CHUNK, chunks)
        complete(stream, reading)

    async def call(self, ask: Ask, sending: Callable[[], None] | None = None) -> Answer:
        """Ask, and wait for the whole answer; *sending* is called before each try is sent.

        Raises:
            ProviderFault: no good answer.
        """
        status = 0
        headers: Mapping[str, str] = {}
        sink = BodySink(self._max_response_bytes)

        def on_head(got: int, given: Mapping[str, str]) -> Sink:
            nonlocal status, headers, sink
            status, headers = got, given
            self._heard(got, given, ask)
            if got != 200:
                sink = BodySink(MAX_ERROR_BYTES)
            check_plain(given)
            return sink

        await self._exchange(ask, on_head, sending=sending)
        body = sink.body
        self._judge(ask, status, headers, body)
        usage = usage_of(check_json(headers, body))
        ask.usage = usage
        content_type = headers.get("content-type", "")
        return Answer(status, passing(headers), body, content_type, self.name, usage)

    def stats(self) -> ProviderStats:
        """The state now."""
        pace = PaceStats(self._pace.per_minute, self._pace.left, self._pace.cooling)
        return ProviderStats(
            self.name,
            self.settings.usable,
            self._gate.stats(),
            self._pools.stats(),
            pace,
            self._health.breaker.state,
            self._health.flagged,
        )

    def ended(self, ask: Ask, exc: BaseException | None) -> None:
        """A try has ended, well or with *exc*: count it, and learn from it."""
        if self._left is not None and not self._gate.inside:
            self._left.set()
        self._paid(ask, exc)
        trial, ask.trial = ask.trial, False
        outdated, ask.pool = self._outdated(ask), None
        exc = exc or ask.fault
        attempts = self.meter.attempts
        if exc is None:
            attempts["ok"].value += 1
        elif isinstance(exc, ProviderFault):
            if exc.attempt_outcome:
                attempts[exc.attempt_outcome].value += 1
        elif isinstance(exc, asyncio.CancelledError) and ask.record.sent:
            attempts["cancelled"].value += 1
        if self._health.ended(exc, trial=trial, outdated=outdated):
            self._gate.refuse_waiting(self._health.left_alone)

    def refuse(self, why: Callable[[], AioserverError] | None = None) -> None:
        """Let nobody in any more, and tell those who wait."""
        self._gate.close(why or (lambda: NoProvider(f"{self.name} is closing")))

    @property
    def busy(self) -> bool:
        """Whether something is under way here."""
        return self._gate.inside > 0

    def leave(self) -> None:
        """It is taken out of the configuration: nobody comes in, what is under way ends in peace."""
        self._left = asyncio.Event()
        self._health.leave()
        self._gate.refuse_waiting(self._health.left_alone)
        if not self._gate.inside:
            self._left.set()

    async def end(self) -> None:
        """Wait until one that was taken out has ended its last answer, then close it."""
        assert self._left is not None, "taken out before"
        await self._left.wait()
        await self._pools.end()

    async def close(self) -> None:
        """Let nobody in, and close every connection."""
        self.refuse()
        await self._pools.close()

    async def _exchange(
        self,
        ask: Ask,
        on_head: Callable[[int, Mapping[str, str]], Sink],
        told: Callable[[int, float], None] | None = None,
        started: Callable[[], None] | None = None,
        sending: Callable[[], None] | None = None,
    ) -> None:
        """A place, a connection, the request, and the answer by way of *on_head*."""
        record = ask.record
        place: Place | None = None
        try:
            self._check(ask)
            record.lined = record.lined or monotonic()
            given, body = self.settings, b""
            if most := given.http_client.tokens_per_minute:
                body = ask.body(given)
                cost = len(body) // BYTES_PER_TOKEN + (given.max_tokens or 0)
                ask.expected = min(cost, most)  # none costs more: it has an image
            place = self._gate.try_enter(ask.expected)
            if place is None:
                body = b""  # afterwards it may be another: a reload may have changed the model
                place = await self._wait(ask, told)
                self._check(ask)  # it may have begun to fail meanwhile
            limits = self.settings.http_client
            ask.trial = self._health.breaker.enter()
            if started is not None:
                started()
            while True:
                ask.pool = pool = self._pools.pool
                request = self._pools.requests.make(ask.path, body or ask.body(self.settings))
                body = b""  # nothing of it is kept for as long as the answer takes
                connection = await pool.connect()
                if sending is not None:
                    sending()
                record.sent = monotonic()
                exchange = Exchange(
                    connection,
                    read_timeout=limits.read_timeout,
                    write_timeout=limits.write_timeout,
                    on_head=on_head,
                    record=record,
                )
                running = exchange.run(request)
                del request
                try:
                    await running
                    return
                except StaleConnection:
                    # Nothing of an answer had come on a kept connection: repeat at once, on a
                    # fresh one. A fresh connection never raises this, so it ends.
                    self.meter.attempts["stale"].value += 1
                    pool.drop_idle()
        except BaseException as exc:
            self._pools.pool.trim()  # a connection may have been kept for this request
            if isinstance(exc, ProviderRateLimited) and exc.attempt_outcome:  # in its answer
                self._rest(ask, exc)
            raise
        finally:
            if place is not None:
                place.release()

    async def _wait(self, ask: Ask, told: Callable[[int, float], None] | None) -> Place:
        """A place, by way of the line."""
        if self._gate.inside >= self._gate.limit:  # else the pace is in the way
            self.on_wait(self)
        began = monotonic()
        cost, ask.expected = ask.expected, 0
        self._coming += 1
        try:
            place = await self._gate.enter(
                ask.caller.turn,
                ask.caller.line,
                weight=ask.caller.priority,
                on_position=told,
                timeout=max(0.0, self.settings.http_client.queue_timeout - ask.waited),
                at_front=ask.again,
                may_fail_over=ask.elsewhere,
                cost=cost,
            )
        finally:
            self._coming -= 1  # nothing else runs before it asks the pool
            waited = monotonic() - began
            ask.waited += waited
            ask.record.waited += waited
        ask.expected = cost
        return place

    def _judge(self, ask: Ask, status: int, headers: Mapping[str, str], body: bytes) -> None:
        try:
            judge(self.name, status, headers, body)
        except ProviderRateLimited as limited:
            self._rest(ask, limited)
            raise

    def _rest(self, ask: Ask, limited: ProviderRateLimited) -> None:
        """It said that we ask too much."""
        if self._outdated(ask):
            return
        self._pace.cool_down(limited.retry_after or 0.0)
        self._gate.refuse_late(WORTH_WAITING)

    def _paid(self, ask: Ask, exc: BaseException | None) -> None:
        """Correct what *ask* was expected to cost by what it did, as far as that is known."""
        if not ask.expected:
            return
        total = ask.usage.get("total_tokens") if ask.usage is not None else None
        if exc is not None and not ask.record.sent:
            total = 0
        elif not isinstance(total, int) or not 0 <= total < 1 << 40:
            total = max(0, ask.expected - (self.settings.max_tokens or 0)) + ask.events
        self._pace.charge(total - ask.expected)
        ask.expected = 0
        self._gate.serve()

    def _heard(self, status: int, headers: Mapping[str, str], ask: Ask) -> None:
        """The head of an answer is there: a provider that fails no more, and what it says is left."""
        if self._outdated(ask):
            return
        if self._pace.heed(headers) and self._gate.waiting:
            self._gate.refuse_late(WORTH_WAITING)
        if ask.trial and 200 <= status < 300:
            self._health.breaker.answered(trial=True)
            ask.trial = False

    def _outdated(self, ask: Ask) -> bool:
        """Whether *ask* went by the settings of before, to which another key or address may belong."""
        return ask.pool is not None and ask.pool is not self._pools.pool

    def _check(self, ask: Ask) -> None:
        """Raise where the provider is to be left alone."""
        self._health.check()
        if ask.elsewhere and (rest := self._pace.cooling) > WORTH_WAITING:
            raise self._gate.too_soon(rest)

"""One provider behind its guards: one queue, one pool, and the meaning of what it answers.

    queue → place taken: `processing` → connection → POST → sinks fill the log

The place and the connection are given back the moment the provider is done, however slow the
client is. A provider knows no face: it runs an `Attempt`, which fills a `Stream` or has an `Answer`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from aioserver.provider_errors import (
    NoProvider,
    ProviderFault,
    ProviderRateLimited,
    StaleConnection,
)
from aioserver.providers.budget import Budget
from aioserver.providers.exchange import Exchange
from aioserver.providers.health import Health
from aioserver.providers.pools import Pools
from aioserver.providers.queueing import Line
from aioserver.telemetry.metrics import ProviderMeter

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.config import settings
    from aioserver.errors import AioserverError
    from aioserver.limits.gate import GateStats, Place
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.pool import PoolStats

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
    free again when `answer` has ended, however it ended.
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
        self.on_wait: Callable[[str], None] = lambda _name: None
        self.max_response_bytes = max_response_bytes
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
            self.max_response_bytes = max_response_bytes
            self._left = None
            self._health.renew(elsewhere=elsewhere, other_key=other_key)
            if elsewhere or other_key:
                self._pace.forget()
            self._gate.adopt(given.http_client)

        return put

    async def answer(self, attempt: Attempt) -> None:
        """Make *attempt*: wait for a place, send the request, and take the answer in.

        Cancelling is safe: the connection is closed at once, and the place is free.

        Raises:
            ProviderFault: no good answer came; some of it may be in the log.
        """
        record = attempt.request.record
        place: Place | None = None
        ended_by: BaseException | None = None
        try:
            self._check(attempt)
            record.lined = record.lined or monotonic()
            self._expect(attempt)
            place = self._gate.try_enter(attempt.expected_tokens)
            if place is None:
                place = await self._wait(attempt)
                self._check(attempt)  # it may have begun to fail meanwhile
            attempt.trial = self._health.breaker.enter()
            attempt.started()
            await self._exchange(attempt)
            attempt.conclude()
        except BaseException as exc:
            ended_by = exc
            self._pools.pool.trim()  # a connection may have been kept for this request
            if (
                isinstance(exc, ProviderRateLimited) and exc.attempt_outcome
            ):  # else our own pace said it
                self._rest(attempt, exc)
            raise
        finally:
            if place is not None:
                place.release()
            self._ended(attempt, ended_by)

    def heard(self, attempt: Attempt) -> None:
        """Learn from the head of an answer.

        A provider that answers a trial well fails no more, and its headers tell what is left of its
        limits.
        """
        if self._outdated(attempt):
            return
        if self._pace.heed(attempt.headers) and self._gate.waiting:
            self._gate.refuse_late(WORTH_WAITING)
        if attempt.trial and 200 <= attempt.status < 300:
            self._health.breaker.answered(trial=True)
            attempt.trial = False

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

    async def _exchange(self, attempt: Attempt) -> None:
        """Send the request on a connection, and push the answer to the sink of *attempt*."""
        request, limits = attempt.request, self.settings.http_client
        record = request.record
        while True:
            attempt.pool = pool = self._pools.pool
            # After a wait the settings may be others: the body is that for the model of now. Nothing
            # of it is kept for as long as the answer takes.
            data = self._pools.writer.write(request.path, request.body(self.settings))
            connection = await pool.connect()
            attempt.sending()
            record.sent = monotonic()
            exchange = Exchange(
                connection,
                read_timeout=limits.read_timeout,
                write_timeout=limits.write_timeout,
                on_head=attempt.head,
                record=record,
            )
            running = exchange.run(data)
            del data
            try:
                await running
            except StaleConnection:
                # Nothing of an answer had come on a kept connection: repeat at once, on a fresh
                # one. A fresh connection never raises this, so the loop ends.
                self.meter.attempts["stale"].value += 1
                pool.drop_idle()
            else:
                return

    async def _wait(self, attempt: Attempt) -> Place:
        """Wait in the queue for a place."""
        if self._gate.inside >= self._gate.limit:  # else the pace is in the way
            self.on_wait(self.name)
        request = attempt.request
        caller, record = request.caller, request.record
        shown = attempt.stream is not None and not request.whole
        cost, attempt.expected_tokens = attempt.expected_tokens, 0
        began = monotonic()
        self._coming += 1
        try:
            place = await self._gate.enter(
                caller.flow,
                caller.subflow,
                weight=caller.priority,
                on_position=attempt.queued if shown else None,
                timeout=max(0.0, self.settings.http_client.queue_timeout - attempt.waited),
                at_front=attempt.retry,
                may_fail_over=attempt.fallback,
                cost=cost,
            )
        finally:
            self._coming -= 1  # nothing else runs before it asks the pool
            waited = monotonic() - began
            attempt.waited += waited
            record.waited += waited
        attempt.expected_tokens = cost
        return place

    def _expect(self, attempt: Attempt) -> None:
        """Estimate the tokens that *attempt* will cost, where tokens are paced."""
        if limit := self.settings.http_client.tokens_per_minute:
            prompt = len(attempt.request.body(self.settings)) // BYTES_PER_TOKEN
            # At most a minute's worth: a body with a picture has far fewer tokens than its bytes say.
            attempt.expected_tokens = min(prompt + (self.settings.max_tokens or 0), limit)

    def _rest(self, attempt: Attempt, limited: ProviderRateLimited) -> None:
        """Leave the provider alone for as long as it wants: it said that we ask too much."""
        if not self._outdated(attempt):
            self._pace.cool_down(limited.retry_after or 0.0)
            self._gate.refuse_late(WORTH_WAITING)

    def _ended(self, attempt: Attempt, exc: BaseException | None) -> None:
        """Count an attempt that has ended, well or with *exc*, and learn from it."""
        if self._left is not None and not self._gate.inside:
            self._left.set()
        self._charge(attempt, exc)
        trial, attempt.trial = attempt.trial, False
        outdated, attempt.pool = self._outdated(attempt), None
        exc = exc or attempt.fault
        attempts = self.meter.attempts
        if exc is None:
            attempts["ok"].value += 1
        elif isinstance(exc, ProviderFault):
            if exc.attempt_outcome:
                attempts[exc.attempt_outcome].value += 1
        elif isinstance(exc, asyncio.CancelledError) and attempt.request.record.sent:
            attempts["cancelled"].value += 1
        if self._health.ended(exc, trial=trial, outdated=outdated):
            self._gate.refuse_waiting(self._health.left_alone)

    def _charge(self, attempt: Attempt, exc: BaseException | None) -> None:
        """Correct what *attempt* was expected to cost by what it did, as far as that is known."""
        if not attempt.expected_tokens:
            return
        total = attempt.usage.get("total_tokens") if attempt.usage is not None else None
        if exc is not None and not attempt.request.record.sent:
            total = 0
        elif not isinstance(total, int) or not 0 <= total < 1 << 40:
            prompt = attempt.expected_tokens - (self.settings.max_tokens or 0)
            total = max(0, prompt) + attempt.events
        self._pace.charge(total - attempt.expected_tokens)
        attempt.expected_tokens = 0
        self._gate.serve()

    def _outdated(self, attempt: Attempt) -> bool:
        """Return whether *attempt* went by former settings, with another key or address perhaps."""
        return attempt.pool is not None and attempt.pool is not self._pools.pool

    def _check(self, attempt: Attempt) -> None:
        """Raise where the provider is to be left alone."""
        self._health.check()
        if attempt.fallback and (rest := self._pace.cooling) > WORTH_WAITING:
            raise self._gate.too_soon(rest)

"""One provider and its guards: its health, its queue and its pool, which learn from its answers.

This file is one concept: an attempt passes the guards, and its end changes them.

    healthy? → bid → granted: `processing` → connection → POST → sinks fill the log

The place and the connection are given back as soon as the provider's answer has ended, however slow
the client is. A provider knows no face: it runs an `Attempt`, which fills a `Stream` or has an
`Answer`.

A model server that restarts is away for minutes: it cannot be reached, or says that it is not
ready. With `when_down: wait` a request that no other provider can answer waits in the queue until
it is back, for `queue_timeout` at most in all its waits together. The waiting requests are the
trials that show when it is back.

Its guards, the breaker, the pace and the queue, learn from its attempts:

    the head of an answer       its headers report the remaining requests and tokens
    the first content           the provider is not dead
    a refusal for its rate      nothing starts for as long as the provider asks
    the end                     the result goes to the breaker, the real tokens to the pace

The guards ignore an attempt that was sent by former settings, perhaps with another key or to
another address.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

import msgspec

from aioserver.limits.estimate import Estimates
from aioserver.limits.resource import Bid, QueueStats
from aioserver.limits.scheduler import Scheduler
from aioserver.provider_errors import (
    NoProvider,
    ProviderFault,
    ProviderRateLimited,
    StaleConnection,
)
from aioserver.providers.backpressure import Backpressure
from aioserver.providers.breaker import Trials
from aioserver.providers.capacity import Capacity, RetryBudget, RetryBudgetStats, Trial
from aioserver.providers.connections import PooledConnection
from aioserver.providers.costs import Costs, paced_tokens
from aioserver.providers.exchange import Exchange
from aioserver.providers.health import ALONE, WAIT, Health
from aioserver.providers.pool import PoolStats
from aioserver.providers.pools import Pools
from aioserver.providers.request import Capabilities
from aioserver.providers.silence import Silence, SilenceMeter
from aioserver.providers.sinks import BodySink
from aioserver.telemetry.bookkeeping import bookkeeping, nothing
from aioserver.telemetry.metrics import ProviderMeter
from aioserver.telemetry.outcome import PROVIDER, AttemptCost, Fault
from aioserver.telemetry.tracer import AttemptEnd
from aioserver.usage.accounting import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.config import settings
    from aioserver.errors import AioserverError
    from aioserver.limits.resource import Grant, Ticket
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.capacity import ShareProvider
    from aioserver.providers.health import ProviderObserver
    from aioserver.streams.lifetime import Lifetime
    from aioserver.streams.stream import Stream
    from aioserver.telemetry.bugs import Bugs
    from aioserver.telemetry.outcome import Outcome

M = TypeVar("M", bound="Capabilities")


class PaceStats(msgspec.Struct, frozen=True):
    """A snapshot of a pace: starts per minute, how many could start now, seconds of cooling down."""

    per_minute: int
    left: int
    cooling: float


class ProviderStats(msgspec.Struct, frozen=True):
    """A snapshot of a provider."""

    name: str
    usable: bool
    queue: QueueStats
    pool: PoolStats
    pace: PaceStats
    state: str
    flagged: bool
    next_try: float | None
    trials: Trials | None
    silence: Silence
    budget: RetryBudgetStats
    background: tuple[int, int] = (0, 0)
    # Its capabilities, as each API has learned them.
    learned: tuple[Capabilities, ...] = ()


class Provider:
    """One provider, which runs attempts within its limits.

    Always: at most `concurrent_requests` attempts are under way, unless new settings have lowered
    that number since. The end of `run`, in whatever way, gives back all that the attempt has
    taken. The breaker learns the result of each trial, once.

    Created by the registry, which must close it.
    """

    def __init__(
        self,
        settings: settings.Provider,
        base_url: str,
        *,
        max_response_bytes: int,
        meter: ProviderMeter | None = None,
        clock: Callable[[], float] = time.monotonic,
        share: ShareProvider | None = None,
        observer: ProviderObserver = ALONE,
        lifetime: Lifetime | None = None,
        estimates: Estimates | None = None,
        usage: Usage | None = None,
        hop: str = "",
        scheduler: Scheduler | None = None,
    ) -> None:
        self.name = settings.name
        self.scheduler = scheduler or Scheduler(asyncio.get_running_loop())
        self.settings = settings
        self.meter = ProviderMeter() if meter is None else meter
        self._lifetime = lifetime
        self.max_response_bytes = max_response_bytes
        self._silences: SilenceMeter[PooledConnection] = SilenceMeter(
            lambda connection: connection.protocol.exchange, PooledConnection.heard_at
        )
        # Its capabilities, as each API has learned them.
        self._capabilities: dict[type[Capabilities], Capabilities] = {}
        self.clock = clock
        self.health = Health(
            settings.name, self.meter, clock, observer, waits=settings.when_down == WAIT
        )
        self.capacity = Capacity(
            settings.name,
            settings.http_client,
            self.health,
            self.scheduler,
            clock,
            None
            if share is None
            else share(self.scheduler, self.name, self.health, clock, self.make_room),
        )
        self._usage = Usage() if usage is None else usage
        self.costs = Costs(
            self.name,
            self.capacity,
            self._usage,
            Estimates() if estimates is None else estimates,
            clock,
        )
        self.backpressure = Backpressure(
            lambda: self.capacity.waiting + self.capacity.waiting_elsewhere,
            lambda: self.capacity.held_up,
        )
        # Attempts that run.
        self._running = 0
        self.pools = Pools(
            settings,
            base_url,
            pending=lambda: self._pending,
            hop=hop,
            scheduler=self.scheduler,
        )
        self.budget = RetryBudget(clock)
        # Set at the end of the last attempt; None unless the provider is removed.
        self._drained: asyncio.Event | None = None

    def prepare(
        self, settings: settings.Provider, base_url: str, *, max_response_bytes: int
    ) -> Callable[[], None]:
        """Return the function that puts *settings* into effect.

        Nothing changes until it is called.

        Attempts that run end as they began. The counts of places and pace go on, and those of the
        breaker too, unless the address has changed. A provider that had refused our key is asked
        again. A new key or address also ends a cooling down.

        Raises:
            ConfigurationError: `ca_file` cannot be read, or holds no certificate.
        """
        new_address = base_url != self.pools.base_url
        new_key = settings.api_key != self.settings.api_key
        apply_to_pools = self.pools.prepare(settings, base_url)

        def apply() -> None:
            apply_to_pools()
            self.settings = settings
            self.max_response_bytes = max_response_bytes
            self._drained = None
            self._capabilities.clear()
            waits = settings.when_down == WAIT
            self.health.reset(new_address=new_address, new_key=new_key, waits=waits)
            if new_address or new_key:
                self.capacity.pace.forget()
            self.capacity.apply_limits(settings.http_client)
            if self.health.breaker.dead and not waits:
                self.capacity.refuse(self.health.refusal)
            if new_address:
                self.capacity.resume()

        return apply

    def bid(self, attempt: Attempt, parked: float | None = None) -> Bid:
        """Return a bid of *attempt* for a place here. *parked*: the seconds until the bid joins the
        queue, since the provider is away.
        """
        record, cost = attempt.request.record, 0
        if not record.queued_at:
            record.queued_at = self.clock()
        if limit := self.settings.http_client.tokens_per_minute:
            cost = attempt.expected_tokens = self.costs.expected_tokens(attempt, limit)
        part = (
            self.capacity.part(background=True) if attempt.background else self.capacity.resource
        )
        bid = Bid(part, cost, 0.0, attempt.again, movable=attempt.fallback)
        if parked is not None:
            bid.parked = True
            if parked:
                bid.not_before = self.scheduler.time() + parked
        return bid

    def join(self, attempt: Attempt, bid: Bid) -> None:
        """Let the request of *attempt*, which waits elsewhere already, *bid* here, too."""
        self.scheduler.join(attempt.request.ticket, bid)
        self.make_room()

    async def run(self, attempt: Attempt, grant: Grant | None = None) -> None:
        """Run *attempt*: send the request, and receive the answer.

        *grant* is its place; None: the attempt waits for a place here. Cancelling is safe: the
        connection is closed at once, and the place is free.

        Raises:
            ProviderFault: no good answer came; a part of an answer may be in the log.
            DeadlineExceeded: the request would be sent too late.
        """
        error: BaseException | None = None
        try:
            if grant is None:
                self.capacity.check(movable=attempt.fallback)
                bids = (self.bid(attempt),)
                if (grant := enter(attempt, bids)) is None:
                    grant = await granted(attempt, (self,))
            self._begin(attempt, grant)
            await self.exchange(attempt)
            if (steps := attempt.conclude()) is not None:
                await steps
            error = attempt.fault
        except BaseException as exc:
            error = exc
            # A connection may have been kept for this request.
            self.pools.pool.trim()
            # A fault without an outcome comes from our own pace, not from the provider.
            if (
                isinstance(exc, ProviderRateLimited)
                and exc.attempt_outcome
                and not self._outdated(attempt)
            ):
                self.capacity.cool_down(exc.retry_after or 0.0)
            raise
        finally:
            try:
                self._end(attempt, grant, error)
            finally:
                error = None  # its traceback refers to this frame

    def give_up(self, attempt: Attempt, grant: Grant) -> None:
        """Give back *grant*, and the trial that *attempt* may be, unless it has run."""
        try:
            if attempt.trial:
                attempt.trial = False
                self.health.breaker.unsure(trial=True)
        finally:
            grant.cancel()

    def _begin(self, attempt: Attempt, grant: Grant) -> None:
        """Note that *attempt* has its place.

        Raises:
            ProviderFault: the provider has died, or has begun to limit us, while it waited.
        """
        self._running += 1
        attempt.runs = True
        if isinstance(grant.taken, Trial):
            grant.taken.taken = True
            if attempt.trial:
                # The attempt was to be a trial of a sick provider, which has died meanwhile.
                self.health.breaker.unsure(trial=True)
            attempt.trial = True
        elif grant.ticket.queued:
            # It may have died, or begun to limit us, during the wait.
            if self.health.breaker.dead:
                raise self.health.refusal()
            self.capacity.check(movable=attempt.fallback)
        attempt.began = self.clock()
        attempt.started()
        if attempt.unread and self._lifetime is not None:
            # A retry or a failover of an answer without a reader: another request may wait for the
            # place.
            self._lifetime.make_room(self.name, self.capacity.held_up)

    def _end(self, attempt: Attempt, grant: Grant | None, error: BaseException | None) -> None:
        """Give the place back, record the attempt's cost, and learn from its end, in this order:
        the next request may start at once, and write to its client.
        """
        cost: AttemptCost | None = None
        request = attempt.request
        # The callback refers to this attempt.
        request.ticket.estimate = None
        if attempt.runs:
            attempt.runs = False
            self._running -= 1
        try:
            attempt.ended()
            if grant is None:
                leave(request.ticket, self)
            else:
                cost = self.costs.count(attempt, error)
        finally:
            try:
                if grant is not None:
                    spent = None
                    if attempt.expected_tokens:
                        spent, attempt.expected_tokens = paced_tokens(attempt, cost), 0
                    elif not request.estimated and cost is not None and cost.source == PROVIDER:
                        # These tokens were not expected.
                        self.capacity.pace.charge(paced_tokens(attempt, cost))
                    grant.release(0 if cost is None else cost.work, spent)
            finally:
                if self._drained is not None and not self.capacity.inside:
                    self._drained.set()
                self._ended(attempt, error, cost)

    def head_received(self, attempt: Attempt) -> None:
        """Learn from the head of an answer; *attempt* has its status and headers, some of which
        clients may see.
        """
        if self._outdated(attempt):
            return
        if self.capacity.pace.learn(attempt.headers) and self.capacity.waiting:
            self.capacity.refuse_late()

    def answered(self, attempt: Attempt) -> None:
        """Learn that an answer has begun: the provider is not dead."""
        if trial := attempt.trial:
            attempt.trial = False
        if (ticket := attempt.request.ticket).slot is not None:
            # The request does not come back.
            ticket.free_slot()
        if attempt.pool is not self.pools.pool:
            # As in `_outdated`: the attempt was sent by former settings.
            self.health.breaker.unsure(trial=trial)
            # Another trial may start now.
            self.scheduler.serve(self.capacity.resource)
            return
        seconds = self.clock() - (attempt.request.outcome.sent_at or attempt.began)
        if self.health.answered(seconds, trial=trial):
            self.capacity.resume()

    def capabilities(self, kind: type[M]) -> M:
        """Return the capabilities that an API has learned about this provider; each API has its
        own *kind*.
        """
        capabilities = self._capabilities.get(kind)
        if not isinstance(capabilities, kind):
            capabilities = self._capabilities[kind] = kind(self.settings, self.clock)
        return capabilities

    def context_limit(self, model: str) -> int | None:
        """Return the tokens of the context of *model*, if its engine has named them lately."""
        learned = self._capabilities.values()
        return next((limit for each in learned if (limit := each.context_limits.get(model))), None)

    def stats(self) -> ProviderStats:
        """Return a snapshot."""
        now = asyncio.get_running_loop().time()
        pace = self.capacity.pace
        return ProviderStats(
            self.name,
            self.settings.usable,
            self.capacity.stats(),
            self.pools.stats(),
            PaceStats(pace.per_minute, pace.left, pace.cooling),
            self.health.state,
            self.health.flagged,
            self.health.next_try(waited_for=self.capacity.waiting > 0),
            self.health.breaker.trials,
            self._silences.measure(self.pools.in_use, now, self.meter.first_token),
            self.budget.stats(),
            self.capacity.background,
            tuple(self._capabilities.values()),
        )

    def refuse(self, error: Callable[[], AioserverError] | None = None) -> None:
        """Refuse the waiting attempts and all later attempts, each with its own *error*.

        Attempts that have started go on. If there is an *error*, attempts that continue an answer
        go on as well. By default all are refused with `NoProvider`.
        """
        closing = error or (lambda: NoProvider(f"{self.name} is closing"))
        self.capacity.close(closing, finishes=error is not None)

    def remove(self) -> None:
        """Refuse the waiting attempts and all later attempts, since the configuration dropped the
        provider.

        Attempts that have started go on. The function that `prepare` returns brings the provider
        back.
        """
        self._drained = asyncio.Event()
        self.health.remove()
        self.capacity.refuse(self.health.refusal)
        if not self.capacity.inside:
            self._drained.set()

    async def drain(self) -> None:
        """Wait until the last attempt has ended after `remove`, then close the connections."""
        assert self._drained is not None, "`remove` was called before"
        await self._drained.wait()
        await self.pools.drain()

    async def close(self) -> None:
        """Refuse every attempt, and close every connection."""
        self.refuse()
        await self.pools.close()

    async def exchange(self, attempt: Attempt) -> None:
        """Send the request of *attempt* on a connection, and push the answer to its sink.

        `run` calls this when the attempt has its place.

        Raises:
            ProviderFault: there was no connection, or the answer was not complete.
        """
        request, limits = attempt.request, self.settings.http_client
        record, outcome = request.record, request.outcome
        while True:
            if (steps := attempt.preparation()) is not None:
                await steps
            attempt.pool = pool = self.pools.pool
            # No reference to the bytes is kept while the answer comes.
            data = attempt.written(self.pools.writer)
            if (connection := pool.take()) is None:
                began = self.clock()
                connection = await pool.connect()
                record.connecting += self.clock() - began
            try:
                if request.bound is not None:
                    request.bound.start(self.name)
                outcome.sent_at = self.clock()
                exchange = Exchange(
                    connection,
                    read_timeout=limits.read_timeout,
                    write_timeout=limits.write_timeout,
                    on_head=attempt.head_received,
                    record=record,
                    backpressure=attempt.backpressure or self.backpressure,
                )
                if limits.first_token_timeout is not None and attempt.streamed:
                    exchange.bound_first_token(
                        limits.first_token_timeout, lambda: attempt.answered
                    )
                attempt.sending(exchange)
                if self._usage.ledger is not None:
                    self.costs.sent(attempt)
                running = exchange.run(data, attempt.body)
            except BaseException:
                connection.close()
                raise
            del data
            try:
                await running
            except StaleConnection:
                # Nothing had come on a reused connection, and the provider cannot have worked on
                # the request. It is repeated at once on a new connection, which never raises this.
                outcome.sent_at = 0.0
                if attempt.body is not None and not attempt.body.rewind():
                    raise
                self.meter.attempts["stale"].value += 1
                pool.drop_idle()
            else:
                if not attempt.repeats():
                    return
                # The request was refused, and costs nothing.
                outcome.sent_at = 0.0
            finally:
                attempt.received()

    def make_room(self) -> None:
        """End answers without a reader, and clients that are too slow, for the requests that wait
        for a place that others hold, here or in another instance.
        """
        if self._lifetime is not None:
            self._lifetime.make_room(self.name, self.capacity.held_up)
        self.backpressure.end()

    async def unsend(self, stream: Stream | None, outcome: Outcome) -> None:
        """Note that the request of *stream* waits, and that no attempt is under way any more.

        From now on the wait ends when the client leaves, and it ends here if the client has left
        already: an answer without a reader must not wait in front of others. Cancelling is safe.
        """
        if stream is None or not stream.sent:
            return
        outcome.sent = False
        if self._lifetime is not None and self._lifetime.unsent(stream):
            # The cancellation of this very task arrives.
            await asyncio.sleep(0)

    @property
    def _pending(self) -> int:
        """Return the number of attempts that wait for a place, or have one and do not run yet."""
        capacity = self.capacity
        return capacity.waiting + capacity.inside - self._running

    def _ended(
        self, attempt: Attempt, exc: BaseException | None, cost: AttemptCost | None
    ) -> None:
        """Count an attempt that has ended, well or with *exc*, at *cost*, and learn from it.

        Its place was given back already.
        """
        self.costs.ended(attempt, cost)
        self._count(attempt, exc)
        if not attempt.answered and (exc is None or exc is attempt.fault):
            # An answer in one piece has no first event.
            attempt.first_event()
        if exc is None:
            attempt.pool = None
            return
        trial, attempt.trial = attempt.trial, False
        outdated, attempt.pool = self._outdated(attempt), None
        if outdated or attempt.says_little:
            # The fault belongs to former settings, with another key or address, or to one path.
            self.health.breaker.unsure(trial=trial)
        elif self.health.attempt_failed(
            exc, attempt.began, trial=trial, answered=attempt.answered
        ):
            self.capacity.refuse_waiting()
        if trial:
            # Another trial may start now.
            self.scheduler.serve(self.capacity.resource)

    @property
    def bugs(self) -> Bugs:
        """The counter of the server's bugs."""
        return self.costs.bugs

    @bookkeeping(nothing)
    def _count(self, attempt: Attempt, exc: BaseException | None) -> None:
        """Count an attempt that has ended, well or with *exc*."""
        record, attempts = attempt.request.record, self.meter.attempts
        if exc is None:
            attempts["ok"].value += 1
        elif isinstance(exc, ProviderFault):
            if exc.attempt_outcome:
                attempts[exc.attempt_outcome].value += 1
            if attempt.began:
                fault = Fault(self.name, exc.code, attempt.began, self.clock())
                record.outcome.faults += (fault,)
        elif isinstance(exc, asyncio.CancelledError) and record.outcome.sent_at:
            attempts["cancelled"].value += 1
        if record.trace is not None:
            record.trace.attempt_ended(self._end_of(attempt, exc))

    @bookkeeping(nothing)
    def waited_in_vain(self, attempt: Attempt, exc: BaseException) -> None:
        """Note that *attempt* got *exc* instead of a place."""
        if (trace := attempt.request.record.trace) is not None:
            trace.attempt_ended(self._end_of(attempt, exc))

    def _outdated(self, attempt: Attempt) -> bool:
        """Return whether *attempt* was sent by former settings, perhaps with another key or
        address.
        """
        return attempt.pool is not None and attempt.pool is not self.pools.pool

    def _end_of(self, attempt: Attempt, exc: BaseException | None) -> AttemptEnd:
        record, sink = attempt.request.record, attempt.sink
        body = sink.body if isinstance(sink, BodySink) and attempt.status == 200 else b""
        timed = record.streamed and record.first_event_at > attempt.began
        return AttemptEnd(
            provider=self.name,
            model=attempt.model or self.settings.model,
            base_url=self.pools.base_url,
            began=attempt.began,
            ended=self.clock(),
            first_chunk=record.first_event_at - record.outcome.sent_at if timed else 0.0,
            status=attempt.status,
            error=exc,
            usage=record.outcome.usage,
            body=body,
        )


def enter(attempt: Attempt, bids: Sequence[Bid]) -> Grant | None:
    """Return the first free grant of *bids*, one of which belongs to *attempt*; None: the request
    waits; call `granted` next.

    Raises:
        ProviderFault: the request may not wait at any provider.
    """
    request = attempt.request
    ticket = request.ticket
    if not ticket.work:
        ticket.estimate = attempt.work
    if attempt.hop is not None:
        ticket.goes_on = True
    report = None
    if (bound := request.bound) is not None:
        ticket.deadline = bound.next
        report = attempt.queued
    elif attempt.stream is not None and not request.whole:
        # A stream shows its client the position.
        report = attempt.queued
    return attempt.provider.scheduler.enter(ticket, bids, report)


async def granted(attempt: Attempt, providers: Sequence[Provider]) -> Grant:
    """Return the grant that the request of *attempt* waits for at *providers*. Cancelling is safe.

    Raises:
        ProviderFault: the request was refused.
    """
    request, clock = attempt.request, providers[0].clock
    began = clock()
    for provider in providers:
        provider.make_room()
    grant: Grant | None = None
    try:
        grant = await providers[0].scheduler.granted(request.ticket)
        request.record.waited(grant.resource.name, began, clock())
    except BaseException as error:
        if grant is not None:
            grant.cancel()
        elif len(providers) == 1:
            request.record.waited(providers[0].name, began, clock())
            providers[0].waited_in_vain(attempt, error)
        raise
    return grant


def leave(ticket: Ticket, provider: Provider) -> None:
    """End the wait of *ticket*, if it waits, at *provider* and all others."""
    if ticket.bids or ticket.outcome is not None:
        provider.scheduler.leave(ticket)

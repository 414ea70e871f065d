"""A client's request on its way to a provider: its route, its caller, the ids by which it is known,
and the wait for an answer that is not streamed.

A call has no log, so no client can come back for it: it runs in the task of the handler that waits
for it, and ends with it. Other answers are kept in a stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from functools import partial
from operator import attrgetter
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.errors import (
    AioserverError,
    DeadlineExceeded,
    InternalError,
    ServerShutdown,
    StreamNotFound,
)
from aioserver.gateway.contracts.keeper import Keeper
from aioserver.gateway.groups import Group
from aioserver.limits.deadline import NO_GUARD, Guard
from aioserver.limits.quota import MAX_WAIT
from aioserver.limits.resource import Grant
from aioserver.providers.attempt import Attempt
from aioserver.providers.provider import Provider
from aioserver.providers.request import Answer, ProviderRequest
from aioserver.streams.cursor import ConditionReader
from aioserver.streams.ending import run_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aioserver.auth.callers import Caller
    from aioserver.limits.quota import Quota
    from aioserver.streams.lifetime import Lifetime
    from aioserver.streams.stream import Stream
    from aioserver.telemetry.request_log import RequestLog, RequestRecord


class Route(msgspec.Struct, eq=False):
    """The route of a request: the provider that is asked first, and the model.

    *model* None: the provider's own. The members of *group* are asked first; *provider* and
    *model* are the first of them that is available. The groups in *then* are asked next, in order,
    once it has no member left. *fallbacks* says whether `llm.fallbacks` are asked after all of
    them. *pinned* says that no other model may answer: neither a fallback's, nor that of a member
    with another model.
    """

    provider: Provider
    model: str | None
    group: Group
    fallbacks: bool = False
    pinned: bool = False
    then: Sequence[Group] = ()


class Request(msgspec.Struct, eq=False):
    """One request of a client for an answer; *face* is the name of the face that it came through.

    *name* is its id in log lines. *key* is the id by which the caller finds its stream again, None
    if no client can return for the answer by an id of its own. *digest* distinguishes a repeated
    request from a conflicting one. A *stored* answer is also found by the provider's id, and an
    answer in the *background* runs to its end without a reader. *keeper* stores the answer beyond
    its log, or loads what the request continues; None if neither applies. Each try at a provider
    is an *attempt*, of a class that its API may extend.
    """

    route: Route
    provider_request: ProviderRequest
    face: str
    name: str
    key: str | None = None
    digest: bytes = b""
    stored: bool = False
    background: bool = False
    keeper: Keeper | None = None
    make_attempt: type[Attempt] = Attempt
    # Its grant at its caller's key, once it counts there; until then it *waits*.
    grant: Grant | None = None
    waits: bool = False

    @property
    def _quota(self) -> Quota:
        quota = self.provider_request.caller.quota
        assert quota is not None
        return quota

    def begin(self, on_late: Callable[[DeadlineExceeded], None]) -> None:
        """Count it for its caller's key, or let it wait there; `release` must follow in any case.

        *on_late* is called if it cannot begin before its deadline.

        Raises:
            DeadlineExceeded: it cannot begin in time.
            AioserverError: as `Quota.take`.
        """
        request = self.provider_request
        quota = request.caller.quota
        assert quota is not None, "the caller has a key"
        try:
            if not (quota.queue_size or quota.budget.limited):
                # It begins or is refused, without an estimate of its cost.
                self.grant = quota.take(request.ticket)
            else:
                # The estimate is that of the provider that is asked first.
                provider = self.route.provider
                model = self.route.model or provider.settings.model
                estimate = provider.costs.estimate(request, model)
                loan = request.loan
                on_wait = None if loan is None else loan.lend
                self.grant = quota.take(request.ticket, estimate.tokens, on_wait)
        except AioserverError as refusal:
            bound = request.bound
            late = isinstance(refusal, DeadlineExceeded)
            error = None if bound is None else bound.exceeded() if late else bound.refused(refusal)
            if error is None:
                raise
            on_late(error)
            raise error from None
        if self.grant is None:
            self.waits = True
            # None if its wait is over already.
            for bid in request.ticket.bids:
                request.record.key_place = bid.resource.first_position(bid), bid.resource.waiting

    async def granted(self, on_position: Callable[[int, float], None] | None = None) -> None:
        """Wait until the request, which *waits*, is within its caller's limits.

        *on_position* is called with its position in the queue, and the seconds until its start.

        Raises:
            ConcurrencyExceeded, RateLimitExceeded: a limit is reached.
            DeadlineExceeded: it could not start in time.
        """
        request, quota = self.provider_request, self._quota
        if (bound := request.bound) is not None:
            on_position = bound.telling("its key", on_position)
        try:
            self.grant = await quota.granted(request.ticket, on_position)
            self.waits = False
        except DeadlineExceeded:
            assert bound is not None
            raise bound.exceeded() from None
        finally:
            if quota.queue_size:
                request.record.key_wait = quota.waited(request.ticket)
        if (back := self._regain()) is not None:
            await back

    def forget_grant(self) -> None:
        """Cancel its grant at its caller's key: it begins no answer."""
        if not (self.waits or self.grant is not None):
            return
        self._leave_key()
        if (grant := self.grant) is not None:
            self.grant = None
            grant.cancel()
        # While the server stops there is no place.
        with suppress(AioserverError):
            self._regain()

    def _leave_key(self) -> None:
        if self.waits:
            self.waits = False
            self._quota.leave(self.provider_request.ticket)

    def _regain(self) -> asyncio.Future[None] | None:
        """Let its client take its place back, if it was lent; return a future for that."""
        request = self.provider_request
        if (loan := request.loan) is None or not loan.lent:
            return None
        left = MAX_WAIT - self._quota.waited(request.ticket)
        return loan.regain(asyncio.get_running_loop().time() + left)

    def guard(
        self, on_late: Callable[[DeadlineExceeded], None], over: Callable[[], bool] = bool
    ) -> AbstractContextManager[object]:
        """Return the `Guard` of its deadline; without one, a context that does nothing."""
        bound = self.provider_request.bound
        return NO_GUARD if bound is None else Guard(bound, on_late, over)

    def release(self) -> None:
        """Release the body and all other resources: the request is over."""
        try:
            self.provider_request.release()
        finally:
            try:
                if self.waits or self.grant is not None:
                    self._release_grant()
            finally:
                if self.keeper is not None:
                    self.keeper.release()

    def _release_grant(self) -> None:
        self._leave_key()
        if (grant := self.grant) is None:
            return
        self.grant = None
        if self.provider_request.estimate is None:
            # Its cost was never counted.
            grant.release(0)
        else:
            outcome = self.provider_request.outcome
            grant.release(outcome.work, sum(outcome.spent))

    @property
    def caller(self) -> Caller:
        """The caller that owns the stream, and whose limits count."""
        return self.provider_request.caller

    @property
    def resumable(self) -> bool:
        """Whether the caller can return for the answer."""
        return self.key is not None or self.stored

    def begin_record(self, request_log: RequestLog) -> RequestRecord:
        """Begin the record of this request, which was parsed and goes to its first provider now."""
        provider_request, route = self.provider_request, self.route
        record, provider = provider_request.record, route.provider
        record.face, record.request_id = self.face, self.name
        record.log, record.admitted_at = request_log, monotonic()
        if since := provider_request.waited_since:
            record.door = record.admitted_at - since
        outcome = record.outcome
        outcome.provider, outcome.model = provider.name, route.model or provider.settings.model
        record.group = route.group.name
        if request_log.tracer is not None:
            record.trace = request_log.tracer.begin(
                provider_request.client_headers,
                provider_request.path,
                record.admitted_at,
                provider_request.waited_since,
            )
            if record.trace is not None:
                # The log line of the request refers to its trace.
                record.trace_id = record.trace.trace_id
        return record


logger = logging.getLogger("aioserver.gateway")

ENDED = attrgetter("ended")


class Calls:
    """The calls under way.

    Always: each call is in the request log once it has ended, in whatever way.
    """

    def __init__(self, request_log: RequestLog) -> None:
        self._request_log = request_log
        # The tasks of the waiting handlers.
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        """The number of calls under way."""
        return len(self._tasks)

    async def answer(
        self, request: Request, ask: Callable[[Request], Awaitable[Answer]]
    ) -> Answer:
        """Return the answer to *request*, which *ask* gets from a provider. The body is released.
        Cancelling ends the request.

        Raises:
            ServerShutdown: `close` was called meanwhile.
            InternalError: there was a bug, which is logged.
            AioserverError: as *ask*.
        """
        record = request.begin_record(self._request_log)
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with request.guard(self._request_log.metrics.count_deadline):
                if request.waits:
                    await request.granted()
                answer = await ask(request)
        except asyncio.CancelledError:
            if task not in self._tasks and not task.uncancel():
                # Only `close` has cancelled this task.
                shutdown = shutdown_error()
                self._request_log.finish(record, shutdown)
                raise shutdown from None
            record.abandoned = True
            self._request_log.finish(record, None, cancelled=True)
            raise
        except AioserverError as error:
            self._request_log.finish(record, error)
            raise
        except Exception as exc:
            self._request_log.finish(record, exc)
            logger.exception("bug in an answer")
            self._request_log.metrics.bugs.note(exc)
            bug = InternalError("internal error")
            bug.counted, bug.paid = True, record.outcome.sent_at > 0
            raise bug from exc
        finally:
            self._tasks.discard(task)
            request.release()
        self._request_log.finish(record, None)
        return answer

    def close(self) -> None:
        """End every call with `ServerShutdown`."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            # `answer` raises `ServerShutdown` for this cancellation.
            task.cancel()


@asynccontextmanager
async def kept_answer(stream: Stream, lifetime: Lifetime) -> AsyncIterator[Answer]:
    """Wait for the whole answer in *stream*, and return it; cancelling leaves the stream running.

    Within the `async with` the stream has a reader, and so is not dropped: its answer counts for
    `max_kept_bytes` until it is written.

    Raises:
        ProviderFault: no provider answered.
        StreamNotFound: another request of the caller has cancelled the answer meanwhile.
    """
    reader = ConditionReader(stream, ENDED)
    try:
        lifetime.reader_added(stream)
        await reader.reached
        # The reader has everything, and is not late.
        reader.next_index = stream.offset + len(stream.entries)
        answer = stream.whole
        if not isinstance(answer, Answer):
            raise stream.error or StreamNotFound("this answer was cancelled")
        yield answer
    finally:
        run_all((reader.leave, partial(lifetime.reader_removed, stream)))


def shutdown_error() -> ServerShutdown:
    """Return a new error for a request that cannot be served any more."""
    return ServerShutdown("the server is stopping", retry_after=5.0)

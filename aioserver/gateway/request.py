"""A request of a client on its way to a provider: which one is asked, for whom, and by which names
it is known.
"""

from __future__ import annotations

from contextlib import suppress
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from aioserver.errors import AioserverError
from aioserver.providers.attempt import Attempt

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.errors import DeadlineExceeded
    from aioserver.gateway.groups import Group
    from aioserver.gateway.keeper import Keeper
    from aioserver.limits.key_queue import Turn
    from aioserver.providers.provider import Provider
    from aioserver.providers.request import ProviderRequest
    from aioserver.telemetry.request_log import RequestLog, RequestRecord


class Route(msgspec.Struct, eq=False):
    """The way of a request: the provider that is asked first, and the model.

    *model* None stands for the provider's own. The members of *group* are asked, of which
    *provider* and *model* are the first that can be; *then* are asked next, where it has nobody
    left, in their order. *fallbacks* says whether `llm.fallbacks` are asked behind all of them,
    *pinned* that no other model is asked for: neither a fallback's, nor that of a member with
    another.
    """

    provider: Provider
    model: str | None
    group: Group
    fallbacks: bool = False
    pinned: bool = False
    then: Sequence[Group] = ()


class Request(msgspec.Struct, eq=False):
    """One request of a client for an answer; *face* is the name of the face that it came through.

    *name* is the id by which log lines name it. *key* is the id by which the caller finds its
    stream again, and *digest* tells a repeated request from a conflicting one. *key* is None if
    nobody can come back for the answer by an id of the client's. A *stored* answer is also found
    by the provider's id, and one in the *background* runs to its end without a reader. *keeper*
    keeps the answer beyond its log, or has what the request continues; None if there is nothing of
    either. Each try at a provider is an *attempt*, of a
    class that its API may extend.
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
    # What it counts for the limits of its caller's key, once it counts.
    turn: Turn | None = None

    def begin(self, on_late: Callable[[DeadlineExceeded], None]) -> None:
        """Count it for its caller's key, or let it wait there; `release` follows in any case.

        *on_late* is called where it cannot begin before its deadline.

        Raises:
            DeadlineExceeded: it cannot.
            AioserverError: as `Quota.begin`.
        """
        request = self.provider_request
        caller, bound = request.caller, request.bound
        assert caller.quota is not None, "the caller has a key"
        quota = caller.quota
        try:
            if not (quota.queue_size or quota.budget.limited):
                # It begins or is refused, whatever it may cost.
                self.turn = quota.begin()
                return
            # By what is known of the provider that is asked first.
            estimate = self.route.provider.estimate(request, self.route.model)
            self.turn = quota.begin(
                estimate.tokens,
                flow=caller.subflow,
                work=request.work,
                start_by=inf if bound is None else bound.next,
                on_wait=None if request.loan is None else request.loan.lend,
            )
        except AioserverError as refusal:
            error = None if bound is None else bound.refused(refusal)
            if error is None:
                raise
            on_late(error)
            raise error from None

    @property
    def undecided(self) -> bool:
        """Whether it is not known yet that the request is within its caller's limits."""
        return self.turn is not None and self.turn.decision is not None

    async def decided(self, on_position: Callable[[int, float], None] | None = None) -> None:
        """Wait until the request is within its caller's limits.

        *on_position* is called with its position among those that wait, and the seconds until its
        start.

        Raises:
            ConcurrencyExceeded, RateLimitExceeded: it is not.
        """
        turn = self.turn
        if turn is not None:
            if (bound := self.provider_request.bound) is not None:
                on_position = bound.telling("its key", on_position)
            try:
                await turn.decided(on_position)
            finally:
                self.provider_request.record.key_wait = turn.waited
            if (back := self._regain()) is not None:
                await back

    def forget_turn(self) -> None:
        """Count for its caller's key no longer: it begins no answer."""
        if self.turn is not None and not self.turn.over:
            self.turn.end(unused=True)
            # While the server stops there is none.
            with suppress(AioserverError):
                self._regain()

    def _regain(self) -> asyncio.Future[None] | None:
        """Have its client take its place again, if it was lent; return what is done then."""
        loan, turn = self.provider_request.loan, self.turn
        return None if loan is None or turn is None else loan.regain(turn.latest)

    def release(self) -> None:
        """Forget the body and all that was kept of it: the request is over."""
        try:
            self.provider_request.release()
        finally:
            try:
                if self.keeper is not None:
                    self.keeper.release()
            finally:
                if self.turn is not None:
                    self._end_turn(self.turn)

    def _end_turn(self, turn: Turn) -> None:
        if turn.reservation is None and turn.charge is None:
            # Nobody counts what it has cost.
            turn.end()
        else:
            outcome = self.provider_request.outcome
            turn.end(sum(outcome.spent), outcome.work)

    @property
    def caller(self) -> Caller:
        """The caller that owns the stream, and whose limits count."""
        return self.provider_request.caller

    @property
    def resumable(self) -> bool:
        """Whether the caller can come back for the answer."""
        return self.key is not None or self.stored

    def begin_record(self, request_log: RequestLog) -> RequestRecord:
        """Begin the record of this request, which is understood and goes to its first provider
        now.
        """
        provider_request, route = self.provider_request, self.route
        record, provider = provider_request.record, route.provider
        record.face, record.request_id = self.face, self.name
        record.log, record.admitted_at = request_log, monotonic()
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
                # The log line of the request leads to its trace.
                record.trace_id = record.trace.trace_id
        return record

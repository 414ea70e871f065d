"""The router: it has the provider that a request goes to (choice.py) answer it, and says how often, and who instead.

A fault that came before the first event of an answer may be tried again at the same provider (`retry`:
`max_retries` times, with `backoff_factor`, within the budget), or at another (`failover`:
`llm.fallbacks` in their order, each with its own model; never for a pinned provider). Place and
connection are free meanwhile. provider_errors.py says which fault allows what.

Where there is another provider, one that is sick comes last, and one that is dead is passed over (providers/breaker.py).
"""

from __future__ import annotations

import asyncio
import random
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Self

from aioserver.errors import AioserverError
from aioserver.gateway.choice import ProviderChoice
from aioserver.provider_errors import (
    CircuitOpen,
    ProviderFault,
    ProviderRateLimited,
    RequestNotBridged,
)
from aioserver.providers.attempt import Attempt
from aioserver.providers.breaker import SICK
from aioserver.providers.health import KEY_FAULTS
from aioserver.providers.passthrough import PassedAttempt, PassedRequest
from aioserver.tracebacks import forget_frames
from aioserver.wings.responses.bridged import RESPONSES, ResponseAttempt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.gateway.request import Request
    from aioserver.providers.provider import Provider
    from aioserver.providers.request import Answer, ProviderRequest
    from aioserver.streams.stream import Stream
    from aioserver.telemetry.outcome import Outcome

# The faults of a provider that could not have answered.
UNUSABLE = (*KEY_FAULTS, RequestNotBridged)
# Seconds to which the backoff before a retry grows.
MAX_BACKOFF = 30.0
# Seconds of a backoff that a provider asks for; if it asks for more, its fault is raised instead.
MAX_ASKED_BACKOFF = 60.0
# Seconds for which a request is parked whose provider may be away, before it is tried again.
MAX_PARKED = 2.0


class Router(ProviderChoice):
    """Chooses providers for a request, and has them answer it.

    Always: once an event of an answer is in a log, no further attempt is made for it.

    *random_number* returns numbers from 0.0 to 1.0, for the jitter of backoffs.
    """

    def __init__(
        self,
        providers: Mapping[str, Provider],
        active: str,
        fallbacks: Sequence[str] = (),
        random_number: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(providers, active, fallbacks)
        self._random_number = random_number

    async def fill(self, request: Request, stream: Stream) -> None:
        """Fill *stream* from the first provider that starts to answer.

        Once an event is in the log there is no second attempt: the client would read two answers.

        Raises:
            ProviderFault: no provider answered.
        """
        if (keeper := request.keeper) is None:
            await self._ask(request, stream)
            return
        await keeper.begin()
        stream.attachment.keeper = keeper
        try:
            await self._ask(request, stream)
            await stream.finished()
        except asyncio.CancelledError:
            stream.close_fast_path()
            if not (stream.ended or stream.attachment.ending):
                keeper.cut(stream)
            raise
        finally:
            stream.attachment.keeper = None

    async def call(self, request: Request, stream: Stream | None = None) -> Answer:
        """Return an answer that is not streamed; *stream* is the log that will keep it, if any.

        Raises:
            ProviderFault: no provider answered.
        """
        keeper = request.keeper
        if keeper is not None:
            await keeper.begin()
        attempt = await self._ask(request, stream)
        answer = attempt.answer
        assert answer is not None, "a whole answer was asked for"
        if keeper is not None and (kept := keeper.keep(answer)) is not None:
            await kept
        return answer

    async def pass_on(self, request: Request) -> Answer:
        """Pass a `PassedRequest` on to its provider, once; return its answer, whose body has been handed over.

        Raises:
            ProviderFault: there is no good answer, or not all of it.
        """
        provider, passed = request.route.provider, request.provider_request
        assert isinstance(passed, PassedRequest)
        outcome = passed.outcome
        outcome.begin_attempt(provider.name, passed.model or "")
        attempt = PassedAttempt(provider, passed)
        try:
            await provider.answer(attempt)
        except ProviderFault as fault:
            outcome.attempts = int(bool(fault.attempt_outcome))
            fault.request_outcome = outcome
            raise
        except AioserverError as error:
            error.paid = outcome.sent_at > 0
            raise
        assert attempt.answer is not None
        return attempt.answer

    async def _ask(self, request: Request, stream: Stream | None) -> Attempt:
        """Return the attempt that succeeded, at the first provider that gave an answer.

        Raises:
            ProviderFault: no provider answered.
        """
        route, provider_request = request.route, request.provider_request
        providers = [route.provider]
        if self._fallbacks and not route.pinned:
            others = self._usable_others(route.provider, messages=route.messages)
            providers = _sick_last([route.provider, *others])
        outcome = provider_request.outcome
        tries: list[Try] = []
        while True:
            provider = providers.pop(0)
            try:
                return await self._ask_provider(
                    provider,
                    provider_request,
                    stream,
                    # A fallback uses its own model.
                    provider_request.model if provider is route.provider else None,
                    fallback=bool(providers) and any(p.health.available for p in providers),
                )
            except ProviderFault as fault:
                if _begun(stream) or not fault.failover:
                    raise
                # A fault that is kept here must not lead back to this frame, which leads to the body.
                forget_frames(fault)
                tries.append(Try.of(fault, outcome))
                if not providers:
                    raise _final_try(tries).raised(outcome) from None
                provider.meter.failovers[fault.code].value += 1

    async def _ask_provider(
        self,
        provider: Provider,
        request: ProviderRequest,
        stream: Stream | None,
        model: str | None,
        *,
        fallback: bool,
    ) -> Attempt:
        """Return the attempt at *provider* that succeeded, the first or a retry.

        *fallback* says that another provider can be asked instead.

        Raises:
            ProviderFault: of the last attempt that was made, or of the first if none was.
        """
        outcome, limits = request.outcome, provider.settings.http_client
        provider.budget.add_request()
        attempt_class = ResponseAttempt if request.path == RESPONSES else Attempt
        number, waited, rejoin = 0, 0.0, False
        previous: list[Try] = []
        while True:
            attempt = attempt_class(
                provider,
                request,
                stream,
                model=model,
                waited=waited,
                retry=number > 0,
                rejoin=rejoin,
                fallback=fallback,
            )
            outcome.begin_attempt(provider.name, model or provider.settings.model)
            try:
                await provider.answer(attempt)
            except ProviderFault as fault:
                if not fault.attempt_outcome:
                    # Nothing was sent.
                    outcome.attempts -= 1
                if not _begun(stream):
                    parked = min(MAX_PARKED, self._backoff(1, limits.backoff_factor, None))
                    if await provider.absence.wait(attempt, fault, parked):
                        waited, rejoin = attempt.waited, True
                        continue
                waited, rejoin = attempt.waited, False  # a rest keeps no room in the queue
                if previous and isinstance(fault, CircuitOpen):
                    # What killed the provider says more than that it is dead.
                    raise previous.pop().raised(outcome) from None
                fault.request_outcome = outcome
                forget_frames(fault)  # as in `_ask`
                previous[:] = (Try.of(fault, outcome),)
                number += 1
                backoff = self._backoff(number, limits.backoff_factor, fault.retry_after)
                breaker, limited = provider.health.breaker, isinstance(fault, ProviderRateLimited)
                if not fallback and backoff < (trial := breaker.delay()) < inf:
                    # The retry of a lone client would come shortly before the next trial may start.
                    backoff = trial
                if (
                    _begun(stream)
                    or not fault.retry
                    or number > limits.max_retries
                    or backoff > MAX_ASKED_BACKOFF
                    # The provider asks us to wait, or is dead, and the next one may not be.
                    or (fallback and (limited or breaker.dead))
                ):
                    raise
                if not provider.budget.take_retry():
                    provider.meter.retries_refused.value += 1
                    raise
                provider.meter.retries[fault.code].value += 1
            except AioserverError as error:
                # Raised by us, perhaps since there is no room for the answer that comes.
                error.paid = outcome.sent_at > 0
                raise
            else:
                return attempt
            await asyncio.sleep(backoff)

    def _backoff(self, number: int, factor: float, retry_after: float | None) -> float:
        """Return the seconds of the backoff before retry *number*, at least *retry_after*.

        Backoffs double, and half of each is random ("equal jitter": Marc Brooker, "Exponential
        Backoff And Jitter", 2015).
        """
        seconds = min(MAX_BACKOFF, factor * 2.0 ** min(number - 1, 30))
        return max(seconds * (0.5 + self._random_number() / 2), retry_after or 0.0)


def _begun(stream: Stream | None) -> bool:
    """Return whether an answer has begun in the log, so that no other may follow."""
    return stream is not None and (stream.answered or stream.ended)


def _sick_last(providers: list[Provider]) -> list[Provider]:
    """Return *providers* in the order in which they are asked: their own, but sick ones last.

    Each twentieth request meets a sick provider in its place, so that it can get well.
    """
    sick = [
        provider
        for provider in providers
        if provider.health.state == SICK and not provider.health.breaker.first_in_turn()
    ]
    return [provider for provider in providers if provider not in sick] + sick


class Try(NamedTuple):
    """How one attempt has failed, and what `Outcome` said of it."""

    fault: ProviderFault
    provider: str
    model: str
    headers: Mapping[str, str]

    @classmethod
    def of(cls, fault: ProviderFault, outcome: Outcome) -> Self:
        """Return the attempt that was made last."""
        return cls(fault, outcome.provider, outcome.model, outcome.headers)

    def raised(self, outcome: Outcome) -> ProviderFault:
        """Return the fault, which ends the request now: *outcome* is about this attempt again."""
        _, outcome.provider, outcome.model, outcome.headers = self
        return self.fault


def _final_try(tries: list[Try]) -> Try:
    """Return the attempt whose fault is raised when all providers have failed: the last of *tries*, as a rule.

    A provider that refuses our key is not usable, nor is one that has no form of the request: their faults are returned
    only if there is no other.
    A fault of too many requests is returned only if every usable provider has raised one. The `retry_after`
    is that of the provider that may answer first. *tries* is empty afterwards.
    """
    of_usable = [one for one in tries if not isinstance(one.fault, UNUSABLE)] or tries
    others = [one for one in of_usable if not isinstance(one.fault, ProviderRateLimited)]
    final = (others or of_usable)[-1]
    if final.fault.retry_after is not None:
        final.fault.retry_after = min(
            one.fault.retry_after for one in of_usable if one.fault.retry_after is not None
        )
    tries.clear()
    return final

"""The router: it chooses the provider that a request goes to, and says how often it is asked, and
who instead.

This file is one concept: the table of providers by which a first one is chosen is that of those
which may follow it.

    the request has                  the router asks
    a `provider` (chats only)        that provider, pinned; the request's model, or its own
    no model                         the active provider, with its own model
    a provider's name as model       that provider, pinned, with its own model
    "groq/llama-…", groq configured  groq, pinned; the rest is the model
    another model                    the active provider, with the model unchanged

A request of an API that some providers alone speak (providers/api.py) goes only to those: the
active one stands then for the first of the active provider and the fallbacks that does.

A fault that came before the first event of an answer may be tried again at the same provider
(`retry`: `max_retries` times, with `backoff_factor`, within the budget), or at another
(`failover`: `llm.fallbacks` in their order, each with its own model; never for a pinned provider).
Place and connection are free meanwhile. provider_errors.py says which fault allows what.

Where there is another provider, one that is sick comes last, and one that is dead is passed over
(providers/breaker.py).
"""

from __future__ import annotations

import asyncio
import random
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Self

from aioserver.errors import AioserverError, ModelNotFound
from aioserver.gateway.request import Route
from aioserver.provider_errors import (
    CircuitOpen,
    NoProvider,
    ProviderFault,
    ProviderRateLimited,
    RequestNotBridged,
)
from aioserver.providers.api import CHAT, Api
from aioserver.providers.breaker import SICK
from aioserver.providers.health import KEY_FAULTS
from aioserver.providers.passthrough import PassedAttempt, PassedRequest
from aioserver.tracebacks import forget_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.gateway.request import Request
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.provider import Provider
    from aioserver.providers.request import Answer
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


class Router:
    """Chooses providers for a request, and has them answer it: one of *providers* is *active*,
    others are its *fallbacks*.

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
        self._random_number = random_number
        self.apply(providers, active, fallbacks)

    def apply(
        self, providers: Mapping[str, Provider], active: str, fallbacks: Sequence[str]
    ) -> None:
        """Choose among *providers* from now on; requests under way stay where they are."""
        self._providers, self._active, self._fallbacks = providers, active, fallbacks
        # The client headers that any provider is passed, in lower case.
        self.passed_headers = frozenset(
            name for provider in providers.values() for name in provider.settings.pass_headers
        )

    @property
    def providers(self) -> Mapping[str, Provider]:
        """All providers that are configured, by name."""
        return self._providers

    @property
    def active(self) -> Provider:
        """The provider that is asked if a request names none."""
        return self._providers[self._active]

    @property
    def fallbacks(self) -> list[str]:
        """The names of those that are asked where the active provider fails."""
        return [provider.name for provider in self._usable_others(self.active, CHAT)]

    @property
    def usable(self) -> bool:
        """Whether the active provider can be asked."""
        return self.active.settings.usable

    def route(self, model: str | None, provider: str | None = None, *, api: Api = CHAT) -> Route:
        """Return where a request of *api* with this *model* and *provider* goes.

        Raises:
            ModelNotFound: the request names a provider that is not configured, or not usable; or
                that does not speak *api*, or none that may be asked does.
            NoProvider: the request names none, and the active provider is not usable.
        """
        if provider is not None:
            return Route(self._named(provider), model, renamed=True, pinned=True)
        route = None if model is None else self._by_name(model)
        if route is None:
            route = Route(self._first(api), model, renamed=model is None, pinned=False)
        if not api.speaks(route.provider.settings):
            raise ModelNotFound(
                f"the provider {route.provider.name} does not speak {api.name}: "
                f"{self._speaking(api)}"
            )
        return route

    def _by_name(self, model: str) -> Route | None:
        """Return where a request for *model* goes, if that names a provider; otherwise None.

        Raises:
            ModelNotFound: that provider is not usable.
        """
        if model in self._providers:
            return Route(self._named(model), None, renamed=True, pinned=True)
        prefix, slash, rest = model.partition("/")
        if slash and rest and prefix in self._providers:
            return Route(self._named(prefix), rest, renamed=True, pinned=True)
        return None

    def _first(self, api: Api) -> Provider:
        """Return the first provider, of the active one and the fallbacks, that speaks *api*.

        Raises:
            ModelNotFound: none does.
            NoProvider: the active one does, and is not usable.
        """
        active = self.active
        if api.speaks(active.settings):
            if not active.settings.usable:
                raise NoProvider(f"the active provider {self._active} is not usable")
            return active
        others = self._usable_others(active, api)
        if not others:
            raise ModelNotFound(
                f"the active provider {self._active} does not speak {api.name}, nor does a "
                f"fallback: {self._speaking(api)}"
            )
        return others[0]

    def _speaking(self, api: Api) -> str:
        """Return what to do where a provider does not speak *api*."""
        names = [
            name
            for name, provider in self._providers.items()
            if api.speaks(provider.settings) and provider.settings.usable
        ]
        if not names:
            return f"no provider does, by its setting `{api.setting}`"
        return f"the model may name one that does: {', '.join(names)}"

    def _usable_others(self, first: Provider, api: Api) -> list[Provider]:
        """Return the fallbacks that may be asked instead of *first*, in their order: those that
        speak *api*.
        """
        fallbacks = (self._providers[name] for name in self._fallbacks)
        return [
            provider
            for provider in fallbacks
            if provider is not first and provider.settings.usable and api.speaks(provider.settings)
        ]

    def _named(self, name: str) -> Provider:
        """Return the provider *name*.

        Raises:
            ModelNotFound: it is not configured, or not usable.
        """
        provider = self._providers.get(name)
        if provider is None or not provider.settings.usable:
            usable = ", ".join(
                other_name
                for other_name, other in self._providers.items()
                if other.settings.usable
            )
            raise ModelNotFound(f"no usable provider is named {name[:64]!r}; there are: {usable}")
        return provider

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
        stream.keeper = keeper
        try:
            await self._ask(request, stream)
            await stream.finished()
        except asyncio.CancelledError:
            stream.close_fast_path()
            if not (stream.ended or stream.ending):
                kept = keeper.cut(stream)
                if kept is not None:
                    await kept
            raise
        finally:
            stream.keeper = None

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
        """Pass a `PassedRequest` on to its provider, once; return its answer, whose body has been
        handed over.

        Raises:
            ProviderFault: there is no good answer, or not all of it.
            AioserverError: the client does not send its body.
        """
        provider, passed = request.route.provider, request.provider_request
        assert isinstance(passed, PassedRequest)
        outcome = passed.outcome
        outcome.begin_attempt(provider.name, passed.model or "")
        attempt = PassedAttempt(provider, passed)
        try:
            if passed.upload is not None:
                await passed.upload.begin()
            await provider.run(attempt)
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
            others = self._usable_others(route.provider, provider_request.api)
            providers = _sick_last([route.provider, *others])
        outcome = provider_request.outcome
        tries: list[Try] = []
        while True:
            provider = providers.pop(0)
            try:
                return await self._ask_provider(
                    provider,
                    request,
                    stream,
                    # A fallback uses its own model.
                    provider_request.model if provider is route.provider else None,
                    fallback=bool(providers) and any(p.health.available for p in providers),
                )
            except ProviderFault as fault:
                if _begun(stream) or not fault.failover:
                    raise
                # A fault that is kept here must not lead back to this frame, which leads to the
                # body.
                forget_frames(fault)
                tries.append(Try.of(fault, outcome))
                if not providers:
                    raise _final_try(tries).raised(outcome) from None
                provider.meter.failovers[fault.code].value += 1

    async def _ask_provider(
        self,
        provider: Provider,
        request: Request,
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
        outcome = request.provider_request.outcome
        limits = provider.settings.http_client
        provider.budget.add_request()
        number, waited, rejoin = 0, 0.0, False
        previous: list[Try] = []
        while True:
            attempt = request.make_attempt(
                provider,
                request.provider_request,
                stream,
                model=model,
                waited=waited,
                retry=number > 0,
                rejoin=rejoin,
                fallback=fallback,
            )
            outcome.begin_attempt(provider.name, model or provider.settings.model)
            try:
                await provider.run(attempt)
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
                    # The retry of a lone client would come shortly before the next trial may
                    # start.
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
    """Return the attempt whose fault is raised when all providers have failed: the last of
    *tries*, as a rule.

    A provider that refuses our key is not usable, nor is one that has no form of the request:
    their faults are returned only if there is no other. A fault of too many requests is returned
    only if every usable provider has raised one. The `retry_after` is that of the provider that
    may answer first. *tries* is empty afterwards.
    """
    of_usable = [failed for failed in tries if not isinstance(failed.fault, UNUSABLE)] or tries
    others = [failed for failed in of_usable if not isinstance(failed.fault, ProviderRateLimited)]
    final = (others or of_usable)[-1]
    if final.fault.retry_after is not None:
        final.fault.retry_after = min(
            failed.fault.retry_after
            for failed in of_usable
            if failed.fault.retry_after is not None
        )
    tries.clear()
    return final

"""Which provider is asked, for which model, how often, and who is asked instead.

provider given in a chat           that one, pinned; `model` as given, else its own
model absent, or a provider's name  that provider (absent: the active one), its own model
"groq/llama-…", groq configured     groq, pinned, the rest is the model
anything else                       the active provider, the model unchanged

A fault that came before the provider's first event may be tried again there (`retry`: `max_retries`, with
`backoff_factor`, within the budget), or elsewhere (`failover`: `llm.fallbacks` in their order, each with
its own model; never for who has pinned a provider). Place and connection are free meanwhile. Which fault
allows what is told in errors.py.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aioserver.errors import ModelNotFound
from aioserver.provider_errors import NoProvider, ProviderFault, ProviderRateLimited
from aioserver.providers.attempt import Attempt
from aioserver.providers.health import KEY_FAULTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.providers.provider import Provider
    from aioserver.providers.request import Answer, ProviderRequest
    from aioserver.streams.stream import Stream

MAX_BACKOFF = 30.0  # seconds of a pause that grows
MAX_PAUSE = 60.0  # where a provider asks for more, its fault is passed on


@dataclass(slots=True)  # not frozen: that triples what making one costs
class Route:
    """Where a request goes: the provider that is asked first, and the model.

    *model* None stands for the provider's own. *renamed* says that `model` in a body is replaced,
    *pinned* that no other provider may be asked.
    """

    provider: Provider
    model: str | None
    renamed: bool
    pinned: bool


@dataclass(slots=True)  # as above
class Request:
    """One request of a client for an answer, of whatever *face*.

    *name* is the id by which a log line names it. *key* is the id under which the caller finds its
    stream again, with *digest* to tell a repeated request from a conflicting one; None: nobody comes
    back for it by an id of the client's. A *stored* one is also found by the provider's id.
    """

    route: Route
    provider_request: ProviderRequest
    face: str
    name: str
    key: str | None = None
    digest: bytes = b""
    stored: bool = False

    @property
    def caller(self) -> Caller:
        """The caller, whose streams and limits count."""
        return self.provider_request.caller

    @property
    def resumable(self) -> bool:
        """Whether somebody can come back for the answer."""
        return self.key is not None or self.stored


class Router:
    """Chooses among the providers and asks the one chosen."""

    def __init__(
        self,
        providers: Mapping[str, Provider],
        active: str,
        fallbacks: Sequence[str] = (),
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._providers = providers
        self._active = active
        self._fallbacks = fallbacks
        self._dice = dice

    def apply(
        self, providers: Mapping[str, Provider], active: str, fallbacks: Sequence[str]
    ) -> None:
        """Choose among these from now on; what is under way stays where it is."""
        self._providers, self._active, self._fallbacks = providers, active, fallbacks

    @property
    def providers(self) -> Mapping[str, Provider]:
        """All that are configured, by name."""
        return self._providers

    @property
    def active(self) -> Provider:
        """The one that is asked when a request names none."""
        return self._providers[self._active]

    @property
    def usable(self) -> bool:
        """Whether the active provider can be asked."""
        return self.active.settings.usable

    def route(self, model: str | None, provider: str | None = None) -> Route:
        """Where a request goes.

        Raises:
            ModelNotFound: it names a provider that is not configured, or not usable.
            NoProvider: it names none, and the active one is not usable.
        """
        if provider is not None:
            return Route(self._usable(provider), model, renamed=True, pinned=True)
        if model is None:
            return Route(self._of_last_resort(), None, renamed=True, pinned=False)
        if model in self._providers:
            return Route(self._usable(model), None, renamed=True, pinned=True)
        first, slash, rest = model.partition("/")
        if slash and rest and first in self._providers:
            return Route(self._usable(first), rest, renamed=True, pinned=True)
        return Route(self._of_last_resort(), model, renamed=False, pinned=False)

    async def fill(self, request: Request, stream: Stream) -> None:
        """Fill *stream* from the first provider that starts to answer.

        Once an event is in the log there is no second attempt: the client would read two answers.

        Raises:
            ProviderFault: no provider answered.
        """
        await self._ask(request, stream)

    async def call(self, request: Request, stream: Stream | None = None) -> Answer:
        """Return an answer that is not streamed; *stream*: the one that will keep it.

        Raises:
            ProviderFault: no provider answered.
        """
        attempt = await self._ask(request, stream)
        answer = attempt.answer
        assert answer is not None, "a whole answer was asked for"
        answer.attempts = request.provider_request.record.attempts
        return answer

    async def _ask(self, request: Request, stream: Stream | None) -> Attempt:
        """Return the attempt that succeeded, at the first of the providers that gave an answer."""
        route, asked = request.route, request.provider_request
        provider, model = route.provider, asked.model
        others = [] if route.pinned or not self._fallbacks else self._others(provider)
        faults: list[ProviderFault] = []
        while True:
            try:
                return await self._try(provider, asked, stream, model, fallback=bool(others))
            except ProviderFault as fault:
                faults.append(fault)
                if _begun(stream) or not fault.failover:
                    raise
                if not others:
                    told = _representative(faults)
                    told.attempts = fault.attempts
                    raise told from None
                provider.meter.failovers[fault.code].value += 1
            provider, model = others.pop(0), None  # a fallback uses its own

    async def _try(
        self,
        provider: Provider,
        request: ProviderRequest,
        stream: Stream | None,
        model: str | None,
        *,
        fallback: bool,
    ) -> Attempt:
        """Return the attempt at *provider* that succeeded, after some that did not perhaps.

        *fallback* says that another provider can be asked instead.
        """
        record, limits = request.record, provider.settings.http_client
        provider.budget.add_request()
        number, waited = 0, 0.0
        while True:
            attempt = Attempt(
                provider,
                request,
                stream,
                model=model,
                waited=waited,
                retry=number > 0,
                fallback=fallback,
            )
            record.provider, record.sent = provider.name, 0.0
            record.model = model or provider.settings.model
            record.attempts += 1
            if stream is not None:
                stream.details.attempts = record.attempts
            try:
                await provider.answer(attempt)
            except ProviderFault as fault:
                if not fault.attempt_outcome:
                    record.attempts -= 1  # nothing was sent
                fault.provider, fault.attempts = provider.name, record.attempts
                number, waited = number + 1, attempt.waited
                pause = self._pause(number, limits.backoff_factor, fault.retry_after)
                limited = isinstance(fault, ProviderRateLimited)
                if (
                    _begun(stream)
                    or not fault.retry
                    or number > limits.max_retries
                    or pause > MAX_PAUSE
                    or (limited and fallback)  # it wants a rest, another may want none
                    or not provider.budget.take_retry()
                ):
                    raise
                provider.meter.retries[fault.code].value += 1
            else:
                return attempt
            await asyncio.sleep(pause)

    def _pause(self, number: int, factor: float, retry_after: float | None) -> float:
        """Seconds before retry *number*: doubling, half of it by chance (Brooker, 2015)."""
        pause = min(MAX_BACKOFF, factor * 2.0 ** min(number - 1, 30)) * (0.5 + self._dice() / 2)
        return max(pause, retry_after or 0.0)

    def _others(self, first: Provider) -> list[Provider]:
        """Who may be asked instead of *first*."""
        named = (self._providers[name] for name in self._fallbacks)
        return [one for one in named if one is not first and one.settings.usable]

    def _usable(self, name: str) -> Provider:
        provider = self._providers.get(name)
        if provider is None or not provider.settings.usable:
            usable = ", ".join(
                known for known, one in self._providers.items() if one.settings.usable
            )
            raise ModelNotFound(f"no provider {name[:64]!r} can be asked; there are: {usable}")
        return provider

    def _of_last_resort(self) -> Provider:
        if not self.usable:
            raise NoProvider(f"the active provider {self._active} is not usable")
        return self.active


def _begun(stream: Stream | None) -> bool:
    """Return whether some of an answer is in the log, so that no other may follow."""
    return stream is not None and (stream.answered or stream.ended)


def _representative(faults: Sequence[ProviderFault]) -> ProviderFault:
    """Which of the *faults* of all who may be asked says why nobody answers: the last one.

    But one that refuses our key is not usable, and says so only where no other is; and that there
    are too many requests is true where every usable one says it. A client that is told when to come
    back comes when the first of them may answer.
    """
    usable = [one for one in faults if not isinstance(one, KEY_FAULTS)] or faults
    others = [one for one in usable if not isinstance(one, ProviderRateLimited)]
    told = (others or usable)[-1]
    if told.retry_after is not None:
        told.retry_after = min(one.retry_after for one in usable if one.retry_after is not None)
    return told

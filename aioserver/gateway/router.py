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
from typing import TYPE_CHECKING, TypeVar

from aioserver.errors import ModelNotFound
from aioserver.provider_errors import NoProvider, ProviderFault, ProviderRateLimited
from aioserver.providers.health import KEY_FAULTS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from aioserver.providers.provider import Provider
    from aioserver.providers.request import Answer, Ask
    from aioserver.streams.stream import Stream

T = TypeVar("T")
MAX_BACKOFF = 30.0  # seconds of a pause that grows
MAX_PAUSE = 60.0  # where a provider asks for more, its fault is passed on


@dataclass(slots=True)  # not frozen: that triples what making one costs
class Route:
    """Who is asked. *model* None: the provider's own; *renamed*: `model` in a body is replaced."""

    provider: Provider
    model: str | None
    renamed: bool
    pinned: bool


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

    async def fill(self, route: Route, stream: Stream, ask: Ask) -> None:
        """Fill *stream* with an answer.

        Raises:
            ProviderFault: nobody gave one.
        """

        def once(provider: Provider) -> Awaitable[None]:
            stream.attempts = ask.record.attempts
            return provider.fill(stream, ask)

        await self._ask(route, ask, once, lambda: stream.answered or stream.ended)

    async def call(
        self, route: Route, ask: Ask, sending: Callable[[], None] | None = None
    ) -> Answer:
        """An answer that is not streamed; *sending* is called when something goes to a provider.

        Raises:
            ProviderFault: nobody gave one.
        """
        answer = await self._ask(
            route, ask, lambda provider: provider.call(ask, sending), lambda: False
        )
        answer.attempts = ask.record.attempts
        return answer

    async def _ask(
        self,
        route: Route,
        ask: Ask,
        once: Callable[[Provider], Awaitable[T]],
        begun: Callable[[], bool],
    ) -> T:
        """What *once* gives for the first provider that answers; *begun*: too late for another."""
        provider = route.provider
        if route.pinned or not self._fallbacks:
            return await self._tries(provider, ask, once, begun, alone=True)
        others = self._others(provider)
        faults: list[ProviderFault] = []
        while True:
            ask.elsewhere = bool(others)
            try:
                return await self._tries(provider, ask, once, begun, alone=not others)
            except ProviderFault as fault:
                faults.append(fault)
                if begun() or not fault.failover:
                    raise
                if not others:
                    told = _told(faults)
                    told.attempts = fault.attempts
                    raise told from None
                provider.meter.failovers[fault.code].value += 1
            provider = others.pop(0)
            ask.model = None  # a fallback uses its own
            ask.again, ask.waited = False, 0.0

    async def _tries(
        self,
        provider: Provider,
        ask: Ask,
        once: Callable[[Provider], Awaitable[T]],
        begun: Callable[[], bool],
        *,
        alone: bool,
    ) -> T:
        """What *once* gives, after some tries; *alone*: nobody can be asked instead."""
        record, limits = ask.record, provider.settings.http_client
        provider.budget.request()
        number = 0
        while True:
            record.provider, record.sent = provider.name, 0.0
            record.model = ask.model or provider.settings.model
            record.attempts += 1
            try:
                answer = await once(provider)
            except BaseException as exc:
                provider.ended(ask, exc)
                if not isinstance(exc, ProviderFault):
                    raise
                if not exc.attempt_outcome:
                    record.attempts -= 1  # nobody was asked
                exc.provider, exc.attempts = provider.name, record.attempts
                number += 1
                wait = self._pause(number, limits.backoff_factor, exc.retry_after)
                limited = isinstance(exc, ProviderRateLimited)
                if (
                    begun()
                    or not exc.retry
                    or number > limits.max_retries
                    or wait > MAX_PAUSE
                    or (limited and not alone)  # it wants a rest, another may have none
                    or not provider.budget.retry()
                ):
                    raise
                provider.meter.retries[exc.code].value += 1
            else:
                provider.ended(ask, None)
                return answer
            await asyncio.sleep(wait)
            ask.again = True

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


def _told(faults: Sequence[ProviderFault]) -> ProviderFault:
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

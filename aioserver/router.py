"""Which provider is asked, and for which model.

provider given in a chat           that one, pinned; `model` as given, else its own
model absent, or a provider's name  that provider (absent: the active one), its own model
"groq/llama-…", groq configured     groq, pinned, the rest is the model
anything else                       the active provider, the model unchanged
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aioserver.errors import ModelNotFound, NoProvider, ProviderAuthError, ProviderFault

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.providers.provider import Answer, Ask, Provider
    from aioserver.streams import Stream


@dataclass(slots=True)  # not frozen: that triples what making one costs
class Route:
    """Who is asked. *model* None: the provider's own; *renamed*: `model` in a body is replaced."""

    provider: Provider
    model: str | None
    renamed: bool
    pinned: bool


class Router:
    """Chooses among the providers and asks the one chosen."""

    def __init__(self, providers: Mapping[str, Provider], active: str) -> None:
        self._providers = providers
        self._active = active

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
        stream.attempts += 1
        ask.record.attempts += 1
        try:
            await route.provider.fill(stream, ask)
        except BaseException as exc:
            self._ended(route.provider, ask, exc)
            raise
        route.provider.meter.attempts["ok"].value += 1

    async def call(
        self, route: Route, ask: Ask, sending: Callable[[], None] | None = None
    ) -> Answer:
        """An answer that is not streamed; *sending* is called when something goes to a provider.

        Raises:
            ProviderFault: nobody gave one.
        """
        ask.record.attempts += 1
        try:
            answer = await route.provider.call(ask, sending)
        except BaseException as exc:
            self._ended(route.provider, ask, exc)
            raise
        route.provider.meter.attempts["ok"].value += 1
        return answer

    @staticmethod
    def _ended(provider: Provider, ask: Ask, exc: BaseException) -> None:
        """A try has ended with *exc*."""
        if isinstance(exc, ProviderFault):
            exc.provider, exc.attempts = provider.name, ask.record.attempts
            if isinstance(exc, ProviderAuthError):
                provider.meter.key_refused.value += 1
            if exc.attempt:
                provider.meter.attempts[exc.attempt].value += 1
        elif isinstance(exc, asyncio.CancelledError) and ask.record.sent:
            provider.meter.attempts["cancelled"].value += 1

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

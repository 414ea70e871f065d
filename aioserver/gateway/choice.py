"""The choice of a provider: which one a request goes to, for which model, and which others may be asked instead.

    the request has                    the router asks
    a `provider` (chats only)          that provider, pinned; the request's model, or the provider's own
    no model                           the active provider, with its own model
    a provider's name as model         that provider, pinned, with its own model
    "groq/llama-…", groq configured    groq, pinned; the rest is the model
    another model                      the active provider, with the model unchanged

A request for Anthropic's Messages API goes only to providers that speak it (`messages`): the active one stands then
for the first of the active provider and the fallbacks that does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.errors import ModelNotFound
from aioserver.gateway.request import Route
from aioserver.provider_errors import NoProvider

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aioserver.providers.provider import Provider


class ProviderChoice:
    """The configured providers, of which one is active, and others are its fallbacks in their order."""

    def __init__(
        self, providers: Mapping[str, Provider], active: str, fallbacks: Sequence[str]
    ) -> None:
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
        return [provider.name for provider in self._usable_others(self.active)]

    @property
    def usable(self) -> bool:
        """Whether the active provider can be asked."""
        return self.active.settings.usable

    def route(
        self, model: str | None, provider: str | None = None, *, messages: bool = False
    ) -> Route:
        """Return where a request with this *model* and *provider* goes; *messages*: for Anthropic's Messages API.

        Raises:
            ModelNotFound: the request names a provider that is not configured, or not usable; or that does not
                speak Messages, or none that may be asked does.
            NoProvider: the request names none, and the active provider is not usable.
        """
        if provider is not None:
            return Route(self._named(provider), model, renamed=True, pinned=True)
        route = None if model is None else self._by_name(model)
        if route is None:
            first = self._first_speaking() if messages else self._usable_active()
            route = Route(first, model, renamed=model is None, pinned=False)
        if messages and not route.provider.settings.messages:
            raise ModelNotFound(
                f"the provider {route.provider.name} does not speak Anthropic's Messages API: {self._speaking()}"
            )
        route.messages = messages
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

    def _first_speaking(self) -> Provider:
        """Return the first provider, of the active one and the fallbacks, that speaks Anthropic's Messages API.

        Raises:
            ModelNotFound: none does.
            NoProvider: the active one does, and is not usable.
        """
        if self.active.settings.messages:
            return self._usable_active()
        others = self._usable_others(self.active, messages=True)
        if not others:
            raise ModelNotFound(
                f"the active provider {self._active} does not speak Anthropic's Messages API, nor does a fallback: "
                f"{self._speaking()}"
            )
        return others[0]

    def _speaking(self) -> str:
        """Return what to do where a provider does not speak Anthropic's Messages API."""
        names = [
            name
            for name, provider in self._providers.items()
            if provider.settings.messages and provider.settings.usable
        ]
        if not names:
            return "no provider does, by its setting `messages`"
        return f"the model may name one that does: {', '.join(names)}"

    def waiting(self, provider: str) -> int:
        """Return how many requests wait at *provider* for a place that others hold."""
        asked = self._providers.get(provider)
        return 0 if asked is None else asked.waiting

    def _usable_others(self, first: Provider, *, messages: bool = False) -> list[Provider]:
        """Return the fallbacks that may be asked instead of *first*, in their order; *messages*: that speak Messages."""
        fallbacks = (self._providers[name] for name in self._fallbacks)
        return [
            provider
            for provider in fallbacks
            if provider is not first
            and provider.settings.usable
            and (provider.settings.messages or not messages)
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

    def _usable_active(self) -> Provider:
        """Return the active provider.

        Raises:
            NoProvider: it is not usable.
        """
        if not self.usable:
            raise NoProvider(f"the active provider {self._active} is not usable")
        return self.active

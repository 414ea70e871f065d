"""Routers over providers that a test has made."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from aioserver.config.settings import Llm
from aioserver.gateway.router import Router

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.config.settings import Group
    from aioserver.providers.provider import Provider


def llm_of(
    providers: Mapping[str, Provider],
    active: str,
    fallbacks: Sequence[str] = (),
    models: Mapping[str, Group] | None = None,
    **further: Any,
) -> Llm:
    """The settings by which these providers are chosen."""
    return Llm(
        active=active,
        fallbacks=tuple(fallbacks),
        models=models or {},
        providers={name: provider.settings for name, provider in providers.items()},
        **further,
    )


def router_of(
    providers: Mapping[str, Provider],
    active: str,
    fallbacks: Sequence[str] = (),
    models: Mapping[str, Group] | None = None,
    random_number: Callable[[], float] = random.random,
    *,
    alone: bool = True,
    **further: Any,
) -> Router:
    """A router that chooses among *providers*."""
    llm = llm_of(providers, active, fallbacks, models, **further)
    return Router(providers, llm, random_number=random_number, alone=alone)

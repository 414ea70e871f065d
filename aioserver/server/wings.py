"""The table of wings, in the one file that names them, and the open wings of a server.

Paths of a deleted wing are unknown, as any other path is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import msgspec

from aioserver.auth.tokens import Tokens
from aioserver.faces.wing import Wing
from aioserver.gateway.contracts.caches import Caches
from aioserver.gateway.contracts.histories import Histories, NoHistories
from aioserver.gateway.contracts.hooks import Hooks
from aioserver.gateway.contracts.instances import Instances
from aioserver.gateway.contracts.sharing import Sharing
from aioserver.telemetry.tracer import Tracer
from aioserver.wings.anthropic.wing import AnthropicWing
from aioserver.wings.cache_loss.wing import CacheLossWing
from aioserver.wings.cluster.wing import ClusterWing
from aioserver.wings.conversations.wing import ConversationsWing
from aioserver.wings.hooks.wing import HooksWing
from aioserver.wings.jwt.wing import JwtWing
from aioserver.wings.openapi.wing import OpenapiWing
from aioserver.wings.responses.wing import ResponsesWing
from aioserver.wings.simulator.wing import SimulatorWing
from aioserver.wings.tracing.wing import TracingWing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AsyncExitStack

    from aioserver.config.settings import Settings
    from aioserver.faces.wing import Core

T = TypeVar("T")

# The order in which they are opened; they are closed in reverse order.
WINGS: tuple[type[Wing], ...] = (
    ClusterWing,
    SimulatorWing,
    ConversationsWing,
    TracingWing,
    ResponsesWing,
    AnthropicWing,
    HooksWing,
    JwtWing,
    OpenapiWing,
    CacheLossWing,
)


def faults(settings: Settings, wings: Iterable[Wing]) -> Iterator[str]:
    """Yield each setting that *wings* cannot serve with, and each that needs a wing which is not
    among them.
    """
    wings = tuple(wings)
    there = {wing.name for wing in wings}
    needs = (
        ("cluster", "cluster.redis_url", settings.cluster.redis_url is not None),
        (
            "simulator",
            "llm.providers: simulated: true",
            any(provider.simulated for provider in settings.llm.providers.values()),
        ),
        (
            "conversations",
            "chat.service.repository.type: sql",
            settings.chat.service.repository.type == "sql",
        ),
        ("hooks", "hooks", bool(settings.hooks)),
        ("cache_loss", "llm.cache_losses", settings.llm.cache_losses),
        ("jwt", "auth.jwt", settings.auth is not None and settings.auth.jwt is not None),
        ("tracing", "tracing.otlp_endpoint", settings.tracing.otlp_endpoint is not None),
        ("tracing", "tracing.gen_ai_metrics", settings.tracing.gen_ai_metrics),
    )
    for name, setting, needed in needs:
        if needed and name not in there:
            yield f"{setting} needs the wing {name}, which this server does not have"
    for wing in wings:
        yield from wing.faults(settings)


class Plugged(msgspec.Struct, frozen=True, kw_only=True):
    """The open *wings* of one server, and the parts that they contribute: see `Wing`."""

    wings: Sequence[Wing]
    histories: Histories
    sharing: Sharing | None
    instances: Instances | None
    simulator: Callable[[], Awaitable[str]] | None
    callers: Tokens | None
    tracer: Tracer | None
    hooks: Hooks | None
    caches: Caches | None


async def open_wings(wings: Sequence[Wing], core: Core, stack: AsyncExitStack) -> Plugged:
    """Open *wings* in turn; each gets the *core* as it is by then. *stack* closes them.

    Raises:
        ConfigurationError: a wing cannot serve with these settings.
    """
    for wing in wings:
        await wing.open(core, stack)
        if wing.commands is not None:
            core = replace(core, commands=wing.commands)
    return Plugged(
        wings=wings,
        histories=_first(wing.histories for wing in wings) or NoHistories(),
        sharing=_first(wing.sharing for wing in wings),
        instances=_first(wing.instances for wing in wings),
        simulator=_first(wing.simulator for wing in wings),
        callers=_first(wing.callers for wing in wings),
        tracer=_first(wing.tracer for wing in wings),
        hooks=_first(wing.hooks for wing in wings),
        caches=_first(wing.caches for wing in wings),
    )


def _first(brought: Iterable[T | None]) -> T | None:
    """Return the first of *brought* that is not None; None if there is none."""
    return next((each for each in brought if each is not None), None)

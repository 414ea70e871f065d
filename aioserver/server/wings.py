"""The table of wings: the one file that names them.

What a deleted wing has served is then unknown, as any path is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.wings.anthropic.wing import AnthropicWing
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

    from aioserver.config.settings import Settings
    from aioserver.faces.wing import Wing

# In the order in which they are opened; they are closed in the reverse one.
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
)


def faults(settings: Settings, wings: Iterable[Wing]) -> Iterator[str]:
    """Yield what *wings* cannot serve with, and each setting that needs a wing which is not among
    them.
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
        ("jwt", "auth.jwt", settings.auth is not None and settings.auth.jwt is not None),
        ("tracing", "tracing.otlp_endpoint", settings.tracing.otlp_endpoint is not None),
    )
    for name, setting, needed in needs:
        if needed and name not in there:
            yield f"{setting} needs the wing {name}, which this server does not have"
    for wing in wings:
        yield from wing.faults(settings)

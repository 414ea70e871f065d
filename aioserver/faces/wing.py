"""The contract of a wing: how a feature that the core does not need is plugged into a server.

The core knows a wing by these members alone, and a wing knows of the core what `Core` and
`Context` have. A server opens its wings in the order of `server/wings.py`, the one file that names
them, and closes them in reverse order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
    from contextlib import AsyncExitStack

    from aiohttp import web

    from aioserver.auth.callers import Peer
    from aioserver.auth.tokens import Tokens
    from aioserver.config.settings import Settings
    from aioserver.faces.context import Context
    from aioserver.faces.form import Form
    from aioserver.files.watched_files import WatchedFiles
    from aioserver.gateway.contracts.caches import Caches
    from aioserver.gateway.contracts.commands import Commands
    from aioserver.gateway.contracts.histories import Histories
    from aioserver.gateway.contracts.hooks import Hooks
    from aioserver.gateway.contracts.instances import Instances
    from aioserver.gateway.contracts.sharing import Sharing
    from aioserver.limits.fixed_share import Scope
    from aioserver.limits.scheduler import Scheduler
    from aioserver.monitoring.section import Section
    from aioserver.providers.request import Api
    from aioserver.streams.store import StreamStore
    from aioserver.telemetry.metrics import Metrics
    from aioserver.telemetry.tracer import Tracer

    # What a check of the doctor has found: `ok`, `warn` or `fail`, a text, and what to do.
    Examined = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class Core:
    """The parts of a server that exist before any wing is open.

    *commands* reach the store that all instances share; it is None if there is no store, or if the
    wing that brings it is not open yet. *scheduler* lets requests wait. *scope* is this process
    among those of its parent, which has called `before_workers`; it is None without a parent.
    *private_server* is the URL of the parent's own Valkey or Redis server, if it has one.
    *watched* reads files again when they have changed.
    """

    settings: Settings
    metrics: Metrics
    loop: asyncio.AbstractEventLoop
    scheduler: Scheduler
    streams: StreamStore
    watched: WatchedFiles
    commands: Commands | None = None
    scope: Scope | None = None
    private_server: str | None = None


@dataclass(frozen=True, kw_only=True)
class Routes:
    """The routes of a wing, by who may use them: *key* routes need a key, if keys are configured.
    *open* routes need none. *websockets* are handshakes, which need a key, too.
    """

    websockets: Sequence[web.RouteDef] = ()
    key: Sequence[web.RouteDef] = ()
    open: Sequence[web.RouteDef] = ()


class Wing:
    """One feature with everything of it. Each member has a default that does nothing.

    Always: `open` is called once, before anything else exists, and `serve` once, when the gateway
    does.
    """

    # The name in the log, and in the test that deletes the wing.
    name: ClassVar[str]
    # The paths of its faces, as the server's overview and `/stats` show them to clients.
    endpoints: ClassVar[Mapping[str, str]] = {}

    # At most one wing fills each of these; None means that the feature is not in use.

    # The limits and the secret that instances share.
    sharing: Sharing | None = None
    # The store that instances share, for the wings after this one.
    commands: Commands | None = None
    # The logs of other instances.
    instances: Instances | None = None
    # The function that starts the simulated provider at its first call, and returns its base URL.
    simulator: Callable[[], Awaitable[str]] | None = None
    # The callers of tokens.
    callers: Tokens | None = None
    # The traces of requests.
    tracer: Tracer | None = None
    # The earlier turns of a conversation.
    histories: Histories | None = None
    # The hooks are asked about each request, and shown each answer.
    hooks: Hooks | None = None
    # What the caches of providers have lost.
    caches: Caches | None = None

    def faults(self, settings: Settings) -> Iterable[str]:  # noqa: ARG002
        """Yield each reason why the wing cannot serve with *settings*, for `check`, the start and
        a reload.
        """
        return ()

    async def examine(self, settings: Settings) -> AsyncIterator[Examined]:  # noqa: ARG002
        """Yield what the doctor says of the wing for a server that would start with *settings*."""
        return
        yield

    @staticmethod
    def before_workers(settings: Settings) -> None:
        """Do what one process does for all workers of a machine before they exist, and import the
        modules that they will share. It blocks.
        """

    async def open(self, core: Core, stack: AsyncExitStack) -> None:
        """Make what lives as long as the server; *stack* closes it.

        Raises:
            ConfigurationError: the wing cannot serve with these settings.
        """

    def sections(self) -> Sequence[Section[Any]]:
        """Return its parts of `/stats`, of `/metrics`, of incidents and of the verdict. It is
        called once, when all wings are open.
        """
        return ()

    async def serve(self, context: Context) -> Routes:  # noqa: ARG002
        """Return the routes of its faces; what they use is in *context*."""
        return Routes()

    def apis(self) -> Sequence[Api]:
        """Return the APIs of providers that it brings, for logs that come from other instances."""
        return ()

    def forms(self) -> Sequence[Form]:
        """Return the forms in which its clients expect errors and model lists."""
        return ()

    def prepare(self, settings: Settings) -> Callable[[], None]:  # noqa: ARG002
        """Return the function that puts *settings* in effect, at a reload.

        Nothing changes until it is called.

        Raises:
            ConfigurationError: they cannot be used.
        """
        return _nothing

    async def listen(self, accept: Callable[[Peer], asyncio.Protocol]) -> None:
        """Let other instances of this server pass requests on to it. *accept* returns the protocol
        of a connection that brings one, which an instance vouches for. Without a runner of ours
        this is not called.
        """

    async def finish(self, seconds: float) -> None:
        """Wait until other instances have the answers that they read here, *seconds* at most. The
        connections of clients have ended.
        """

    async def leave(self) -> None:
        """Say good-bye to other servers: every answer has ended, and connections still stand."""


def _nothing() -> None:
    """Put nothing in effect."""

"""The cluster as a wing: this process joins it before anything else exists, and leaves it last."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from aioserver.faces.wing import Routes, Wing
from aioserver.gateway.contracts.sharing import Sharing

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping
    from contextlib import AsyncExitStack

    from aioserver.auth.callers import Peer
    from aioserver.config.settings import Settings
    from aioserver.faces.context import Context
    from aioserver.faces.wing import Core, Examined
    from aioserver.gateway.contracts.commands import Commands
    from aioserver.monitoring.monitor import Monitor
    from aioserver.providers.provider import Provider
    from aioserver.wings.cluster.answers.remote_streams import RemoteStreams


class Member(Sharing, Protocol):
    """This process as an instance of a cluster: a `Membership` (membership.py), or a smaller one
    of a test.
    """

    commands: Commands

    def streams(self) -> RemoteStreams:
        """Return the streams of other instances."""

    def serve(self, providers: Callable[[], Mapping[str, Provider]], monitor: Monitor) -> None:
        """Let announcements reach *providers*, and let *monitor* show the state of all
        instances.
        """


class ClusterWing(Wing):
    """The limits and streams that several processes and machines share, through
    `cluster.redis_url` or a parent's private server.

    *member* is this process as an instance of a cluster that it has already joined; None: it joins
    by itself, if the settings say so.
    """

    name: ClassVar = "cluster"

    def __init__(self, member: Member | None = None) -> None:
        self._member = member
        self._others: RemoteStreams | None = None

    def faults(self, settings: Settings) -> Iterable[str]:
        """Yield what `cluster.redis_url` lacks."""
        if settings.cluster.redis_url is not None and find_spec("redis") is None:
            yield (
                "cluster.redis_url: redis is not installed (pip install '.[cluster]' in the clone)"
            )

    async def examine(self, settings: Settings) -> AsyncIterator[Examined]:
        """Yield what the doctor says of the cluster of `cluster.redis_url`."""
        url = settings.cluster.redis_url
        if url is not None and find_spec("redis") is not None:
            from aioserver.wings.cluster.examination import examine  # noqa: PLC0415 - as in `_join`

            async for examined in examine(settings.cluster, url):
                yield examined

    @staticmethod
    def before_workers(settings: Settings) -> None:  # noqa: ARG004
        """Import the modules of a cluster before the fork, if their packages are installed."""
        with suppress(ModuleNotFoundError):
            import_module("aioserver.wings.cluster.membership")

    async def open(self, core: Core, stack: AsyncExitStack) -> None:
        """Join the cluster, if there is one.

        Raises:
            ConfigurationError: `cluster.redis_url` cannot be used, or its server refuses us.
        """
        if self._member is None:
            self._member = await _join(core, stack)
        if self._member is not None:
            self.sharing, self.commands = self._member, self._member.commands
            self.instances = self._others = self._member.streams()

    async def serve(self, context: Context) -> Routes:
        """Let the other instances read the streams of this one, and receive their
        announcements.
        """
        if self._member is not None and self._others is not None:
            await self._others.serve(context)
            self._member.serve(lambda: context.router.providers, context.monitor)
        return Routes()

    async def listen(self, accept: Callable[[Peer], asyncio.Protocol]) -> None:
        """Let the other instances pass requests on."""
        if self._others is not None:
            self._others.listen(accept)

    async def finish(self, seconds: float) -> None:
        """Wait for the answers that other instances read here."""
        if self._others is not None:
            await self._others.finish(seconds)

    async def leave(self) -> None:
        """Hand over the logs that have ended here."""
        if self._others is not None:
            await self._others.close()


async def _join(core: Core, stack: AsyncExitStack) -> Member | None:
    """Join the cluster until *stack* closes; return None if this process is the only instance."""
    cluster, scope = core.settings.cluster, core.scope
    clear = core.settings.chat.service.repository.persistence.clear_on_startup
    url, folder, fixed, first = cluster.redis_url, None, None, False
    if scope is not None:
        if url is None:
            # No other process uses it, so the number of instances is known.
            url, fixed, first = core.private_server, (scope.rank, scope.workers), scope.first
            folder = None if url is None else Path(url.removeprefix("unix://")).parent
        # A worker that replaces another one does not start the server.
        clear = clear and scope.first
    if url is None:
        return None
    # A single instance does not need these modules, so they are imported only here.
    from aioserver.wings.cluster.membership import join  # noqa: PLC0415

    return await stack.enter_async_context(
        join(
            url,
            cluster.name,
            cluster=cluster,
            folder=folder,
            fixed=fixed,
            first=first,
            clear=clear,
            scope=scope,
        )
    )

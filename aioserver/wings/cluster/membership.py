"""This process as an instance of a cluster: all objects of this package with the lifetime of a
server, and its end.

    join     connections are made, and limits are shared from the first provider on
    serve    the server exists: its streams can be read elsewhere, and announcements reach
             its providers
    leave    the server has ended: no place is inside any more, and the others are notified

This file is one concept: the connections to the cluster's server, and the objects that depend on
them, begin and end together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aioserver.auth.sessions import SECRET_BYTES
from aioserver.config.faults import ConfigurationError
from aioserver.config.settings import Cluster
from aioserver.gateway.contracts.commands import Commands
from aioserver.wings.cluster.answers import peer_network
from aioserver.wings.cluster.answers.remote_streams import RemoteStreams
from aioserver.wings.cluster.connection import AccessDenied, CallFailed, ScriptConnection
from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import TIMES
from aioserver.wings.cluster.limits.leases import Leases, token_of
from aioserver.wings.cluster.limits.limits import SharedLimits
from aioserver.wings.cluster.limits.renewer import Renewer, Subscription
from aioserver.wings.cluster.redis_commands import RedisCommands
from aioserver.wings.cluster.totals import Totals

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
    from pathlib import Path

    from aioserver.auth.sessions import Sessions
    from aioserver.limits.fixed_share import Scope
    from aioserver.monitoring.monitor import Monitor
    from aioserver.monitoring.state import ClusterState
    from aioserver.providers.provider import Provider
    from aioserver.wings.cluster.answers.peer_network import PeerNetwork
    from aioserver.wings.cluster.limits.lease_messages import Times

logger = logging.getLogger("aioserver.cluster")

# Seconds for notifying the others that this instance has left; an unreachable server is not
# notified.
LEAVE_TIMEOUT = 1.0
# Seconds to free the places of killed instances before this one serves, and between two looks at
# whether they are free.
SETTLE_TIMEOUT, SETTLE_LOOK = 1.0, 0.01
# Seconds for the instances' agreement on their secrets; until the next one, which restores the
# secrets at a server that has lost them; and until the next one after a failure.
AGREE_TIMEOUT, AGREE_EVERY, AGREE_AGAIN = 1.0, 60.0, 5.0
# Seconds for which a secret is kept while no instance runs: longer than a browser session lasts.
SECRET_SECONDS = 30 * 86_400
# The pauses in seconds before a new member is dialled: it may not serve yet.
MEETING_PAUSES = (0.5, 1.0, 2.0, 4.0)
# The most characters of a host's name in the name of an instance.
MAX_HOST = 32
# Keys that the server scans in one step.
SCANNED = 1000
# Characters with a special meaning in a pattern of keys.
_GLOB = re.compile(r"[*?\[\]\\^-]")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9.]+")


@dataclass(frozen=True)
class ConnectionClasses:
    """The classes of the connections to the cluster's server: for renewals, for messages, and for
    commands. Tests pass other classes with the same arguments.
    """

    renewals: Callable[..., ScriptConnection] = ScriptConnection
    words: Callable[..., Subscription] = Subscription
    commands: Callable[[str], RedisCommands] = RedisCommands


# The connections to a Redis or Valkey server.
REDIS = ConnectionClasses()


class Membership:
    """One instance of the cluster *name*, whose server is at *url*. Made by `join`.

    The others reach it by *network*. *fixed*: the rank of this instance and the number of all, if
    a parent knows them. *times* are those of the cluster. *scope* is this instance among the
    workers of its host, which share connections; None if it has no parent. *classes* are those of
    its connections to the server. *patient*: its start waits until the server grants something,
    unless it has a fixed share at once.
    """

    def __init__(
        self,
        url: str,
        name: str,
        instance: str,
        network: PeerNetwork,
        fixed: tuple[int, int] | None,
        times: Times = TIMES,
        scope: Scope | None = None,
        *,
        classes: ConnectionClasses = REDIS,
        patient: bool = True,
    ) -> None:
        self.instance = instance
        self._numbers, self._times = fixed, times
        self.renewer = Renewer(self._make_leases, url, name, classes.renewals, classes.words)
        self.leases = self.renewer.leases
        self.limits = limits = SharedLimits(self.leases, scope)
        # The interface `Sharing`.
        self.retire = self.leases.retire
        self.share_provider, self.observe = limits.share_provider, limits.observe
        self.make_quota, self.share_door = limits.make_quota, limits.share_door
        self._connection = classes.commands(url)
        self.commands = Commands(self._connection, self.renewer.prefix, self.leases.hangs)
        self.address = self.renewer.connection.address
        self._incidents: Monitor | None = None
        self._patient = patient
        self._joined = asyncio.Event()
        self._network = network
        # Empty until all instances agree on it.
        self._peer_secret = b""
        proposed = secrets.token_bytes(SECRET_BYTES)
        # The secrets on which they agree, by their keys: each with a function that proposes a
        # secret, and one that puts a secret into use.
        self._secrets: dict[str, tuple[Callable[[], bytes], Callable[[bytes], object]]] = {
            "peer_secret": (lambda: self._peer_secret or proposed, self._use_peer_secret)
        }
        # Whether the last try has succeeded.
        self._agreed = False
        self._tasks: set[asyncio.Task[None]] = set()
        # The members that were dialled, or are about to be.
        self._met = {instance}
        self._streams = RemoteStreams(
            instance,
            self.commands,
            network,
            lambda: self._peer_secret,
            self._look,
            lambda: self.leases.members,
        )
        self._totals: Totals | None = None

    def streams(self) -> RemoteStreams:
        """Return the streams of other instances."""
        return self._streams

    def serve(self, providers: Callable[[], Mapping[str, Provider]], monitor: Monitor) -> None:
        """Let announcements reach *providers*, and let *monitor* show the state of all
        instances.
        """
        self.limits.serve(providers)
        self._incidents = monitor
        self._totals = Totals(
            self.instance,
            self._streams.fan_out,
            lambda: self.leases.members,
            monitor,
            self.standing,
            lambda: self.limits.connections,
        )
        monitor.share(self._totals)
        self._meet_members()

    async def others_serve(self) -> bool:
        """Return whether an instance elsewhere takes new work; see `Sharing`."""
        # All instances at a server of a parent's own are that parent's.
        if self._totals is None or self._numbers is not None:
            return False
        return await self._totals.others_serve()

    def _look(self, what: str) -> bytes:
        """Return the page *what* for another instance; empty before this one serves."""
        return b"" if self._totals is None else self._totals.tell(what)

    async def agree_on_sessions(self, sessions: Sessions) -> None:
        """Let *sessions* use the secret on which the instances agree; see `Sharing`."""
        if self._patient and self._numbers is None:
            # Otherwise the workers have the secret of their parent.
            self._secrets["session_secret"] = (lambda: sessions.secret, sessions.use)
            self._agreed = await self._agree()

    async def _agree(self) -> bool:
        """Try to agree on all secrets, and return whether each is now that of all instances."""
        execute, done = self.commands.execute, True
        try:
            async with asyncio.timeout(AGREE_TIMEOUT):
                for name, (own, use) in self._secrets.items():
                    key = f"{self.renewer.prefix}{name}"
                    await execute("SET", key, own(), "NX", "EX", SECRET_SECONDS)
                    agreed = await execute("GET", key)
                    await execute("EXPIRE", key, SECRET_SECONDS)
                    if isinstance(agreed, bytes) and len(agreed) >= SECRET_BYTES:
                        use(agreed)
                    else:
                        done = False
        except (CallFailed, TimeoutError):
            return False
        return done

    async def _keep_agreeing(self) -> None:
        """Agree from time to time, and as soon as the server is back."""
        while True:
            self._joined.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGREE_EVERY if self._agreed else AGREE_AGAIN):
                    await self._joined.wait()
            self._agreed = await self._agree()

    def _use_peer_secret(self, secret: bytes) -> None:
        self._peer_secret = secret

    def standing(self) -> ClusterState:
        """Return the state of this instance in the cluster."""
        streams = self._streams.stats()
        return {
            "state": self.leases.state.value,
            "calls": self.leases.calls,
            "failed_calls": self.leases.failures,
            "links": streams.links,
            "tunnels": streams.tunnels,
            "unclaimed": streams.unclaimed,
        }

    @property
    def token(self) -> int:
        """The number at the end of this instance's name."""
        return int(token_of(self.instance), 16)

    def ended(self, token: int) -> None:
        """Note that the instance with *token* has certainly ended: its places are free now, and
        not only when its lease expires.
        """
        self._network.forget(f"{token:08x}")
        self.leases.ended(f"{token:08x}")

    async def settled(self) -> None:
        """Wait until the places of ended instances are free, for at most SETTLE_TIMEOUT: the
        server may be unreachable.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_TIMEOUT):
                while self.leases.freeing:  # noqa: ASYNC110 - for a moment, at a start
                    await asyncio.sleep(SETTLE_LOOK)

    def _members_changed(self) -> None:
        self.limits.instances_changed()
        self._meet_members()
        standing = self.leases.standing
        if (
            self._incidents is not None
            and standing.state is State.JOINED
            # A server that has lost its state does not know all of them yet.
            and not standing.grace
        ):
            self._streams.keep(self.leases.members)

    def _meet_members(self) -> None:
        """Dial each new member, once this instance serves."""
        if self._incidents is not None:
            members = set(self.leases.members)
            for name in members - self._met:
                self._begin(self._meet(name))
            self._met = members | {self.instance}

    async def _meet(self, name: str) -> None:
        """Say so if the member *name* cannot be reached."""
        why = ""
        for pause in MEETING_PAUSES:
            await asyncio.sleep(pause)
            if name not in self.leases.members:
                return
            if not (why := await self._streams.fan_out.meet(name)):
                return
        text = f"the instance {name} cannot be reached: {why} (cluster.listen, cluster.advertise)"
        logger.warning("cluster: %s", text)
        if self._incidents is not None:
            self._incidents.incident("cluster", text, severity="warning")

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def open(self, *, clear: bool = False, first: bool = False) -> None:
        """Connect, and share. An unreachable server is retried in the background.

        *first*: the fixed share of this instance is in use. *clear*: delete the existing
        conversations if this is the first instance; otherwise other instances may use them.

        Raises:
            ConfigurationError: the server refuses the password, or the user lacks a permission.
        """
        try:
            await self.renewer.open()
        except AccessDenied as error:
            raise ConfigurationError([f"cluster.redis_url: {error}"]) from None
        if clear and self.leases.members == [self.instance]:
            await self._clear_conversations()
        if self.leases.epoch and self._patient and not first:
            # A new server grants nothing yet. Nothing could start until then without a fixed share,
            # or while that is the share of the process which this one replaces.
            times = self.leases.times
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(times.grace + times.beat + times.bound):
                    await self._joined.wait()
        self._agreed = await self._agree()
        self._begin(self._keep_agreeing())
        state = self.leases.state
        logger.info("cluster: instance %s, %s (%s)", self.instance, state.value, self.address)

    async def close(self) -> None:
        """Report that no place is inside any more, and close the connections."""
        self._network.close()
        if self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        await self.renewer.leave(LEAVE_TIMEOUT)
        await self.renewer.close()
        await self._connection.close()

    def _make_leases(self, on_due: Callable[[], None]) -> Leases:
        return Leases(
            self.instance,
            fixed=self._numbers,
            times=self._times,
            on_due=on_due,
            on_state=self._state_changed,
            on_members=self._members_changed,
            on_announced=lambda *news: self.limits.announced(*news),
            ask=lambda budget: self.renewer.ask(budget),
            later=asyncio.get_running_loop().call_later,
        )

    async def _clear_conversations(self) -> None:
        try:
            count = await self._unlink("c:*")
            await self._unlink("own:*")
        except CallFailed as failure:
            logger.warning("not all conversations are deleted at the start: %s", failure)
        else:
            logger.info("conversations deleted at the start: %d", count)

    async def _unlink(self, pattern: str) -> int:
        """Delete the keys of the cluster that match *pattern*; return how many there were."""
        prefix = _GLOB.sub(r"\\\g<0>", self.renewer.prefix)
        connection, cursor, count = self.renewer.connection, b"0", 0
        while True:
            cursor, keys = await connection.execute(
                *("SCAN", cursor, "MATCH", f"{prefix}{pattern}", "COUNT", SCANNED)
            )
            if keys:
                count += await connection.execute("UNLINK", *keys)
            if int(cursor) == 0:
                return count

    def _state_changed(self, _old: State, new: State, why: str) -> None:
        if new is State.JOINED:
            self._joined.set()
            if self._incidents is not None:
                # A server that has come back may have lost them.
                self._streams.renew()
        if self.leases.standing.leaving:
            # The instance has left.
            return
        if new is State.JOINED:
            text = "the instances share their limits exactly"
        elif new is State.UNHEARD:
            text = f"the cluster's server does not answer: {why}"
        else:
            text = (
                "the cluster's server is away: "
                "this instance goes on with its fixed share of each limit"
            )
        level = logging.INFO if new is State.JOINED else logging.WARNING
        logger.log(level, "cluster: %s: %s", new.value, text)
        # The first contact is not an incident.
        if self._incidents is not None:
            severity = "info" if new is State.JOINED else "warning"
            self._incidents.incident("cluster", text, severity=severity)


@asynccontextmanager
async def join(
    url: str,
    name: str,
    *,
    cluster: Cluster | None = None,
    folder: Path | None = None,
    fixed: tuple[int, int] | None = None,
    first: bool = False,
    clear: bool = False,
    times: Times = TIMES,
    scope: Scope | None = None,
) -> AsyncIterator[Membership]:
    """Join the cluster *name* for the length of the block.

    The others reach this instance where *cluster* says, or by a UNIX socket in *folder*.

    *fixed*, *times*, *scope*: see `Membership`. *first*: no other instance can have places of an
    earlier run of the cluster, so that the fixed share may be used at once. *clear*: see
    `Membership.open`.

    Raises:
        ConfigurationError: *url* cannot be used, its server refuses us, or others cannot be let
            in as *cluster* says.
    """
    token = secrets.token_hex(4)
    network: PeerNetwork
    if folder is not None:
        network = peer_network.bind_unix(folder, token)
    else:
        network = await peer_network.bind_tcp(cluster or Cluster(), url)
        logger.info("cluster: others reach this instance at %s", network.end)
    try:
        instance = instance_name(token, network.end)
        membership = Membership(url, name, instance, network, fixed, times, scope)
    except ValueError as error:
        network.close()
        raise ConfigurationError([f"cluster.redis_url: {error}"]) from None
    if first:
        membership.leases.use_fixed()
    try:
        await membership.open(clear=clear, first=first)
        yield membership
    finally:
        await membership.close()


def instance_name(token: str, end: str) -> str:
    """Return a name that no other instance ever has: the host, the process, and a random *token*.
    Its *end* says where the instance listens.
    """
    host = _NOT_IN_NAMES.sub("-", socket.gethostname())[:MAX_HOST]
    return f"{host}-{os.getpid()}-{token}@{end}"

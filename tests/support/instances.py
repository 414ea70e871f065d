"""Several instances in one process: what they share in memory, and peer listeners on sockets of
their own, with the faults of a network.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import random
import socket
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from aioserver.auth.keys import quota_of
from aioserver.gateway.contracts.commands import MARKED, Commands
from aioserver.limits.gcra import Gcra
from aioserver.providers.health import ALONE
from aioserver.wings.cluster.answers import claims
from aioserver.wings.cluster.answers.peer_network import Address, PeerNetwork
from aioserver.wings.cluster.answers.remote_streams import RemoteStreams
from aioserver.wings.cluster.connection import BOUND, CallFailed
from aioserver.wings.conversations import redis as turns
from aioserver.wings.conversations.redis import Listed
from aioserver.wings.conversations.turn import Position
from aioserver.wings.responses import redis as chains
from tests.support.chat import chat, to_end, until_status
from tests.support.server import QUICK, RunningServer, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from aioserver.config.settings import ClientKey
    from aioserver.faces.admission import ShareDoor
    from aioserver.limits.quota import Quota
    from aioserver.limits.resource import Resource
    from aioserver.limits.scheduler import Scheduler
    from aioserver.providers.health import Health
    from tests.support.simulator import Behaviour

    P = TypeVar("P", bound=asyncio.Protocol)
    # `a, b = await make(2, behaviour, **changes)`
    Make = Callable[..., Awaitable[list["Instance"]]]
    MakeQuota = Callable[[ClientKey], Quota]

# What all instances of a test know.
SECRET = b"s" * 32


@dataclass
class Claim:
    owner: str
    until: float


@dataclass
class World:
    """What the instances share. *broken* is the share of connections between them that break off."""

    random: random.Random = field(default_factory=lambda: random.Random(1))
    broken: float = 0.0
    # Whether the server of claims does not answer, and the seconds that an answer takes.
    away: bool = False
    slow: float = 0.0
    # The seconds in which an instance of that name hears of its claims.
    replies: dict[str, float] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    # The ways of each instance to the others, and those of which no connection ever comes about.
    networks: dict[str, NamedNetwork] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    secrets: dict[str, bytes] = field(default_factory=dict)
    claims: dict[str, Claim] = field(default_factory=dict)
    logs: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    conversations: dict[str, list[bytes]] = field(default_factory=dict)
    # By name: the data, and the name of the response before.
    responses: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    # Those that are about to be written, and whether they were deleted before.
    announced: dict[str, bool] = field(default_factory=dict)
    # The names of responses that were deleted.
    forgotten: set[str] = field(default_factory=set)
    # By owner, and in it by id: when its last turn ended.
    lists: dict[str, dict[str, float]] = field(default_factory=dict)
    # When a conversation, or all of an owner, were deleted.
    deletions: dict[str, float] = field(default_factory=dict)
    # The questions under way in conversations, and when they came.
    marks: dict[str, dict[str, float]] = field(default_factory=dict)
    # How often the store was asked for anything, and what is to happen while it is asked the next
    # time.
    calls: int = 0
    meanwhile: Callable[[], object] | None = None

    def kill(self, name: str) -> None:
        """Let the instance *name* hear and say nothing any more."""
        self.networks[name].kill()


class NamedNetwork(PeerNetwork):
    """The ways of one instance, whose name says enough: each has a UNIX socket, and those of one
    *place* reach each other.
    """

    def __init__(self, world: World, name: str, place: object) -> None:
        self._world = world
        self._place = hashlib.sha256(f"{os.getpid()} {place}".encode()).hexdigest()[:16]
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(self.where(name).host)
        super().__init__(sock, name)
        # What others have connected to, each with `abort`.
        self.accepted: list[Any] = []
        world.networks[name] = self
        world.members.append(name)

    def where(self, name: str) -> Address:
        # The path of a socket is short, and that of a test's folder is not.
        return Address(f"{tempfile.gettempdir()}/aio-{self._place}-{name}.sock", 0)

    async def listen(self, make: Callable[[], asyncio.Protocol]) -> None:
        def accept() -> asyncio.Protocol:
            accepted = make()
            self.accepted.append(accepted)
            return accepted

        await super().listen(accept)

    def kill(self) -> None:
        """Break off what is open, and refuse what comes."""
        self.close()
        for accepted in self.accepted:
            accepted.abort()

    async def dial(self, name: str, make: Callable[[], P]) -> tuple[asyncio.Transport, P]:
        world, loop = self._world, asyncio.get_running_loop()
        if name in world.silent:
            await loop.create_future()
        made = await super().dial(name, make)
        if world.random.random() < world.broken:
            loop.call_later(world.random.random() * 0.3, made[0].abort)
        return made


class MemoryStore:
    """What the instances share at a server, as one of them reaches it: a connection, see
    `Commands`.

    Keys have no prefix. Each script that the wings send is a method of its own.
    """

    def __init__(self, world: World, me: str) -> None:
        self._world = world
        self._me = me
        self.connected = True
        self.heard = -math.inf
        self._carried_out: set[asyncio.Task[Any]] = set()

    async def execute(self, *command: Any) -> Any:
        # It is carried out, and its answer heard, though nobody may wait for it any more.
        asked = asyncio.ensure_future(self._bounded(*command))
        self._carried_out.add(asked)
        asked.add_done_callback(self._hear)
        return await asyncio.shield(asked)

    def _hear(self, asked: asyncio.Task[Any]) -> None:
        self._carried_out.discard(asked)
        if not asked.cancelled() and not isinstance(asked.exception(), CallFailed):
            self.heard = asyncio.get_running_loop().time()

    async def _bounded(self, *command: Any) -> Any:
        try:
            async with asyncio.timeout(BOUND):
                return await self._carry_out(*command)
        except TimeoutError:
            raise CallFailed("no answer") from None

    async def _carry_out(self, *command: Any) -> Any:
        match command:
            case ("EVAL", script, count, *rest):
                names = [_name(key) for key in rest[:count]]
                return await self._evaluate(script, names, rest[count:])
            case ("ZRANGE", "m", *_):
                return [name.encode() for name in await self.members()]
            case ("SET", key, value, "NX", "EX", _):
                return await self.propose(key, value)
            case ("GET", key) if key.endswith("_secret"):
                return await self.agreed(key)
            case ("EXPIRE", *_):
                return 1
            case ("GET", key) if key.startswith("log:"):
                return await self.get_log(_name(key))
            case ("ZREVRANGEBYSCORE", key, most, _, _, _, _, limit):
                listed = await self.conversations(_name(key))
                some = [each for each in listed if each.updated <= float(most)][:limit]
                return [part for at, name in some for part in (name.encode(), b"%r" % at)]
            case ("ZREM", key, mark):
                return await self.take_mark(_name(key), mark)
            case ("DEL", key) if key.startswith("log:"):
                await self._asked()
                return self._world.logs.pop(_name(key), None) is not None
            case ("DEL", key):
                return await self.unmark_response(_name(key))
        raise AssertionError(command)

    async def _evaluate(self, script: str, names: list[str], values: list[Any]) -> Any:
        match script:
            case claims.TAKE:
                _me, milliseconds, lost = values
                return await self.take(names[0], milliseconds / 1000, lost)
            case claims.FIND:
                return await self.find(names[0], values[1])
            case claims.RENEW:
                seconds = [milliseconds / 1000 for milliseconds in values[1:]]
                return await self.renew(dict(zip(names, seconds, strict=True)))
            case claims.PUT_LOG:
                return await self.put_log(names[0], values[0], values[1] / 1000)
            case turns.KEEP_TURN:
                _prefix, owner, turn, size, count, milliseconds, _overhead, _most, mark = values[
                    :9
                ]
                name, updated, asked = values[9:]
                listed = Listed(owner, name, float(updated), float(asked))
                return await self.keep_turn(
                    names[0], turn, (size, count, milliseconds / 1000), listed, mark
                )
            case turns.LOAD_TURNS:
                _prefix, me, mark, *_seconds = values
                kept, deleted, busy, now = await self.turns(names[0], me, mark)
                return kept, int(deleted), int(busy), b"%r" % now
            case turns.FIRST_TURNS:
                return await self.first_turns(names)
            case turns.DELETE_TURNS:
                _prefix, owner, _milliseconds, _overhead, _most, asked, *ids = values
                named = dict(zip(ids, names[1::3], strict=True))
                return await self.delete_turns(owner, named, asked=bool(asked))
            case turns.NOTE_DELETION:
                return await self.note_deletion(values[1], asked=bool(values[5]))
            case chains.PUT:
                previous = names[2] if names[2:] else ""
                return await self.put_response(names[0], values[2], previous)
            case chains.ANNOUNCE:
                return await self.mark_response(names[0])
            case chains.LOOK:
                there = await self.has_response(names[0])
                return 1 if there else 2 * (names[0] in self._world.announced)
            case chains.CHAIN:
                return [b"", *await self.response_chain(names[0], values[1])]
            case chains.DELETE:
                return await self.delete_response(names[0])
        raise AssertionError(script)

    async def propose(self, key: str, secret: bytes) -> None:
        await self._asked()
        self._world.secrets.setdefault(key, secret)

    async def agreed(self, key: str) -> bytes | None:
        await self._asked()
        return self._world.secrets.get(key)

    async def take(self, name: str, seconds: float, lost: str) -> tuple[bytes, int]:
        now = await self._asked()
        if (owner := self._other(name, now)) not in ("", lost):
            return owner.encode(), -2
        self._world.claims[name] = Claim(self._me, now + seconds)
        if (late := self._world.replies.get(self._me)) is not None:
            await asyncio.sleep(late)
        return self._me.encode(), self._left(name, now)

    async def find(self, name: str, lost: str) -> tuple[bytes, int]:
        now = await self._asked()
        if (owner := self._other(name, now)) not in ("", lost):
            return owner.encode(), -2
        left = self._left(name, now)
        return b"" if left > 0 else owner.encode(), left

    async def renew(self, claims: Mapping[str, float]) -> None:
        now = await self._asked()
        for name, seconds in claims.items():
            claim = self._claim(name, now)
            if claim is None or claim.owner == self._me:
                if seconds <= 0:
                    self._world.claims.pop(name, None)
                elif claim is None:
                    self._world.claims[name] = Claim(self._me, now + seconds)
                else:
                    claim.until = now + seconds

    async def members(self) -> list[str]:
        await self._asked()
        return list(self._world.members)

    async def put_log(self, name: str, log: bytes, seconds: float) -> None:
        self._world.logs[name] = log, await self._asked() + seconds

    async def get_log(self, name: str) -> bytes | None:
        now = await self._asked()
        log, until = self._world.logs.get(name, (None, 0.0))
        return log if until > now else None

    async def keep_turn(
        self,
        name: str,
        turn: bytes,
        bounds: tuple[int, int, float],
        listed: Listed | None = None,
        mark: str = "",
    ) -> bool:
        await self._asked()
        world = self._world
        world.marks.get(name, {}).pop(mark, None)
        if listed is not None:
            deleted = (world.deletions.get(each, 0.0) for each in (name, listed.owner))
            if listed.asked <= max(deleted):
                return False
            world.lists.setdefault(listed.owner, {})[listed.conversation_id] = listed.updated
        turns = world.conversations.setdefault(name, [])
        turns.append(turn)
        del turns[: -bounds[1]]
        return True

    async def turns(self, name: str, me: str, mark: str) -> tuple[list[bytes], bool, bool, float]:
        now, world = await self._asked(), self._world
        marks = world.marks.get(name, {})
        busy = any(not each.startswith(me) and at > now - MARKED for each, at in marks.items())
        if mark:
            world.marks[name] = {**marks, mark: now}
        turns = list(world.conversations.get(name, ()))
        return turns, name in world.deletions, busy, now

    async def take_mark(self, name: str, mark: str) -> int:
        await self._asked()
        self._world.marks.get(name, {}).pop(mark, None)
        return 1

    async def conversations(self, owner: str) -> list[Position]:
        await self._asked()
        listed = self._world.lists.get(owner, {})
        return sorted((Position(at, each) for each, at in listed.items()), reverse=True)

    async def first_turns(self, names: Sequence[str]) -> list[tuple[int, bytes]]:
        await self._asked()
        kept = [self._world.conversations.get(name, []) for name in names]
        return [(len(turns), turns[0] if turns else b"") for turns in kept]

    async def delete_turns(self, owner: str, names: Mapping[str, str], *, asked: bool) -> int:
        now = await self._asked()
        world, count = self._world, 0
        for conversation_id, name in names.items():
            world.lists.get(owner, {}).pop(conversation_id, None)
            kept, marks = world.conversations.pop(name, None), world.marks.pop(name, None)
            there = kept is not None or bool(marks)
            if there or asked:
                world.deletions[name] = now
            count += there
        return count

    async def note_deletion(self, owner: str, *, asked: bool) -> bool:
        now = await self._asked()
        if asked or self._world.lists.get(owner):
            self._world.deletions[owner] = now
        return True

    async def put_response(self, name: str, data: bytes, previous: str) -> int:
        await self._asked()
        responses = self._world.responses
        if previous and previous not in responses:
            return chains.MISSING
        if not self._world.announced.pop(name, False):
            responses[name] = data, previous
        return chains.WRITTEN

    async def mark_response(self, name: str) -> bool:
        await self._asked()
        self._world.announced.setdefault(name, False)
        return True

    async def unmark_response(self, name: str) -> int:
        await self._asked()
        return int(self._world.announced.pop(name, None) is not None)

    async def has_response(self, name: str) -> bool:
        await self._asked()
        return name in self._world.responses

    async def response_chain(self, name: str, most: int) -> list[bytes]:
        await self._asked()
        chain: list[bytes] = []
        if name in self._world.forgotten:
            return chain
        while name:
            if name not in self._world.responses:
                return []
            data, name = self._world.responses[name]
            chain.append(data)
        return chain

    async def delete_response(self, name: str) -> bool:
        await self._asked()
        world = self._world
        if name not in world.responses and name in world.announced:
            world.announced[name] = True
            return True
        known = name in world.responses and name not in world.forgotten
        world.forgotten.add(name)
        return known

    async def _asked(self) -> float:
        self._world.calls += 1
        meanwhile, self._world.meanwhile = self._world.meanwhile, None
        if meanwhile is not None:
            asyncio.get_running_loop().call_soon(meanwhile)
        await asyncio.sleep(self._world.slow)
        if self._world.away:
            raise CallFailed("away")
        return asyncio.get_running_loop().time()

    def _other(self, name: str, now: float) -> str:
        """The other member that has a claim to *name*."""
        claim = self._claim(name, now)
        if claim is None or claim.owner == self._me or claim.owner not in self._world.members:
            return ""
        return claim.owner

    def _left(self, name: str, now: float) -> int:
        """The milliseconds for which a log is kept."""
        log, until = self._world.logs.get(name, (None, 0.0))
        return -2 if log is None else int(1000 * (until - now))

    def _claim(self, name: str, now: float) -> Claim | None:
        claim = self._world.claims.get(name)
        return claim if claim is not None and claim.until > now else None


def _name(key: str) -> str:
    """Return the name in *key*, whose beginning says what kind of thing it is."""
    return key.partition(":")[2]


@dataclass
class Instance:
    """One of several servers in this process, and what it knows of the others.

    *look* answers others that want to know something for their operating pages.
    """

    name: str
    server: RunningServer
    cluster: RemoteStreams
    leave: Callable[[], Any]
    world: World
    look: Callable[[str], bytes] = lambda _what: b""

    @property
    def requests(self) -> int:
        """How many requests its provider has got."""
        return self.server.simulator.stats().requests


class OwnCapacity:
    """The capacity of a provider that an instance has for itself."""

    starving, elsewhere = False, 0

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def places(self, resource: Resource, limit: int) -> None:
        """Leave *resource* as it is."""
        assert resource.limit == limit

    def starts(self, interval: float, tolerance: float, _serve: Callable[[], None]) -> Gcra:
        """Return a rate of its own."""
        return Gcra(interval, tolerance, self._clock)

    tokens = starts

    def without_tokens(self) -> None:
        """Share none, as before."""


class StreamsOnly:
    """A cluster whose instances share nothing but streams; *make* makes what knows those of the
    others.
    """

    observe = staticmethod(lambda _name: ALONE)

    def __init__(
        self,
        commands: Commands,
        make: Callable[[], RemoteStreams],
        make_quota: MakeQuota = quota_of,
        share_door: ShareDoor = lambda *_door: None,
    ) -> None:
        self.share_door = share_door
        self.commands = commands
        self.streams = make
        self.make_quota = make_quota

    token = 0

    async def others_serve(self) -> bool:
        """Know of no others."""
        return False

    def retire(self) -> None:
        """Have nothing to give back."""

    def share_provider(
        self,
        _scheduler: Scheduler,
        _name: str,
        _health: Health,
        clock: Callable[[], float],
        _on_starving: Callable[[], None],
    ) -> OwnCapacity:
        """Share nothing."""
        return OwnCapacity(clock)

    def ended(self, token: int) -> None:
        """Note nothing."""

    async def settled(self) -> None:
        """Wait for nothing."""

    async def agree_on_sessions(self, _sessions: object) -> None:
        """Agree on nothing."""

    def serve(self, *_owners: object) -> None:
        """Tell nothing."""


async def instance_of(
    world: World,
    stack: AsyncExitStack,
    path: Path,
    name: str,
    behaviour: Behaviour = QUICK,
    changes: dict[str, Any] | None = None,
    over: Commands | None = None,
    make_quota: MakeQuota = quota_of,
) -> Instance:
    """Start one more instance; it ends with *stack*, or by its `leave`."""
    made: list[RemoteStreams] = []
    commands = over or Commands(MemoryStore(world, name), "")

    def others() -> RemoteStreams:
        made.append(
            RemoteStreams(
                name,
                commands,
                NamedNetwork(world, name, path),
                lambda: SECRET,
                lambda what: instance.look(what),
                lambda: world.members,
            )
        )
        return made[0]

    own = AsyncExitStack()
    server = await own.enter_async_context(
        running(
            path / f"{name}.yaml",
            behaviour,
            changes,
            cluster=StreamsOnly(commands, others, make_quota),
        )
    )

    async def leave() -> None:
        """Stop the server in good order."""
        await own.aclose()
        world.networks[name].close()
        with contextlib.suppress(ValueError):
            world.members.remove(name)

    stack.push_async_callback(leave)
    instance = Instance(name, server, made[0], leave, world)
    return instance


@contextlib.asynccontextmanager
async def instances(
    path: Path,
    count: int = 2,
    behaviour: Behaviour = QUICK,
    world: World | None = None,
    **changes: Any,
) -> AsyncIterator[list[Instance]]:
    """Run *count* servers that know of each other, a, b, c …; *changes* as those of
    `make_server`.
    """
    world = World() if world is None else world
    async with AsyncExitStack() as stack:
        yield [
            await instance_of(world, stack, path, name, behaviour, changes)
            for name in "abcdefgh"[:count]
        ]


async def asked(instance: Instance, stack: AsyncExitStack, name: str = "r1") -> Any:
    """Ask over WebSocket, and return the socket, with the answer under way."""
    ws = await stack.enter_async_context(instance.server.connect())
    await ws.send_json(chat(name))
    await until_status(ws, "chunk")
    return ws


async def answered(instance: Instance, name: str = "r1", **payload: Any) -> list[Any]:
    """Ask over WebSocket, and read the answer."""
    async with instance.server.connect() as ws:
        await ws.send_json(chat(name, **payload))
        return await to_end(ws)


def read_by(instance: Instance) -> int:
    """How many readers the answers of *instance* have."""
    return sum(len(stream.readers) for stream in instance.server.owners.streams.running())

"""The Redis or Valkey server of a run, which all instances share: its script and claims in memory,
with faults.

What an instance says takes a moment each way, comes in the order in which it was said on one
*line*, and may be lost, late, or never answered. What the server says to an instance by itself may
be lost or late. The server may be gone and come back empty, be emptied, be paused, or be
put back to an earlier state.
"""

from __future__ import annotations

import asyncio
import copy
import time
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from aioserver.wings.cluster.connection import CallFailed, ScriptConnection
from aioserver.wings.cluster.limits.lease_messages import SECOND
from aioserver.wings.cluster.limits.renewer import Subscription
from tests.simulation.clock import Clock
from tests.support.instances import MemoryStore, World
from tests.support.renew_script import Script, Stale

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine, Sequence

    from aioserver.wings.cluster.connection import Script as LuaScript
    from aioserver.wings.cluster.limits.leases import Leases
    from tests.simulation.loop import SimulatedLoop
    from tests.simulation.plan import Shared

T = TypeVar("T")
# Seconds for a way, at most; the longest that is late; until instances hear again a server that is
# back.
WAY, LATEST, BACK = 0.001, 2.0, 0.5

# Where the server of a run is, the name of its cluster, and how its keys begin.
URL, NAME = "redis://127.0.0.1", "simulation"
PREFIX = f"aio:{{{NAME}}}:"


class _World(World):
    """Claims and logs; the members are those of the script."""

    def __init__(self, server: SharedServer, dice: random.Random) -> None:
        self._server = server
        super().__init__(random=dice)

    @property
    def members(self) -> list[str]:
        """The names of all members."""
        return list(self._server.script.members)

    @members.setter
    def members(self, _names: list[str]) -> None:
        """Do nothing: calls make members."""


class SharedServer:
    """The server; *faults* has the share of each fault of a message.

    *troubled* has the names of which some claim may not have come through, and *disturbed* when
    all of them were forgotten.
    """

    def __init__(self, loop: SimulatedLoop, dice: random.Random, faults: Shared) -> None:
        self.loop = loop
        self.dice = dice
        self.faults = faults
        self.script = Script()
        self.world = _World(self, dice)
        self.up, self.paused = True, False
        self.run = "run0"
        # The instances whose messages do not get through.
        self.cut_off: set[int] = set()
        self.leases: dict[str, tuple[int, Leases, Context]] = {}
        # Where each instance listens for the others.
        self.ports: dict[str, int] = {}
        self.troubled: set[str] = set()
        self.disturbed: list[float] = []
        self._inbox: list[Callable[[], None]] = []

    def reaches(self, number: int) -> bool:
        """Return whether calls of instance *number* get through for certain."""
        return self.up and not self.paused and not self.faults.lossy and number not in self.cut_off

    def join(self, number: int, leases: Leases) -> None:
        """Let the instance *number* be woken."""
        self.leases[leases.instance] = number, leases, copy_context()

    def forget(self, name: str) -> None:
        """Let the instance *name* hear nothing any more."""
        self.leases.pop(name, None)

    # What it is asked.

    def call(self, script: LuaScript, request: bytes) -> bytes:
        """Answer a call of *script*, and wake others.

        Raises:
            CallFailed: the answer is an error.
        """
        try:
            answer = self.script.call(script.name, request, round(time.time() * SECOND))
        except Stale as error:
            raise CallFailed(str(error)) from error
        for name, words in self.script.wakes.items():
            self._wake(name, words)
        return answer

    def after(self, moment: float, action: Callable[[], None], context: Context) -> None:
        """Do *action* at *moment*, in *context*."""
        self.loop.call_exactly_at(moment, action, context=context)

    def arrive(self, run: str, carry: Callable[[], None], refuse: Callable[[], None]) -> None:
        """Take a call that was meant for the process *run*."""
        if not self.up or run != self.run:
            refuse()
        elif self.paused:
            self._inbox.append(partial(self.arrive, run, carry, refuse))
        else:
            carry()

    def _wake(self, name: str, words: Sequence[str]) -> None:
        if (entry := self.leases.get(name)) is not None:
            number, leases, context = entry
            self._say(number, partial(leases.woken, words), context)

    def _say(self, number: int, action: Callable[[], None], context: Context) -> None:
        """Let *action* happen at instance *number*, unless the message is lost."""
        dice, faults = self.dice, self.faults
        lost, late = dice.random() < faults.lost, dice.random() < faults.late
        way = dice.uniform(0.1, 1.0) * WAY + (dice.uniform(0.0, LATEST) if late else 0.0)
        if not lost and number not in self.cut_off:
            self.after(Clock.now + way, action, context)

    # Its own faults.

    async def suffer(self, name: str, seconds: float) -> None:
        """Suffer the fault *name*; some last for *seconds*."""
        if name == "pause":
            self.paused = True
            await asyncio.sleep(seconds)
            self.paused = False
            inbox, self._inbox = self._inbox, []
            # They came on several lines.
            self.dice.shuffle(inbox)
            for each in inbox:
                each()
        elif name == "kill":
            self.up = False
            self._inbox.clear()
            self._empty()
            await asyncio.sleep(seconds)
            self._start()
        elif name == "empty":
            self._empty()
        else:
            world = self.world
            names = ("claims", "logs", "conversations", "responses", "forgotten")
            former = copy.deepcopy([getattr(world, name) for name in names])
            keys = self.script.snapshot()
            await asyncio.sleep(seconds)
            self.script.restore(keys)
            for kept_name, value in zip(names, former, strict=True):
                setattr(world, kept_name, value)
            self.disturbed.append(Clock.now)
            self._start()

    def reconnect(self, number: int) -> None:
        """Let instance *number* hear again, which was cut off."""
        for other, leases, context in list(self.leases.values()):
            if other == number:
                moment = Clock.now + self.dice.uniform(0.0, BACK)
                self.after(moment, partial(self._connected, leases), context)

    def _empty(self) -> None:
        self.script = Script()
        world = self.world
        for kept in (world.claims, world.logs, world.conversations, world.responses):
            kept.clear()
        world.forgotten.clear()
        world.secrets.clear()
        self.disturbed.append(Clock.now)

    def _start(self) -> None:
        """Run as another process, to which all instances connect again."""
        self.up = True
        self.run = f"run{int(self.run[3:]) + 1}"
        for number, leases, context in list(self.leases.values()):
            if number not in self.cut_off:
                moment = Clock.now + self.dice.uniform(0.0, BACK)
                self.after(moment, partial(self._connected, leases), context)

    def _connected(self, leases: Leases) -> None:
        if leases.instance in self.leases:
            leases.woken([""])


class Line:
    """A connection of instance *number* to *server*: what is asked on it arrives in its order, if
    at all.
    """

    def __init__(self, server: SharedServer, number: int) -> None:
        self._server = server
        self._number = number
        self._there = self._back = 0.0
        # The server's process that it leads to.
        self.run = server.run

    @property
    def connected(self) -> bool:
        """Whether what is asked is sent."""
        server = self._server
        return server.up and self._number not in server.cut_off

    def ask(
        self, action: Callable[[], T], lost: Callable[[], None] = lambda: None
    ) -> asyncio.Future[T]:
        """Let the server do *action*; return the future result. *lost* is called if it may never
        come.
        """
        server, dice, faults = self._server, self._server.dice, self._server.faults
        answer: asyncio.Future[T] = server.loop.create_future()
        answer.add_done_callback(_retrieve)
        context = copy_context()
        fates = [dice.random() < share for share in (faults.lost, faults.lost, faults.late)]
        ways = [dice.uniform(0.1, 1.0) * WAY for _ in range(2)]
        if fates[2]:
            ways[dice.randrange(2)] += dice.uniform(0.0, LATEST)
            lost()
        if any(fates[:2]) or self._number in server.cut_off or server.paused or not server.up:
            lost()
        if not server.up:
            server.after(Clock.now + WAY, partial(_refuse, answer), context)
            return answer
        if fates[0] or self._number in server.cut_off:
            return answer
        self.run = server.run
        self._there = max(self._there, Clock.now + ways[0])

        def reply(tell: Callable[[], None]) -> None:
            if not fates[1] and self._number not in server.cut_off:
                self._back = max(self._back, Clock.now + ways[1])
                server.after(self._back, tell, context)
            else:
                lost()

        def carry() -> None:
            try:
                result = action()
            except CallFailed as failure:
                reply(partial(_refuse, answer, failure))
            else:
                reply(partial(_renew, answer, result))

        def refuse() -> None:
            lost()
            reply(partial(_refuse, answer))

        arrive = partial(server.arrive, self.run, carry, refuse)
        # It is on its way, whatever becomes of whoever has asked.
        server.after(self._there, arrive, Context())
        return answer


class SimulatedStore(MemoryStore):
    """The claims of instance *number*, named *me*."""

    def __init__(self, server: SharedServer, number: int, me: str) -> None:
        super().__init__(server.world, me)
        self._server = server
        self._line = Line(server, number)

    async def execute(self, *command: Any) -> Any:
        # The keys in memory are those of one cluster.
        return await super().execute(
            *(part.removeprefix(PREFIX) if isinstance(part, str) else part for part in command)
        )

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""

    async def _ask(self, make: Callable[[], Coroutine[Any, Any, T]], *names: str) -> T:
        def do() -> T:
            # Its steps never wait, so that it is over with the first one.
            try:
                make().send(None)
            except StopIteration as end:
                result: T = end.value
                return result
            raise AssertionError("it waits")

        return await self._line.ask(do, lambda: self._server.troubled.update(names))

    async def _asked(self) -> float:
        return Clock.now


def _asking(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return what asks for the method *name* of the store in memory on the line of an instance."""
    method = getattr(MemoryStore, name)

    async def ask(store: SimulatedStore, *args: Any, **options: Any) -> Any:
        claimed = list(args[0]) if name == "renew" else args[:1]
        names = claimed if name in CLAIMING else ()
        return await store._ask(partial(method, store, *args, **options), *names)  # noqa: SLF001

    return ask


# What is asked of a store; and that of which the answer is to be relied on, whatever was lost.
CLAIMING = ("take", "renew", "put_log", "get_log")
for _name in (
    *(
        *CLAIMING,
        "find",
        "propose",
        "agreed",
        "members",
        "keep_turn",
        "turns",
        "take_mark",
        "put_response",
    ),
    *("mark_response", "unmark_response", "has_response", "response_chain", "delete_response"),
):
    setattr(SimulatedStore, _name, _asking(_name))


class SimulatedConnection(ScriptConnection):
    """What carries the calls of `Leases`: as `ScriptConnection`, with the same *bound*."""

    def __init__(
        self,
        server: SharedServer,
        number: int,
        url: str,
        *,
        bound: float,
        on_open: Callable[[], None],
        on_loss: Callable[[CallFailed], None],
    ) -> None:
        # The server tells each instance itself: see `SharedServer.join`.
        del on_open, on_loss
        self.address = url
        self._server = server
        self._number = number
        self._bound = bound
        self._line = Line(server, number)
        self._open = False
        self.run = ""

    @property
    def connected(self) -> bool:
        """Whether calls are sent at once."""
        return self._open and self.run == self._server.run

    async def execute(self, *command: bytes | float | str, bound: float | None = None) -> Any:
        """Raise an error: only conversations are cleared by it, which no run asks for."""
        raise AssertionError(command)

    async def ready(self) -> None:
        """Wait until calls are sent at once.

        Raises:
            CallFailed: there is no connection within the bound.
        """
        server = self._server
        if self.connected:
            return
        if not self._line.connected or server.paused:
            await asyncio.sleep(self._bound)
        if not self._line.connected or server.paused:
            raise CallFailed("no connection")
        self._open, self.run = True, server.run

    async def open(self) -> None:
        """Connect.

        Raises:
            CallFailed: the server is not there.
        """
        await self.ready()

    async def call(self, script: LuaScript, prefix: str, request: bytes, run: str) -> bytes:
        """Return the answer of *script* to *request*, which is meant for the process *run*.

        Raises:
            CallFailed: there is none within the bound, or it is an error.
        """
        if run != self._server.run:
            self._open = False
            raise CallFailed("it is another server now")
        try:
            async with asyncio.timeout(self._bound):
                return await self._line.ask(partial(self._server.call, script, request))
        except TimeoutError:
            self._open = False
            raise CallFailed("no answer") from None

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""


class SimulatedSubscription(Subscription):
    """Stands for the connection on which `Leases` is woken: see `SharedServer.join`."""

    def __init__(
        self,
        url: str,
        channel: str,
        handler: Callable[[bytes], None],
        *,
        bound: float,
        on_open: Callable[[], None],
    ) -> None:
        """Do nothing."""

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


def _refuse(answer: asyncio.Future[Any], failure: CallFailed | None = None) -> None:
    if not answer.done():
        answer.set_exception(CallFailed("refused") if failure is None else failure)


def _renew(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _retrieve(answer: asyncio.Future[Any]) -> None:
    if not answer.cancelled():
        answer.exception()

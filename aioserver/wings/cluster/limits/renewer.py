"""The renewer: carries the calls of `Leases` and the questions of budgets to the server, and receives
wake-up messages.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aioserver.wings.cluster.connection import (
    BUDGET,
    RENEW,
    AccessDenied,
    CallFailed,
    Connection,
    ScriptConnection,
)
from aioserver.wings.cluster.limits.lease_messages import decode_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis.asyncio.connection import AbstractConnection

    from aioserver.wings.cluster.connection import Reply
    from aioserver.wings.cluster.limits.leases import Leases
    from aioserver.wings.cluster.limits.shared_budget import SharedBudget


class Subscription(Connection):
    """A connection for messages: *handler* is called with each that comes on *channel*.

    A message that comes while there is no connection is lost, so *on_open* has to look for its
    effects.
    """

    def __init__(
        self,
        url: str,
        channel: str,
        handler: Callable[[bytes], None],
        *,
        bound: float,
        on_open: Callable[[], None],
    ) -> None:
        super().__init__(url, bound=bound, on_open=on_open)
        self._channel, self._handler = channel, handler

    async def _greet(self, connection: AbstractConnection) -> None:
        await connection.send_command("SUBSCRIBE", self._channel, check_health=False)
        await connection.read_response()

    def _take(self, reply: Reply) -> None:
        _kind, _channel, data = reply
        self._handler(data)


class Renewer:
    """Renews leases at the server at *url*, in the cluster *name*, which is the same at each
    instance.

    *make_leases* makes the leases; its argument is a function that they call when a renewal is due
    earlier. The creator must `open` the renewer, and `close` it in the end. `leave` before `close`
    gives everything back. *connect* makes `connection`, as `ScriptConnection`, which takes other
    commands as well, and *listen* the connection for wake-up messages, as `Subscription`. Keys and
    channels begin with `prefix`.

    Raises:
        ValueError: *url* cannot be used.
    """

    def __init__(
        self,
        make_leases: Callable[[Callable[[], None]], Leases],
        url: str,
        name: str,
        connect: Callable[..., ScriptConnection] = ScriptConnection,
        listen: Callable[..., Subscription] = Subscription,
    ) -> None:
        self._task: asyncio.Task[None] | None = None
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        # The questions that are under way.
        self._questions: set[asyncio.Task[None]] = set()
        self.leases = leases = make_leases(self._arm)
        self.prefix = f"aio:{{{name}}}:"
        bound = leases.times.bound
        self.connection = connect(url, bound=bound, on_open=self._tell_all, on_loss=self._lost)
        self.subscription = listen(
            url,
            f"{self.prefix}wake:{leases.instance}",
            self._woken,
            bound=bound,
            # Messages that were published while the subscription was closed are lost.
            on_open=self._tell_all,
        )

    async def open(self) -> CallFailed | None:
        """Connect, make the first call, and continue in the background, also if the server is
        unreachable.

        Return the failure of the first call; None if it succeeded.

        Raises:
            AccessDenied: the server refuses the password, or the user lacks a permission.
        """
        for connection in (self.connection, self.subscription):
            try:
                await connection.open()
            except AccessDenied:
                raise
            except CallFailed:
                pass
        failure = await self._renew()
        if isinstance(failure, AccessDenied):
            raise failure
        self._task = asyncio.create_task(self._run())
        return failure

    async def leave(self, within: float) -> None:
        """Take no more places, and notify the other instances once no request holds a place here.

        Wait at most *within* seconds for that.
        """
        self.leases.leave()
        for budget in self.leases.budgets.values():
            budget.leave()
        tasks = self._questions | ({self._task} if self._task is not None else set())
        if tasks:
            await asyncio.wait(tasks, timeout=within)

    async def close(self) -> None:
        """Close the connections."""
        self._closed = True
        tasks = self._questions | ({self._task} if self._task is not None else set())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._timer is not None:
            self._timer.cancel()
        await self.connection.close()
        await self.subscription.close()

    def ask(self, budget: SharedBudget) -> None:
        """Send the question of *budget*, and let it be `answered`."""
        if not self._closed:
            question = asyncio.create_task(self._ask(budget))
            self._questions.add(question)
            question.add_done_callback(self._questions.discard)

    async def _ask(self, budget: SharedBudget) -> None:
        connection, answer = self.connection, None
        try:
            await connection.ready()
            run = connection.run
            answer = await connection.call(BUDGET, self.prefix, budget.question(run), run)
        except CallFailed:
            pass
        budget.answered(answer)

    async def _run(self) -> None:
        while not self.leases.left:
            self._arm()
            await self._due.wait()
            await self._renew()

    async def _renew(self) -> CallFailed | None:
        leases, connection = self.leases, self.connection
        try:
            await connection.ready()
        except CallFailed as failure:
            leases.failed(str(failure))
            return failure
        run = connection.run
        request = leases.request(run)
        try:
            answer = await connection.call(RENEW, self.prefix, request, run)
        except CallFailed as failure:
            leases.failed(str(failure))
            return failure
        except BaseException:
            leases.failed("closed")
            raise
        leases.answered(answer)
        return None

    def _arm(self) -> None:
        """Set the timer for the next call."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        wait = self.leases.due - self.leases.now
        if wait <= 0:
            self._due.set()
            return
        self._due.clear()
        if wait < self.leases.times.lease * 2:
            self._timer = loop.call_later(wait, self._due.set)

    def _lost(self, failure: CallFailed) -> None:
        # A call that is under way fails by itself.
        if not self.leases.busy and not self.leases.left:
            self.leases.failed(str(failure))

    def _tell_all(self) -> None:
        self.leases.woken([""])

    def _woken(self, data: bytes) -> None:
        self.leases.woken(decode_words(data))

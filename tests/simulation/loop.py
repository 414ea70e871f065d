"""An event loop whose clock jumps to the next timer, and whose connections are those of a
`Network`.

Most of a run is this loop: hundreds of thousands of turns, in which a few callbacks run. So a turn
is written for speed: no selector is asked, and timers lie in a heap of tuples, which Python
compares in C.
"""

from __future__ import annotations

import asyncio
import heapq
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

from tests.simulation.clock import START, Clock
from tests.simulation.disk import tell
from tests.simulation.network import INSTANCE
from tests.support.strict_timers import strict_timer
from tests.support.virtual_loop import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.simulation.disk import Disk
    from tests.simulation.network import Network
    from tests.simulation.transport import FakeSocket

    Factory = Callable[[], asyncio.Protocol]

# Timers that are due within so many seconds of each other are due in the same turn.
RESOLUTION = 1e-9
# Turns in which no time passes, after which none ever will.
ENDLESS = 100_000


class SimulatedLoop(VirtualLoop):
    """The loop of one run, whose time is that of the process; *network* makes its connections.

    *on_pause* is called whenever nothing is ready to run and time is about to pass.

    Always: timers fire in the order of their times, and of two with the same time the older one
    first.
    """

    def __init__(self, network: Network, disk: Disk | None = None) -> None:
        super().__init__()
        self.now = START
        self.network = network
        self.disk = disk
        self.on_pause: Callable[[], None] = lambda: None
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = count()
        # The instances of which nothing runs: what a stopped one has missed; None, if it was
        # killed.
        self.absent: dict[int, list[asyncio.Handle] | None] = {}
        # The instance of each task that is one's.
        self.owners: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        # Turns since time has passed.
        self._turns = 0
        network.loop = self

    @property
    def now(self) -> float:
        """The time of the process (clock.py)."""
        return Clock.now

    @now.setter
    def now(self, now: float) -> None:
        Clock.now = now

    def time(self) -> float:
        return Clock.now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Call *callback* at the time *when*, as strictly as strict_timers.py says."""
        when, timer = strict_timer(self, when, callback, args, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_exactly_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> None:
        """Call *callback* at the time *when*: for what is no program's timer, but the network or a
        disk.
        """
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Call *callback* in *delay* seconds."""
        return self.call_at(Clock.now + delay, callback, *args, context=context)

    def follow_tasks(self) -> None:
        """Note from now on of which instance each task is."""
        self.set_task_factory(self._make_task)

    def _make_task(self, _loop: Any, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, **options)
        context = options.get("context")
        self.owners[task] = INSTANCE.get() if context is None else context.get(INSTANCE, -1)
        return task

    def owner_of(self, task: Any) -> int:
        """Return the instance whose *task* that is."""
        if hasattr(task, "get_context"):
            # Some tasks are made without the factory, and begin at once; only Python 3.12 and
            # later have them.
            return int(task.get_context().get(INSTANCE, -1))
        return self.owners.get(task, -1)

    def go_on(self, instance: int) -> None:
        """Let *instance*, which was stopped, run again: all that it has missed comes at once."""
        missed = self.absent.pop(instance)
        assert missed is not None
        self._ready.extend(missed)  # type: ignore[attr-defined]

    def _misses(self, handle: Any) -> bool:
        """Return whether *handle* is one of an instance of which nothing runs."""
        instance = handle._context.get(INSTANCE, -1)  # noqa: SLF001
        if instance not in self.absent:
            return False
        if (missed := self.absent[instance]) is not None:
            missed.append(handle)
        return True

    def is_absent(self, handle: Any) -> bool:
        """Return whether *handle* is one of an instance of which nothing runs."""
        return handle._context.get(INSTANCE, -1) in self.absent  # noqa: SLF001

    def timers(self) -> Iterator[asyncio.TimerHandle]:
        """Iterate over the timers that have not fired, and were not cancelled."""
        return (timer for _, _, timer in self._timers if not timer.cancelled())

    def _run_once(self) -> None:
        """Run what is ready; if nothing is, let time pass until the next timer."""
        ready: Any = self._ready  # type: ignore[attr-defined]
        timers = self._timers
        while timers and timers[0][2]._cancelled:  # noqa: SLF001 - faster than the method
            heapq.heappop(timers)
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                raise RuntimeError("every task waits, and there is no timer")
            self.on_pause()
            if timers[0][0] > Clock.now:
                Clock.now = timers[0][0]
                self._turns = 0
        self._turns += 1
        if self._turns > ENDLESS:
            raise RuntimeError("time does not pass: something is done over and over")
        due = Clock.now + RESOLUTION
        while timers and timers[0][0] < due:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:  # noqa: SLF001 - as asyncio's own loop
                if self.absent and self._misses(handle):
                    continue
                try:
                    # What the method `_run` does, without its cost.
                    handle._context.run(handle._callback, *handle._args)  # noqa: SLF001
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as exc:  # noqa: BLE001 - whoever handles it decides
                    message = f"Exception in callback {handle!r}"
                    self.call_exception_handler(
                        {"message": message, "exception": exc, "handle": handle}
                    )

    def _write_to_self(self) -> None:
        """Do nothing: there is no other thread that could wait for the loop."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        """Run *func* at once: a thread would have a time of its own. What an *executor* does is
        over when the disk says.
        """
        future, result, error = self.create_future(), None, None
        try:
            result = func(*args)
        except Exception as exc:  # noqa: BLE001 - whoever waits gets it
            error = exc
        if executor is None or self.disk is None:
            tell(future, result, error)
        else:
            self.call_exactly_at(self.disk.end_of(executor), tell, future, result, error)
        return future

    async def create_server(  # type: ignore[override]
        self, protocol_factory: Factory, *_args: Any, **_kwargs: Any
    ) -> Any:
        """Listen on a free port of the network."""
        return self.network.listen(protocol_factory)

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Factory, *_args: Any, sock: FakeSocket, **_kwargs: Any
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Connect to the listener at the address of *sock*."""
        return await self.network.connect(protocol_factory, sock)

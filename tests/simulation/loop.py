"""An event loop whose clock jumps to the next timer, and whose connections are those of a `Network`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.simulation.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.network import FakeSocket, Network

    Factory = Callable[[], asyncio.Protocol]


class Deadlock(RuntimeError):
    """Every task waits, and there is no timer: nothing would ever happen again."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """The loop of one run; *network* makes its connections.

    *on_pause* is called whenever nothing is ready to run and time is about to pass.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.on_pause: Callable[[], None] = lambda: None
        self._clock_resolution = 1e-9
        self._selector: Any = self
        network.loop = self

    def time(self) -> float:
        return Clock.now

    def select(self, timeout: float | None) -> list[Any]:
        """Be the loop's selector: let *timeout* seconds pass."""
        if timeout is None:
            raise Deadlock("every task waits, and there is no timer")
        if timeout > 0:
            self.on_pause()
            Clock.now += timeout
        return []

    def get_map(self) -> dict[Any, Any]:
        """Be the loop's selector, which watches no file."""
        return {}

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Do nothing: there is no other thread that could wait for the loop."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        """Run *func* at once: a thread would have a time of its own."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(exc)
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

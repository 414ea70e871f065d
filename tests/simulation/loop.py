"""An event loop whose clock jumps to the next timer, and whose connections are those of a `Network`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.simulation.clock import Clock
from tests.support.virtual_loop import VirtualLoop

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from tests.simulation.network import FakeSocket, Network

    Factory = Callable[[], asyncio.Protocol]


class SimulatedLoop(VirtualLoop):
    """The loop of one run, whose time is that of the process; *network* makes its connections.

    *on_pause* is called whenever nothing is ready to run and time is about to pass.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.on_pause: Callable[[], None] = lambda: None
        network.loop = self

    @property
    def now(self) -> float:
        """The time of the process (clock.py)."""
        return Clock.now

    @now.setter
    def now(self, now: float) -> None:
        Clock.now = now

    def select(self, timeout: float | None) -> list[Any]:
        if timeout:
            self.on_pause()
        return super().select(timeout)

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

"""The simulator as a wing, for providers with `simulated: true`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Wing

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from aioserver.faces.wing import Core


class OnDemand:
    """A simulator that starts when its address is asked for, and runs until *stack* closes it."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._address = ""

    async def address(self) -> str:
        """Return the base URL of the simulator, which is started if it does not run yet."""
        if not self._address:
            # Few servers need it, and it takes time to import.
            from aioserver.wings.simulator.server import Simulator  # noqa: PLC0415

            simulator = await self._stack.enter_async_context(Simulator())
            self._address = simulator.base_url
        return self._address


class SimulatorWing(Wing):
    """The provider of a first start, without a key and without a network."""

    name: ClassVar = "simulator"

    async def open(self, core: Core, stack: AsyncExitStack) -> None:  # noqa: ARG002
        """Provide the simulator on demand."""
        self.simulated = OnDemand(stack)

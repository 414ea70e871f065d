"""The simulator as a wing, for providers with `simulated: true`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Wing

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from aioserver.faces.wing import Core


class SimulatorWing(Wing):
    """The provider of a first start, without a key and without a network."""

    name: ClassVar = "simulator"

    def __init__(self) -> None:
        self._base_url = ""

    async def open(self, core: Core, stack: AsyncExitStack) -> None:  # noqa: ARG002
        """Provide the simulator, which starts when its base URL is asked for."""
        self.simulator = partial(self._start, stack)

    async def _start(self, stack: AsyncExitStack) -> str:
        """Start the simulator until *stack* closes it, if it does not run; return its base URL."""
        if not self._base_url:
            # Few servers need the simulator, and it takes time to import.
            from aioserver.wings.simulator.server import Simulator  # noqa: PLC0415

            simulator = await stack.enter_async_context(Simulator())
            self._base_url = simulator.base_url
        return self._base_url

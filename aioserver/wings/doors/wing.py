"""How the doors are plugged in."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Wing
from aioserver.wings.doors.hooks import HookSet, faults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AsyncExitStack

    from aioserver.config.settings import Settings
    from aioserver.faces.wing import Core


class DoorsWing(Wing):
    """What stops people at the door, beside keys."""

    name: ClassVar = "doors"
    _hooks: HookSet
    _shutdown_timeout = 0.0

    def faults(self, settings: Settings) -> Iterable[str]:
        """Return which hooks cannot be asked."""
        return faults(settings.hooks)

    async def open(self, core: Core, stack: AsyncExitStack) -> None:
        """Make the hooks."""
        self.hooks = self._hooks = HookSet(core.settings, core.metrics)
        stack.push_async_callback(self._hooks.close)
        self._note(core.settings)

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Return the function that asks the hooks of *settings*.

        Raises:
            ConfigurationError: a class cannot be made.
        """
        apply_hooks = self._hooks.prepare(settings)

        def apply() -> None:
            apply_hooks()
            self._note(settings)

        return apply

    async def leave(self) -> None:
        """Let hooks see the ends of all answers."""
        await self._hooks.finish(self._shutdown_timeout)

    def _note(self, settings: Settings) -> None:
        self._shutdown_timeout = settings.chat.websocket.shutdown_timeout

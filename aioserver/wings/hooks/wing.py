"""Hooks as a wing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from aioserver.faces.wing import Wing
from aioserver.wings.hooks import hook_set
from aioserver.wings.hooks.hook_set import HookSet
from aioserver.wings.hooks.section import HooksSection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AsyncExitStack

    from aioserver.config.settings import Settings
    from aioserver.faces.wing import Core


class HooksWing(Wing):
    """The programs that are asked about requests, and shown answers."""

    name: ClassVar = "hooks"
    _hooks: HookSet
    _section: HooksSection
    _shutdown_timeout = 0.0

    def faults(self, settings: Settings) -> Iterable[str]:
        """Yield which hooks cannot be asked."""
        return hook_set.faults(settings.hooks)

    async def open(self, core: Core, stack: AsyncExitStack) -> None:
        """Make the hooks.

        Raises:
            ConfigurationError: a class cannot be made.
        """
        self.hooks = self._hooks = HookSet(core.settings, core.metrics)
        self._section = HooksSection(self._hooks, core.metrics)
        stack.push_async_callback(self._hooks.close)
        self._note(core.settings)

    def sections(self) -> Sequence[HooksSection]:
        """Return the state of the hooks."""
        return (self._section,)

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

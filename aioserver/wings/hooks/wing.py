"""Hooks as a wing, and their state for operators."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, ClassVar, TypedDict

from aioserver.faces.wing import Wing
from aioserver.monitoring.section import Section
from aioserver.monitoring.state import COUNTS, SUM
from aioserver.wings.hooks import hook_set
from aioserver.wings.hooks.hook_set import HookSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AsyncExitStack

    from aioserver.config.settings import Settings
    from aioserver.faces.wing import Core
    from aioserver.telemetry.metrics import Metrics


class HookState(TypedDict):
    """One hook: the calls that are open, and the outcomes of the others since the start."""

    open: Annotated[int, SUM]
    outcomes: Annotated[dict[str, int], COUNTS]


class HooksState(TypedDict):
    """The hooks by name, and the bytes of answers that they have not taken yet."""

    behind_bytes: Annotated[int, SUM]
    by_name: dict[str, HookState]


class HooksSection(Section[HooksState]):
    """The state of *hooks* for operators; *metrics* count their calls."""

    key = "hooks"
    shape = HooksState

    def __init__(self, hooks: HookSet, metrics: Metrics) -> None:
        self._hooks, self._metrics = hooks, metrics

    def state(self) -> HooksState:
        """Return the state of the configured hooks."""
        calls = self._hooks.calls()
        outcomes: dict[str, Counter[str]] = {name: Counter() for name in calls}
        for (name, _event, outcome), counter in self._metrics.hook_calls.items():
            if name in outcomes:
                outcomes[name][outcome] += int(counter.value)
        return {
            "behind_bytes": self._hooks.stats().behind,
            "by_name": {
                name: {"open": calls[name], "outcomes": dict(counts)}
                for name, counts in outcomes.items()
            },
        }


class HooksWing(Wing):
    """The programs that are asked about requests, and shown answers."""

    name: ClassVar = "hooks"
    _hooks: HookSet
    _section: HooksSection

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

    def sections(self) -> Sequence[HooksSection]:
        """Return the state of the hooks."""
        return (self._section,)

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Return the function that asks the hooks of *settings*.

        Raises:
            ConfigurationError: a class cannot be made.
        """
        return self._hooks.prepare(settings)

    async def leave(self) -> None:
        """Let hooks see the ends of all answers."""
        await self._hooks.finish()

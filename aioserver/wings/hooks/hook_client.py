"""A hook that can be asked: behind a URL (http_hook.py), or a class (python_hook.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

    from aioserver.config import settings
    from aioserver.hook import Call, Refuse
    from aioserver.wings.hooks.tap import Tap


class HookClient(ABC):
    """A hook of these *settings*. *owner* is the owner of the request in question: owners share
    the capacity of a hook.
    """

    def __init__(self, settings: settings.Hook) -> None:
        self.settings = settings
        # The calls that are open.
        self.open = 0

    @property
    def name(self) -> str:
        """The name, in logs and metrics."""
        return self.settings.name

    @property
    def connections(self) -> int:
        """The number of its connections in use."""
        return 0

    def retire(self) -> None:  # noqa: B027 - a class has nothing
        """Release everything that is not in use: the hook is no longer configured. It continues
        for the requests that have come to it, and for their answers.
        """

    async def close(self) -> None:  # noqa: B027 - as above
        """Release all resources."""

    @abstractmethod
    async def decide(self, call: Call, owner: Hashable) -> Refuse | bytes | None:
        """Return the decision about the request in *call*: a refusal, another body, or None if it
        passes. Cancelling is safe.

        Raises:
            HookFault: there is none.
        """

    @abstractmethod
    async def decide_answer(self, call: Call, body: bytes, owner: Hashable) -> Refuse | None:
        """Return the decision about *body*, a whole answer: a refusal, or None. Cancelling is
        safe.

        Raises:
            HookFault: there is none.
        """

    @abstractmethod
    async def follow(self, call: Call, shown: Tap, owner: Hashable) -> Refuse | None:
        """Show the events in *shown*, until they end or the hook has decided; return its decision,
        as `decide_answer`.

        Raises:
            HookFault: there is none.
        """

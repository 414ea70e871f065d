"""Answers that begin at a key, as a request lets them: a grant at once, or after a wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.limits.resource import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from aioserver.limits.quota import Quota
    from aioserver.limits.resource import Grant


class Turn:
    """One answer at *quota*, which begins or waits."""

    def __init__(
        self,
        quota: Quota,
        tokens: int = 0,
        *,
        flow: Hashable = "",
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        self.quota = quota
        self._ticket = Ticket(flow=flow)
        self.grant: Grant | None = quota.take(self._ticket, tokens, on_wait)

    @property
    def waiting(self) -> bool:
        """Whether it has not begun yet."""
        return self.grant is None and self._ticket.outcome is None

    async def begun(self) -> None:
        """Wait until it may begin; raise why it may not."""
        if self.grant is None:
            self.grant = await self.quota.granted(self._ticket)

    def end(self, spent: int = 0, *, unused: bool = False) -> None:
        """Give back what it has."""
        if self.grant is None:
            self.quota.leave(self._ticket)
        elif unused:
            self.grant.cancel()
        else:
            self.grant.release(0, spent)

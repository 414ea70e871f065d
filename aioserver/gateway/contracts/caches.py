"""The contract of what finds the losses of providers' caches: which turns of a conversation were
read anew, and from which byte on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.gateway.request import Request
    from aioserver.protocol.prefix import Parts
    from aioserver.providers.provider import Provider


class Caches(Protocol):
    """Compares the prompt of each turn with the one before it."""

    async def read(
        self, request: Request, conversation_id: str | None, providers: Mapping[str, Provider]
    ) -> Parts | None:
        """Read the prompt of *request*, which goes to one of *providers* now, and set the
        `turn_read` of its outcome, if it is a turn that can be compared. Return the parts of the
        prompt, if there are any. Cancelling is safe.
        """

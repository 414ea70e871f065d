"""The contract of the wing that finds out which turns of a conversation a provider has read anew,
without its cache, and from which byte on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.gateway.request import Request
    from aioserver.protocol.regions import Regions
    from aioserver.providers.provider import Provider


class Caches(Protocol):
    """Compares the prompt of each turn with the one before it."""

    async def read(
        self, request: Request, conversation_id: str | None, providers: Mapping[str, Provider]
    ) -> Regions | None:
        """Read the prompt of *request*, which goes to one of *providers* now, and set the
        `turn_read` of its outcome, if it is a turn that can be compared. Return the regions of
        the prompt, if it has any. Cancelling is safe.
        """

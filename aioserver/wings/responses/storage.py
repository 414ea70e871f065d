"""Stored responses on their way between instances, where several serve.

The wing `cluster` implements `Storage`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from aioserver.auth.callers import Caller


class Record(NamedTuple):
    """A response without those before it, on its way between instances: see
    `stored_response.StoredResponse` and `ResponseParts`.
    """

    id: str
    status: str
    provider: str
    kept_there: bool
    input: bytes
    head: bytes
    output: bytes
    tail: bytes
    whole: bool


class Storage(Protocol):
    """Where the responses of all instances are, if there are several."""

    def announce(self, caller: Caller, response_id: str) -> None:
        """Note that a response is under way which will be kept: a look-up waits for it a moment."""

    def withdraw(self, caller: Caller, response_id: str) -> None:
        """Note that a response that was announced will not be kept."""

    def keep(
        self,
        caller: Caller,
        record: Record,
        previous_id: str | None,
        seconds: float,
        *,
        whole: Callable[[], Record | None],
    ) -> asyncio.Future[bool] | None:
        """Keep a response of *caller* for *seconds*, soon.

        *previous_id* is that of the response which it continued.

        Where that one proves to be missing, `whole()` is kept instead, the record that has all
        that came before. What is returned has whether it is kept, once that is known; None if
        there is no room for it among those that are on their way.
        """

    async def load(
        self, caller: Caller, response_id: str, window: float, most: int
    ) -> Sequence[Record]:
        """Return a response that was stored within *window*, and those before it, the newest
        first; nothing if there is none.

        *most* are the bytes that they may have together.

        Raises:
            InstanceUnavailable: whether there is one is not known.
            ServerAtCapacity: too many are read already.
        """

    async def delete(self, caller: Caller, response_id: str) -> bool:
        """Let a response be found no longer; return whether there was one.

        Raises:
            InstanceUnavailable: that is not known.
        """

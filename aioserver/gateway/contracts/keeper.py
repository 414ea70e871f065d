"""The contract of a request that continues something, or whose answer is stored.

    begin        before any provider is asked
    identified   once the provider's id of the answer is known, if it has one
    keep         before the client knows that the answer is complete
    cut          instead of `keep`, when its client has cancelled the answer
    release      at the end, in any case

A chat stores its turn of the conversation (prompts.py), a response stores itself (wing
`responses`). Most requests have no keeper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from aioserver.providers.request import Answer
    from aioserver.streams.stream import Stream


class Keeper(Protocol):
    """Loads what one request continues, and stores its answer; each `Request` has its own.

    Always: at most one of `keep` and `cut` is called, and only once; nothing is called after
    `release`. A failed answer is not stored, for whatever reason it has failed.
    """

    @property
    def kept_at(self) -> str | None:
        """The name of the provider that stores the response being continued; None: no provider
        does, or it is not known.
        """

    async def begin(self) -> None:
        """Load what the request continues. Cancelling is safe."""

    def identified(self, answer_id: str) -> None:
        """Record the id that the provider has given to the answer, which clients know from now on."""

    def keep(self, answer: Stream | Answer) -> Awaitable[None] | None:
        """Store *answer*, which is complete: a log without its last event, or an answer that was
        not streamed.

        Return None once it is stored. Otherwise the answer ends only when the awaitable is done,
        which must not raise, and must have a bound of its own; the provider's place is free
        meanwhile.
        """

    def cut(self, stream: Stream) -> Awaitable[None] | None:
        """Store the part of an answer in *stream*, which its client has cancelled; the log ends as
        after `keep`.
        """

    def release(self) -> None:
        """Release everything; a second call does nothing."""

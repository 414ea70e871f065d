"""The contract of what a request continues, and of what is kept of its answer.

    begin        before any provider is asked
    identified   once the provider's id of the answer is known, if it has one
    keep         before the client knows that the answer is complete
    cut          instead, when its client has cancelled the answer
    release      whatever happened

A chat keeps its turn of the conversation (prompts.py), a response itself (wing `responses`). Most
requests have no keeper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from aioserver.providers.request import Answer
    from aioserver.streams.stream import Stream


class Keeper(Protocol):
    """What one request continues, and keeps; it is given to `Request` once.

    Always: `keep` and `cut` are called once at most, and only one of them; nothing is called after
    `release`. Of an answer that has failed, whoever has ended it, nothing is kept.
    """

    @property
    def kept_at(self) -> str | None:
        """The name of the provider that has made what the request continues, and keeps it; None:
        none does, or it is not known.
        """

    async def begin(self) -> None:
        """Find what the request continues. Cancelling is safe."""

    def identified(self, answer_id: str) -> None:
        """Note the id that the provider has given to the answer, which clients know from now
        on.
        """

    def keep(self, answer: Stream | Answer) -> Awaitable[None] | None:
        """Keep *answer*, which is complete: a log with all but its last event, or an answer that
        was not streamed.

        Return None if that is done. Otherwise the answer ends only when the awaitable is done,
        which must not raise, and has a bound of its own; the provider's place is free meanwhile.
        """

    def cut(self, stream: Stream) -> Awaitable[None] | None:
        """Keep what *stream* has of an answer that its client has cancelled; the log ends as after
        `keep`.
        """

    def release(self) -> None:
        """Forget all of it; a second call does nothing."""

"""The contract of hooks: programs of the operator's that are asked about each request, and shown
each answer.

    ask       once what the request continues is known, and before a provider is asked
    answered  once a whole answer is there, and before anything is sent of it

A request is shown once, whatever becomes of it: attempts, other providers and the rest of an
answer come behind `ask`, and clients that come back for the answer ask nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aioserver.gateway.request import Request
    from aioserver.providers.request import Answer
    from aioserver.streams.stream import Stream


class Hooks(Protocol):
    """The hooks of the server, those of the settings that were applied last.

    *present*: whether there are any. *log* is the class of a new log: where answers are shown, one
    that shows its events.
    """

    present: bool
    log: type[Stream]

    async def ask(self, request: Request, stream: Stream | None = None) -> None:
        """Show *request*, whose answer is about to fill *stream* if that is streamed; it may have
        another body then. Cancelling is safe.

        Raises:
            RequestRefused: a hook has refused it, or refuses what it cannot see.
            HookUnavailable: one that must decide has not.
            ServerAtCapacity: there is no room for its new body.
        """

    async def answered(self, request: Request, answer: Answer) -> None:
        """Show a whole *answer* to *request*, of which nothing is sent yet. Cancelling is safe.

        Raises:
            AnswerRefused: a hook has refused it.
            HookUnavailable: one that must decide has not.
        """

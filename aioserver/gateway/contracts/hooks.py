"""The contract of hooks: programs of the operator that decide about each request, and see each
answer.

    ask       once the request's conversation is known, and before a provider is asked
    answered  once a whole answer is there, and before any of it is sent

Hooks see each request once, however it fares: retries, failovers and continuations come after
`ask`, and clients that return for the answer cause no further call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aioserver.gateway.request import Request
    from aioserver.providers.request import Answer
    from aioserver.streams.stream import Stream


class Hooks(Protocol):
    """The hooks in the settings that were applied last.

    *present*: whether there are any. *log* is the class of new logs: if hooks see answers, a log
    that shows them its events.
    """

    present: bool
    log: type[Stream]

    async def ask(self, request: Request, stream: Stream | None = None) -> None:
        """Show *request* to the hooks, and wait for their decision; its body may be replaced. If
        it is streamed, its answer will fill *stream*. Cancelling is safe.

        Raises:
            RequestRefused: a hook has refused it, or refuses requests that it cannot see.
            HookUnavailable: a hook whose decision is required has not answered.
            ServerAtCapacity: there is no room for its new body.
        """

    async def answered(self, request: Request, answer: Answer) -> None:
        """Show *answer*, a whole answer to *request*, of which nothing was sent yet. Cancelling is
        safe.

        Raises:
            AnswerRefused: a hook has refused it.
            HookUnavailable: a hook whose decision is required has not answered.
        """

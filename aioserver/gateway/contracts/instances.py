"""Streams of other instances: if several processes serve together, each of them gives access to
every stream.

A request id belongs to one instance, the owner of its stream, which *claims* it before it begins
an answer. A request whose id another instance owns is passed on to it, and so is that of a client
that returns for a stream which is not here. The wing `cluster` implements `Instances`, which hides
how the instances communicate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager
    from functools import partial

    from aioserver.auth.callers import Caller
    from aioserver.errors import AioserverError
    from aioserver.streams.stream import Stream

    RenderError = Callable[[AioserverError, bytes], bytes]
    # `Writer.pass_on`.
    PassOn = Callable[[bytes, Callable[[], None]], bool]

NOT_FOUND = "no such stream: it never existed, or is no longer kept"


class Start(NamedTuple):
    """Where a client reads on: after event *after*, or after the event with the sequence number
    *sequence*; if both are None, after the newest event. With a *digest*, the answer must be that
    to the same request.
    """

    after: int | None = 0
    sequence: int | None = None
    digest: bytes | None = None


class Reading(Protocol):
    """An answer of another instance that a WebSocket reads; `start` or `leave` must be called.

    *last* is the message that was passed on last, and *passed* the number of times that messages
    were passed on.
    """

    last: bytes
    passed: int

    def start(self, pass_on: PassOn, on_end: Callable[[AioserverError | None], None]) -> None:
        """Pass whole messages to *pass_on*, and call *on_end* once behind the last: with an error
        if the answer goes on, but not here.
        """

    def leave(self) -> None:
        """Read no more, and call nothing any more; a second call does nothing."""


class Elsewhere(Exception):
    """A request is for the *owner* of its answer, another instance.

    *body* has the bytes that the client has sent. *forward* is called by the method of that name.
    *follow* returns the `Reading` of the answer for a WebSocket, from a `Start` on. Its messages
    are those of chats, or those of an API on the lane of the given name.

        Lost, InstanceUnavailable: as `forward`.
        RequestConflict, ResumeGap: the owner has another answer, or not all of the rest.
    """

    def __init__(
        self,
        owner: str,
        forward: Callable[
            [Elsewhere, web.Request, RenderError, Callable[[], None]],
            Awaitable[web.StreamResponse],
        ],
        follow: Callable[[Start, str, str | None], Awaitable[Reading]],
    ) -> None:
        super().__init__(owner)
        self.owner, self.follow = owner, follow
        self.body = b""
        self._forward = forward

    def forward(
        self, request: web.Request, render_error: RenderError, on_accept: Callable[[], None]
    ) -> Awaitable[web.StreamResponse]:
        """Pass *request* on to the owner, and the owner's answer to the client. Return the
        response, which has been written.

        *render_error* renders an error behind the bytes that the client has got last; b"": they do
        not end with a whole event. *on_accept* is called once the owner has the answer: the body is
        not needed any more, and is dropped.

        Raises:
            Lost: the owner does not have the answer any more. Nothing was written.
            InstanceUnavailable: the owner cannot be reached. Nothing was written.
            ServerShutdown: it has ended before it has answered. Nothing was written.
        """
        return self._forward(self, request, render_error, on_accept)


class Lost(Exception):
    """The *owner* of an answer does not have it any more; *error* is what a client hears if nobody
    has it.
    """

    def __init__(self, owner: str, error: AioserverError) -> None:
        super().__init__(owner)
        self.owner, self.error = owner, error


# The id of the answer that a request asks for, by which any instance finds it.
ASKED = web.RequestKey("asked", str)
# The first is set once an owner to which the request was passed on has lost the answer. The second
# is the client's body until it is read again.
LOST = web.RequestKey("lost", Lost)
BODY = web.RequestKey("body", bytes)
# Set once the id is claimed here: returns `Instances.claiming` of it.
CLAIMED: web.RequestKey[partial[AbstractContextManager[object]]] = web.RequestKey("claimed")
# The name of the instance that has answered a request which was passed on.
FORWARDED = web.RequestKey("forwarded", str)


class Instances(Protocol):
    """The other instances, as the gateway and the faces see them."""

    async def claim(self, caller: Caller, request_id: str, lost: Lost | None) -> None:
        """Let the requests of *caller* with *request_id* come here, before there is a stream. An
        answer of an instance that has ended is then a stream of this one.

        *lost*: an owner that was asked for it, and does not have it.

        Raises:
            Elsewhere: they go to another instance.
            InstanceUnavailable, ServerAtCapacity: the answer of an instance that has ended cannot
                be read, or there is no room for it.
        """

    def claiming(self, caller: Caller, request_id: str) -> AbstractContextManager[object]:
        """Let other instances wait for a stream within the `with`: the request with the claimed id
        waits here, and has no stream yet.
        """

    async def route(self, caller: Caller, request_id: str, lost: Lost | None) -> Stream:
        """Return the caller's stream *request_id*, if nobody else has it: that of an instance that
        has ended.

        Raises:
            Elsewhere: another instance has it.
            StreamNotFound: no instance has it.
            ServerShutdown: its owner is gone.
            InstanceUnavailable: it is not known whether there is one.
            ServerAtCapacity: as `claim`.
        """

    async def cancel(self, caller: Caller, request_id: str) -> None:
        """Cancel a stream of another instance.

        Raises:
            StreamNotFound: there is none.
            InstanceUnavailable: it is not known whether there is one.
        """

    async def listing(self, caller: Caller) -> tuple[list[dict[str, Any]], bool]:
        """Return the `Stream.describe` of each of the caller's streams at all other instances, and
        whether some may be missing.
        """

    async def forget(self, caller: Caller, name: str) -> bool:
        """Remove an answer that is stored beside its log from all other instances; return whether
        there was one.

        Raises:
            InstanceUnavailable: not all of them have confirmed it.
        """

    def aliased(self, stream: Stream, alias: str) -> None:
        """Note that *alias* is another id of *stream*."""

    def ended(self, stream: Stream) -> None:
        """Note that the producer of *stream* has ended."""

"""Streams of other instances: where several processes serve together, any of them leads to any stream.

A request id belongs to one instance, which *claims* it before it asks a provider: the owner of its
stream. A request whose id is another instance's gets a mirror of the owner's log (streams/mirror.py). So
does a client that comes back for a stream which is not here. What the instances say to each other is
behind `Instances`, which the wing `cluster` implements.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from aioserver.errors import RequestConflict, StreamNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aioserver.auth.callers import Caller
    from aioserver.gateway.producers import Producers
    from aioserver.gateway.request import Request
    from aioserver.streams.lifetime import Lifetime
    from aioserver.streams.store import StreamStore
    from aioserver.streams.stream import Stream

# Seconds for which a mirror waits for its first reader, who may have to wait for a place of its own.
MAX_UNREAD = 60.0
NOT_FOUND = "no such stream: it never existed, or is no longer kept"


class Start(NamedTuple):
    """Where a mirror begins: after event *after*, or after that with the sequence number *sequence*.

    Both None: after the newest event. *digest*: only if the log is that of the same request. *cancel*: the
    answer is cancelled.
    """

    after: int | None = 0
    sequence: int | None = None
    digest: bytes | None = None
    cancel: bool = False


# Where a client begins that has seen nothing.
FROM_START = Start()


class Instances(Protocol):
    """The other instances, as the gateway sees them."""

    async def claim(
        self, stream: Stream, accept: Callable[[], None]
    ) -> asyncio.Future[None] | None:
        """Claim the request id of *stream* for this instance.

        None: the answer is to be made here. Otherwise another instance has it, *accept* was called, and its
        events come to *stream*: the future is done when there are no more. Cancelling is safe.

        Raises:
            RequestConflict: the id is another instance's, with another payload.
        """

    async def follow(self, stream: Stream, start: Start) -> None:
        """Fill the mirror *stream*, whose claim is settled once it is known that there is such a log.

        Raises:
            StreamNotFound: no instance has such a log.
            RequestConflict, ResumeGap: as `Gateway.find`, and `Stream.locate`.
            ServerShutdown: its owner is gone.
        """

    async def cancel(self, caller: Caller, request_id: str) -> bool:
        """Cancel a stream of another instance; return whether there is one."""

    async def listing(self, caller: Caller) -> list[dict[str, Any]]:
        """Return what `describe` says of the caller's streams at all other instances."""

    async def forget_response(self, caller: Caller, response_id: str) -> bool:
        """Let no other instance know a response any more; return whether one did."""

    def note_end(self, stream: Stream) -> None:
        """Note that *stream*, whose id was claimed, has ended."""


class Elsewhere:
    """What the gateway does with streams that other instances have."""

    def __init__(
        self,
        instances: Instances,
        streams: StreamStore,
        producers: Producers,
        lifetime: Lifetime,
    ) -> None:
        self._instances = instances
        self._streams = streams
        self._producers = producers
        self._lifetime = lifetime
        self._loop = asyncio.get_running_loop()
        producers.on_end = self._note_end

    def claiming(
        self,
        stream: Stream,
        request: Request,
        producer: Coroutine[Any, Any, None],
        release: Callable[[], None],
    ) -> tuple[Coroutine[Any, Any, None], Callable[[], None]]:
        """Return the producer that claims the id of *stream* and then runs *producer*, and its release.

        *release* is that of *producer*.
        """
        stream.attachment.claimed = self._loop.create_future()

        def release_all() -> None:
            # It may never have begun.
            producer.close()
            release()

        return self._claim(stream, request, producer), release_all

    def mirror(self, caller: Caller, request_id: str, start: Start) -> Stream:
        """Return a mirror of the caller's stream *request_id*, which ends soon if there is none.

        Raises:
            ServerAtCapacity: there is no room for it.
        """
        stream = self._streams.open_mirror(request_id, caller, after=start.after or 0)
        try:
            stream.attachment.claimed = self._loop.create_future()
            self._lifetime.expect(stream, MAX_UNREAD)
            self._producers.start(stream, self._instances.follow(stream, start), _nothing)
        except BaseException:
            self._streams.drop(stream)
            raise
        return stream

    async def reach(self, caller: Caller, request_id: str, start: Start) -> Stream:
        """Return a mirror, as `mirror`, once it is known that there is such a stream.

        Raises:
            AioserverError: as `Instances.follow`.
        """
        stream = self.mirror(caller, request_id, start)
        await self.claimed(stream)
        return stream

    async def claimed(self, stream: Stream) -> None:
        """Wait until it is known that *stream* is answered, here or elsewhere.

        Raises:
            AioserverError: it is not.
        """
        if (claimed := stream.attachment.claimed) is None:
            return
        try:
            await asyncio.wait((claimed,))
        except asyncio.CancelledError:
            if stream.attachment.mirrored:
                self._lifetime.let_go(stream)
            elif not stream.readers:
                self._lifetime.reader_removed(stream)
            raise
        if (error := claimed.result()) is not None:
            raise error

    async def cancel(self, caller: Caller, request_id: str) -> None:
        """Cancel a stream of another instance.

        Raises:
            StreamNotFound: there is none.
        """
        if not await self._instances.cancel(caller, request_id):
            raise StreamNotFound(NOT_FOUND)

    async def forget_response(self, caller: Caller, response_id: str) -> bool:
        """Let no other instance know a response any more; return whether one did."""
        return await self._instances.forget_response(caller, response_id)

    async def listing(self, caller: Caller) -> list[dict[str, Any]]:
        """Return what `describe` says of the caller's streams at all other instances."""
        return await self._instances.listing(caller)

    async def _claim(
        self,
        stream: Stream,
        request: Request,
        producer: Coroutine[Any, Any, None],
    ) -> None:
        try:
            filled = await self._instances.claim(
                stream, partial(self._become_mirror, stream, request)
            )
        except RequestConflict:
            # The id stays free for a request with the payload that it is known with.
            self._streams.hide(stream)
            stream.attachment.mirrored = False
            raise
        stream.attachment.settle_claim()
        if filled is not None:
            await filled
            return
        await producer

    def _become_mirror(self, stream: Stream, request: Request) -> None:
        """Note that another instance has the answer: *stream* is its mirror, and no answer of ours."""
        self._streams.hide(stream)
        # First, or it would be given back as one that has a place.
        request.forget_undecided()
        if (quota := request.caller.quota) is not None:
            quota.give_back(unused=True)
        request.provider_request.forget_body()
        self._lifetime.expect(stream, MAX_UNREAD)

    def _note_end(self, stream: Stream) -> None:
        attachment = stream.attachment
        if attachment.claimed is not None:
            if attachment.undecided and attachment.abandoned:
                # Its client has left before it was known whether another instance has the answer.
                self._streams.unname(stream)
            refused = attachment.undecided
            attachment.settle_claim(stream.error or StreamNotFound("this answer was cancelled"))
            if refused:
                # There is no such log: the answer is an error, and nobody reads it.
                self._lifetime.let_go(stream)
            if not attachment.mirrored:
                self._instances.note_end(stream)


def describe(stream: Stream) -> dict[str, Any]:
    """Return what a list of streams says of *stream*."""
    return {
        "request_id": stream.request_id,
        "status": stream.end_status.decode() or "running",
        "last_event_id": stream.last,
        "first_event_id": stream.first,
        "readers": len(stream.readers),
    }


def _nothing() -> None:
    """Release nothing: a mirror has no request."""

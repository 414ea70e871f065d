"""Streams of other instances: if several processes serve together, each of them gives access to
every stream.

A request id belongs to one instance, the owner of its stream, which *claims* it before it asks a
provider. A request whose id another instance owns gets a mirror of the owner's log
(streams/stream.py), and so does a client that returns for a stream which is not here. The wing
`cluster` implements `Instances`, which hides how the instances communicate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aioserver.auth.callers import Caller
    from aioserver.gateway.request import Request
    from aioserver.streams.stream import Stream

NOT_FOUND = "no such stream: it never existed, or is no longer kept"


class Start(NamedTuple):
    """The start of a mirror: after event *after*, or after the event with the sequence number
    *sequence*; if both are None, after the newest event.

    With a *digest*, the log must belong to the same request. With *cancel*, the owner cancels the
    answer.
    """

    after: int | None = 0
    sequence: int | None = None
    digest: bytes | None = None
    cancel: bool = False


# The start for a client that has seen nothing.
FROM_START = Start()


class Instances(Protocol):
    """The other instances, as the gateway and the faces see them."""

    def claiming(
        self,
        stream: Stream,
        request: Request,
        producer: Coroutine[Any, Any, None],
        release: Callable[[], None],
    ) -> tuple[Coroutine[Any, Any, None], Callable[[], None]]:
        """Return a producer that claims the id of *stream* and then runs *producer*, and the
        function that releases both. *release* releases *producer*.
        """

    def mirror(self, caller: Caller, request_id: str, start: Start) -> Stream:
        """Return a mirror of the caller's stream *request_id*, which ends soon if there is none.

        Raises:
            ServerAtCapacity: there is no room for it.
        """

    async def reach(self, caller: Caller, request_id: str, start: Start) -> Stream:
        """Return a mirror, as `mirror`, once it is certain that there is such a stream.

        Raises:
            StreamNotFound: no instance has such a log.
            RequestConflict, ResumeGap: as `Gateway.find`, and `Stream.locate`.
            ServerShutdown: its owner is gone.
            InstanceUnavailable: it is not known whether there is one.
        """

    async def claimed(self, stream: Stream) -> None:
        """Wait until it is certain that *stream* is being answered, here or elsewhere.

        Raises:
            AioserverError: it is not being answered.
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

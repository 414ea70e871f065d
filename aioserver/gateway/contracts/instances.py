"""Streams of other instances: where several processes serve together, any of them leads to any
stream.

A request id belongs to one instance, which *claims* it before it asks a provider: the owner of its
stream. A request whose id is another instance's gets a mirror of the owner's log
(streams/stream.py). So does a client that comes back for a stream which is not here. What the
instances say to each other is behind `Instances`, which the wing `cluster` implements.
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
    """Where a mirror begins: after event *after*, or after that with the sequence number
    *sequence*.

    Both None: after the newest event. *digest*: only if the log is that of the same request.
    *cancel*: the answer is cancelled.
    """

    after: int | None = 0
    sequence: int | None = None
    digest: bytes | None = None
    cancel: bool = False


# Where a client begins that has seen nothing.
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
        """Return the producer that claims the id of *stream* and then runs *producer*, and its
        release.

        *release* is that of *producer*.
        """

    def mirror(self, caller: Caller, request_id: str, start: Start) -> Stream:
        """Return a mirror of the caller's stream *request_id*, which ends soon if there is none.

        Raises:
            ServerAtCapacity: there is no room for it.
        """

    async def reach(self, caller: Caller, request_id: str, start: Start) -> Stream:
        """Return a mirror, as `mirror`, once it is known that there is such a stream.

        Raises:
            StreamNotFound: no instance has such a log.
            RequestConflict, ResumeGap: as `Gateway.find`, and `Stream.locate`.
            ServerShutdown: its owner is gone.
            InstanceUnavailable: whether there is one is not known.
        """

    async def claimed(self, stream: Stream) -> None:
        """Wait until it is known that *stream* is answered, here or elsewhere.

        Raises:
            AioserverError: it is not.
        """

    async def cancel(self, caller: Caller, request_id: str) -> None:
        """Cancel a stream of another instance.

        Raises:
            StreamNotFound: there is none.
            InstanceUnavailable: whether there is one is not known.
        """

    async def listing(self, caller: Caller) -> tuple[list[dict[str, Any]], bool]:
        """Return what `Stream.describe` says of the caller's streams at all other instances, and
        whether it may be only a part of that.
        """

    async def forget(self, caller: Caller, name: str) -> bool:
        """Let no other instance know an answer any more that is kept beside its log; return
        whether one did.

        Raises:
            InstanceUnavailable: that is not known of all.
        """

    def aliased(self, stream: Stream, alias: str) -> None:
        """Note that *stream* is found by *alias*, too."""

    def ended(self, stream: Stream) -> None:
        """Note that the producer of *stream* has ended."""

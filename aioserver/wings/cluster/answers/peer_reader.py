"""The owner's side of an answer that a client reads on a WebSocket of another instance.

That instance has checked who the client is, and names its caller: the client's key or token is not
kept for as long as its socket. So nothing but an answer that exists is read here. The messages are
those of the client's socket, ready-made, so that they can be passed on as they are.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, cast

from aioserver.auth.callers import Caller
from aioserver.errors import AioserverError, ResumeGap, ServerShutdown, StreamNotFound
from aioserver.gateway.contracts.instances import NOT_FOUND
from aioserver.streams.formats import MESSAGES
from aioserver.streams.writer import Writer
from aioserver.wings.cluster.answers.greeting import END, FOUND, refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.faces.context import Context
    from aioserver.streams.cursor import Cursor
    from aioserver.streams.formats import Format
    from aioserver.streams.stream import Stream
    from aioserver.wings.cluster.answers.greeting import Follow


class PeerReader(asyncio.Protocol):
    """Writes the messages of the answer that *asked* names to the other instance, to their end.

    Always: it is a reader of its stream like any other, and the connection ends with it.

    *claiming* returns a future that is done once a request of the caller with an id begins its
    answer here, or is not answered here; None: there is no such request.
    """

    def __init__(
        self,
        context: Context,
        claiming: Callable[[Caller, str], asyncio.Future[None] | None],
        asked: Follow,
    ) -> None:
        self._context, self._claiming, self._asked = context, claiming, asked
        self._writer: Writer | None = None
        self._transport: asyncio.Transport | None = None
        # Whether the other instance reads.
        self._reads = asyncio.Event()
        self._reads.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        # uvloop's transports are no instances of it.
        self._transport = cast("asyncio.Transport", transport)
        self._begin()

    def _begin(self, _claiming: object = None) -> None:
        """Begin with the messages once there is an answer; refuse once it is clear that no answer
        is about to begin here.
        """
        if (to := self._transport) is None:
            return
        context, caller, name = self._context, Caller(self._asked.caller), self._asked.request_id
        claiming = self._claiming(caller, name)
        if claiming is not None and context.gateway.lifetime.store.find(caller, name) is None:
            claiming.add_done_callback(self._begin)
            return
        lifetime, admission = context.gateway.lifetime, context.admission
        # A question that is asked again resumes nothing.
        resumes = self._asked.digest is None
        try:
            with context.metrics.resuming() if resumes else nullcontext():
                stream, after, event_format = self._found()
                writer = Writer(
                    to,
                    self._drain,
                    context.outbox,
                    send_timeout=admission.send_timeout,
                    on_drop=partial(admission.dropped, "websocket"),
                    head=FOUND,
                    tail=END,
                    on_unfollow=lifetime.reader_removed,
                )
                writer.follow(stream, after, event_format, on_end=self._ended)
        except AioserverError as error:
            to.write(refusal(error))
            to.close()
            return
        self._writer = writer
        lifetime.reader_added(stream)
        writer.pump()
        writer.send_head()

    def _found(self) -> tuple[Stream, int, Format]:
        """Return the stream, the event after which to read it, and the format.

        Raises:
            StreamNotFound, RequestConflict, ResumeGap: there is none, or not from there on.
        """
        asked = self._asked
        stream = self._context.gateway.find(Caller(asked.caller), asked.request_id, asked.digest)
        if asked.digest is not None and isinstance(stream.error, ServerShutdown):
            raise StreamNotFound(NOT_FOUND)
        event_format = MESSAGES
        if asked.api:
            api = self._context.apis.get(asked.api)
            if api is None or stream.api is not api or stream.whole is not None:
                raise StreamNotFound(NOT_FOUND)
            event_format = api.messages(asked.lane)
        after = asked.after
        if asked.sequence is not None:
            after = stream.events.event_before(asked.sequence, stream.last)
            if after is None:
                raise ResumeGap(f"event {asked.sequence} does not exist yet")
        elif after is None:
            after = stream.last - 1 if stream.ended else stream.last
        return stream, after, event_format

    def _ended(self, _cursor: Cursor) -> None:
        """End the connection behind the last message."""
        assert self._writer is not None
        assert self._transport is not None
        self._writer.close()
        self._transport.close()

    async def _drain(self) -> None:
        await self._reads.wait()
        if self._transport is None:
            raise ConnectionResetError("the other instance has left")

    def connection_lost(self, _exc: Exception | None) -> None:
        """Leave the stream."""
        self._transport = None
        self._reads.set()
        if self._writer is not None:
            self._writer.close()

    def pause_writing(self) -> None:
        """Note that the other instance does not read."""
        self._reads.clear()

    def resume_writing(self) -> None:
        """Note that the other instance reads again."""
        self._reads.set()

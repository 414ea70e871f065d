"""The counting wrapper around every handler that costs something: WebSocket, SSE and `/v1`.

In two steps. *Prepare*: the handshake, or the body, read under a deadline and found valid, so that
a slow upload holds no place. Then *enter*: below `max_connections` at once, at the limit in the
order of coming, `connection_queue_size` at most, for `queue_timeout` at most. Past either bound
the face refuses in its own way. Every way out of a handler gives the place back, once.

An HTTP handler waits in its own task, which is cancelled when the client leaves (`counted`). A
WebSocket must go on reading while it waits, so its waiting is a task beside it (`Entering`).
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING, Self, TypeVar

from aioserver.auth.callers import CALLER
from aioserver.errors import AioserverError, ServerAtCapacity
from aioserver.limits.gate import Gate, Place
from aioserver.telemetry.logs import RateLimit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp import web

    from aioserver.config.settings import Concurrency
    from aioserver.telemetry.metrics import Metrics

T = TypeVar("T")
logger = logging.getLogger("aioserver.connections")

LINES_PER_SECOND = 20
MAX_REFUSED_CLOSING = 256  # refused WebSockets still in their close handshake; beyond: plain 503


class Admission:
    """The gate in front of the handlers, and the bytes of bodies that are not admitted yet.

    Always: `body_bytes <= max_body_bytes`.
    """

    def __init__(self, limits: Concurrency, metrics: Metrics) -> None:
        self.metrics = metrics
        self._entered = metrics.admission_wait["entered"]
        self.gate = Gate(
            limits.max_connections,
            queue_size=limits.connection_queue_size,
            queue_timeout=limits.queue_timeout,
            full_error=self._refusal,
            timeout_error=self._refusal,
        )
        self.refused_closing = 0
        self._limits = limits
        self._body_bytes = 0
        self._lines = RateLimit(LINES_PER_SECOND)

    def apply(self, limits: Concurrency) -> None:
        """Use new bounds. Who is inside stays; who waits keeps the deadline it came with."""
        self._limits = limits
        self.gate.apply(
            limits.max_connections,
            queue_size=limits.connection_queue_size,
            queue_timeout=limits.queue_timeout,
        )

    @property
    def body_bytes(self) -> int:
        """Bytes of bodies being read or waiting."""
        return self._body_bytes

    def hold(self) -> BodyHold:
        """Account for one body."""
        return BodyHold(self)

    def grow(self, size: int) -> None:
        """Another *size* bytes of a body.

        Raises:
            ServerAtCapacity: more than `max_body_bytes` with them.
        """
        if self._body_bytes + size > self._limits.max_body_bytes:
            raise ServerAtCapacity(
                f"chat.websocket.concurrency.max_body_bytes={self._limits.max_body_bytes} reached",
                retry_after=self.gate.retry_after(),
            )
        self._body_bytes += size

    def shrink(self, size: int) -> None:
        """A body of *size* bytes is admitted, or gone."""
        self._body_bytes -= size

    def log(self, event: str, face: str, level: int = logging.INFO, *, caller: str = "") -> None:
        """One line: a connection was opened, closed or refused, and how full the house is.

        At most `LINES_PER_SECOND` of one event and face: a storm is counted, not written out.
        """
        if logger.isEnabledFor(level) and (suppressed := self._lines.allow(event, face)) >= 0:
            gate = self.gate
            logger.log(
                level,
                "connection %s",
                event,
                extra={
                    "fields": {
                        "face": face,
                        **({"caller": caller} if caller else {}),
                        "active": gate.inside,
                        "limit": gate.limit,
                        "waiting": gate.waiting,
                        **({"suppressed": suppressed} if suppressed else {}),
                    }
                },
            )

    def try_enter(self) -> Place | None:
        """A place, if one is free."""
        if (place := self.gate.try_enter()) is not None:
            self._entered.observe(0.0)
        return place

    async def wait(self, face: str, told: Callable[[int, float], None] | None = None) -> Place:
        """A place, by way of the line.

        Raises:
            ServerAtCapacity: none within the bounds of the line.
            ServerShutdown: the server is stopping.
        """
        waits, meter = self.metrics.admission_wait, self.metrics.faces[face]
        began = monotonic()
        meter.waiting.value += 1
        try:
            place = await self.gate.enter(on_position=told)
        except AioserverError:
            waits["refused"].observe(monotonic() - began)
            meter.rejected.value += 1
            raise
        finally:
            meter.waiting.value -= 1
        waits["entered"].observe(monotonic() - began)
        return place

    def opened(self, face: str, caller: str = "") -> None:
        """A connection of *face* has its place."""
        meter = self.metrics.faces[face]
        meter.connections.value += 1
        meter.opened.value += 1
        self.log("opened", face, caller=caller)

    def closed(self, face: str, code: str = "", caller: str = "") -> None:
        """It has ended; *code*: the close code of a WebSocket."""
        self.metrics.faces[face].connections.value -= 1
        closed = self.metrics.closed
        (closed.get((face, code)) or closed[face, "other"]).value += 1
        self.log("closed", face, caller=caller)

    def dropped(self, face: str, why: str) -> None:
        """A client was dropped since it took nothing, or fell behind."""
        self.metrics.slow_clients.value += 1
        self.log(f"dropped: {why}", face, logging.WARNING)

    def _refusal(self, retry_after: float) -> ServerAtCapacity:
        return ServerAtCapacity(
            f"chat.websocket.concurrency.max_connections={self._limits.max_connections} reached",
            retry_after=retry_after,
        )


class BodyHold:
    """What one body has taken of `max_body_bytes`; given back at the end of its `with`."""

    __slots__ = ("_admission", "_size")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._size = 0

    def grow(self, size: int) -> None:
        """As `Admission.grow`."""
        self._admission.grow(size)
        self._size += size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._admission.shrink(self._size)


def counted(
    admission: Admission,
    face: str,
    prepare: Callable[[web.Request, BodyHold], Awaitable[T]],
    serve: Callable[[web.Request, T], Awaitable[web.StreamResponse]],
    refuse: Callable[[web.Request, ServerAtCapacity], Awaitable[web.StreamResponse]] | None = None,
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """An HTTP handler: prepare, enter, serve. Without *refuse* a refusal is raised: a plain 503."""

    async def handler(request: web.Request) -> web.StreamResponse:
        caller = request[CALLER].name
        with admission.hold() as hold:
            prepared = await prepare(request, hold)
            try:
                place = admission.try_enter() or await admission.wait(face)
            except ServerAtCapacity as error:
                admission.log("refused", face, logging.WARNING, caller=caller)
                if refuse is None:
                    raise
                return await refuse(request, error)
        admission.opened(face, caller)
        try:
            with place:
                return await serve(request, prepared)
        finally:
            admission.closed(face, caller=caller)

    return handler


class Entering:
    """A place, taken at once or waited for beside a reader that must not stop.

    *entered* or *refused* is called once, unless the `with` ends before. At its end the place is
    given back, or the waiting is ended.
    """

    def __init__(
        self,
        admission: Admission,
        *,
        entered: Callable[[], None],
        refused: Callable[[AioserverError], None],
        told: Callable[[int, float], None],
    ) -> None:
        self._admission = admission
        self._entered = entered
        self._refused = refused
        self._told = told
        self._place: Place | None = None
        self._task: asyncio.Task[Place] | None = None
        self._over = False

    def __enter__(self) -> Self:
        self._place = self._admission.try_enter()
        if self._place is not None:
            self._entered()
        else:
            self._task = asyncio.ensure_future(self._admission.wait("websocket", told=self._told))
            self._task.add_done_callback(self._settle)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over = True
        if self._place is not None:
            self._place.release()
        if self._task is not None:
            self._task.cancel()

    def _settle(self, task: asyncio.Task[Place]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._place = task.result()
            if self._over:
                self._place.release()
            else:
                self._entered()
        elif not self._over:
            assert isinstance(error, AioserverError)
            self._refused(error)

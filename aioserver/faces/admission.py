"""Admission: a counted place for everything that costs something on WebSocket, SSE and `/v1`.

Admission has two steps. *Prepare*: the handshake is done, or the body is read under a deadline and
found valid, so that a slow upload holds no place. *Enter*: a request gets a place at once below
`max_connections`, and at the limit in the order of arrival. At most `connection_queue_size` wait,
and none longer than `queue_timeout`; past either bound the face refuses in its own way. Every way
out of a handler gives the place back, once, and not before its response is in the kernel.

An HTTP handler waits in its own task, which is cancelled when the client leaves (`counted`). A
WebSocket has to go on reading while it waits, so it waits in a task of its own (upgrade.py).

This file is one concept: a place, and all counts that change with it from a request to its end.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import ceil, inf
from time import monotonic
from typing import TYPE_CHECKING, Generic, Self, TypeAlias, TypeVar

import msgspec
from aiohttp import web

from aioserver.auth.callers import CALLER
from aioserver.auth.guard import peer_of
from aioserver.errors import (
    AioserverError,
    ConcurrencyExceeded,
    ServerAtCapacity,
    StreamNotFound,
)
from aioserver.faces import whole
from aioserver.faces.form import NO_FORMS
from aioserver.faces.http import Request, error_response
from aioserver.faces.idle_sockets import IdleSockets
from aioserver.gateway.contracts.instances import (
    ASKED,
    BODY,
    CLAIMED,
    FORWARDED,
    LOST,
    Elsewhere,
    Lost,
)
from aioserver.limits.deadline import NO_GUARD, Deadline, Guard
from aioserver.limits.fair_queue import INTERACTIVE
from aioserver.limits.quota import Quota
from aioserver.limits.resource import Bid, Class, Grant, Resource, Ticket
from aioserver.protocol.request_headers import (
    NO_REQUEST_OPTIONS,
    RequestOptions,
    request_options_of,
)
from aioserver.provider_errors import ProviderFault
from aioserver.telemetry import logs
from aioserver.telemetry.metrics import FaceMeter
from aioserver.tracebacks import forget_frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Concurrency
    from aioserver.faces.form import Forms
    from aioserver.limits.resource import PositionCallback, Reason
    from aioserver.limits.scheduler import Scheduler
    from aioserver.telemetry.metrics import Metrics

T = TypeVar("T")
ShareDoor: TypeAlias = "Callable[[Scheduler, Resource, int], None]"
logger = logging.getLogger("aioserver.connections")

LINES_PER_SECOND = 20
# The bound for lines about refusals: a full server refuses thousands, and an incident counts them.
REFUSAL_LINES_PER_SECOND = 1
# Refused WebSockets whose close handshake is not over; beyond: a handshake gets a plain 503.
MAX_REFUSED_CLOSING = 256
# The statuses by which an instance answers a request that another one has passed on. The first
# stands in front of the response, and says that the answer is here (RFC 2518, 10.1); the second
# says that it is not (RFC 9110, 15.5.20).
ACCEPTED, MISDIRECTED = b"HTTP/1.1 102 Processing\r\n\r\n", 421
# The most owners that are asked for one answer, one after the other, if each has lost it.
MAX_OWNERS = 3
# The class of requests that wait for the limits of their keys, and whose places others use
# meanwhile. They may fill half of the queue, go before new connections, and wait until their keys
# let them start.
LENT = "lent"
CLASSES = (Class(INTERACTIVE), Class(LENT, 1_000_000, room=0.5, patience=inf))


class Admission:
    """The limit of connections in front of the handlers, and the bytes of the bodies that may yet
    be sent to a provider.

    Always: `body_bytes <= max_body_bytes`.

    *share* is called with the scheduler, the resource of connections, and the number of all its
    places, if they are shared with other processes.
    """

    def __init__(
        self,
        limits: Concurrency,
        metrics: Metrics,
        send_timeout: float,
        scheduler: Scheduler,
        share: ShareDoor | None = None,
        forms: Forms = NO_FORMS,
    ) -> None:
        self.scheduler = scheduler
        self.metrics = metrics
        self.forms = forms
        self._entered = metrics.admission_wait["entered"]
        loop = asyncio.get_running_loop()
        # Returns the loop's time.
        self.now = loop.time
        # Each connection has a ticket of its own; all belong to one caller and wait in order of
        # arrival.
        self.gate = Resource(
            "door",
            0,
            queue_size=0,
            queue_timeout=0.0,
            refuse=self._refuse,
            serve=scheduler.serve,
            clock=loop.time,
            classes=CLASSES,
            bare=True,
        )
        if share is not None:
            share(scheduler, self.gate, limits.max_connections)
        self.idle_sockets = IdleSockets(
            loop,
            limit=lambda: self.gate.limit,
            waiting=lambda: self.gate.waiting,
            elsewhere=self._elsewhere,
        )
        self.refused_closing = 0
        # Seconds without progress after which a client that does not read its response is dropped.
        self.send_timeout = send_timeout
        self._limits = limits
        # Bytes of bodies that are being read, or whose request may yet be sent.
        self.body_bytes = 0
        self.max_body_bytes = limits.max_body_bytes
        # Callbacks that free bodies which are kept in case their answer breaks off, the oldest
        # first.
        self._spare: dict[BodyHold, Callable[[], None]] = {}
        self._lines = logs.RateLimit(LINES_PER_SECOND)
        self.refusal_lines = logs.RateLimit(REFUSAL_LINES_PER_SECOND)
        self._apply(limits)

    def apply(self, limits: Concurrency, send_timeout: float) -> None:
        """Use new limits.

        Connections that have a place keep it; those that wait keep their deadline.
        """
        self._limits, self.send_timeout = limits, send_timeout
        self.max_body_bytes = limits.max_body_bytes
        self._apply(limits)
        self.idle_sockets.limit_changed()

    def _apply(self, limits: Concurrency) -> None:
        gate = self.gate
        size, gate.queue_timeout = limits.connection_queue_size, limits.queue_timeout
        if (supply := gate.supply) is None:
            gate.queue_size = size
            self.scheduler.resize(gate, limits.max_connections)
        else:
            gate.queue_size = supply.share(size)
            supply.apply(limits.max_connections)

    def close(self, error: Callable[[], AioserverError]) -> None:
        """Refuse all requests that wait for a place or come later, each with an error
        of its own.
        """
        self.scheduler.shut(self.gate, error)
        if self.gate.supply is not None:
            self.gate.supply.leave()

    @property
    def max_tunnels(self) -> int:
        """The most requests that may be passed on to other instances, and as many from them."""
        return max(1, self._limits.max_connections // 2)

    @property
    def lent(self) -> int:
        """The number of requests that have lent their places to others."""
        return self.gate.class_slots[1]

    def hold(self) -> BodyHold:
        """Return a hold for one body; the caller must release it, however the request ends."""
        return BodyHold(self, self.now())

    def make_room(self, size: int) -> None:
        """Free spare bodies until there is room for another *size* bytes.

        Raises:
            ServerAtCapacity: all bodies together would have more than `max_body_bytes`.
        """
        most = self.max_body_bytes - size
        while self.body_bytes > most and self._spare:
            self._spare.pop(next(iter(self._spare)))()
        if self.body_bytes > most:
            raise ServerAtCapacity(
                f"chat.websocket.concurrency.max_body_bytes={self.max_body_bytes} reached",
                retry_after=self.gate.retry_after(),
            )

    def spare(self, hold: BodyHold, let_go: Callable[[], None] | None = None) -> None:
        """Mark *hold* as spare: *let_go* is called when another body needs its room. None ends
        that.
        """
        if let_go is not None:
            self._spare[hold] = let_go
        elif self._spare:
            self._spare.pop(hold, None)

    def log(
        self, event: str, face: str, level: int = logging.INFO, *, caller: str = "", code: str = ""
    ) -> None:
        """Log that a connection was opened, closed or refused, and how full the gate is.

        At most `LINES_PER_SECOND` lines of one event and face are written, and of refusals at most
        `REFUSAL_LINES_PER_SECOND` of one face and error *code*; the rest is counted.
        """
        lines = self.refusal_lines if event == "refused" else self._lines
        if (left_out := lines.allow(event, face, code)) is not None:
            gate = self.gate
            fields = {
                "face": face,
                **({"code": code} if code else {}),
                **({"caller": caller} if caller else {}),
                "active": gate.inside,
                "limit": gate.limit,
                "waiting": gate.waiting,
                **left_out,
            }
            logs.write(logger, level, f"connection {event}", fields)

    async def connect(self, face: str, caller: Caller) -> Quota | None:
        """Count a connection of the caller's key, and return the quota that counts it.
        `disconnect` must be called on it once; None: the connection is not counted. Cancelling is
        safe.

        Raises:
            ConcurrencyExceeded: the key has as many connections as it may have.
            InvalidApiKey: the key was revoked meanwhile.
        """
        quota = caller.quota
        if quota is None:
            return None
        try:
            if (undecided := quota.connect()) is not None:
                try:
                    await undecided
                except BaseException:
                    quota.disconnect()
                    raise
        except ConcurrencyExceeded as error:
            self.log("refused", face, logging.WARNING, caller=caller.name, code=error.code)
            raise
        return quota

    def try_enter(self) -> Grant | None:
        """Return a place, or None if none is free. The caller releases it."""
        if (place := self.gate.try_start(Ticket())) is not None:
            # An observation of 0.0.
            self._entered.counts[0] += 1
        return place

    async def wait(
        self,
        face: str,
        name: str,
        on_position: Callable[[int, float], None] | None = None,
        hold: BodyHold | None = None,
    ) -> Grant:
        """Queue for a place, and return it. The caller releases it; cancelling leaves the queue.

        *name* is the name of the waiting key, *hold* that of its body, which notes the wait.
        *on_position* is called with the position in the queue and the seconds until a place is
        expected, whenever either changes.

        Raises:
            ServerAtCapacity: the queue is full, or no place became free within `queue_timeout`.
            ServerShutdown: the server is stopping.
        """
        waits, meter = self.metrics.admission_wait, self.metrics.faces[face]
        began = monotonic()
        if not self._limits.queue_timeout:
            self.idle_sockets.make_room(name)
        self.idle_sockets.waits(name)
        meter.waiting.value += 1
        place = None
        try:
            try:
                guard: AbstractContextManager[object] = NO_GUARD
                if hold is not None and hold.request_options.bounding:
                    deadline = Deadline(hold.arrived, hold.request_options)
                    on_position = deadline.telling("the door", None)
                    guard = Guard(deadline, self.metrics.count_deadline)
                ticket = Ticket()
                report: PositionCallback | None = None
                if (tell := on_position) is not None:
                    report = lambda _door, position, eta: tell(position, eta)  # noqa: E731
                with guard:
                    place = await self.scheduler.wait(ticket, [Bid(self.gate)], report)
            finally:
                meter.waiting.value -= 1
                self.idle_sockets.waited(name)
            waits["entered"].observe(monotonic() - began)
        except BaseException as exc:
            if place is not None:
                place.release()
            elif isinstance(exc, AioserverError):
                meter.rejected.value += 1
                waits["refused"].observe(monotonic() - began)
            raise
        if hold is not None:
            hold.waited_since = began
        return place

    def opened(self, meter: FaceMeter, caller: str = "") -> None:
        """Count a connection that has got its place, on the face of *meter*. If this raises, the
        connection is not counted.
        """
        if logger.isEnabledFor(logging.INFO):
            self.log("opened", meter.face, caller=caller)
        if caller:
            self.idle_sockets.opened(caller)
        meter.opened.value += 1

    def too_many_lent(self) -> ConcurrencyExceeded | None:
        """Return the error for one more request that would lend its place; None if it may."""
        gate, lent = self.gate, self.lent
        if lent < gate.queue_size // 2:
            return None
        return ConcurrencyExceeded(
            f"{lent} requests wait at their keys, at most half of"
            f" connection_queue_size={gate.queue_size}",
            retry_after=gate.retry_after(),
        )

    def closed(
        self, meter: FaceMeter, code: str = "", caller: str = "", *, gave_way: bool = False
    ) -> None:
        """Count that a connection has ended, which was `opened` with *meter*.

        *code*: the close code of a WebSocket. *gave_way*: its place went to others before.
        """
        (meter.closed.get(code) or meter.closed["other"]).value += 1
        if caller and not gave_way:
            self.idle_sockets.closed(caller)
        if logger.isEnabledFor(logging.INFO):
            self.log("closed", meter.face, caller=caller)

    def gave_way(self, face: str, caller: str) -> None:
        """Count an idle client that gave its place to another one."""
        self.metrics.gave_way.value += 1
        self.log("gave way", face, logging.WARNING, caller=caller)

    def dropped(self, face: str, reason: str) -> None:
        """Count a client that was disconnected because it read nothing, or fell behind."""
        self.metrics.slow_clients.value += 1
        self.log(f"dropped: {reason}", face, logging.WARNING)

    def _elsewhere(self) -> bool:
        """Return whether another process may have an unused place."""
        self.gate.ask()
        return self.gate.elsewhere > 0

    def _refuse(self, _reason: Reason, retry_after: float, _bid: Bid) -> ServerAtCapacity:
        most = self._limits.max_connections
        return ServerAtCapacity(
            f"the server is full: {most} of {most} places are taken; try again in "
            f"{ceil(retry_after)} s (chat.websocket.concurrency.max_connections={most} reached)",
            retry_after=retry_after,
        )


class BodyHold(msgspec.Struct, eq=False):
    """The bytes that one body has taken of `max_body_bytes`, from its first byte.

    The end of its `with` gives them back, unless the hold was `given` to a request that outlives
    the handler: then the end of that request does. *arrived* is the time of the loop at which the
    request arrived, *request_options* are its options.
    """

    _admission: Admission
    arrived: float
    request_options: RequestOptions = NO_REQUEST_OPTIONS
    size: int = 0
    given: bool = False
    waited_since: float = 0.0

    @property
    def loan(self) -> Visit | None:
        """The client whose place can be lent while its request waits; None if there is none."""
        return None

    def grow(self, size: int) -> None:
        """Count another *size* bytes of this body.

        Raises:
            ServerAtCapacity: see `Admission.make_room`.
        """
        admission = self._admission
        if admission.body_bytes + size > admission.max_body_bytes:
            admission.make_room(size)
        admission.body_bytes += size
        self.size += size

    def spare(self, let_go: Callable[[], None] | None = None) -> None:
        """Have *let_go* called, once, when another body needs the room; None ends that."""
        self._admission.spare(self, let_go)

    def shrink_to(self, size: int) -> None:
        """Count no more than *size* bytes of this body from now on."""
        if self.size > size:
            self._admission.body_bytes -= self.size - size
            self.size = size

    def release(self) -> None:
        """Stop counting this body; a second call does nothing."""
        if size := self.size:
            admission, self.size = self._admission, 0
            admission.body_bytes -= size
            admission.spare(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.size and not self.given:
            self.release()


class Visit(BodyHold, eq=False, kw_only=True):
    """A client of the face of *meter*, from its request to the end of its handler. It owns the
    connection that counts for its key, its body, and its place.

    Always: everything that it has taken is given back at the end of its `with`, whatever fails
    meanwhile, and each client that was counted as served is counted off once.
    """

    meter: FaceMeter
    # The name of its key.
    name: str
    # The quota that counts the connection.
    quota: Quota | None = None
    # The place; it is released while it is *lent* to others.
    _place: Grant | None = None
    lent: bool = False
    _return: asyncio.Task[None] | None = None

    def enter(self, place: Grant) -> None:
        """Count the client as served: it has its *place*."""
        try:
            self._admission.opened(self.meter, self.name)
        except BaseException:
            place.release()
            raise
        self._place = place

    @property
    def loan(self) -> Visit | None:
        """This client, if its place can be lent while its request waits for its key."""
        quota = self.quota
        return self if self._place is not None and quota is not None and quota.queue_size else None

    def lend(self) -> None:
        """Give the place to others for as long as the request waits for the limits of its key.

        Raises:
            ConcurrencyExceeded: the most requests that may have already lent theirs.
        """
        if (place := self._place) is None or self.lent:
            return
        admission = self._admission
        if (error := admission.too_many_lent()) is not None:
            raise error
        admission.idle_sockets.closed(self.name)
        self.lent = True
        admission.scheduler.suspend(place, LENT)

    def regain(self, until: float) -> asyncio.Future[None] | None:
        """Take the next free place, *until* a moment of the loop's clock. Return a future that is
        done then, None if the client has its place or needs none any more. It may be called again,
        and the future may be cancelled or dropped.

        Raises:
            AioserverError: the server is stopping; the future has `ServerAtCapacity` once it is
                too late.
        """
        if (place := self._place) is None or not self.lent:
            return None
        if self._return is None or self._return.done():
            ticket, admission = place.ticket, self._admission
            ticket.deadline = until
            again = admission.scheduler.enter(ticket, [Bid(admission.gate)])
            if again is not None:
                self._has(again)
                return None
            self._return = asyncio.ensure_future(self._come_back(ticket))
        back = asyncio.get_running_loop().create_future()
        self._return.add_done_callback(partial(_conclude, back))
        return back

    def _end_loan(self, place: Grant) -> None:
        if self._return is not None:
            self._return.cancel()
            self._return = None
        # If lending has failed, the client still has the place.
        place.release()
        self._admission.scheduler.close(place.ticket)

    async def _come_back(self, ticket: Ticket) -> None:
        self._has(await self._admission.scheduler.granted(ticket))

    def _has(self, place: Grant) -> None:
        try:
            self._admission.idle_sockets.opened(self.name)
        except BaseException:
            place.release()
            raise
        self._place, self.lent = place, False

    def __exit__(self, *_exc: object) -> None:
        try:
            if (place := self._place) is not None:
                self._place = None
                try:
                    if self.lent:
                        self._end_loan(place)
                    else:
                        place.release()
                finally:
                    self._admission.closed(self.meter, caller=self.name, gave_way=self.lent)
        finally:
            try:
                if self.size and not self.given:
                    self.release()
            finally:
                if self.quota is not None:
                    self.quota.disconnect()


def _conclude(back: asyncio.Future[None], task: asyncio.Task[None]) -> None:
    """End *back*, which may have no waiter, as *task* has ended."""
    error = None if task.cancelled() else task.exception()
    if back.done():
        return
    if error is None:
        back.set_result(None)
    else:
        back.set_exception(error)
        back.exception()


def _no_event(_request: web.Request, _error: AioserverError, _last: bytes) -> bytes:
    return b""


class CountedHandler(Generic[T]):
    """An HTTP handler that prepares a request, enters, and serves the prepared request; `handle` is
    the handler.

    *refuse* answers a request that got no place, or whose key has too many connections. Without it
    the refusal is raised: a plain 503 or 429. *broken* renders an error behind the last events of
    an answer that another instance has broken off; b"": there is no such event.

    A request whose answer is elsewhere is passed on, once it has its place here. A request that
    another instance has passed on needs no place here, since it has one there.
    """

    def __init__(
        self,
        admission: Admission,
        face: str,
        prepare: Callable[[web.Request, BodyHold], Awaitable[T]],
        serve: Callable[[web.Request, T], Awaitable[web.StreamResponse]],
        refuse: Callable[[web.Request, AioserverError], Awaitable[web.StreamResponse]]
        | None = None,
        broken: Callable[[web.Request, AioserverError, bytes], bytes] = _no_event,
    ) -> None:
        self._admission, self._face, self._meter = admission, face, admission.metrics.faces[face]
        self._prepare, self._serve, self._refuse = prepare, serve, refuse
        self._broken = broken

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer *request*."""
        if peer_of(request) is not None:
            return await self._answer_peer(request)
        admission, face, refuse = self._admission, self._face, self._refuse
        caller = request[CALLER]
        request_options = request_options_of(request.headers)
        with Visit(
            admission, admission.now(), request_options, meter=self._meter, name=caller.name
        ) as visit:
            try:
                if caller.quota is not None:
                    visit.quota = await admission.connect(face, caller)
            except ConcurrencyExceeded as error:
                if refuse is None:
                    raise
                return await refuse(request, error)
            prepared = await self._find(request, visit)
            try:
                if (place := admission.try_enter()) is None:
                    with request.get(CLAIMED, nullcontext)():
                        place = await admission.wait(face, visit.name, hold=visit)
            except ServerAtCapacity as error:
                admission.log(
                    "refused", face, logging.WARNING, caller=caller.name, code=error.code
                )
                if refuse is None:
                    raise
                return await refuse(request, error)
            visit.enter(place)
            if isinstance(prepared, Elsewhere):
                return await self._pass_on(request, visit, prepared)
            return await self._answer(request, prepared)

    async def _find(self, request: web.Request, hold: BodyHold) -> T | Elsewhere:
        """Return what `prepare` does, or where the answer is."""
        try:
            return await self._prepare(request, hold)
        except Elsewhere as elsewhere:
            # The frames of the traceback would keep the body while the answer is passed on.
            forget_frames(elsewhere)
            return elsewhere

    async def _pass_on(
        self, request: web.Request, hold: BodyHold, elsewhere: Elsewhere
    ) -> web.StreamResponse:
        """Let the instance that has the answer serve *request*, or serve it if none has it now."""
        broken = partial(self._broken, request)
        for _ in range(MAX_OWNERS):
            try:
                response = await elsewhere.forward(request, broken, hold.release)
            except Lost as lost:
                request[LOST] = lost
            else:
                request[FORWARDED] = elsewhere.owner
                return response
            # Meanwhile another instance may have the answer, or none: then it begins here.
            hold.release()
            request[BODY] = elsewhere.body
            prepared = await self._find(request, hold)
            if not isinstance(prepared, Elsewhere):
                return await self._answer(request, prepared)
            elsewhere = prepared
        raise request[LOST].error

    async def _answer_peer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request that another instance has passed on."""
        admission = self._admission
        with BodyHold(admission, admission.now(), request_options_of(request.headers)) as hold:
            try:
                prepared = await self._prepare(request, hold)
            except (StreamNotFound, Elsewhere):
                return web.Response(status=MISDIRECTED)
            if ASKED not in request:
                # No instance passes on a request without an id.
                return web.Response(status=MISDIRECTED)
            if request.transport is not None:
                request.transport.write(ACCEPTED)
            return await self._answer(request, prepared)

    async def _answer(self, request: web.Request, prepared: T) -> web.StreamResponse:
        """Serve the *prepared* request, and write the response if that was not done."""
        admission = self._admission
        try:
            response = await self._serve(request, prepared)
        except ProviderFault as fault:
            started = isinstance(request, Request) and request.started
            if fault.request_outcome is None or started:
                raise
            # The fault is counted with its record, and may be as large as the provider likes.
            response = error_response(fault, request, admission.forms.of(request))
            forget_frames(fault)
        if not response.prepared:
            timeout, drop = admission.send_timeout, admission.dropped
            await whole.write(request, response, timeout, drop, self._face)
        return response

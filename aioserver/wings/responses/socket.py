"""OpenAI's Responses API over WebSocket: many responses on one connection, in lanes.

A `response.create` frame (wings/responses/frames.py) is the body of a `POST /v1/responses`, and is
answered by the events of that response, each one a frame with the bytes of the provider's event.
It takes the same way as the POST: nothing about a provider, a place or a limit belongs to the
connection. A *lane* is the sequence of responses with one `stream_id` (lanes.py).

When a client leaves, its responses end at once, except those with `store: true`: they are found by
their ids, over HTTP or by `response.resume` on another connection.

This file is one concept: how one connection handles its frames, and the answers to them.
"""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import WSCloseCode, hdrs, web

from aioserver.errors import (
    AioserverError,
    MethodNotAllowed,
    ServerShutdown,
    StreamNotFound,
)
from aioserver.faces.intake import session_of
from aioserver.faces.socket import Socket
from aioserver.faces.upgrade import serve
from aioserver.gateway.contracts.instances import Start
from aioserver.gateway.request import shutdown_error
from aioserver.protocol import eventstream
from aioserver.protocol.sound import NotUtf8
from aioserver.protocol.steps import LARGE_BYTES
from aioserver.streams.formats import WS_TEXT, ws_frame, ws_payload
from aioserver.streams.stream import Stream
from aioserver.wings.responses import face as responses
from aioserver.wings.responses import frames
from aioserver.wings.responses.api import RESPONSES
from aioserver.wings.responses.draft import Draft
from aioserver.wings.responses.events import ResponseEvents
from aioserver.wings.responses.frames import (
    BadFrame,
    Cancel,
    Create,
    Processed,
    Refused,
    Resume,
    Steer,
)
from aioserver.wings.responses.lanes import LaneNews, Lanes
from aioserver.wings.responses.stored import not_found
from aioserver.wings.responses.stored_face import NOT_FOUND

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.gateway.contracts.instances import Lost
    from aioserver.protocol.model_body import ModelBody
    from aioserver.streams.cursor import Cursor
    from aioserver.wings.responses.frames import Command
    from aioserver.wings.responses.lanes import Lane
    from aioserver.wings.responses.stored import StoredResponse, StoredResponses

PATH = f"/v1/{RESPONSES.path}"


def routes(context: Context, stored: StoredResponses) -> list[web.RouteDef]:
    """Return the route of this face."""
    return [web.get(PATH, partial(answer, context, stored), allow_head=False)]


async def answer(
    context: Context, stored: StoredResponses, request: web.Request
) -> web.StreamResponse:
    """Answer a handshake, and serve the socket to its end.

    Raises:
        MethodNotAllowed: *request* is no handshake.
    """
    if "websocket" not in request.headers.get(hdrs.UPGRADE, "").lower():
        error = MethodNotAllowed(
            f"GET {PATH} is for WebSockets: POST a request, or GET {PATH}/{{id}}"
        )
        error.allowed = ("POST",)
        raise error
    make = partial(ResponsesSocket, stored, session_of(request))
    return await serve(context, request, ResponsesSocket, make)


class ResponsesSocket(Socket):
    """One client's socket on this face.

    Always: each response under way is followed by the writer, or searched for by a task in
    `_tasks`.
    """

    __slots__ = ("_lanes", "_news", "_over", "_session", "_stored", "_tasks")

    face = "responses_ws"
    protocols = ("realtime", "responses")
    # A shorter timeout has ended long turns of agents, whose machines are busy meanwhile.
    min_ping_timeout = 30.0

    def __init__(self, stored: StoredResponses, session: str | None, *args: Any) -> None:
        super().__init__(*args)
        self._stored = stored
        # The agent's session that the handshake names.
        self._session = session
        self._lanes = Lanes(stored.held, self._done, self._loop.time)
        self._news = LaneNews(self._lanes, self._writer, self._context)
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = False

    @property
    def busy(self) -> bool:
        """Whether a response is under way on this socket, or waits."""
        return self._lanes.busy

    async def receive(self, data: bytes, hold: BodyHold) -> None:
        """Carry out one frame."""
        try:
            command = await frames.parsing(data)
        except BadFrame as fault:
            self._refuse(fault.lane, fault.error)
        else:
            # While a large frame is read, the socket may be closed.
            if len(data) <= LARGE_BYTES or self.open:
                self._carry_out(command, hold)

    def show_position(self, position: int, eta: float) -> None:
        """Send an `aioserver:queued` frame that belongs to no response."""
        self._send(frames.queued(None, "connection", position, eta))

    def show_error(self, error: AioserverError) -> None:
        """Send an `error` frame that belongs to no response."""
        self._send(frames.error(error, None))

    async def finish(self) -> None:
        """Drop the waiting commands, and leave nothing behind."""
        self._over = True
        for task in self._tasks:
            task.cancel()
        self._news.end()
        self._lanes.close()
        await super().finish()

    # Commands.

    def _carry_out(self, command: Command, hold: BodyHold) -> None:
        match command:
            case Create() | Refused() | Resume():
                self._last_request = self._loop.time()
                # The deadline of a waiting command is reported in its turn: answers on a lane come
                # in the order of their commands.
                hold.request_options = self._request_options
                try:
                    self._lanes.add(command.lane, command, hold)
                except AioserverError as error:
                    self._refuse(command.lane, error)
                else:
                    self._go_on()
                    if self._lanes.busy and self.open:
                        self._news.begin(self._loop.time())
            case Cancel():
                try:
                    self._cancel(command)
                except AioserverError as error:
                    self._refuse(command.lane, error)
            case Steer():
                self._send(frames.not_steered(command))
            case Processed():
                pass

    def _go_on(self) -> None:
        """Carry out the commands whose turns have come."""
        # A socket that is closing gets no answers, and nothing is paid for them.
        while self.open and (turn := self._lanes.next()) is not None:
            lane, command, hold = turn.lane, turn.command, turn.hold
            with hold:
                try:
                    self._begin(lane, command, hold)
                except AioserverError as error:
                    if isinstance(command, Create):
                        self._lanes.forget(command.body.previous_response_id)
                    self._refuse(lane.name, error)
            self._lanes.free(lane)

    def _begin(self, lane: Lane, command: Create | Refused | Resume, hold: BodyHold) -> None:
        if isinstance(command, Create):
            self.check_token()
        match command:
            case Refused():
                raise command.error
            case Resume():
                self._work(lane, self._resume(lane, command))
            case Create() if command.generate:
                self._ask(lane, command.body, hold)
            case Create():
                hold.given = True
                self._work(lane, self._prepare(lane, command)).add_done_callback(
                    lambda _task: hold.release()
                )

    def _ask(self, lane: Lane, body: ModelBody, hold: BodyHold) -> None:
        """Ask a provider, as a POST does."""
        context, draft = self._context, self._draft(lane, body)
        try:
            request = responses.make_request(
                context,
                body,
                face=self.face,
                caller=self.caller.on_behalf_of(body.user or self._session),
                name=uuid.uuid4().hex,
                hold=hold,
                client_headers=self._client_headers,
                draft=draft,
            )
            stream = context.gateway.relay(request)
        except AioserverError:
            draft.release()
            raise
        self._lanes.begun(lane)
        lane.asked, lane.continues = stream.producer, body.previous_response_id
        if lane.asked is not None:
            # Until then this response counts for the limits of its caller's key.
            lane.asked.add_done_callback(lane.ended)
        self._follow(lane, stream, 0)

    async def _prepare(self, lane: Lane, command: Create) -> None:
        """Answer a request that generates nothing with a response that can be continued.

        It is an answer for the limits of its caller's key, since it is kept like any other.

        Raises:
            ModelNotFound, NoProvider: its model cannot be asked for.
            ResponseNotFound: the response that it continues is not held here.
            ConcurrencyExceeded, RateLimitExceeded: the key has reached a limit of its own.
            ServerShutdown: the server is stopping.
        """
        if self._context.lifecycle.stopping.is_set():
            raise shutdown_error()
        if (quota := self.caller.quota) is None:
            await self._answer_prepared(lane, command)
        else:
            async with quota.used():
                await self._answer_prepared(lane, command)

    async def _answer_prepared(self, lane: Lane, command: Create) -> None:
        body = command.body
        route = self._context.router.route(body.model, caller=self.caller, body=body.data)
        model = route.model or route.provider.settings.model
        draft = self._draft(lane, body)
        try:
            await draft.begin()
            if body.previous_response_id is not None and draft.previous is None:
                raise not_found(body.previous_response_id)
            response_id, now = f"resp_{uuid.uuid4().hex}", int(time.time())
            events = frames.prepared(command, response_id, model, now)
            draft.take_input(body.data)
            kept = draft.keep_response(events[-1][1], route.provider.name)
            if kept is not None:
                await kept
        finally:
            draft.release()
        for event, _ in events:
            self._send(event if lane.name is None else frames.in_lane(event, lane.name))

    async def _resume(self, lane: Lane, command: Resume) -> None:
        """Find a response, and write the rest of its events.

        Raises:
            StreamNotFound, ResumeGap: the response, or the rest, is not kept.
        """
        start = Start() if command.after is None else Start(sequence=command.after)
        gateway, after = self._context.gateway, 0
        lane.response_id = response_id = command.response_id
        lane.asked = lane.continues = None

        async def find(lost: Lost | None) -> Stream:
            nonlocal after
            with self._context.metrics.resuming():
                try:
                    stream = gateway.find(self.caller, response_id)
                except StreamNotFound:
                    if gateway.instances is None:
                        raise
                    stream = await gateway.instances.route(self.caller, response_id, lost)
                if stream.api is not RESPONSES or stream.whole is not None:
                    raise StreamNotFound(NOT_FOUND)
                if start.sequence is not None:
                    after = responses.event_of(stream, start.sequence)
                return stream

        answer = await self.reach(find, start, RESPONSES.path, lane.name)
        if isinstance(answer, Stream):
            # The socket may have been closed meanwhile.
            if self.open:
                self._follow(lane, answer, after)
        elif not self.open:
            answer.leave()
        else:
            lane.reading = answer
            self._lanes.begun(lane)
            answer.start(self._writer.pass_on, partial(self._passed, lane))
            self._context.admission.idle_sockets.asked(self)

    def _cancel(self, command: Cancel) -> None:
        """Cancel a response of this socket; the end of its events is the answer.

        Raises:
            StreamNotFound: no such response is under way here.
        """
        gateway = self._context.gateway
        for lane in self._lanes.under_way():
            stream = lane.stream
            if stream is not None and stream.ended:
                continue
            if command.response_id is None:
                wanted = lane.name == command.lane
            else:
                if stream is not None:
                    # Read once: a response object may be large.
                    lane.response_id = lane.response_id or _id_of(stream)
                alias = None if stream is None else stream.alias
                wanted = command.response_id in {alias, lane.response_id}
            if wanted and stream is not None:
                gateway.lifetime.end(stream, abandoned=False)
                return
            if wanted and lane.response_id is not None:
                # It is that of another instance, or is being looked for there.
                cancelling = gateway.cancel_anywhere(self.caller, lane.response_id)
                self.work(cancelling, partial(self._refuse, command.lane))
                return
        raise StreamNotFound(f"no such response is under way here: POST {PATH}/{{id}}/cancel")

    # Turns.

    def _draft(self, lane: Lane, body: ModelBody) -> Draft:
        """Return the draft of a response on *lane*, which keeps it regardless of `store`."""

        def keep(response: StoredResponse) -> None:
            if not self._over:
                self._lanes.keep(lane, response)

        previous_id = body.previous_response_id
        return Draft(
            self._stored,
            self.caller,
            store=body.stored,
            previous_id=previous_id,
            previous=None if previous_id is None else self._lanes.latest(previous_id),
            max_bytes=self._context.settings.chat.websocket.max_message_size,
            on_kept=keep,
        )

    def _work(self, lane: Lane, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do *work*, whose end the next turn on *lane* waits for, and report its errors."""

        def refuse(error: AioserverError) -> None:
            if not self._over:
                self._refuse(lane.name, error)

        task = self.work(work, refuse)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _task: self._done(lane))
        self._lanes.begun(lane)
        return task

    def _follow(self, lane: Lane, stream: Stream, after: int) -> None:
        """Write the events of *stream* after event *after* on *lane*.

        Raises:
            ResumeGap: those events are no longer kept.
        """
        self._writer.follow(stream, after, lane.format, on_end=partial(self._written, lane))
        lane.stream, lane.response_id = stream, None
        self._lanes.begun(lane)
        self._context.gateway.lifetime.reader_added(stream)
        self._context.admission.idle_sockets.asked(self)

    def _written(self, lane: Lane, cursor: Cursor) -> None:
        """Note that all events of the response under way on *lane* are written."""
        if cursor.stream.error is not None and not cursor.stream.answered:
            self._lanes.forget(lane.continues)
        self._context.admission.idle_sockets.asked(self)
        self._done(lane)

    def _passed(self, lane: Lane, error: AioserverError | None) -> None:
        """Note that another instance's events on *lane* have ended, or come no more, with *error*."""
        reading, lane.reading = lane.reading, None
        if error is not None and reading is not None:
            self._context.metrics.count_error(error)
            events = ResponseEvents()
            data = ws_payload(reading.last).replace(b"\n", b" ")
            events.note(eventstream.write(data), 1)
            if events.last_sequence < 0:
                self._send(frames.error(error, lane.name))
            else:
                self._writer.send(lane.format.render_bytes(events.render(error)))
        self._context.admission.idle_sockets.asked(self)
        self._done(lane)

    def _done(self, lane: Lane) -> None:
        """Note the end of work for which the next turn on *lane* has waited."""
        self._lanes.done(lane)
        if not self._over:
            self._go_on()
            self.answers_ended()

    def _send(self, event: bytes) -> None:
        self._writer.send(ws_frame(WS_TEXT, event))

    def _refuse(self, lane: str | None, error: AioserverError) -> None:
        self._context.metrics.count_error(error)
        if isinstance(error, NotUtf8):
            self.close(WSCloseCode.INVALID_TEXT, b"")
            return
        self._send(frames.error(error, lane))
        # While responses are under way the socket stays open for them, and closes after the last
        # one.
        if isinstance(error, ServerShutdown) and not self.busy:
            self.close(ServerShutdown.close or 1012, ServerShutdown.close_reason)


def _id_of(stream: Stream) -> str | None:
    """Return the provider's id of the response; None if it has not come yet."""
    events = stream.events
    response = events.response if isinstance(events, ResponseEvents) else None
    response_id = None if response is None else response.get("id")
    return response_id if isinstance(response_id, str) else None

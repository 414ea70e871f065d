"""The SSE transport: an HTTP response for each answer (WHATWG HTML 9.2).

A question is a POST. The rest of an answer is a GET with the number of the last event, and DELETE
cancels it. The response is read when the program reads the answer, so that nothing is kept here.
The server waits for a slow program, which resumes if it was too slow.

After a loss one request is the trial, and the others wait until it has its response. So a client
asks a full or unreachable server with one request at a time, as on a WebSocket.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from functools import partial
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote

import aiohttp
from yarl import URL

from aioserver.client.credentials import UNAUTHORIZED
from aioserver.client.faults import (
    MAX_ERROR_BYTES,
    NO_ROOM,
    RESTART,
    SHUTDOWN,
    Broken,
    Fault,
    Interrupted,
    closed_fault,
    protocol_error,
    read_body,
    refusal,
    unreachable_fault,
)
from aioserver.client.transport import MAX_FRAME_BYTES, Reading, Transport, fault_of
from aioserver.protocol import eventstream
from aioserver.protocol import frames as protocol_frames

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.client.credentials import Credentials
    from aioserver.client.transport import Question
    from aioserver.protocol.frames import Frame

# Seconds without a byte after which the connection is dead: four of the server's `ping_interval`.
SILENCE = 80.0
# Seconds for DNS, TCP and TLS together.
CONNECT_TIMEOUT = 10.0
# Seconds for the body of an error.
ERROR_TIMEOUT = 10.0
# Seconds for all cancellations when the client is closed, and for one of them.
CLOSE_TIMEOUT = 2.0
CANCEL_TIMEOUT = 10.0
# Seconds for the end of a response after its last event.
FINISH_TIMEOUT = 1.0
# Refusals that concern every request, as a refused WebSocket handshake does.
CLOSED_TO_ALL = frozenset({"server_at_capacity", SHUTDOWN})
# Statuses that may mean the same, or that a proxy does not reach the server.
AWAY = frozenset({502, 503, 504})
# The errors of a request that was never sent.
NOT_CONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL)
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=SILENCE)


class EventSourceReading(Reading):
    """The reading of an answer from one HTTP response after the other."""

    def __init__(
        self, transport: EventSourceTransport, question: Question, last: int | None = None
    ) -> None:
        super().__init__(transport.room, question, last)
        self._transport = transport
        # The number of losses before its last request.
        self.losses = 0
        self._response: aiohttp.ClientResponse | None = None
        self._splitter = eventstream.Splitter(MAX_FRAME_BYTES)
        # The interruption that came after the returned frames.
        self._interrupted: Interrupted | None = None

    async def frames(self) -> list[Frame]:
        """Return the received frames."""
        while True:
            if self._interrupted is not None:
                interrupted, self._interrupted = self._interrupted, None
                raise interrupted
            if self._response is None:
                self._response = await self._open()
                self._splitter = eventstream.Splitter(MAX_FRAME_BYTES)
            try:
                data = await self._response.content.readany()
            except (OSError, aiohttp.ClientError) as error:
                raise self._lost(error) from None
            if not data:
                raise self._lost(None)
            if frames := self._parse(data):
                return frames

    def _cancel(self) -> asyncio.Future[None] | None:
        return self._transport.cancel(self.question.request_id)

    def _detach(self) -> None:
        self._drop()
        self._transport.forget(self)

    def _give_back(self) -> None:
        self._transport.make_room()
        super()._give_back()

    def _parse(self, data: bytes) -> list[Frame]:
        """Return the frames that *data* completes, up to a frame that interrupts the reading."""
        frames: list[Frame] = []
        try:
            for event in eventstream.parse(self._splitter.feed(data)):
                frame = protocol_frames.parse(event.data)
                if frame.request_id != self.question.request_id:
                    raise protocol_error("a frame of another answer")
                if frame.event_id is not None:
                    self._count(frame)
                    self._transport.reconnection.progressed()
                    frames.append(frame)
                    if self.ended:
                        break
                elif frame.status == "queued":
                    frames.append(frame)
                elif frame.status in {"error", "busy"}:
                    fault = fault_of(frame)
                    raise self._lost(None) if fault.code == "slow_client" else self._turned(fault)
        except Interrupted as error:
            self._interrupted = error
        except (protocol_frames.BadFrame, eventstream.EventTooLong) as error:
            self._interrupted = protocol_error(str(error))
        if self._interrupted is not None or self.ended:
            self._drop()
            if self._interrupted is not None and not frames:
                interrupted, self._interrupted = self._interrupted, None
                raise interrupted
        return frames

    async def _open(self) -> aiohttp.ClientResponse:
        """Ask, or resume.

        Raises:
            Interrupted: there is no response to read from.
        """
        async with self._transport.turn():
            sent, self.sent = self.sent, True
            try:
                response = await self._transport.request(self)
            except Interrupted:
                self.sent = sent
                raise
            except (OSError, aiohttp.ClientError) as error:
                if isinstance(error, NOT_CONNECTED):
                    self.sent = sent
                if isinstance(error, aiohttp.InvalidURL):
                    raise Broken(unreachable_fault(self._transport.url, error)) from None
                raise self._lost(error) from None
            try:
                if response.status != 200:
                    raise await self._refused(response)
                if response.content_type != "text/event-stream":
                    self.sent = False
                    raise protocol_error(
                        f"an answer of the type {response.content_type}, not text/event-stream"
                    )
            except BaseException:
                response.close()
                raise
            return response

    async def _refused(self, response: aiohttp.ClientResponse) -> Interrupted:
        """Return the meaning of a status other than 200."""
        try:
            async with asyncio.timeout(ERROR_TIMEOUT):
                body = await read_body(response, MAX_ERROR_BYTES)
        except (OSError, aiohttp.ClientError):
            body = b""
        if response.status < 400:
            self.sent = False
            return protocol_error(f"HTTP status {response.status} in place of the answer")
        fault, final = refusal(response.status, response.headers, body)
        if fault.code == "connect_error" and not final:
            return self._lost_by(fault)
        turned = self._turned(fault)
        return Broken(turned.fault) if final else turned

    def _turned(self, fault: Fault) -> Interrupted:
        """Return the interruption by a refusal of this answer, or of every request."""
        refused = self._refuse(fault)
        return self._lost_by(fault) if fault.retryable and fault.code in CLOSED_TO_ALL else refused

    def _lost(self, error: BaseException | None) -> Interrupted:
        if error is None:
            return self._lost_by(closed_fault(None))
        return self._lost_by(unreachable_fault(self._transport.url, error))

    def _lost_by(self, fault: Fault) -> Interrupted:
        self._drop()
        return self._transport.lost_since(self.losses, fault)

    def _drop(self) -> None:
        """Let the response go; its connection may be used again after the last event."""
        response, self._response = self._response, None
        if response is not None:
            if self.ended:
                finished = self._transport.finish(response)
                if self._had_place:
                    # The answer keeps its place at the server until the end of the response.
                    finished.add_done_callback(lambda _finished: self._give_back())
            else:
                response.close()


class EventSourceTransport(Transport):
    """The responses of a client."""

    _HEADERS: ClassVar = {"Accept": "text/event-stream"}

    def __init__(self, session: aiohttp.ClientSession, url: str, credentials: Credentials) -> None:
        super().__init__(session, url, credentials)
        # The readings that were sent and have not ended.
        self._readings: set[EventSourceReading] = set()
        # The number of losses so far; whether no request since the last one has had a response;
        # and a future that is done when the trial has one.
        self.losses = 0
        self._down = False
        self._trial: asyncio.Future[None] | None = None

    def read(self, question: Question, last: int | None = None) -> EventSourceReading:
        """Return the reading of the answer to *question*."""
        return EventSourceReading(self, question, last)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until a request may be sent, which is done in the block.

        Raises:
            Lost: no request may be sent before a later time.
        """
        while self._trial is not None and self.loss is None:
            await asyncio.wait([self._trial])
        if (loss := self.loss) is not None:
            raise loss
        if not self._down:
            yield
            return
        self._trial = trial = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            self._trial = None
            trial.set_result(None)

    def lost_since(self, losses: int, fault: Fault) -> Interrupted:
        """Return the loss, by *fault*, of a request that was sent after so many *losses*.

        Responses that are lost together are one loss.
        """
        counted = not self._down or losses == self.losses
        self._down = True
        self.losses += counted
        return self.lost(fault, RESTART if fault.code == SHUTDOWN else None, counted=counted)

    async def request(self, reading: EventSourceReading) -> aiohttp.ClientResponse:
        """Ask the question of *reading*, or for the rest of its answer.

        Raises:
            OSError, aiohttp.ClientError: there is no response.
            Interrupted: nothing was sent.
        """
        if self.closed:
            raise Broken(Fault("connect_error", "the client is closed"))
        self._readings.add(reading)
        response = await self._asked(reading)
        if response.status == UNAUTHORIZED and self.credentials.renewable:
            self.finish(response)
            response = await self._asked(reading)
        self.reconnection.reached = True
        if response.status not in AWAY and reading.losses == self.losses:
            self._down = False
        return response

    async def _asked(self, reading: EventSourceReading) -> aiohttp.ClientResponse:
        question, reading.losses = reading.question, self.losses
        lost = partial(self.lost_since, self.losses)
        headers = {**await self.headers(lost), **self._HEADERS}
        if reading.resumes:
            headers["Last-Event-ID"] = str(reading.last)
            return await self._session.get(
                self._address(question.request_id),
                headers=headers,
                timeout=_TIMEOUT,
                allow_redirects=False,
            )
        headers["Content-Type"] = "application/json"
        return await self._session.post(
            self.url,
            # aiohttp would write a large body of bytes in one piece, and warns of that.
            data=io.BytesIO(question.body()),
            headers=headers,
            timeout=_TIMEOUT,
            allow_redirects=False,
        )

    def forget(self, reading: EventSourceReading) -> None:
        """Forget a reading that has ended, or was left."""
        self._readings.discard(reading)

    def cancel(self, request_id: str) -> asyncio.Future[None] | None:
        """Cancel an answer. Returns a future that is done when the server has the request."""
        return None if self.closed else self.start(self._cancel(request_id))

    def make_room(self) -> None:
        """Note that an answer has given its connection back: a full server accepts one again."""
        if self._loss is not None and self._loss[0].code in NO_ROOM:
            self._loss = self._loss[0], self._firm

    def finish(self, response: aiohttp.ClientResponse) -> asyncio.Future[None]:
        """Read the end of a response, so that its connection can be used again. Returns a future
        that is done then.
        """
        if not (self.closed or response.content.at_eof()):
            return self.start(self._finish(response))
        response.close()
        finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        finished.set_result(None)
        return finished

    async def close(self) -> None:
        """Cancel the running answers, within a short time."""
        for reading in list(self._readings):
            reading.leave()
        self.closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT)
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _finish(self, response: aiohttp.ClientResponse) -> None:
        try:
            async with asyncio.timeout(FINISH_TIMEOUT):
                await response.content.readany()
        except (OSError, aiohttp.ClientError):
            pass
        finally:
            response.close()

    async def _cancel(self, request_id: str) -> None:
        timeout = aiohttp.ClientTimeout(total=CANCEL_TIMEOUT)
        # An answer without a reader ends by itself after the server's `resume_window`. An
        # exception of the caller's key function is raised where an answer is awaited.
        with contextlib.suppress(Exception):
            headers = await self.credentials.headers()
            async with self._session.delete(
                self._address(request_id), headers=headers, timeout=timeout
            ):
                pass

    def _address(self, request_id: str) -> URL:
        return URL(f"{self.url}/{quote(request_id, safe='')}", encoded=True)

"""A question, the reading of its answer, and the transport that carries both, over whichever protocol.

The files socket.py and event_source.py derive a transport and its readings for one protocol each.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from aioserver.client.faults import (
    FULL,
    NO_ROOM,
    Broken,
    Fault,
    Interrupted,
    Lost,
    Reconnection,
    Refused,
    protocol_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import aiohttp

    from aioserver.client.credentials import Credentials
    from aioserver.protocol.frames import Frame

T = TypeVar("T")

MAX_ID_CHARACTERS = 256
# Fields of OpenAI's request that `options` cannot set: they have arguments, or are the server's.
RESERVED_OPTIONS = frozenset({"model", "messages", "stream"})
# An event has at most the server's `max_stream_bytes`, 4 MiB by default. A frame above this bound
# could fill the memory.
MAX_FRAME_BYTES = 1 << 26
# The code of an answer that is not kept, and the message for an answer that had begun.
GONE = "stream_not_found"
LOST_ANSWER = (
    "the server has lost the rest of this answer: it was started anew, or keeps it no longer"
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, as JSON: *payload* is the same under any id."""

    request_id: str
    payload: bytes

    def command(self) -> bytes:
        """Return the WebSocket frame of the question."""
        name = orjson.dumps(self.request_id)
        return b'{"action":"chat","request_id":%b,"payload":%b}' % (name, self.payload)

    def body(self) -> bytes:
        """Return the HTTP body of the question."""
        return b'{"request_id":%b,%b' % (orjson.dumps(self.request_id), self.payload[1:])

    def under_new_id(self) -> Question:
        """Return the same question under another id."""
        return Question(uuid.uuid4().hex, self.payload)


def make_question(
    content: object,
    *,
    request_id: str | None,
    options: dict[str, Any] | None,
    tools: list[dict[str, Any]] | None,
    **fields: Any,
) -> Question:
    """Check and write a question; *fields* that are None are left out.

    Raises:
        ValueError: an argument can be no part of a question.
    """
    if isinstance(content, str):
        _expect(bool(content), "the text of a question must not be empty")
        payload: dict[str, Any] = {"text": content}
    else:
        _expect(
            isinstance(content, list)
            and bool(content)
            and all(isinstance(message, dict) and "role" in message for message in content),
            "content must be a text, or a list of messages with a role",
        )
        payload = {"messages": content}
    options = dict(options or {})
    for name in RESERVED_OPTIONS & options.keys():
        raise ValueError(f"{name} cannot be set in options")
    if tools is not None:
        options["tools"] = tools
    if options:
        payload["options"] = options
    payload.update((name, value) for name, value in fields.items() if value is not None)
    if request_id is None:
        request_id = uuid.uuid4().hex
    _expect(
        0 < len(request_id) <= MAX_ID_CHARACTERS and request_id.isprintable(),
        f"request_id must have 1 to {MAX_ID_CHARACTERS} printable characters",
    )
    try:
        return Question(request_id, orjson.dumps(payload))
    except TypeError as error:
        # orjson names the type that is not JSON, or says that a text is not UTF-8.
        raise ValueError(f"the question cannot be written as JSON: {error}") from None


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def fault_of(frame: Frame) -> Fault:
    """Return the fault that an `error` or `busy` frame reports."""
    chunk = frame.chunk
    return Fault(chunk.code or "error", chunk.error, chunk.retryable, chunk.retry_after)


class Room:
    """The answers of one client for which the server had no room.

    Each of them asks again after a time. But when another answer of the same client ends and gives
    its place back, this client is the first to know: one of the waiting answers then asks at once.
    So a client with more questions than the server has places keeps these places in use.

    Always: when a place is given back, the answer that has waited longest asks, if any waits.
    """

    def __init__(self) -> None:
        self._tickets = count()
        # Futures by ticket: each has the result True when its answer may ask.
        self._waiting: dict[int, asyncio.Future[bool]] = {}

    def ticket(self) -> int:
        """Return a ticket for one more waiting answer."""
        return next(self._tickets)

    def give_back(self) -> None:
        """Let the first waiting answer ask, since there is a place again."""
        waiting = [ticket for ticket, asked in self._waiting.items() if not asked.done()]
        if waiting:
            self._waiting[min(waiting)].set_result(True)

    async def wait(self, ticket: int, seconds: float) -> bool:
        """Wait for a place, *seconds* at most; return whether there is one. Cancelling is safe."""
        loop = asyncio.get_running_loop()
        asked: asyncio.Future[bool] = loop.create_future()
        self._waiting[ticket] = asked
        timer = loop.call_later(max(0.0, seconds), _give_up, asked)
        try:
            return await asked
        except asyncio.CancelledError:
            if asked.done() and not asked.cancelled() and asked.result():
                self.give_back()
            raise
        finally:
            timer.cancel()
            del self._waiting[ticket]


def _give_up(asked: asyncio.Future[bool]) -> None:
    if not asked.done():
        asked.set_result(False)


class Reading(ABC):
    """The reading of one answer on a transport, over as many connections as it takes.

    *last*: the number of the last event that an earlier program has dealt with; None if the
    question is new.

    Always: the numbered frames that `frames` has returned are those after the first *last* up to
    the present one, each once. When the answer has ended at the server, its place is given back to
    *room*.
    """

    def __init__(self, room: Room, question: Question, last: int | None = None) -> None:
        self.question = question
        self._room = room
        # Whether the answer's end makes room at the server, because it had a place.
        self._had_place = False
        self.last = last or 0
        # Whether the last event has come; the program may not have read it yet.
        self.ended = False
        # Whether the server may know the question; and whether it certainly has received it.
        self.sent = self._asked = last is not None
        self._left = False

    @property
    def resumes(self) -> bool:
        """Whether the next request asks for the rest of the answer instead of the question."""
        return self._asked or self.last > 0

    @abstractmethod
    async def frames(self) -> list[Frame]:
        """Return the received frames, one at least; ask, or resume, where necessary.

        Cancelling it loses nothing. It is not called after the last event.

        Raises:
            Lost: the connection is lost; call again at the time of the exception.
            Refused: the server refuses the question, or the rest of the answer; call again to
                repeat it.
            Broken: another call would not help.
        """

    def leave(self) -> asyncio.Future[None] | None:
        """Stop reading, and let the server cancel an answer that may not have ended.

        Return a future that is done when the command was sent; None if no command is needed: after
        the last event, and at a second call.
        """
        sent = None if self._left or self.ended or not self.sent else self._cancel()
        self._left = True
        self._detach()
        if sent is not None:
            sent.add_done_callback(lambda _sent: self._give_back())
        return sent

    @abstractmethod
    def _cancel(self) -> asyncio.Future[None] | None:
        """Let the server cancel the answer; return a future that is done when the command was sent."""

    @abstractmethod
    def _detach(self) -> None:
        """Let the connection go."""

    def _give_back(self) -> None:
        """Let another answer of this client ask."""
        self._room.give_back()

    def _refuse(self, fault: Fault) -> Refused:
        """Return the interruption by a *fault* that has no number."""
        if not self.resumes or fault.code == GONE:
            # There is nothing to cancel; the id may belong to another answer.
            self.sent = False
        if self.resumes and fault.code == GONE:
            # The server, which may be another process now, cannot know that there was an answer.
            return Refused(Fault(GONE, LOST_ANSWER))
        return Refused(fault)

    def _count(self, frame: Frame) -> None:
        """Take the next numbered frame.

        Raises:
            Broken: the frame has an unexpected number.
        """
        if frame.event_id != self.last + 1:
            raise protocol_error(f"event {frame.event_id} came after event {self.last}")
        self.last += 1
        self.ended = frame.ends
        # The answer has begun, and did not end for lack of room.
        self._had_place = frame.ends and self.last > 1 and frame.chunk.code not in FULL


class Transport(ABC):
    """The connections to one face of a server at *url*, and the tasks that work for them.

    Always: after a loss no reading connects before the time that the loss allows.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, credentials: Credentials) -> None:
        self.closed = False
        self.room = Room()
        self.reconnection = Reconnection(random.random)
        self._session = session
        self.url = url
        self.credentials = credentials
        self._tasks: set[asyncio.Task[Any]] = set()
        # The fault of the last loss, and the loop's time before which no connection is opened.
        self._loss: tuple[Fault, float] | None = None
        # The loop's time before which no connection is opened, even if a full server has room.
        self._firm = 0.0

    @abstractmethod
    def read(self, question: Question, last: int | None = None) -> Reading:
        """Return the reading of an answer, as `Reading`; nothing is sent before its `frames` is
        called.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let the server cancel the answers that run, and close all connections. Readings end as
        broken.
        """

    @property
    def loss(self) -> Lost | None:
        """The last loss, while it delays the next connection."""
        if self._loss is None or asyncio.get_running_loop().time() >= self._loss[1]:
            return None
        return Lost(*self._loss)

    def lost(
        self, fault: Fault, close_code: int | None = None, *, counted: bool = True
    ) -> Interrupted:
        """Note a loss, by *fault* and with *close_code*, and return its interruption for a
        reading.

        The loss is final at an address where no server was ever reached. Without *counted* it is a
        part of the last loss.
        """
        delay = fault.retry_after or 0.0
        if counted:
            delay = self.reconnection.after_loss(close_code, fault.retry_after)
        until = asyncio.get_running_loop().time() + delay
        if self._loss is not None:
            # A loss that allows an earlier return does not shorten the time that the server asked
            # for.
            until = max(until, self._loss[1])
        self._loss = fault, until
        if fault.code not in NO_ROOM:
            self._firm = until
        return Broken(fault) if self.reconnection.hopeless else Lost(fault, until)

    async def headers(self, lost: Callable[[Fault], Interrupted]) -> dict[str, str]:
        """Return the headers of a request.

        Raises:
            Interrupted: the key function has failed; *lost* makes the interruption, whose cause is
                the function's exception.
        """
        try:
            return await self.credentials.headers()
        except Exception as error:
            message = f"the function for the key has failed: {str(error) or type(error).__name__}"
            raise lost(Fault("connect_error", message, True)) from error

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that ends before `close` returns."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

"""The answer to one question, and its events, as a program sees them. An answer sends the question,
reads the events to their end, and asks again if that is allowed.

This file is one concept: the events of an answer, and the moments at which they come.

    Queued* Processing (Text | Reasoning | ToolCalls)* Complete

An answer that the library has asked for again may have more than one `Processing`. A `Waiting` may
come anywhere before the end. The *number* of an event is that of the server, from 1; `Queued` and
`Waiting` have none.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from aioserver.client.faults import (
    NO_ROOM,
    AnswerError,
    Broken,
    Fault,
    Interrupted,
    Lost,
    Refused,
    Retries,
    protocol_error,
)
from aioserver.client.transport import fault_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aioserver.client.transport import Question, Reading, Transport
    from aioserver.protocol.frames import Frame


@dataclass(frozen=True, slots=True)
class Queued:
    """The question waits: *position* in the queue, from 1, and an estimate of the wait in seconds.
    *admission*: the socket itself waits, in front of a full server.
    """

    position: int
    eta: float
    admission: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Waiting:
    """The library waits for *seconds* before it asks, or reads on, again. *code* and *message* are
    those of the temporary fault.
    """

    code: str
    message: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Processing:
    """A provider has begun."""

    provider: str = ""
    model: str = ""
    conversation_id: str | None = None
    number: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    text: str
    number: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's reasoning."""

    text: str
    number: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """OpenAI's list of deltas: join `function.arguments` of those that have the same `index`."""

    deltas: list[dict[str, Any]]
    number: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Complete:
    """The end of a whole answer; a value that the provider did not report is None or empty.

    *finish_reason* `length` says that the answer was cut by `max_tokens`.
    """

    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    provider: str = ""
    model: str = ""
    number: int = field(default=0, compare=False)


Event = Queued | Waiting | Processing | Text | Reasoning | ToolCalls | Complete


def event_of(frame: Frame) -> Event | None:
    """Return *frame* as an event; None if the frame is not an event, or is unknown here.

    Raises:
        Broken: a field has the wrong type.
    """
    chunk, number = frame.chunk, frame.event_id or 0
    match frame.status:
        case "chunk":
            return _piece(chunk.type, chunk.data, number)
        case "queued":
            return Queued(chunk.position, chunk.eta, frame.request_id is None)
        case "processing":
            metadata = chunk.metadata
            return Processing(
                _text(metadata, "provider") or "",
                _text(metadata, "model") or "",
                _text(metadata, "conversation_id"),
                number,
            )
        case "complete":
            metadata = chunk.metadata
            usage = metadata.get("usage") or {}
            if not isinstance(usage, dict):
                raise protocol_error("usage is not an object")
            return Complete(
                _text(metadata, "finish_reason"),
                usage,
                _text(metadata, "provider") or "",
                _text(metadata, "model") or "",
                number,
            )
    return None


def _piece(kind: str, data: Any, number: int) -> Event | None:
    if kind == "text":
        if isinstance(data, str):
            return Text(data, number)
    elif kind == "reasoning":
        if isinstance(data, str):
            return Reasoning(data, number)
    elif kind == "tool_calls":
        if isinstance(data, list) and all(isinstance(delta, dict) for delta in data):
            return ToolCalls(data, number)
    else:
        return None
    raise protocol_error(f"the data of a {kind} chunk is of the type {type(data).__name__}")


def _text(metadata: dict[str, Any], name: str) -> str | None:
    value = metadata.get(name)
    if value is None or isinstance(value, str):
        return value
    raise protocol_error(f"{name} is not a text")


# Seconds that `cancel` waits for its command to be sent.
CANCEL_TIMEOUT = 5.0
# Shorter waits are not reported, in seconds; an event loop may wake up a part of a millisecond
# early.
LEAST_WAIT = 0.01


class Answer:
    """The answer to a question. Nothing is sent before it is read, and it is read once, in one of
    three ways.

    Its text, piece by piece; the whole text (`text`); or its `events`:

        async for piece in client.chat("Hello"):
            print(piece, end="")

        text = await client.chat("Hello").text()

        async for event in client.chat("Hello").events():
            print(event)

    Leaving the loop before its end cancels the answer at the server, whether by `break`, by an
    exception, or because the task is cancelled. So does the garbage collection of the iterator. A
    program that keeps the iterator should read the answer `async with`, which cancels at the end
    of its block:

        async with client.chat("Hello") as answer:
            async for piece in answer:
                ...
    """

    def __init__(
        self,
        transport: Transport,
        question: Question,
        deadline: float | None,
        last_event_id: int | None = None,
        *,
        retry: bool = True,
    ) -> None:
        # The text of the answer so far; whole after the end.
        self._texts: list[str] = []
        # The last event of a whole answer.
        self.complete: Complete | None = None
        self._transport = transport
        self._reading: Reading = transport.read(question, last_event_id)
        self._timeout = deadline
        self._retry = retry
        # The deadline in the loop's time, once the answer is read.
        self._deadline: float | None = None
        self._retries = Retries(random.random)
        self._started = self._ended = False
        # Frames that were received and not yet returned.
        self._rest: list[Frame] = []
        # Whether a part of the answer has come. Event 1 has no part of it.
        self._shown = last_event_id is not None and last_event_id > 1
        # The fault of the last repetition, and the loop's time before which nothing is sent.
        self._fault: Fault | None = None
        self._until: float | None = None
        # Its ticket among the answers of this client that wait for room, if it waits.
        self._ticket: int | None = None
        self._timer: asyncio.Timeout | None = None

    @property
    def request_id(self) -> str:
        """The id of the question; it changes when the question is asked again under a new id."""
        return self._reading.question.request_id

    @property
    def received(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    def __aiter__(self) -> AsyncGenerator[str]:
        return self._pieces()

    def events(self) -> AsyncGenerator[Event]:
        """Read the answer as events.

        Raises:
            AnswerError: there is no whole answer.
        """
        return self._events()

    async def text(self) -> str:
        """Read the answer to its end, and return its text.

        Raises:
            AnswerError: there is no whole answer.
        """
        self._start()
        try:
            while await self.batch():
                pass
        finally:
            self.leave()
        return self.received

    async def batch(self) -> list[Event]:
        """Return all events that have come, one at least; none at the end.

        This is the loop of `events` by hand, for a program that wants to take several at once.
        Such a program calls `leave` when it gives up before the end.

        Raises:
            AnswerError: there is no whole answer.
        """
        if self._timeout is not None and self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._timeout
        while not self._ended:
            if self._until is not None:
                await self._pause(self._until)
                continue
            try:
                self._check_deadline()
                frames = self._rest or await self._frames()
                if events := self._take(frames):
                    return events
            except TimeoutError:
                # If the answer has ended, `cancel` ended it by moving the deadline.
                if not self._ended:
                    raise self._error(self._overdue()) from None
            except Lost as lost:
                self._raise_cause(lost)
                if events := self._wait(lost.fault, lost.until):
                    return events
            except Refused as refused:
                wait = self._retries.after_refusal(refused.fault)
                if events := self._wait(refused.fault, self._after(refused.fault, wait)):
                    return events
            except Broken as broken:
                self._raise_cause(broken)
                raise self._error(broken.fault) from None
        return []

    def leave(self) -> asyncio.Future[None] | None:
        """Stop reading, and let the server cancel an answer that has not ended; of no effect after
        the end.

        Return a future that is done when the command was sent to the server; None if no command is
        needed.
        """
        self._ended = True
        return self._reading.leave()

    async def cancel(self) -> None:
        """Cancel the answer at the server; its reading ends here as after its last event.

        It returns when the command was sent, or cannot be sent. Cancelling an answer that has ended
        does nothing.
        """
        sent = self.leave()
        if self._timer is not None and not self._timer.expired():
            # This wakes up the task that reads.
            self._timer.reschedule(asyncio.get_running_loop().time())
        if sent is not None:
            await asyncio.wait([sent], timeout=CANCEL_TIMEOUT)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.leave()

    async def _pieces(self) -> AsyncGenerator[str]:
        self._start()
        try:
            while events := await self.batch():
                for event in events:
                    if isinstance(event, Text):
                        yield event.text
        finally:
            self.leave()

    async def _events(self) -> AsyncGenerator[Event]:
        self._start()
        try:
            while events := await self.batch():
                for event in events:
                    yield event
        finally:
            self.leave()

    def _start(self) -> None:
        if self._started:
            raise RuntimeError("an answer is read once: ask again, or keep what has come")
        self._started = True

    def _check_deadline(self) -> None:
        """Check the deadline: a timeout never fires if frames are always waiting.

        Raises:
            TimeoutError: the deadline has passed. It does not matter once the last event has come.
        """
        if self._deadline is None or self._reading.ended:
            return
        if asyncio.get_running_loop().time() >= self._deadline:
            raise TimeoutError

    async def _frames(self) -> list[Frame]:
        """Return the next frames.

        Raises:
            TimeoutError: the deadline has passed, or the answer is cancelled.
        """
        try:
            async with asyncio.timeout_at(self._deadline) as timer:
                self._timer = timer
                return await self._reading.frames()
        finally:
            self._timer = None

    def _take(self, frames: list[Frame]) -> list[Event]:
        """Return the events in *frames*, or prepare to ask again.

        Raises:
            AnswerError, Broken: they say that there is no answer.
        """
        self._fault = None
        self._rest = []
        events: list[Event] = []
        for position, frame in enumerate(frames):
            if frame.event_id is not None and frame.status in {"error", "cancelled"}:
                # The events before the interruption are returned first.
                if events:
                    self._rest = frames[position:]
                elif frame.status == "error":
                    return self._ask_anew(fault_of(frame), frame.event_id > 1)
                else:
                    raise Broken(Fault("cancelled", "another client has cancelled the answer"))
                break
            try:
                event = event_of(frame)
            except Broken:
                if not events:
                    raise
                self._rest = frames[position:]
                break
            if event is None:
                continue
            if isinstance(event, Text):
                self._texts.append(event.text)
            if isinstance(event, Text | Reasoning | ToolCalls):
                self._shown = True
            elif isinstance(event, Complete):
                self.complete, self._ended = event, True
            events.append(event)
        return events

    def _ask_anew(self, fault: Fault, began: bool) -> list[Event]:
        """Ask under a new id, after a wait, since an error has ended the answer.

        Raises:
            AnswerError: the error is final.
        """
        wait = self._retries.after_end(fault, shown=self._shown, began=began)
        events = self._wait(fault, self._after(fault, wait))
        self._reading = self._transport.read(self._reading.question.under_new_id())
        return events

    def _after(self, fault: Fault, wait: float | None) -> float:
        if wait is None:
            raise self._error(fault)
        return asyncio.get_running_loop().time() + wait

    def _wait(self, fault: Fault, until: float) -> list[Event]:
        """Let nothing be sent before the loop's time *until*, and return the events that report
        this.

        Raises:
            AnswerError: the deadline comes before, or nothing is to be sent again.
        """
        self._fault = fault
        if not self._retry or (self._deadline is not None and until >= self._deadline):
            raise self._error(fault)
        self._until = until
        delay = until - asyncio.get_running_loop().time()
        return [Waiting(fault.code, fault.message, delay)] if delay > LEAST_WAIT else []

    async def _pause(self, until: float) -> None:
        """Sleep until the loop's time *until*, or until a full server has room again."""
        delay = until - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(None) as timer:
                self._timer = timer
                await self._sleep(delay)
                self._until = None
        except TimeoutError:
            # The future was cancelled meanwhile, which the caller sees.
            pass
        finally:
            self._timer = None

    async def _sleep(self, seconds: float) -> None:
        if self._fault is None or self._fault.code not in NO_ROOM:
            await asyncio.sleep(max(0.0, seconds))
            return
        room = self._transport.room
        if self._ticket is None:
            self._ticket = room.ticket()
        if await room.wait(self._ticket, seconds) and self._ended:
            # The answer was left meanwhile, and does not need the room.
            room.give_back()

    def _raise_cause(self, interrupted: Interrupted) -> None:
        """Raise the exception of the caller's key function, unless the question was sent already.
        The rest of a running answer can still be read once the function returns a key again.
        """
        if interrupted.__cause__ is not None and not self._reading.sent:
            raise interrupted.__cause__

    def _overdue(self) -> Fault:
        """Return the fault of an answer whose deadline has passed."""
        if self._fault is not None:
            return self._fault
        message = f"no whole answer within {self._timeout:g} s"
        # Once a provider has begun, another answer would be paid for again.
        return Fault("deadline_exceeded", message, not self._reading.last)

    def _error(self, fault: Fault) -> AnswerError:
        return AnswerError(
            fault.code,
            fault.message,
            retryable=fault.retryable and not self._shown,
            retry_after=fault.retry_after,
            request_id=self.request_id,
            text=self.received,
        )

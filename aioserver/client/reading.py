"""A question, and the reading of its answer on a transport."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from aioserver.client.errors import Fault, protocol_error

if TYPE_CHECKING:
    import asyncio

    from aioserver.protocol.server_frames import Frame

MAX_ID_CHARACTERS = 256
# Fields of OpenAI's request that `options` cannot set: they have arguments, or are the server's.
RESERVED_OPTIONS = frozenset({"model", "messages", "stream"})
# An event is as large as the server's `max_stream_bytes` at most, 4 MiB by default. One that is larger than
# this would fill the memory.
MAX_FRAME_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Question:
    """A question, as JSON: *payload* is the same under any id."""

    request_id: str
    payload: bytes

    def command(self) -> bytes:
        """Return the frame that asks it on a WebSocket."""
        name = orjson.dumps(self.request_id)
        return b'{"action":"chat","request_id":%b,"payload":%b}' % (name, self.payload)

    def body(self) -> bytes:
        """Return the HTTP body that asks it."""
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
        # orjson says which type is not JSON, or that a text is not UTF-8.
        raise ValueError(f"the question cannot be written as JSON: {error}") from None


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def fault_of(frame: Frame) -> Fault:
    """Return the fault that an `error` or `busy` frame reports."""
    chunk = frame.chunk
    return Fault(chunk.code or "error", chunk.error, chunk.retryable, chunk.retry_after)


class Reading(ABC):
    """The reading of one answer on a transport, over as many connections as it takes.

    Always: the numbered frames that `frames` has returned are those from 1 to *last*, each once.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self.last = 0
        # Whether the last event has come; the program may not have read it yet.
        self.ended = False

    @abstractmethod
    async def frames(self) -> list[Frame]:
        """Return the frames that have come, one at least; asks, or resumes, where it is necessary.

        Cancelling it loses nothing. It is not called after the last event.

        Raises:
            Lost: the connection is lost; call again at its time.
            Refused: the server refuses the question, or the rest of the answer; call again to repeat it.
            Broken: it is of no use to call again.
        """

    @abstractmethod
    def leave(self) -> asyncio.Future[None] | None:
        """Read no further, and let the server cancel an answer that may not have ended.

        Returns what is done when the server has been told; None if there is nothing to tell it. Of
        no effect after the last event, and at the second call.
        """

    def _count(self, frame: Frame) -> None:
        """Take the next numbered frame.

        Raises:
            Broken: another number has its turn.
        """
        if frame.event_id != self.last + 1:
            raise protocol_error(f"event {frame.event_id} came after event {self.last}")
        self.last += 1
        self.ended = frame.ends


class Transport(Protocol):
    """A way to a server."""

    def read(self, question: Question) -> Reading:
        """Return the reading of the answer to *question*; nothing is sent before its `frames` is called."""

    async def close(self) -> None:
        """Tell the server what is to be cancelled, and close all connections. Readings end as broken."""

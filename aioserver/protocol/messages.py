"""The frames of the WebSocket and SSE faces: commands in, events out.

From client to server, one JSON object per text frame; the body of an SSE request has the payload's
fields:

    {"action": "chat", "request_id": "6f0c", "payload": {"text": "Hello", "streaming": true}}
    {"action": "cancel", "request_id": "6f0c"}
    {"action": "resume", "request_id": "6f0c", "payload": {"last_event_id": 17}}
    {"action": "ping"}

From server to client:

    {"request_id":"6f0c","event_id":3,"status":"chunk","chunk":{"type":"text","data":"Hel","metadata":{}}}
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.errors import AioserverError, InvalidJson, InvalidRequest
from aioserver.protocol.client_headers import NO_HEADERS

if TYPE_CHECKING:
    from aioserver.protocol.client_headers import ClientHeaders

MAX_ID_CHARACTERS = 256
RESERVED_OPTIONS = frozenset({"model", "messages", "stream"})
_ACTIONS = "chat, cancel, resume, ping"
_FIELDS = frozenset(
    {
        "text",
        "messages",
        "streaming",
        "conversation_id",
        "provider",
        "model",
        "options",
        "metadata",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A question. Exactly one of *text* and *messages* is set.

    If *streaming* is None, the configuration decides. The *client_headers* go on to the provider, and are
    no part of the question: two questions that differ in them alone are the same.
    """

    request_id: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    streaming: bool | None = None
    conversation_id: str | None = None
    provider: str | None = None
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    client_headers: ClientHeaders = NO_HEADERS

    def digest(self) -> bytes:
        """Return a hash of the question, which tells a repeated request from a conflicting one.

        The hash is kept as long as the answer, since the question itself may have megabytes.

        Raises:
            InvalidRequest: the question is nested deeper than the 254 levels that orjson writes (it
                reads 1,024).
        """
        question = [
            self.text,
            self.messages,
            self.streaming,
            self.conversation_id,
            self.provider,
            self.model,
            self.options,
        ]
        try:
            written = orjson.dumps(question, option=orjson.OPT_SORT_KEYS)
        except orjson.JSONEncodeError:
            raise InvalidRequest("the question is nested too deeply") from None
        return hashlib.sha256(written).digest()


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the answer to *request_id*, for all of its readers."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Continue after the event *last_event_id*."""

    request_id: str
    last_event_id: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer with a pong."""

    request_id: str | None


Command = Chat | Cancel | Resume | Ping


class BadCommand(Exception):
    """The frame is no valid command. *request_id* is None if it could not be read."""

    def __init__(self, error: AioserverError, request_id: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.request_id = request_id


def load(text: bytes | str) -> Any:
    """Parse JSON of any shape.

    Raises:
        InvalidJson: *text* is not JSON; this includes NaN, lone surrogates, and nesting beyond 1,024 levels.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise InvalidJson(f"not JSON: {exc.msg} at character {exc.pos}") from None


def parse(text: bytes | str) -> Command:
    """Parse the command of one WebSocket text frame.

    Raises:
        BadCommand: the frame is no command; its `error` is an `InvalidJson` or `InvalidRequest`.
    """
    request_id: str | None = None
    try:
        frame = load(text)
        if not isinstance(frame, dict):
            raise InvalidRequest("a frame must be a JSON object")
        value = frame.get("request_id")
        request_id = value if isinstance(value, str) and len(value) <= MAX_ID_CHARACTERS else None
        action = frame.get("action")
        payload = frame.get("payload", {})
        if not isinstance(payload, dict):
            raise InvalidRequest("payload must be an object", param="payload")
        match action:
            case "ping":
                return Ping(request_id)
            case "chat":
                return chat(identifier(value), payload)
            case "cancel":
                return Cancel(identifier(value))
            case "resume":
                return Resume(identifier(value), event_number(payload.get("last_event_id", 0)))
        raise InvalidRequest(f"unknown action; one of {_ACTIONS} is expected", param="action")
    except AioserverError as error:
        raise BadCommand(error, request_id) from None


def identifier(value: object) -> str:
    """Check a request id: 1 to 256 printable characters.

    Raises:
        InvalidRequest: *value* is anything else.
    """
    if not isinstance(value, str) or not value:
        raise InvalidRequest("request_id is required, a string", param="request_id")
    if len(value) > MAX_ID_CHARACTERS or not value.isprintable():
        raise InvalidRequest(
            f"request_id must have at most {MAX_ID_CHARACTERS} printable characters",
            param="request_id",
        )
    return value


def event_number(value: object) -> int:
    """Check the number of the last event that a client has; 0 if it has none.

    Raises:
        InvalidRequest: *value* is neither a whole number >= 0 nor a string of at most 18 digits.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest("last_event_id must be a number >= 0", param="last_event_id")
    return value


def chat(request_id: str, payload: dict[str, Any]) -> Chat:
    """Parse the question in *payload*.

    Raises:
        InvalidRequest: a field is missing, unknown or of the wrong type.
    """
    for name in payload:
        if name not in _FIELDS:
            raise InvalidRequest(f"unknown field in payload: {name[:64]}", param=name[:64])
    text, messages = payload.get("text"), payload.get("messages")
    if (text is None) == (messages is None):
        raise InvalidRequest("exactly one of text and messages is required", param="text")
    _expect(text is None or isinstance(text, str), "text must be a string", "text")
    _expect(text is None or text != "", "text must not be empty", "text")
    _expect(
        messages is None
        or (
            isinstance(messages, list)
            and bool(messages)
            and all(
                isinstance(message, dict) and isinstance(message.get("role"), str)
                for message in messages
            )
        ),
        "messages must be a list of objects with a role",
        "messages",
    )
    streaming = payload.get("streaming")
    _expect(
        streaming is None or isinstance(streaming, bool),
        "streaming must be true or false",
        "streaming",
    )
    for name in ("conversation_id", "provider", "model"):
        value = payload.get(name)
        _expect(
            value is None or (isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARACTERS),
            f"{name} must be a string of 1 to {MAX_ID_CHARACTERS} characters",
            name,
        )
    options, metadata = payload.get("options", {}), payload.get("metadata", {})
    _expect(isinstance(options, dict), "options must be an object", "options")
    _expect(isinstance(metadata, dict), "metadata must be an object", "metadata")
    for name in RESERVED_OPTIONS & options.keys():
        raise InvalidRequest(f"{name} cannot be set in options", param="options")
    return Chat(
        request_id=request_id,
        text=text,
        messages=messages,
        streaming=streaming,
        conversation_id=payload.get("conversation_id"),
        provider=payload.get("provider"),
        model=payload.get("model"),
        options=options,
        metadata=metadata,
    )


def _expect(holds: bool, message: str, param: str) -> None:
    if not holds:
        raise InvalidRequest(message, param=param)


def frame_head(request_id: str | None) -> bytes:
    """Return the bytes with which every frame of one request begins; rendered once per stream."""
    return b'{"request_id":%b,' % orjson.dumps(request_id)


def frame(head: bytes, event_id: int, status: bytes, chunk: bytes) -> bytes:
    """Return an event of a stream as a frame; *chunk* is JSON."""
    return b'%b"event_id":%d,"status":"%b","chunk":%b}' % (head, event_id, status, chunk)


def text_frame(head: bytes, event_id: int, text: bytes) -> bytes:
    """Return the frame of a `chunk` event with a text.

    *text* is what follows the opening quote of a JSON string, its closing quote included.
    """
    return (
        b'%b"event_id":%d,"status":"chunk",'
        b'"chunk":{"type":"text","data":"%b,"metadata":{}}}' % (head, event_id, text)
    )


def loose_frame(request_id: str | None, status: str, chunk: dict[str, Any]) -> bytes:
    """Return a frame that is no event of a stream: `queued`, `pong`, or an error of the socket."""
    return orjson.dumps({"request_id": request_id, "status": status, "chunk": chunk})

"""The frames that clients send on the WebSocket and SSE faces: one JSON object each.

    {"action": "chat", "request_id": "6f0c", "payload": {"text": "Hello", "streaming": true}}
    {"action": "cancel", "request_id": "6f0c"}
    {"action": "resume", "request_id": "6f0c", "payload": {"last_event_id": 17}}
    {"action": "ping"}

The body of an SSE request has the payload's fields and the `request_id`. Only these fields of a
question are read: `text`, `messages` and `options` stay the bytes that the client has written, and
go to the provider as they are.

This file is one concept: everything that a client may send on these faces, checked by the same
rules.
"""

from __future__ import annotations

import hashlib
from math import inf

import msgspec
import orjson
from msgspec import Raw
from msgspec.structs import replace

from aioserver.errors import AioserverError, InvalidJson, InvalidRequest
from aioserver.protocol import json_body, request_headers
from aioserver.protocol.json_body import ABSENT, UnknownField
from aioserver.protocol.model_body import MAX_CHOICES
from aioserver.protocol.request_headers import (
    BATCH,
    CLASSES,
    HOLDS,
    NO_HEADERS,
    NO_REQUEST_OPTIONS,
    ClientHeaders,
    RequestOptions,
)
from aioserver.protocol.sound import sound
from aioserver.protocol.steps import LARGE_BYTES, at_once, pause, pause_after

MAX_ID_CHARACTERS = 256
# A character of an id may be written as an escape, and one beyond U+FFFF as two of six bytes.
MAX_ID_BYTES = 12 * MAX_ID_CHARACTERS + 2
MAX_EVENT_NUMBER_BYTES = 32
# The messages of a chat are checked one by one if they cannot be more than this. The provider
# checks larger chats: an object for each of a million messages would stop the event loop.
MAX_CHECKED_MESSAGES = 30_000
_ACTIONS = "chat, cancel, resume, ping"
_EMPTY = Raw(b"{}")


class _Frame(msgspec.Struct, gc=False):
    action: Raw = ABSENT
    request_id: Raw = ABSENT
    payload: Raw = _EMPTY


class _Payload(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    text: Raw = ABSENT
    messages: Raw = ABSENT
    streaming: Raw = ABSENT
    conversation_id: Raw = ABSENT
    provider: Raw = ABSENT
    model: Raw = ABSENT
    options: Raw = _EMPTY
    metadata: Raw = _EMPTY
    start_within: Raw = ABSENT
    deadline: Raw = ABSENT
    class_: Raw = msgspec.field(default=ABSENT, name="class")
    hold: Raw = ABSENT


class _Question(_Payload, gc=False, forbid_unknown_fields=True):
    request_id: Raw = ABSENT


class _Position(msgspec.Struct, gc=False):
    last_event_id: Raw = Raw(b"0")


class _Message(msgspec.Struct, gc=False):
    role: str


_FRAME = msgspec.json.Decoder(_Frame)
_PAYLOAD = msgspec.json.Decoder(_Payload)
_QUESTION = msgspec.json.Decoder(_Question)
_POSITION = msgspec.json.Decoder(_Position)
_MESSAGES = msgspec.json.Decoder(list[_Message])
PAYLOAD_FIELDS = _Payload.__struct_encode_fields__
# The options that a client may not set, and those that ask for several answers.
RESERVED_OPTIONS = ("model", "messages", "stream")
CHOICES = ("n", "best_of")
# The options that have a default.
_DEFAULTED = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "stream_options")
_OPTIONS = json_body.raw_members(*RESERVED_OPTIONS, *CHOICES, *_DEFAULTED)


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """A question.

    Exactly one of *text* and *messages* is set; both are JSON, as the client wrote it.

    *options* is the JSON of an object, and *option_names* are those of its keys that replace a
    default. *max_answer* is their bound of the answer in tokens, None if there is none, and
    *choices* the number of answers that they ask for. If *streaming* is None, the configuration
    decides. *original* is empty unless something in the question was replaced: it is then a hash
    of the bytes that the client has sent. *hashed* is the `digest`, if it was made in steps. The
    *client_headers* go on to the provider. They are not part of the question, nor are its
    *request_options*: two questions that differ only in these are the same.
    """

    request_id: str
    text: bytes | None = None
    messages: bytes | None = None
    streaming: bool | None = None
    conversation_id: str | None = None
    provider: str | None = None
    model: str | None = None
    options: bytes = b"{}"
    option_names: frozenset[str] = frozenset()
    max_answer: int | None = None
    choices: int = 1
    original: bytes = b""
    request_options: RequestOptions = NO_REQUEST_OPTIONS
    hashed: bytes = b""
    client_headers: ClientHeaders = NO_HEADERS

    def digest(self) -> bytes:
        """Return a hash of the question, which distinguishes a repeated request from a conflicting
        one.

        It is a hash of the bytes as they came: another order of keys is another question. The hash
        is kept as long as the answer, since the question itself may have megabytes.
        """
        return self.hashed or at_once(self.hashing())

    async def hashing(self) -> bytes:
        """Return the digest, in steps."""
        names = (self.conversation_id, self.provider, self.model, self.streaming)
        digest = hashlib.sha256(self.original)
        for part in (orjson.dumps(names), self.text or b"", self.messages or b"", self.options):
            digest.update(b"%d:" % len(part))
            await _hashing(digest, part)
        return digest.digest()


class Cancel(msgspec.Struct, frozen=True):
    """Stop the answer to *request_id*, for all of its readers."""

    request_id: str


class Resume(msgspec.Struct, frozen=True):
    """Continue after the event *last_event_id*."""

    request_id: str
    last_event_id: int


class Ping(msgspec.Struct, frozen=True):
    """Answer with a pong."""

    request_id: str | None


Command = Chat | Cancel | Resume | Ping


class BadCommand(Exception):
    """The frame is not a valid command. *request_id* is None if it could not be read."""

    def __init__(self, error: AioserverError, request_id: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.request_id = request_id


async def parsing(data: bytes) -> Command:
    """Parse the command of one WebSocket text frame, in steps if it is large.

    Raises:
        BadCommand: the frame is not a command; its `error` is an `InvalidJson` or `InvalidRequest`.
    """
    request_id: str | None = None
    try:
        body = await sound(data)
        await pause_after(body)
        frame = json_body.decode(_FRAME, body, "a frame")
        written_id = json_body.text(frame.request_id, MAX_ID_BYTES)
        if written_id is not None and len(written_id) <= MAX_ID_CHARACTERS:
            request_id = written_id
        payload = memoryview(frame.payload)
        if payload[0] != ord("{"):
            raise InvalidRequest("payload must be an object", param="payload")
        match json_body.text(frame.action, MAX_ID_BYTES):
            case "ping":
                return Ping(request_id)
            case "chat":
                name = identifier(written_id)
                await pause_after(payload)
                fields = json_body.decode(_PAYLOAD, payload, "payload")
                await pause_after(payload)
                return await _chat(name, fields, await _original(data, body))
            case "cancel":
                return Cancel(identifier(written_id))
            case "resume":
                name = identifier(written_id)
                position = json_body.decode(_POSITION, payload, "payload")
                return Resume(name, _event_number(position.last_event_id))
        raise InvalidRequest(f"unknown action; one of {_ACTIONS} is expected", param="action")
    except AioserverError as error:
        raise BadCommand(error, request_id) from None


async def reading_question(data: bytes) -> Chat:
    """Parse the body of an SSE request, in steps as `parsing`.

    Raises:
        InvalidJson: *data* is not JSON.
        InvalidRequest: a field is missing, unknown or of the wrong type.
    """
    body = await sound(data)
    await pause_after(body)
    try:
        fields = json_body.decode(_QUESTION, body, "the body")
    except UnknownField as error:
        # A missing id is reported first.
        await pause_after(body)
        frame = json_body.decode(_FRAME, body, "the body")
        identifier(json_body.text(frame.request_id, MAX_ID_BYTES))
        raise InvalidRequest(
            f"unknown field in payload: {error.param}", param=error.param
        ) from None
    await pause_after(body)
    name = identifier(json_body.text(fields.request_id, MAX_ID_BYTES))
    return await _chat(name, fields, await _original(data, body))


async def _original(data: bytes, body: bytes) -> bytes:
    if body is data:
        return b""
    digest = hashlib.sha256()
    await _hashing(digest, data)
    return digest.digest()


async def _hashing(digest: hashlib._Hash, data: bytes) -> None:
    """Add *data* to *digest*, in steps if it is large."""
    if len(data) <= LARGE_BYTES:
        digest.update(data)
        return
    view = memoryview(data)
    for start in range(0, len(data), LARGE_BYTES):
        digest.update(view[start : start + LARGE_BYTES])
        await pause()


def identifier(value: object) -> str:
    """Check a request id: 1 to 256 printable characters.

    Raises:
        InvalidRequest: *value* is not such an id.
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
    """Check the number of the last event that a client has seen; 0 if it has seen none.

    Raises:
        InvalidRequest: *value* is neither a whole number >= 0 nor a string of at most 18 digits.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest("last_event_id must be a number >= 0", param="last_event_id")
    return value


def _event_number(raw: Raw) -> int:
    written = bytes(raw)
    if len(written) > MAX_EVENT_NUMBER_BYTES:
        return event_number(None)
    try:
        return event_number(orjson.loads(written))
    except orjson.JSONDecodeError:
        # No float can hold such a number.
        return event_number(None)


async def _chat(request_id: str, fields: _Payload, original: bytes) -> Chat:
    """Check the fields of a question, in steps if it is large.

    Raises:
        InvalidRequest: a field is missing, or of the wrong type.
    """
    text = None if json_body.null(fields.text) else bytes(fields.text)
    messages = None if json_body.null(fields.messages) else bytes(fields.messages)
    if (text is None) == (messages is None):
        raise InvalidRequest("exactly one of text and messages is required", param="text")
    if text is not None:
        _expect(text.startswith(b'"'), "text must be a string", "text")
        _expect(text != b'""', "text must not be empty", "text")
    if messages is not None:
        _expect(
            _valid_messages(messages), "messages must be a list of objects with a role", "messages"
        )
        await pause_after(messages)
    streaming = json_body.flag(fields.streaming)
    _expect(
        streaming is not None or json_body.null(fields.streaming),
        "streaming must be true or false",
        "streaming",
    )
    options = bytes(fields.options)
    _expect(options.startswith(b"{"), "options must be an object", "options")
    option_names, max_answer, choices = _read_options(options)
    await pause_after(options)
    _expect(
        bytes(memoryview(fields.metadata)[:1]) == b"{", "metadata must be an object", "metadata"
    )
    chat = Chat(
        request_id=request_id,
        text=text,
        messages=messages,
        streaming=streaming,
        conversation_id=_name(fields.conversation_id, "conversation_id"),
        provider=_name(fields.provider, "provider"),
        model=_name(fields.model, "model"),
        options=options,
        option_names=option_names,
        max_answer=max_answer,
        choices=choices,
        original=original,
        request_options=_request_options(fields),
    )
    large = len(text or messages or b"") + len(options) > LARGE_BYTES
    return replace(chat, hashed=await chat.hashing()) if large else chat


def _request_options(fields: _Payload) -> RequestOptions:
    if fields.start_within is fields.deadline is fields.class_ is fields.hold is ABSENT:
        return NO_REQUEST_OPTIONS
    return RequestOptions(
        _seconds(fields.start_within, "start_within"),
        _seconds(fields.deadline, "deadline"),
        request_headers.one_of(CLASSES, _name(fields.class_, "class"), "class") == BATCH,
        request_headers.one_of(HOLDS, _name(fields.hold, "hold"), "hold"),
    )


def _seconds(raw: Raw, name: str) -> float:
    if json_body.null(raw):
        return inf
    written = bytes(memoryview(raw)[: request_headers.MAX_CHARACTERS + 1])
    return request_headers.seconds(written.decode(errors="replace"), name)


def _valid_messages(messages: bytes) -> bool:
    if not messages.startswith(b"["):
        return False
    if messages.count(b"{") > MAX_CHECKED_MESSAGES:
        return True
    try:
        return bool(_MESSAGES.decode(messages))
    except msgspec.ValidationError:
        return False
    except RecursionError:
        raise InvalidJson("not JSON: nested too deeply") from None


def _name(raw: Raw, name: str) -> str | None:
    if json_body.null(raw):
        return None
    value = json_body.text(raw, MAX_ID_BYTES)
    _expect(
        value is not None and 0 < len(value) <= MAX_ID_CHARACTERS,
        f"{name} must be a string of 1 to {MAX_ID_CHARACTERS} characters",
        name,
    )
    return value


def _read_options(options: bytes) -> tuple[frozenset[str], int | None, int]:
    """Return which of the options with a default are set, the bound of an answer in tokens, and
    the number of answers that they ask for.

    Raises:
        InvalidRequest: the options have a key that a client may not set.
    """
    if options == b"{}":
        return frozenset(), None, 1
    fields = json_body.decode(_OPTIONS, options, "options")
    for name in RESERVED_OPTIONS:
        if getattr(fields, name) is not ABSENT:
            raise InvalidRequest(f"{name} cannot be set in options", param="options")
    names = frozenset(name for name in _DEFAULTED if getattr(fields, name) is not ABSENT)
    bounds = fields.max_tokens, fields.max_completion_tokens
    largest = max(filter(None, map(json_body.count, bounds)), default=None)
    choices = (json_body.lenient_count(getattr(fields, name)) or 1 for name in CHOICES)
    return names, largest, min(max(1, *choices), MAX_CHOICES)


def _expect(holds: bool, message: str, param: str) -> None:
    if not holds:
        raise InvalidRequest(message, param=param)

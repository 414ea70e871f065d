"""The frames of OpenAI's Responses API over WebSocket, one JSON object each.

This file is one concept: the frames of clients and those of the server are one protocol.

From clients:

    {"type": "response.create", …the body of POST /v1/responses…, "stream_id": "a",
     "generate": false}
    {"type": "response.cancel", "response_id": "resp_1"}, or with "stream_id"        ours
    {"type": "response.resume", "response_id": "resp_1", "starting_after": 17,
     "stream_id": "a"}                                                               ours
    {"type": "response.steer", "previous_response_id": "resp_1", "input": "Shorter!"}
    {"type": "response.processed", …}

To clients: the events of the response, which are the provider's bytes, and frames of our own:
errors, positions in a queue, and the events of a response that is only prepared (`generate:
false`).

A `stream_id` names a *lane* of the connection. Of a `response.create` only the top level is
decoded, and the body for the provider is the client's text, without the members that belong to the
frame.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import AioserverError, InvalidRequest, InvalidStreamId
from aioserver.protocol import json_body
from aioserver.protocol.json_body import ABSENT
from aioserver.protocol.model_body import Member, ModelBody, Place
from aioserver.protocol.sound import sound
from aioserver.protocol.steps import pause_after
from aioserver.wings.responses.bridge.output import REPEATED

if TYPE_CHECKING:
    from collections.abc import Sequence

# The most bytes of an id, or of the name of a lane, as it is written.
MAX_ID_BYTES = 1026
# The most bytes of a field that an event of our own repeats; a longer one is left out.
MAX_ECHO_BYTES = 1 << 13
_TYPES = "response.create, response.cancel, response.resume, response.steer, response.processed"
_LANE = re.compile(r"[A-Za-z0-9_.-]{1,256}")
# -1 stands before the first event.
_SEQUENCE = re.compile(rb"[0-9]{1,18}|-1")
# The members of a frame that do not belong to the body.
_OF_FRAME = tuple(map(Member, ("type", "stream_id", "generate")))
_STREAM = Member("stream")


# The members of a response that generates nothing which repeat its request.
_DEFAULTS = REPEATED | {"reasoning": b"null"}
_NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"cached_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 0,
}
_FRAME = json_body.raw_members(
    *("type", "stream_id", "generate", "background", "stream", "response_id", "starting_after"),
    *("previous_response_id", "input"),
)
_SHOWN = json_body.raw_members(*_DEFAULTS)


class Create(msgspec.Struct, frozen=True):
    """Answer *body*, after earlier commands on the *lane*; None is the lane without a name.

    *generate* false: no provider is asked.
    """

    lane: str | None
    body: ModelBody
    generate: bool


class Refused(msgspec.Struct, frozen=True):
    """Answer a `response.create` with *error*, after earlier commands on the *lane*."""

    lane: str | None
    error: AioserverError


class Resume(msgspec.Struct, frozen=True):
    """Continue with the events of a response after *after*, a sequence number, on the *lane*.

    None: from the first.
    """

    lane: str | None
    response_id: str
    after: int | None


class Cancel(msgspec.Struct, frozen=True):
    """Stop a response: the one with an id or, if the id is None, the one under way on
    the *lane*.
    """

    lane: str | None
    response_id: str | None


class Steer(msgspec.Struct, frozen=True):
    """Change a response while it comes, which our providers cannot do; *input* is JSON."""

    previous: str | None
    input: bytes


class Processed(msgspec.Struct, frozen=True):
    """Note that the client has carried out the calls of a response; this has no effect."""


Command = Create | Refused | Resume | Cancel | Steer | Processed


class BadFrame(Exception):
    """The frame is no valid command. *lane* is its lane, None if it names none."""

    def __init__(self, error: AioserverError, lane: str | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.lane = lane


async def parsing(data: bytes) -> Command:
    """Parse the command of one text frame, in steps.

    Raises:
        BadFrame: *data* is not a command; the `error` is an `InvalidJson` or `InvalidRequest`.
    """
    lane: str | None = None
    try:
        body = await sound(data)
        await pause_after(body)
        frame = json_body.decode(_FRAME, body, "a frame")
        await pause_after(body)
        kind = json_body.text(frame.type, MAX_ID_BYTES)
        if kind == "response.steer":
            return Steer(_id(frame, "previous_response_id"), _short(frame.input, b'""'))
        if kind == "response.processed":
            return Processed()
        lane = _lane(frame.stream_id)
        match kind:
            case "response.create":
                try:
                    return await _create(lane, frame, body)
                except AioserverError as error:
                    return Refused(lane, error)
            case "response.cancel":
                return Cancel(lane, _id(frame, "response_id"))
            case "response.resume":
                response_id = _id(frame, "response_id")
                if response_id is None:
                    raise InvalidRequest("response_id is required", param="response_id")
                return Resume(lane, response_id, _sequence(frame.starting_after))
        raise InvalidRequest(f"unknown type; one of {_TYPES} is expected", param="type")
    except AioserverError as error:
        raise BadFrame(error, lane) from None


async def _create(lane: str | None, frame: Any, body: bytes) -> Create:
    """Return the command of a frame whose bytes are *body*, in steps."""
    generate = json_body.flag(frame.generate)
    if generate is None and not json_body.null(frame.generate):
        raise InvalidRequest("generate must be true or false", param="generate")
    if json_body.flag(frame.background) is True:
        raise InvalidRequest(
            "background is not available over WebSocket: use POST /v1/responses",
            param="background",
        )
    streamed = json_body.flag(frame.stream) is True
    body = await _without(_OF_FRAME if streamed else (*_OF_FRAME, _STREAM), frame, body)
    await pause_after(body)
    if not streamed:
        body = _STREAM.insert(body, [b"true"])
    return Create(lane, ModelBody(body), generate is not False)


async def _without(members: Sequence[Member], frame: Any, body: bytes) -> bytes:
    """Return *body* without those of its *members* that *frame* has, in steps.

    Raises:
        InvalidRequest: the body has one of them several times.
    """
    places: list[Place] = []
    removed: list[Member] = []
    for member in members:
        raw: Raw = getattr(frame, member.name)
        if raw is not ABSENT:
            places.append(member.find(body, bytes(raw)))
            removed.append(member)
            await pause_after(body)
    # In reverse order, so that the positions of the others stay the same.
    for place in sorted(places, reverse=True):
        start, end = Member.extent(body, place)
        view = memoryview(body)
        body = b"".join((view[:start], view[end:]))
    # Without their keys, in any spelling, there is nothing to read.
    if b"\\u00" in body or any(member.key in body for member in removed):
        rest = json_body.decode(_FRAME, body, "a frame")
        await pause_after(body)
        for member in removed:
            if getattr(rest, member.name) is not ABSENT:
                raise InvalidRequest(f"several keys {member.name} in one body", param=member.name)
    return body


def _lane(raw: Raw) -> str | None:
    if json_body.null(raw):
        return None
    name = json_body.text(raw, MAX_ID_BYTES)
    if name is None or _LANE.fullmatch(name) is None:
        raise InvalidStreamId(
            "stream_id must be 1 to 256 characters of A-Z, a-z, 0-9, _, . and -", param="stream_id"
        )
    return name


def _id(frame: Any, name: str) -> str | None:
    raw: Raw = getattr(frame, name)
    if json_body.null(raw):
        return None
    value = json_body.text(raw, MAX_ID_BYTES)
    if not value:
        raise InvalidRequest(f"{name} must be the id of a response", param=name)
    return value


def _sequence(raw: Raw) -> int | None:
    if json_body.null(raw):
        return None
    written = bytes(memoryview(raw)[:20])
    if _SEQUENCE.fullmatch(written) is None:
        raise InvalidRequest("starting_after must be a sequence_number", param="starting_after")
    return int(written)


def _short(raw: Raw, default: bytes) -> bytes:
    """Return *raw*, or *default* if there is none, or if it is too long to be repeated."""
    if raw is ABSENT or len(memoryview(raw)) > MAX_ECHO_BYTES:
        return default
    return bytes(raw)


# Frames to clients.


def in_lane(event: bytes, lane: str) -> bytes:
    """Return *event*, the JSON of an object, with the `stream_id` of its *lane* at its end."""
    start = event[: event.rindex(b"}")].rstrip()
    comma = b"" if start == b"{" else b","
    return b'%b%b"stream_id":"%b"}' % (start, comma, lane.encode())


def queued(lane: str | None, at: str, position: int, eta: float | None) -> bytes:
    """Return the frame with the position of a response in a queue: *at* the connection, at its key
    or at its provider; *eta* in seconds, None if it is not known.
    """
    return _news(
        lane,
        {
            "type": "aioserver:queued",
            "at": at,
            "position": position,
            "eta": None if eta is None else round(eta, 1),
        },
    )


def heartbeat(lane: str | None) -> bytes:
    """Return the frame that reports a running response whose provider is silent."""
    return _news(lane, {"type": "aioserver:heartbeat"})


def _news(lane: str | None, event: dict[str, Any]) -> bytes:
    return orjson.dumps(event if lane is None else {**event, "stream_id": lane})


def error(fault: AioserverError, lane: str | None) -> bytes:
    """Return the frame for a *fault* before the first content of a response.

    The headers that an answer over HTTP would have are in `error.headers`, as openai-python reads
    them, and beside `error`, as Codex does.
    """
    frame: dict[str, Any] = {"type": "error", "status": fault.http_status}
    if lane is not None:
        frame["stream_id"] = lane
    frame["error"] = fields = _error_object(fault)
    headers = {
        name.lower(): value
        for name, value in fault.headers().items()
        if name != "WWW-Authenticate"
    }
    if headers:
        fields["headers"] = frame["headers"] = headers
    return orjson.dumps(frame)


def _error_object(fault: AioserverError) -> dict[str, Any]:
    """Return OpenAI's error object: the provider's own, if it refused the request, or ours."""
    own = fault.as_object()
    try:
        content = orjson.loads(fault.body())
    except orjson.JSONDecodeError:
        return own
    found = content.get("error") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        return own
    # Clients in typed languages do not recognize an error if one of these is no string.
    texts = {name: found.get(name) for name in ("type", "code", "message", "param")}
    shown = {
        name: text if text is None or isinstance(text, str) else orjson.dumps(text).decode()
        for name, text in texts.items()
    }
    return {
        **shown,
        "type": shown["type"] or own["type"],
        "message": shown["message"] or own["message"],
    }


def prepared(
    command: Create, response_id: str, model: str, created_at: int
) -> list[tuple[bytes, bytes]]:
    """Return the events of a response that generates nothing, each with the response object in it.

    *created_at*: seconds since 1970.
    """
    fields = json_body.decode(_SHOWN, command.body.data, "the body")
    shown = {name: _short(getattr(fields, name), default) for name, default in _DEFAULTS.items()}
    response: dict[str, Any] = {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "previous_response_id": command.body.previous_response_id,
        **{name: orjson.Fragment(raw) for name, raw in shown.items()},
        "usage": None,
    }
    events: list[tuple[bytes, bytes]] = []
    for number, kind in enumerate(("created", "in_progress", "completed")):
        if kind == "completed":
            response |= {"status": kind, "usage": _NO_USAGE}
        written = orjson.dumps(response)
        event = {"type": f"response.{kind}", "sequence_number": number}
        events.append((orjson.dumps({**event, "response": orjson.Fragment(written)}), written))
    return events


def not_steered(command: Steer) -> bytes:
    """Return the frame that gives back the input of a *command* that cannot be carried out."""
    fault = {
        "type": "invalid_request_error",
        "code": "steering_not_supported",
        "message": "a response cannot be changed while it comes: cancel it, and send another one",
    }
    # Clients expect both, also of a frame that lacked one.
    previous, given = command.previous or "", orjson.Fragment(command.input)
    steer = {"previous_response_id": previous, "input": given}
    return orjson.dumps(
        {"type": "response.steer.failed", "sequence_number": 0, "steer": steer, "error": fault}
    )

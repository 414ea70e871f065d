"""The messages to a hook, and its possible answers: one JSON object for each decision, lines of
JSON for a streamed answer.

    {"event": "request", "id", "hook", "caller", "path", "model", "stream", "body"}
    {"event": "answer", "id", "hook", "caller", "path", "provider", "model", "body"}     a whole one
    {"event": "answer", …} ⏎ {"n": 3, "data": …} ⏎ … {"end": "complete"} ⏎               a streamed one

    204, or 200 {}                                        the request or the answer goes on
    200 {"refuse": {"message", "status", "retry_after"}}  it is refused
    200 {"body": {…}}                                     a request goes on with this body

Bodies and events stand in these objects as they came, as bytes, so that no objects are made of
them. Each is validated before: invalid JSON could end the object around it, and inject other
members.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import orjson
from msgspec import UNSET, Raw, UnsetType

from aioserver.errors import AioserverError, InvalidJson, InvalidRequest
from aioserver.faces import openai
from aioserver.hook import Refuse
from aioserver.protocol import json_body, model_body
from aioserver.protocol.model_body import Member
from aioserver.protocol.sound import sound

if TYPE_CHECKING:
    from aioserver.config import settings
    from aioserver.gateway.request import Route
    from aioserver.hook import Call
    from aioserver.protocol.model_body import ModelBody
    from aioserver.providers.request import BodyMaker

# The HTTP statuses that a refusal may have.
STATUSES = frozenset({403, 400, 429})
# The most characters of a refusal's message that a client gets.
MAX_MESSAGE = 1000
# The most seconds that a hook may ask a client to wait.
MAX_WAIT = 3600.0
REFUSED = "a hook of this server has refused it"
STREAM = Member("stream")


class HookFault(Exception):
    """A hook has made no decision. The text says why, and quotes nothing of the content."""


class _Refusal(msgspec.Struct, forbid_unknown_fields=True):
    message: str = REFUSED
    status: int = 403
    retry_after: float | None = None


class _Verdict(msgspec.Struct, forbid_unknown_fields=True):
    refuse: _Refusal | None = None
    body: Raw | UnsetType = UNSET


_DECODER = msgspec.json.Decoder(_Verdict)


def verdict(status: int, content: bytes) -> Refuse | bytes | None:
    """Return the meaning of an HTTP answer with *status* and *content*: nothing (None), a refusal,
    or another body, which is an object.

    Raises:
        HookFault: the answer is not a decision.
    """
    if status == 204:
        return None
    if status != 200:
        raise HookFault(f"status {status}")
    try:
        said = _DECODER.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise HookFault("its answer is no decision") from None
    if said.body is UNSET:
        return None if said.refuse is None else refusal(said.refuse)
    body = bytes(said.body)
    if said.refuse is not None or not body.startswith(b"{"):
        raise HookFault("its answer is no decision")
    return body


def verdict_on_answer(status: int, content: bytes) -> Refuse | None:
    """Return the decision about an answer of a model, as `verdict`. A hook cannot replace an answer
    by another body.
    """
    said = verdict(status, content)
    if isinstance(said, bytes):
        raise HookFault("its answer is no decision")
    return said


def refusal(said: _Refusal | Refuse) -> Refuse:
    """Return *said*, the decision of a hook, as a refusal that a client may see.

    Raises:
        HookFault: its status is not allowed for a refusal, or its message or time is not valid.
    """
    message, status, retry_after = said.message, said.status, said.retry_after
    if status not in STATUSES or not isinstance(message, str):
        raise HookFault("its refusal has a status other than 403, 400 and 429, or no message")
    if retry_after is not None and not 0 <= retry_after <= MAX_WAIT:
        raise HookFault(f"its retry_after is not within {MAX_WAIT:g} s")
    # A lone surrogate cannot be written.
    text = message.encode("utf-8", "replace").decode()[:MAX_MESSAGE]
    return Refuse(text or REFUSED, status, retry_after)


def opening(event: str, call: Call) -> bytes:
    """Return the object that describes *call*, without its closing brace."""
    names = ["id", "hook", "caller", "path"]
    names += ["model", "stream"] if event == "request" else ["provider", "model"]
    members = {name: getattr(call, name) for name in names}
    return orjson.dumps({"event": event, **members})[:-1]


def with_body(event: str, call: Call, body: bytes) -> bytes:
    """Return the message about *call*, with *body*, which is JSON."""
    return b'%b,"body":%b}' % (opening(event, call), body or b"null")


async def member(body: bytes) -> bytes:
    """Return *body* as a value of an object: unchanged if it is JSON, otherwise as a text. In
    steps.
    """
    try:
        await sound(body)
        json_body.decode(json_body.ANYTHING, body, "the body")
    except (InvalidJson, InvalidRequest):
        return orjson.dumps(body.decode("utf-8", "replace"))
    return body


def line(number: int, data: bytes) -> bytes:
    """Return the line of event *number* of an answer, whose *data* is JSON, or a text."""
    try:
        data.decode()
        json_body.ANYTHING.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        data = orjson.dumps(data.decode("utf-8", "replace"))
    else:
        # Outside of its strings, which have none, a line end is white space.
        data = data.replace(b"\n", b" ").replace(b"\r", b" ")
    return b'{"n":%d,"data":%b}\n' % (number, data)


class ChangedBody(NamedTuple):
    """The *body* that a hook has returned for one with the model *shown*."""

    body: ModelBody
    shown: str | None

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return len(self.body.data)

    def maker(self, route: Route) -> BodyMaker:
        """Return a function that makes the body for a provider and a model. The hook was shown the
        body for the first provider of *route*.

        A model that the hook has chosen replaces only the model that it was shown.
        """
        body, first = self.body, route.model or route.provider.settings.model
        if self.shown != first:
            # A body that is passed on as it is, whatever its model means.
            return lambda _provider, _model: body.data

        def body_for(provider: settings.Provider, model: str | None) -> bytes:
            if (model or provider.model) == first and body.model is not None:
                return body.data
            return openai.body_for(body, provider, model)

        return body_for


async def changed_body(said: bytes, shown: bytes, max_bytes: int) -> ChangedBody:
    """Return the body *said*, by which a hook replaces the body *shown*, in steps. Its `stream` is
    that of *shown*.

    Raises:
        HookFault: it is not the body of a request, or has more than *max_bytes*.
    """
    if len(said) > max_bytes:
        raise HookFault("its body is too large")
    before = await model_body.reading(shown)
    try:
        body = await model_body.reading(said)
        if body.streamed != before.streamed:
            data = _with_stream(body.data, streamed=before.streamed)
            body = await model_body.reading(data)
    except AioserverError as exc:
        raise HookFault("its body is not that of a request") from exc
    return ChangedBody(body, before.model)


def _with_stream(body: bytes, *, streamed: bool) -> bytes:
    """Return *body* with `stream` set to *streamed*."""
    word, value = b"true" if streamed else b"false", STREAM.value(body)
    if not value:
        return STREAM.insert(body, (word,))
    place, view = STREAM.find(body, value), memoryview(body)
    return b"".join((view[: place.value], word, view[place.end :]))

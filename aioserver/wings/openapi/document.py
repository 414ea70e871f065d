"""`GET /openapi.json`: our own faces in OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.1).

It is made of the server's own parts: the table of routes, with the configured paths; the policies
of the guard, which become `security`; the structs of messages, and the errors. The paths that pass
through below `/v1` are one entry. OpenAPI has no term for a WebSocket: such an operation has
`x-websocket: true`.

It is made at the first request, when all routes exist, and anew when a reload adds the first key
or takes the last one.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import orjson
from aiohttp import hdrs, web
from msgspec.inspect import BoolType, IntType, NoneType, StrType, StructType, UnionType, type_info

from aioserver import __version__, provider_errors
from aioserver.auth.guard import COOKIE, KEY_HEADERS, Policy
from aioserver.errors import AioserverError
from aioserver.faces.pages import Asset
from aioserver.protocol import client_frames
from aioserver.protocol.frames import Frame
from aioserver.protocol.model_body import MAX_MODEL_BYTES, Fields
from aioserver.protocol.request_headers import MAX_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp.web_urldispatcher import AbstractRoute
    from msgspec.inspect import Type

    from aioserver.faces.context import Context

PATH = "/openapi.json"
# The routes that are left out: the beginning of each path, and the reason.
LEFT_OUT = {
    "/assets/": "a file of the pages",
    "/client": "the pages' client library, a module",
    "/dashboard": "a page for people",
    "/healthz": "another name of /health",
    "/livez": "another name of /health",
    "/readyz": "another name of /ready",
}
HEADERS = {"Cache-Control": "no-cache", "Vary": "Origin"}
_PARAMETER = re.compile(r"\{(\w+)\}")
SCHEMA = "#/components/schemas/{name}"
# The ways in which a caller may present its key.
SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    **{name: {"type": "apiKey", "in": "header", "name": name} for name in KEY_HEADERS},
    "session": {"type": "apiKey", "in": "cookie", "name": COOKIE},
}
TEXT, OBJECT = {"type": "string"}, {"type": "object"}
NULL, MAYBE = {"type": "null"}, {"type": ["string", "null"]}
NAME = {"type": "string", "minLength": 1, "maxLength": client_frames.MAX_ID_CHARACTERS}
# OpenAPI's patterns have no term for the characters that are printable: it leaves out most others.
REQUEST_ID = {
    **NAME,
    "description": "printable characters",
    "pattern": "^[^\\u0000-\\u001f\\u007f-\\u00a0\\u00ad\\u2028\\u2029]*$",
}
MAYBE_NAME = {**NAME, **MAYBE}
SECONDS = {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": MAX_SECONDS}
MESSAGE = {"type": "object", "required": ["role"], "properties": {"role": TEXT}}
TYPES = {BoolType: "boolean", IntType: "integer", NoneType: "null", StrType: "string"}
# The types of the fields of a question, which are read as bytes (protocol/client_frames.py).
QUESTION: dict[str, Any] = {
    "text": {"type": ["string", "null"], "minLength": 1},
    "messages": {"type": ["array", "null"], "minItems": 1, "items": MESSAGE},
    "streaming": {"type": ["boolean", "null"]},
    "conversation_id": MAYBE_NAME,
    "provider": MAYBE_NAME,
    "model": MAYBE_NAME,
    "options": {**OBJECT, "propertyNames": {"not": {"enum": [*client_frames.RESERVED_OPTIONS]}}},
    "metadata": OBJECT,
    "start_within": SECONDS,
    "deadline": SECONDS,
    "class": {"enum": ["interactive", "batch", None]},
    "hold": {"enum": ["preamble", "calls", "turn", None]},
}
# A question has one of these, and the other one is left out or null.
ONE_OF = [
    {"required": [one], "properties": {one: {"not": NULL}, other: NULL}}
    for one, other in (("text", "messages"), ("messages", "text"))
]
PARAMETERS = {"request_id": REQUEST_ID}
POSITION: dict[str, Any] = {
    "type": "object",
    "properties": {"last_event_id": {"type": "integer", "minimum": 0}},
}


class Operation(NamedTuple):
    """The purpose of a route: a sentence, the name of the schema of its body, if it has one, and
    the type of its answer. A body may be left out if it is *optional*, and *empty* says that the
    answer may have none.
    """

    summary: str
    body: str = ""
    answers: str = "application/json"
    optional: bool = False
    empty: bool = False


JSON_OR_EVENTS = "application/json, text/event-stream"
# By method and path; `WS` and `SSE` stand for the configured ones.
OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "WS"): Operation("Chat over a WebSocket: `Command` frames in, `Frame`s out"),
    ("POST", "SSE"): Operation(
        "Ask, and read the answer", "Question", "text/event-stream", empty=True
    ),
    ("GET", "SSE"): Operation("List the answers of the caller that are kept"),
    ("GET", "SSE/{request_id}"): Operation(
        "Read an answer from the event after `Last-Event-ID` on",
        answers=JSON_OR_EVENTS,
        empty=True,
    ),
    ("DELETE", "SSE/{request_id}"): Operation(
        "Cancel an answer, for all of its readers", answers="", empty=True
    ),
    ("POST", "/v1/chat/completions"): Operation(
        "Ask for a chat completion", "Body", JSON_OR_EVENTS
    ),
    ("POST", "/v1/completions"): Operation("Ask for a completion", "Body", JSON_OR_EVENTS),
    ("POST", "/v1/embeddings"): Operation("Ask for embeddings", "Body"),
    ("POST", "/v1/responses"): Operation("Ask for a response", "Body", JSON_OR_EVENTS),
    ("GET", "/v1/responses"): Operation("Responses over a WebSocket, as at OpenAI"),
    ("GET", "/v1/responses/{id}"): Operation(
        "Read a response that is kept, or its events", answers=JSON_OR_EVENTS
    ),
    ("DELETE", "/v1/responses/{id}"): Operation("Delete a stored response"),
    ("POST", "/v1/responses/{id}/cancel"): Operation("Cancel a response"),
    ("POST", "/v1/responses/compact"): Operation("Compact a conversation", "Body"),
    ("POST", "/v1/responses/input_tokens"): Operation(
        "Count the tokens of a conversation, at a provider with responses", "Body"
    ),
    ("GET", "/v1/responses/{id}/input_items"): Operation("List the input of a stored response"),
    ("POST", "/v1/messages"): Operation("Ask for a message (Anthropic)", "Body", JSON_OR_EVENTS),
    ("POST", "/v1/messages/count_tokens"): Operation("Count the tokens of a message", "Body"),
    ("GET", "/v1/models"): Operation("List the models"),
    ("GET", "/v1/models/{id}"): Operation("Say which provider is asked for a model"),
    ("GET", "/conversations"): Operation("List the conversations of the caller"),
    ("DELETE", "/conversations"): Operation("Delete all conversations of the caller"),
    ("GET", "/conversations/{id}"): Operation("Read a conversation"),
    ("DELETE", "/conversations/{id}"): Operation("Delete a conversation", answers="", empty=True),
    ("GET", "/usage"): Operation("What callers have spent"),
    ("GET", "/requests/{request_id}"): Operation(
        "Where the time of a request went, once it has ended"
    ),
    ("GET", "/stats"): Operation("The state of the server"),
    ("GET", "/events"): Operation("That state each second", answers="text/event-stream"),
    ("GET", "/metrics"): Operation("Metrics for Prometheus", answers="text/plain"),
    ("GET", "/health"): Operation("Whether the process lives"),
    ("GET", "/ready"): Operation("Whether it takes requests"),
    ("GET", "/session"): Operation("Whether the browser has a session"),
    ("POST", "/session"): Operation(
        "Exchange a key for a cookie: that of a header, or else of the body",
        "Login",
        optional=True,
    ),
    ("DELETE", "/session"): Operation("End the session of the browser", answers="", empty=True),
    ("GET", "/"): Operation("The chat page for browsers; an overview for programs"),
    ("GET", PATH): Operation("This description"),
}
# All requests that pass through.
PASSED = Operation(
    "Every other path of OpenAI's API, passed on to a provider as it is", answers="*/*"
)


def routes(context: Context) -> list[web.RouteDef]:
    """Return the route of the description."""

    @cache
    def made(app: web.Application, _keyed: bool) -> Asset:
        return Asset(orjson.dumps(describe(context, app)), "application/json", HEADERS)

    async def serve(request: web.Request) -> web.StreamResponse:
        return await made(request.app, context.access.keyed).serve(request)

    return [web.get(PATH, serve)]


def describe(context: Context, app: web.Application) -> dict[str, Any]:
    """Return the description of our routes in *app*."""
    chat = context.settings.chat
    endpoints = {chat.websocket.endpoint: "WS", chat.sse.endpoint: "SSE"}
    paths: dict[str, dict[str, Any]] = {}
    for route, policy in described(context, app):
        assert route.resource is not None
        path = route.resource.canonical
        known = path
        for endpoint, word in endpoints.items():
            if path == endpoint or path.startswith(f"{endpoint}/"):
                known = word + path.removeprefix(endpoint)
        operation = OPERATIONS.get((route.method, known), Operation(path))
        if path == "/v1/{path}":
            operation = PASSED
        websocket = route in context.guard.websockets
        paths.setdefault(path, {})[route.method.lower()] = _operation(
            path, operation, policy, websocket=websocket, keyed=context.access.keyed
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "aioserver",
            "version": __version__,
            "summary": "One gateway between many chat clients and few provider connections",
        },
        "paths": paths,
        "components": {
            "securitySchemes": SECURITY,
            "schemas": _schemas(),
            "responses": {error.code: _response_of(error) for error in _errors()},
        },
    }


def described(context: Context, app: web.Application) -> Iterator[tuple[AbstractRoute, Policy]]:
    """Yield each described route, with its policy. HEAD, which comes with a GET, is left out, and
    so is LEFT_OUT.
    """
    for route in app.router.routes():
        policy = context.guard.policies.get(route)
        if policy is None or route.method == hdrs.METH_HEAD or route.resource is None:
            continue
        if not route.resource.canonical.startswith(tuple(LEFT_OUT)):
            yield route, policy


def _operation(
    path: str, operation: Operation, policy: Policy, *, websocket: bool, keyed: bool
) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary}
    if websocket:
        described["x-websocket"] = True
    if names := _PARAMETER.findall(path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": PARAMETERS.get(name, TEXT)}
            for name in names
        ]
    if operation.body:
        content = {"application/json": {"schema": _ref(operation.body)}}
        described["requestBody"] = {"required": not operation.optional, "content": content}
    success: dict[str, Any] = {}
    if websocket:
        success["101"] = {"description": "the WebSocket is open"}
    elif operation.answers:
        good: dict[str, Any] = {kind: {} for kind in operation.answers.split(", ")}
        success["200"] = {"description": "the answer", "content": good}
    if operation.empty:
        success["204"] = {"description": "the answer has no body"}
    error = {"application/json": {"schema": _error_at(path)}}
    described["responses"] = {
        **success,
        "default": {"description": "an error of `components.responses`", "content": error},
    }
    described["security"] = [] if policy is Policy.OPEN else [{name: []} for name in SECURITY]
    if policy is not Policy.OPEN:
        if not keyed:
            # None of them is needed.
            described["security"].append({})
        described["description"] = f"Where the server has keys: {policy.value}."
    return described


def _schemas() -> dict[str, Any]:
    _, components = msgspec.json.schema_components((Frame,), ref_template=SCHEMA)
    # A body is passed on as it came: these are the members of it that are read.
    struct = type_info(Fields)
    assert isinstance(struct, StructType)
    members = {field.encode_name: _type_of(field.type) for field in struct.fields}
    # In ASCII, with its two quotes.
    members["model"] |= {"minLength": 1, "maxLength": MAX_MODEL_BYTES - 2}
    body = {
        "type": "object",
        "description": "The members that the server reads; all others go on to the provider.",
        "properties": members,
    }
    question = {
        "type": "object",
        "properties": QUESTION,
        "additionalProperties": False,
        "oneOf": ONE_OF,
    }
    command = {
        "type": "object",
        "required": ["action"],
        "properties": {
            "action": {"enum": ["chat", "cancel", "resume", "ping"]},
            "request_id": REQUEST_ID,
            "payload": {"anyOf": [_ref("Payload"), POSITION]},
        },
    }
    asked = {
        **question,
        "required": ["request_id"],
        "properties": {**QUESTION, "request_id": REQUEST_ID},
    }
    # A provider's own code passes, and it may have none.
    code = {**MAYBE, "examples": sorted({error.code for error in _errors()})}
    error = {"message": TEXT, "type": TEXT, "param": MAYBE, "code": code}
    inner = {"type": "object", "required": ["message", "type"], "properties": error}
    in_messages = {**inner, "properties": {"message": TEXT, "type": TEXT, "code": code}}
    return {
        **components,
        "Body": body,
        "Payload": question,
        "Question": asked,
        "Command": command,
        "Login": {"type": "object", "required": ["key"], "properties": {"key": TEXT}},
        "Error": {"type": "object", "required": ["error"], "properties": {"error": inner}},
        "MessagesError": {
            "type": "object",
            "required": ["type", "error"],
            "properties": {"type": {"const": "error"}, "error": in_messages, "request_id": MAYBE},
        },
    }


def _error_at(path: str) -> dict[str, Any]:
    """Return the schema of an error at *path*: below `/v1` a client that names its
    `anthropic-version` gets those of Anthropic's API everywhere.
    """
    if path.startswith("/v1/messages"):
        return _ref("MessagesError")
    if path.startswith("/v1/"):
        return {"anyOf": [_ref("Error"), _ref("MessagesError")]}
    return _ref("Error")


def _type_of(kind: Type) -> dict[str, Any]:
    """Return the schema of a member of a body; a member that stays bytes may have any type."""
    kinds = kind.types if isinstance(kind, UnionType) else (kind,)
    names = [TYPES[type(each)] for each in kinds if type(each) in TYPES]
    return {"type": names} if names else {}


def _errors() -> Iterator[type[AioserverError]]:
    """Yield each class of errors that clients may see, the first of each code."""
    seen = set()
    for error in provider_errors.subclasses(AioserverError):
        if error.code not in seen and error not in (AioserverError, provider_errors.ProviderFault):
            seen.add(error.code)
            yield error


def _response_of(error: type[AioserverError]) -> dict[str, Any]:
    """Return *error* as a response: its HTTP status and its meaning."""
    meaning = (inspect.getdoc(error) or "").partition("\n\n")[0].replace("\n", " ")
    return {
        "description": f"{error.status}: {meaning}",
        "content": {"application/json": {"schema": _ref("Error")}},
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": SCHEMA.format(name=name)}


assert tuple(QUESTION) == client_frames.PAYLOAD_FIELDS, "each field has its type"

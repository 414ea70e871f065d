"""The body of a request to `/v1/responses` as that of one to `/v1/chat/completions`.

    instructions                 the first system message
    input                        messages (items.py)
    tools, tool_choice           functions (tools.py)
    text.format                  response_format
    text.verbosity               verbosity
    reasoning.effort             reasoning_effort
    max_output_tokens            max_tokens, which more engines know than max_completion_tokens
    top_logprobs, include        logprobs, top_logprobs
    safety_identifier            user, unless there is one
    temperature, top_p, user, service_tier, parallel_tool_calls    the same
    presence_penalty, frequency_penalty                            the same

`metadata`, `store` and `previous_response_id` are handled here, not by the provider. Hints for
caches, and limits of actions that a provider takes by itself, are left out, since some providers
refuse unknown fields. A field that would change the meaning of the answer is refused by name: see
`_REFUSED`.
"""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidRequest, ResponseNotFound
from aioserver.protocol import json_body
from aioserver.protocol.bridging.accepted_parameters import ALL_WORDS, AcceptedParameters, Size
from aioserver.protocol.bridging.chat import BridgedChat, put_together, tool_members
from aioserver.protocol.bridging.reading import (
    elements,
    for_each,
    is_string,
    members,
    read,
    string,
)
from aioserver.protocol.bridging.turns import Piece, Turns
from aioserver.protocol.json_body import ABSENT, flag, null, raw_members
from aioserver.protocol.steps import Steps, pause_after
from aioserver.wings.responses.bridge.items import ItemReader
from aioserver.wings.responses.bridge.output import MAX_REPEATED_BYTES, REPEATED
from aioserver.wings.responses.bridge.tools import Tools

LOGPROBS = "message.output_text.logprobs"
# Fields that only a provider with responses of its own can honour.
_REFUSED = ("conversation", "prompt", "moderation")
_TEXT_FORMAT = b'{"type":"text"}'


class _Format(msgspec.Struct, gc=False):
    type: str
    name: Raw = ABSENT
    description: Raw = ABSENT
    schema: Raw = ABSENT
    strict: Raw = ABSENT


_BODY = raw_members(
    *(
        "model",
        "stream",
        "input",
        "instructions",
        "tools",
        "tool_choice",
        "text",
        "reasoning",
        "include",
    ),
    *(
        "max_output_tokens",
        "temperature",
        "top_p",
        "top_logprobs",
        "presence_penalty",
        "frequency_penalty",
        "max_tool_calls",
        "parallel_tool_calls",
        "user",
    ),
    *(
        "safety_identifier",
        "service_tier",
        "prompt_cache_key",
        "metadata",
        "store",
        "previous_response_id",
    ),
    *_REFUSED,
)
_TEXT = raw_members("format", "verbosity")
_FORMAT = msgspec.json.Decoder(_Format)
_REASONING = raw_members("effort")
_METADATA = msgspec.json.Decoder(dict[str, str] | None)


class ChatRequest(BridgedChat, kw_only=True):
    """A request for chat completions, with the data that turn its answer into a response.
    *repeated* is for the `Frame` of the response. *logprobs* says that the answer must have them.
    """

    tools: Tools
    repeated: bytes
    logprobs: bool


async def chat_request(
    body: bytes,
    *,
    previous: str | None = None,
    reasoning_field: str = "",
    accepted: AcceptedParameters = ALL_WORDS,
    streamed: bool = False,
    incomplete: bool = False,
) -> ChatRequest:
    """Return the request for chat completions that corresponds to *body*, in steps.

    *body* is JSON with a model. *previous* is the id of the response that it continues, if the
    items of that response are in the body already. With *incomplete*, they may be missing.
    *reasoning_field* is as for `Turns`, and *accepted* are the parameters that the provider
    accepts. With *streamed*, the answer is streamed, even if *body* says otherwise.

    Raises:
        InvalidRequest: *body* is no request, or the request has no form in chat completions.
    """
    json_body.check_values(body)
    await pause_after(body)
    fields = _fields(body)
    await pause_after(body)
    if not (incomplete or null(fields.previous_response_id)):
        raise ResponseNotFound("the previous response is not known", param="previous_response_id")
    tools = Tools()
    steps = Steps()
    for number, raw in enumerate(elements(fields.tools, "tools")):
        await tools.add(raw, f"tools[{number}]")
        await steps.taken(len(memoryview(raw)))
    choice = await tools.choose(fields.tool_choice)
    turns = Turns(reasoning_field)
    if not null(fields.instructions):
        turns.instruct(string(fields.instructions, "instructions"))
    if is_string(fields.input):
        turns.ask(Piece(bytes(fields.input)))
    else:
        await for_each(fields.input, "input", ItemReader(tools, turns, incomplete=incomplete).add)
    logprobs = not null(fields.top_logprobs) or LOGPROBS in _names(fields.include)
    written_format, shown_text = _text(fields.text)
    return await put_together(
        ChatRequest,
        body,
        fields.model,
        turns,
        tool_members(tools.functions, choice, fields.parallel_tool_calls, accepted),
        lambda size: _options(fields, accepted, size, logprobs=logprobs),
        accepted,
        streamed=streamed or bool(flag(fields.stream)),
        form=written_format,
        tools=tools,
        hosted=tools.hosted,
        repeated=_repeated(fields, tools, shown_text, previous),
        logprobs=logprobs,
    )


def _fields(body: bytes) -> Any:
    fields = json_body.decode(_BODY, body, "the body")
    for name in _REFUSED:
        raw = getattr(fields, name)
        if not null(raw) and flag(raw) is not False:
            message = f"{name} is not available: the provider has chat completions only"
            raise InvalidRequest(message, param=name)
    read(_METADATA, Raw(b"null") if null(fields.metadata) else fields.metadata, "metadata")
    return fields


def _names(raw: Raw) -> list[str]:
    return [json_body.text(each) or "" for each in elements(raw, "include")]


def _options(fields: Any, accepted: AcceptedParameters, size: Size, *, logprobs: bool) -> bytes:
    effort = ABSENT
    if not null(fields.reasoning):
        effort = read(_REASONING, fields.reasoning, "reasoning").effort
    return members(
        (b"temperature", fields.temperature),
        (b"top_p", fields.top_p),
        (b"presence_penalty", fields.presence_penalty),
        (b"frequency_penalty", fields.frequency_penalty),
        (accepted.bound.encode(), accepted.bounded(fields.max_output_tokens, size)),
        (b"reasoning_effort", effort if accepted.takes("reasoning_effort") else ABSENT),
        (b"logprobs", b"true" if logprobs else b""),
        (b"top_logprobs", fields.top_logprobs),
        (b"user", fields.safety_identifier if null(fields.user) else fields.user),
        (b"service_tier", fields.service_tier),
    )


def _text(raw: Raw) -> tuple[bytes, bytes]:
    """Return the members for the form of the text, and the `text` of the response."""
    fields = read(_TEXT, Raw(b"{}") if null(raw) else raw, "text")
    verbosity = members((b"verbosity", fields.verbosity))
    shown = b'{"format":%b%b}' % (
        _TEXT_FORMAT if null(fields.format) else bytes(fields.format),
        verbosity,
    )
    if null(fields.format):
        return verbosity, shown
    form = read(_FORMAT, fields.format, "text.format")
    if form.type == "text":
        return verbosity, shown
    if form.type == "json_object":
        return verbosity + b',"response_format":{"type":"json_object"}', shown
    if form.type != "json_schema":
        raise InvalidRequest(f"no format is named {form.type[:64]!r}", param="text.format.type")
    schema = members(
        (b"name", string(form.name, "text.format.name")),
        (b"description", form.description),
        (b"schema", form.schema),
        (b"strict", form.strict),
    )
    written = b',"response_format":{"type":"json_schema","json_schema":{%b}}' % schema[1:]
    return verbosity + written, shown


def _repeated(fields: Any, tools: Tools, text: bytes, previous: str | None) -> bytes:
    """Return the members of the response that repeat the request."""
    values = {
        name: default if null(raw := getattr(fields, name, ABSENT)) else bytes(raw)
        for name, default in REPEATED.items()
    }
    shown = b",".join(tools.shown)
    if len(values["instructions"]) + len(shown) > MAX_REPEATED_BYTES:
        values["instructions"], shown = b"null", b""
    values |= {
        "previous_response_id": orjson.dumps(previous),
        "store": b"false" if flag(fields.store) is False else b"true",
        "text": text,
        "tools": b"[%b]" % shown,
        "user": b"null" if null(fields.user) else bytes(fields.user),
    }
    repeated = b",".join([b'"%b":%b' % (name.encode(), raw) for name, raw in values.items()])
    if len(repeated) > 2 * MAX_REPEATED_BYTES:
        raise InvalidRequest(
            f"the request has more than {MAX_REPEATED_BYTES} bytes beside input, "
            "instructions and tools"
        )
    return repeated

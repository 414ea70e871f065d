"""The body of a request to `/v1/messages` as that of one to `/v1/chat/completions`.

    system, messages             messages (blocks.py)
    tools, tool_choice           functions (tools.py), parallel_tool_calls
    max_tokens, stop_sequences   max_tokens, stop
    temperature, top_p, top_k    the same
    output_config.format         response_format
    output_config.effort         reasoning_effort

All other fields mean nothing to an engine, and are left out: `thinking`, `metadata`,
`service_tier`, `context_management`, betas, `cache_control`. A reference to content that only
Anthropic has is refused by name: a thread that is continued, a file by its id.
"""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol import json_body
from aioserver.protocol.bridging.accepted_parameters import ALL_WORDS, AcceptedParameters, Size
from aioserver.protocol.bridging.chat import BridgedChat, put_together, tool_members
from aioserver.protocol.bridging.reading import (
    elements,
    for_each,
    members,
    read,
    string,
)
from aioserver.protocol.bridging.turns import Turns
from aioserver.protocol.json_body import ABSENT, flag, null, raw_members
from aioserver.protocol.steps import Steps, pause_after
from aioserver.wings.anthropic.bridge.blocks import BlockReader
from aioserver.wings.anthropic.bridge.tools import MAX_TOOLS, Tools

_EFFORTS = {b'"xhigh"': b'"high"', b'"max"': b'"high"'}
# The message of a request that continues a thread.
THREAD_MESSAGE = "capability_rejected: beta_header:message-threads-2026-08-12"


class _Format(msgspec.Struct, gc=False):
    type: str
    schema: Raw = ABSENT


class _Thinking(msgspec.Struct, gc=False):
    type: str = ""
    display: str | None = None


_BODY = raw_members(
    *(
        "model",
        "stream",
        "messages",
        "system",
        "tools",
        "tool_choice",
        "mcp_servers",
        "max_tokens",
        "stop_sequences",
    ),
    *("temperature", "top_p", "top_k", "output_config", "output_format", "thinking", "thread"),
)
_OUTPUT_CONFIG = raw_members("format", "effort")
_FORMAT = msgspec.json.Decoder(_Format)
_THINKING = msgspec.json.Decoder(_Thinking)


class ThreadContinued(InvalidRequest):
    """The request continues a thread, whose beginning only Anthropic has kept.

    `answer` is the error that Claude Code recognizes: it then sends the whole conversation.
    """

    answer = orjson.dumps(
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": THREAD_MESSAGE,
                "code": "invalid_request",
                "details": {"error_code": "thread_unsupported_request"},
            },
        }
    )


class ChatRequest(BridgedChat, kw_only=True):
    """A request for chat completions, with the data that turn its answer into a message.
    *thinking*: the client wants to see the reasoning.
    """

    tools: Tools
    thinking: bool


async def chat_request(
    body: bytes, *, reasoning_field: str = "", accepted: AcceptedParameters = ALL_WORDS
) -> ChatRequest:
    """Return the request for chat completions that corresponds to *body*, in steps.

    *body* is JSON with a model. *reasoning_field* is as for `Turns`, and *accepted* are the
    parameters that the provider accepts.

    Raises:
        InvalidRequest: *body* is no request, or the request has no form in chat completions.
    """
    json_body.check_values(body)
    await pause_after(body)
    fields = json_body.decode(_BODY, body, "the body")
    await pause_after(body)
    if not null(fields.thread) and b'"continue"' in bytes(fields.thread):
        raise ThreadContinued(THREAD_MESSAGE, param="thread")
    tools = Tools()
    steps = Steps()
    for number, raw in enumerate(elements(fields.tools, "tools", MAX_TOOLS)):
        tools.add(raw, f"tools[{number}]")
        await steps.taken(len(memoryview(raw)))
    if elements(fields.mcp_servers, "mcp_servers"):
        tools.hosted.add("mcp_servers", "mcp_servers")
    choice = tools.choose(fields.tool_choice)
    turns = Turns(reasoning_field)
    reader = BlockReader(tools, turns)
    await reader.instruct(fields.system, "system")
    await for_each(fields.messages, "messages", reader.add)
    return await put_together(
        ChatRequest,
        body,
        fields.model,
        turns,
        tool_members(tools.functions, choice, b"false" if tools.serial else b"", accepted),
        lambda size: _options(fields, accepted, size),
        accepted,
        streamed=bool(flag(fields.stream)),
        form=_response_format(fields),
        tools=tools,
        hosted=tools.hosted,
        thinking=_thinking(fields),
    )


def _options(fields: Any, accepted: AcceptedParameters, size: Size) -> bytes:
    effort = b""
    if accepted.takes("reasoning_effort") and not null(config := _config(fields).effort):
        effort = string(config, "output_config.effort")
    stop = b"" if null(fields.stop_sequences) else bytes(fields.stop_sequences)
    return members(
        (accepted.bound.encode(), accepted.bounded(fields.max_tokens, size)),
        (b"stop", b"" if stop[1:-1].strip() == b"" else stop),
        (b"temperature", fields.temperature),
        (b"top_p", fields.top_p),
        (b"top_k", fields.top_k if accepted.takes("top_k") else ABSENT),
        (b"reasoning_effort", _EFFORTS.get(effort, effort)),
    )


def _config(fields: Any) -> Any:
    raw = Raw(b"{}") if null(fields.output_config) else fields.output_config
    return read(_OUTPUT_CONFIG, raw, "output_config")


def _response_format(fields: Any) -> bytes:
    raw = _config(fields).format
    raw = fields.output_format if null(raw) else raw
    if null(raw):
        return b""
    form = read(_FORMAT, raw, "output_config.format")
    if form.type != "json_schema" or null(form.schema):
        message = f"no format is named {form.type[:64]!r}"
        raise InvalidRequest(message, param="output_config.format")
    schema = b'{"name":"answer","schema":%b}' % bytes(form.schema)
    return b',"response_format":{"type":"json_schema","json_schema":%b}' % schema


def _thinking(fields: Any) -> bool:
    """Return whether the client wants to see the reasoning."""
    if null(fields.thinking):
        return False
    thinking = read(_THINKING, fields.thinking, "thinking")
    return thinking.type in {"enabled", "adaptive"} and thinking.display != "omitted"

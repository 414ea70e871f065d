r"""The tool that the simulated model calls, and its arguments. No I/O, no clock, no randomness.

A tool is called if the request demands it (`tool_choice`), or if the user's last message asks for
it. The words "call a tool" and the name of a tool do so. A question for the thing that a tool
`get_…` gets does so as well, and so does a request to run a command in backticks, if there is a
tool for that. The arguments are valid by the tool's schema. They are, in this order: a JSON object
in the message; the quotes of the message; the message itself. A command for a shell is the text in
backticks if it only reads, else `ls`.

    Run `ls -1` with the shell.
    What is the weather in Rome?
    Call get_weather for "Rome".
    Call get_weather with {"city": "Rome", "days": 3}.

After the result of a tool the model answers in words, so that an agent comes to an end. If a call
is still demanded, it calls the tools that it has not called yet since that message, each once.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from aioserver.wings.simulator.samples import Sampler, objects

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MESSAGES, COUNT_TOKENS = "messages", "messages/count_tokens"
# The endpoints of Anthropic's API.
MESSAGES_ENDPOINTS = frozenset({MESSAGES, COUNT_TOKENS})
# The most characters of the user's message that are searched, and that become an argument.
_MAX_SEARCHED = 20_000
_MAX_ARGUMENT = 80
_QUOTED = re.compile(r'`([^`\n]+)`|"([^"`\n]+)"|“([^”`\n]+)”')
_WHAT = re.compile(r"\s*what\b", re.IGNORECASE)
_RUN = re.compile(r"\b(?:run|execute)\b", re.IGNORECASE)
# Programs put additions to a person's message into a tag, such as <system-reminder>.
_ADDED = re.compile(r"\s*<([a-z][\w-]*)\b.*</\1>\s*", re.DOTALL)
# The properties in which tools for a shell have the command.
_COMMANDS = frozenset({"command", "cmd"})
# Commands that print something and change nothing.
_HARMLESS = frozenset({"cat", "echo", "id", "ls", "pwd", "uname", "whoami"})
# Characters that make a shell run another command, or write a file.
_SHELL_SYNTAX = re.compile(r"[;&|<>$()`\\\r\n]")
_COMMAND = "ls"
# The most tools that are considered: each is searched for in the message.
_MAX_TOOLS = 1000


class UnknownTool(Exception):
    """`tool_choice` names a tool that is not among the tools."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool of the request. A *free* one takes a text and not JSON (`custom` of OpenAI)."""

    name: str
    schema: Mapping[str, Any]
    free: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool, with its arguments as JSON, or the text that a *free* one takes."""

    name: str
    arguments: str
    free: bool = False


@dataclass(frozen=True, slots=True)
class Results:
    """The tools that were called since the user's last message, and the last result.

    None: none came.
    """

    called: tuple[str, ...]
    last: str | None


def text_of(content: Any) -> str:
    """Return the text of a message's content: a string, or a list of parts, some of them text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return " ".join(text for text in texts if isinstance(text, str))


def question(messages: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """Return the index of the user's last message, and its text without the additions of programs.

    A message with the results of tools does not count as one of the user. Without any the index is
    -1.
    """
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        content = message.get("content")
        if message["role"] != "user" or any(
            _kind(part) == "tool_result" for part in objects(content)
        ):
            continue
        texts = (
            [content]
            if isinstance(content, str)
            else [text_of([part]) for part in objects(content)]
        )
        own = [_own(text) for text in texts]
        if own := [text for text in own if text.strip() and not _ADDED.fullmatch(text)]:
            return index, " ".join(own)
    return -1, ""


def _own(text: str) -> str:
    """Return *text* without reminders, which a translation may have joined with it."""
    first, *pieces = text.split("<system-reminder>")
    behind = (piece.partition("</system-reminder>") for piece in pieces)
    return first + "".join(after if end else inside for inside, end, after in behind)


def results(messages: Sequence[Mapping[str, Any]]) -> Results:
    """Read the messages since the user's last one.

    *messages* are those of any endpoint.
    """
    called: list[str] = []
    last: str | None = None
    for message in messages[question(messages)[0] + 1 :]:
        for item in itertools.chain((message,), objects(message.get("content"))):
            if _kind(item) in {"function_call", "custom_tool_call", "tool_use"}:
                called.append(str(item.get("name")))
            elif _kind(item).endswith("_call_output"):
                last = text_of(item.get("output"))
            elif _kind(item) == "tool_result":
                last = text_of(item.get("content"))
        called += [str(_function(call).get("name")) for call in objects(message.get("tool_calls"))]
        if message["role"] == "tool" and "tool_call_id" in message:
            last = text_of(message.get("content"))
    return Results(tuple(called), last)


def call(
    endpoint: str, body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
) -> Call | None:
    """Return the call that answers the request *body*; None: it is answered in words.

    Raises:
        UnknownTool: `tool_choice` names an unknown tool.
    """
    tools = [*itertools.islice(_tools(endpoint, body.get("tools")), _MAX_TOOLS)]
    text = question(messages)[1][:_MAX_SEARCHED]
    mode, allowed = _choice(body.get("tool_choice"))
    if missing := [name for name in allowed or () if name not in {tool.name for tool in tools}]:
        raise UnknownTool(missing[0])
    if allowed is not None:
        tools = [tool for tool in tools if tool.name in allowed]
    before = results(messages)
    if mode == "none" or (mode == "auto" and before.last is not None):
        return None
    tools = [tool for tool in tools if tool.name not in before.called]
    tool = _asked_for(tools, text) or (tools[0] if tools and mode == "required" else None)
    return _call(tool, text) if tool else None


def _tools(endpoint: str, declared: Any) -> Iterator[Tool]:
    """Yield the tools that the client itself runs.

    The provider's own, such as `web_search`, are skipped.
    """
    for item in objects(declared):
        kind = str(item.get("type", "function"))
        definition = _function(item)
        name = definition.get("name")
        if endpoint in MESSAGES_ENDPOINTS:
            ours, free = kind in {"function", "custom"} or kind.startswith("bash_"), False
        else:
            ours, free = kind in {"function", "custom"}, kind == "custom"
        if not ours or not isinstance(name, str) or not name:
            continue
        schema = definition.get("parameters") or definition.get("input_schema")
        if kind.startswith("bash_"):
            schema = {"properties": {"command": {"type": "string"}}}
        yield Tool(name, schema if isinstance(schema, dict) else {}, free)


def _choice(choice: Any) -> tuple[str, list[str] | None]:
    """Return the mode of `tool_choice`, as "none", "auto" or "required", and the tools that it
    allows; None: all.

    Chat, Responses and Messages write it differently, and this reads all of them.
    """
    if isinstance(choice, str):
        return (choice if choice in {"none", "required"} else "auto"), None
    if not isinstance(choice, dict):
        return "auto", None
    kind = _kind(choice)
    if kind == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        inner = inner if isinstance(inner, dict) else {}
        names = [_function(tool).get("name") for tool in objects(inner.get("tools"))]
        mode = "required" if inner.get("mode") == "required" else "auto"
        return mode, [name for name in names if isinstance(name, str)]
    name = _function(choice).get("name")
    if kind in {"function", "custom", "tool"} and isinstance(name, str):
        return "required", [name]
    return ("required" if kind == "any" else "none" if kind == "none" else "auto"), None


def _asked_for(tools: Sequence[Tool], text: str) -> Tool | None:
    """Return the first of *tools* that *text* asks for."""
    if "call a tool" in text.lower():
        return tools[0] if tools else None
    for tool in tools:
        if re.search(rf"(?<![\w-]){re.escape(tool.name)}(?![\w-])", text):
            return tool
    if _WHAT.match(text):
        asked = set(re.findall(r"[\w-]+", text.lower()))
        for tool in tools:
            if tool.name.startswith("get_") and asked.issuperset(tool.name.split("_")[1:]):
                return tool
    shells = [tool for tool in tools if _COMMANDS & _properties(tool.schema).keys()]
    if shells and _RUN.search(text) and any(map(_harmless, _quoted(text))):
        return shells[0]
    return None


def _call(tool: Tool, text: str) -> Call:
    quoted = [piece for piece in _quoted(text) if piece != tool.name]
    plain = " ".join(text[: 10 * _MAX_ARGUMENT].split())[:_MAX_ARGUMENT] or tool.name
    if tool.free:
        return Call(tool.name, quoted[0] if quoted else plain, free=True)
    properties = _properties(tool.schema)
    commands = {name: schema for name, schema in properties.items() if name in _COMMANDS}
    if commands:
        quoted = [piece for piece in quoted if not _harmless(piece)]
    sample = Sampler(tool.schema, quoted, plain).value()
    arguments: dict[str, Any] = sample if isinstance(sample, dict) else {}
    for name, schema in commands.items():
        command = next(filter(_harmless, _quoted(text)), _COMMAND)
        split = isinstance(schema, dict) and schema.get("type") == "array"
        if name in arguments:
            arguments[name] = shlex.split(command) if split else command
    arguments |= {
        name: value
        for name, value in _object_in(text).items()
        if name not in commands and (name in properties or not properties)
    }
    return Call(tool.name, orjson.dumps(arguments).decode())


def structured(body: Mapping[str, Any], text: str) -> str | None:
    """Return the JSON that the request asks for as its answer, valid by its schema.

    None: it asks for words.
    """
    chat, responses, messages = (
        body.get(name) for name in ("response_format", "text", "output_config")
    )
    inner = [each.get("format") for each in (responses, messages) if isinstance(each, dict)]
    for form in (chat, *inner):
        if not isinstance(form, dict):
            continue
        kind = _kind(form)
        holder = form.get("json_schema", form)
        schema = holder.get("schema") if isinstance(holder, dict) else None
        if kind in {"json_schema", "json_object"}:
            schema = schema if isinstance(schema, dict) else {"properties": {"answer": {}}}
            value = Sampler(schema, _quoted(text), text[:_MAX_ARGUMENT] or "text").value()
            return orjson.dumps(value).decode()
    return None


def _quoted(text: str) -> list[str]:
    matches = _QUOTED.findall(text[:_MAX_SEARCHED])
    return [piece for groups in matches for piece in groups if piece]


def _object_in(text: str) -> dict[str, Any]:
    """Return the first JSON object in *text*; {}: there is none."""
    start = text.find("{")
    if start < 0:
        return {}
    try:
        value, _end = json.JSONDecoder().raw_decode(text[:_MAX_SEARCHED], start)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _harmless(command: str) -> bool:
    if command.split(" ", maxsplit=1)[0] not in _HARMLESS or _SHELL_SYNTAX.search(command):
        return False
    try:
        return bool(shlex.split(command))
    except ValueError:
        # A quotation mark has no end.
        return False


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _kind(item: Mapping[str, Any]) -> str:
    kind = item.get("type")
    return kind if isinstance(kind, str) else ""


def _function(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object in which *item* has the name of its tool: Chat nests it below the type,
    the others do not.
    """
    inner = item.get("function") or item.get("custom")
    return inner if isinstance(inner, dict) else item

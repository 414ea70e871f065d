"""The tools of a request as functions, which are the tools that every engine knows.

    function                        a function
    custom                          a function with one string, `input`: its text
    namespace                       its functions, each with the name of the namespace in front
    web_search without web access   left out: it may find nothing that the model does not know
    any other                       refused by name: it would run where there is nobody to run it

A call comes back under the name and kind that the client knows: `Tools.declared` has them by the
function's name. The choice of a tool, and a list of those allowed, follow the tools that are left.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol.bridging.reading import (
    MAX_ELEMENTS,
    elements,
    is_string,
    members,
    read,
    string,
)
from aioserver.protocol.json_body import ABSENT, flag, null

FUNCTION, CUSTOM = "function", "custom"
# The characters in the name of a function that engines take.
MAX_NAME = 64
# The parameters of the function that stands for a custom tool.
_INPUT = (
    b'{"type":"object","properties":{"input":{"type":"string"%b}},"required":["input"],'
    b'"additionalProperties":false}'
)
_CHOICES = frozenset({b'"none"', b'"auto"', b'"required"'})
_MODES = frozenset({"auto", "required"})


class _Tool(msgspec.Struct, gc=False):
    type: str
    name: str = ""
    description: Raw = ABSENT
    parameters: Raw = ABSENT
    strict: Raw = ABSENT
    format: Raw = ABSENT
    tools: Raw = ABSENT
    external_web_access: Raw = ABSENT


class _Format(msgspec.Struct, gc=False):
    definition: Raw = ABSENT
    syntax: Raw = ABSENT


class _Choice(msgspec.Struct, gc=False):
    type: str
    name: str = ""
    namespace: str | None = None
    mode: str = "auto"
    tools: Raw = ABSENT


_TOOL = msgspec.json.Decoder(_Tool)
_FORMAT = msgspec.json.Decoder(_Format)
_CHOICE = msgspec.json.Decoder(_Choice)


class Tool(NamedTuple):
    """A tool as the client knows it.

    *kind* is FUNCTION or CUSTOM; *namespace* is empty outside of one.
    """

    kind: str
    name: str
    namespace: str = ""


class Tools:
    """The tools of one request.

    `declared` has them by the names of their functions, `functions` has those functions as JSON by
    the same names, and `shown` is JSON of the tools in effect, as the client has declared them.
    """

    def __init__(self) -> None:
        self.declared: dict[str, Tool] = {}
        self.functions: dict[str, bytes] = {}
        self.shown: list[bytes] = []
        self._names: dict[Tool, str] = {}

    def name_of(self, kind: str, name: str, namespace: str = "") -> str:
        """Return the name of the function that stands for a tool, declared or not."""
        tool = Tool(kind, name, namespace)
        known = self._names.get(tool)
        if known is None:
            known = self._names[tool] = self._new_name(tool)
        return known

    def find(self, name: str) -> Tool:
        """Return the tool whose function has this *name*.

        A function that was not declared is itself.
        """
        return self.declared.get(name) or Tool(FUNCTION, name)

    def add(self, raw: Raw, param: str, namespace: str = "") -> None:
        """Add a declared tool, of a *namespace* if one is passed.

        Raises:
            InvalidRequest: it is none, or chat completions have no such tool, or there are too
                many; *param* names it.
        """
        if len(self.functions) >= MAX_ELEMENTS:
            raise InvalidRequest(f"more than {MAX_ELEMENTS} tools", param=param)
        tool = read(_TOOL, raw, param)
        if tool.type == "namespace" and not namespace:
            self._check_name(tool, param)
            for number, nested in enumerate(elements(tool.tools, f"{param}.tools")):
                self.add(nested, f"{param}.tools[{number}]", tool.name)
        elif tool.type in {FUNCTION, CUSTOM}:
            self._check_name(tool, param)
            name = self.name_of(tool.type, tool.name, namespace)
            made = (
                _function(tool, name, param)
                if tool.type == FUNCTION
                else _custom(tool, name, param)
            )
            self.declared[name] = Tool(tool.type, tool.name, namespace)
            self.functions[name] = made
        elif tool.type == "web_search" and flag(tool.external_web_access) is False:
            return
        else:
            raise InvalidRequest(_hosted(tool.type), param=f"{param}.type")
        if not namespace:
            self.shown.append(bytes(raw))

    def choose(self, raw: Raw) -> bytes:
        """Return the `tool_choice` of chat completions for that of a request; empty if there is
        none.

        Tools that the choice does not allow are taken out of `functions`.

        Raises:
            InvalidRequest: it is none, or names a tool that was not declared, or that chat
                completions do not have.
        """
        if null(raw):
            return b""
        written = bytes(raw)
        if written in _CHOICES:
            if written == b'"required"' and not self.functions:
                raise InvalidRequest("a tool is required, and there is none", param="tool_choice")
            return written if self.functions else b""
        choice = read(_CHOICE, raw, "tool_choice")
        if choice.type == "allowed_tools":
            allowed = {
                self._chosen(read(_CHOICE, each, "tool_choice.tools"))
                for each in elements(choice.tools, "tool_choice.tools")
            }
            if choice.mode not in _MODES or not allowed:
                raise InvalidRequest(
                    "mode must be auto or required, for some tools", param="tool_choice"
                )
            self.functions = {
                name: made for name, made in self.functions.items() if name in allowed
            }
            return orjson.dumps(choice.mode)
        return b'{"type":"function","function":{"name":%b}}' % orjson.dumps(self._chosen(choice))

    def _chosen(self, choice: _Choice) -> str:
        """Return the name of the function for the tool that *choice* names."""
        if choice.type not in {FUNCTION, CUSTOM}:
            raise InvalidRequest(_hosted(choice.type), param="tool_choice")
        tool = Tool(choice.type, choice.name, choice.namespace or "")
        name = self._names.get(tool, "")
        if name not in self.functions:
            raise InvalidRequest(
                f"no tool is named {choice.name[:MAX_NAME]!r}", param="tool_choice"
            )
        return name

    def _new_name(self, tool: Tool) -> str:
        name = f"{tool.namespace}__{tool.name}" if tool.namespace else tool.name
        if len(name) <= MAX_NAME and name not in self.declared:
            return name
        # A digest keeps apart what is the same when it is cut, or a function and a custom tool of
        # one name.
        digest = f"{zlib.crc32(repr(tool).encode('utf-8', 'replace')):08x}"
        return f"{name[: MAX_NAME - 9]}_{digest}"

    def _check_name(self, tool: _Tool, param: str) -> None:
        if not tool.name:
            raise InvalidRequest(f"{param} must have a name", param=f"{param}.name")


def _function(tool: _Tool, name: str, param: str) -> bytes:
    description = (
        b"" if null(tool.description) else string(tool.description, f"{param}.description")
    )
    # Chat completions are not strict by default, and not every engine knows the word.
    strict = b"true" if flag(tool.strict) else b""
    more = members(
        (b"description", description), (b"parameters", tool.parameters), (b"strict", strict)
    )
    return b'{"type":"function","function":{"name":%b%b}}' % (orjson.dumps(name), more)


def _custom(tool: _Tool, name: str, param: str) -> bytes:
    """Return the function of a custom tool.

    The grammar of its input stands in the description of that.
    """
    described = b""
    if not null(tool.format):
        grammar = read(_FORMAT, tool.format, f"{param}.format")
        if is_string(grammar.definition):
            syntax = grammar.syntax if is_string(grammar.syntax) else b'""'
            described = b',"description":"A text of this grammar (%b):\\n%b"' % (
                bytes(syntax)[1:-1],
                bytes(grammar.definition)[1:-1],
            )
    description = (
        b"" if null(tool.description) else string(tool.description, f"{param}.description")
    )
    more = members((b"description", description), (b"parameters", _INPUT % described))
    return b'{"type":"function","function":{"name":%b%b}}' % (orjson.dumps(name), more)


def _hosted(kind: str) -> str:
    hint = '; Codex leaves it out with web_search = "disabled"' if kind == "web_search" else ""
    return (
        f"the tool {kind[:MAX_NAME]!r} is not available: the provider has chat completions only, "
        f"whose tools are functions that the client runs{hint}"
    )

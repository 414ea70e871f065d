"""The tools of a request as functions, which are the tools that every engine knows.

    function                        a function
    custom                          a function with one string, `input`: its text
    namespace                       its functions, each with the name of the namespace in front
    web_search without web access   left out: it may find nothing that the model does not know
    any other                       hosted: left out or refused (protocol/bridging/hosted.py)

A call comes back under the name and kind that the client knows: `Tools.declared` has them by the
function's name. The choice of a tool, and a list of those allowed, refer to the remaining tools.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol.bridging.chat import MAX_NAME, function, function_name
from aioserver.protocol.bridging.hosted import Hosted
from aioserver.protocol.bridging.reading import MAX_ELEMENTS, elements, is_string, read
from aioserver.protocol.json_body import ABSENT, flag, null, raw_members

FUNCTION, CUSTOM = "function", "custom"
_OWN = frozenset({FUNCTION, CUSTOM})
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


class _Choice(msgspec.Struct, gc=False):
    type: str
    name: str = ""
    namespace: str | None = None
    mode: str = "auto"
    tools: Raw = ABSENT


_TOOL = msgspec.json.Decoder(_Tool)
_FORMAT = raw_members("definition", "syntax")
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
    `hosted` are the tools that only a provider could run.
    """

    def __init__(self) -> None:
        self.declared: dict[str, Tool] = {}
        self.functions: dict[str, bytes] = {}
        self.shown: list[bytes] = []
        self.hosted = Hosted()
        self._names: dict[Tool, str] = {}

    def name_of(self, kind: str, name: str, namespace: str = "") -> str:
        """Return the name of the function that stands for a tool, declared or not."""
        tool = Tool(kind, name, namespace)
        known = self._names.get(tool)
        if known is None:
            full = f"{namespace}__{name}" if namespace else name
            # A function and a custom tool may have one name.
            known = self._names[tool] = function_name(full, tool, self.declared)
        return known

    def find(self, name: str) -> Tool:
        """Return the tool whose function has this *name*.

        A function that was not declared stands for itself.
        """
        return self.declared.get(name) or Tool(FUNCTION, name)

    async def add(self, raw: Raw, param: str, namespace: str = "") -> None:
        """Add a declared tool, of a *namespace* if one is passed.

        Raises:
            InvalidRequest: *raw* is not a tool, chat completions have no such tool, or there are
                too many; *param* names it.
        """
        if len(self.functions) >= MAX_ELEMENTS:
            raise InvalidRequest(f"more than {MAX_ELEMENTS} tools", param=param)
        tool = read(_TOOL, raw, param)
        if tool.type == "namespace" and not namespace:
            self._check_name(tool, param)
            for number, nested in enumerate(elements(tool.tools, f"{param}.tools")):
                await self.add(nested, f"{param}.tools[{number}]", tool.name)
        elif tool.type in _OWN:
            self._check_name(tool, param)
            name = self.name_of(tool.type, tool.name, namespace)
            own = tool.type == FUNCTION
            parameters = tool.parameters if own else _parameters(tool, param)
            strict = own and bool(flag(tool.strict))
            made = function(name, tool.description, parameters, param, strict=strict)
            self.declared[name] = Tool(tool.type, tool.name, namespace)
            self.functions[name] = made
        elif tool.type == "web_search" and flag(tool.external_web_access) is False:
            return
        else:
            self.hosted.add(tool.type, f"{param}.type")
            return
        if not namespace:
            shown = bytes(raw)
            if tool.type == FUNCTION and tool.strict is ABSENT:
                # The response says it, even if the request does not.
                shown = shown[:-1] + b',"strict":false}'
            self.shown.append(shown)

    async def choose(self, raw: Raw) -> bytes:
        """Return the `tool_choice` of chat completions for that of a request; empty if there is
        none.

        Tools that the choice does not allow are removed from `functions`. All tools must have been
        added.

        Raises:
            InvalidRequest: *raw* is not a choice, or names a tool that was not declared, or that
                chat completions do not have.
        """
        written = b"" if null(raw) else bytes(raw)
        if not written or written in _CHOICES:
            self.hosted.leave_out(others=bool(self.functions))
        if not written:
            return b""
        if written in _CHOICES:
            if written == b'"required"' and not self.functions:
                raise InvalidRequest("a tool is required, and there is none", param="tool_choice")
            return written if self.functions else b""
        choice = read(_CHOICE, raw, "tool_choice")
        if choice.type == "allowed_tools":
            listed = [
                read(_CHOICE, each, "tool_choice.tools")
                for each in elements(choice.tools, "tool_choice.tools")
            ]
            own = [each for each in listed if each.type in _OWN]
            if listed and not own:
                raise self.hosted.refused(listed[0].type, "tool_choice")
            self.hosted.leave_out(others=True)
            allowed = {self._chosen(each) for each in own}
            if choice.mode not in _MODES or not allowed:
                raise InvalidRequest(
                    "mode must be auto or required, for some tools", param="tool_choice"
                )
            self.functions = {
                name: made for name, made in self.functions.items() if name in allowed
            }
            return orjson.dumps(choice.mode)
        chosen = self._chosen(choice)
        self.hosted.leave_out(others=True)
        return b'{"type":"function","function":{"name":%b}}' % orjson.dumps(chosen)

    def _chosen(self, choice: _Choice) -> str:
        """Return the name of the function for the tool that *choice* names."""
        if choice.type not in _OWN:
            raise self.hosted.refused(choice.type, "tool_choice")
        tool = Tool(choice.type, choice.name, choice.namespace or "")
        name = self._names.get(tool, "")
        if name not in self.functions:
            raise InvalidRequest(
                f"no tool is named {choice.name[:MAX_NAME]!r}", param="tool_choice"
            )
        return name

    def _check_name(self, tool: _Tool, param: str) -> None:
        if not tool.name:
            raise InvalidRequest(f"{param} must have a name", param=f"{param}.name")


def _parameters(tool: _Tool, param: str) -> bytes:
    """Return the parameters of a custom tool's function; `input` has its grammar."""
    described = b""
    if not null(tool.format):
        grammar = read(_FORMAT, tool.format, f"{param}.format")
        if is_string(grammar.definition):
            syntax = grammar.syntax if is_string(grammar.syntax) else b'""'
            described = b',"description":"A text of this grammar (%b):\\n%b"' % (
                bytes(syntax)[1:-1],
                bytes(grammar.definition)[1:-1],
            )
    return _INPUT % described

"""The tools of a request as functions, which are the tools that every engine knows.

with an `input_schema`      a function
without one; `mcp_servers`  hosted: left out or refused (protocol/bridging/hosted.py)
"""

from __future__ import annotations

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol.bridging.chat import function, function_name
from aioserver.protocol.bridging.hosted import Hosted
from aioserver.protocol.bridging.reading import read
from aioserver.protocol.json_body import ABSENT, flag, null

# The most tools of one request.
MAX_TOOLS = 10_000
MODES = {"auto": b'"auto"', "any": b'"required"', "none": b'"none"'}


class _Tool(msgspec.Struct, gc=False):
    name: str = ""
    type: str | None = None
    description: Raw = ABSENT
    input_schema: Raw = ABSENT
    strict: Raw = ABSENT


class _Choice(msgspec.Struct, gc=False):
    type: str
    name: str = ""
    disable_parallel_tool_use: Raw = ABSENT


_TOOL = msgspec.json.Decoder(_Tool)
_CHOICE = msgspec.json.Decoder(_Choice)


class Tools:
    """The tools of one request.

    `functions` has them as JSON, by the names that the client knows; `hosted` are the tools that
    only a provider could run. *serial*: only one may be called at a time.
    """

    def __init__(self) -> None:
        self.functions: dict[str, bytes] = {}
        self.hosted = Hosted()
        self.serial = False
        self._own_names: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def name_of(self, name: str) -> str:
        """Return the name of the function that stands for the tool *name*, declared or not."""
        own = self._own_names.get(name)
        if own is None:
            own = self._own_names[name] = function_name(name, name, self._names)
            self._names[own] = name
        return own

    def find(self, own_name: str) -> str:
        """Return the name of the tool whose function has this name; a function that was not
        declared stands for itself.
        """
        return self._names.get(own_name, own_name)

    def add(self, raw: Raw, param: str) -> None:
        """Add a declared tool.

        Raises:
            InvalidRequest: *raw* is not a tool, or there are too many; *param* names it.
        """
        if len(self.functions) >= MAX_TOOLS:
            raise InvalidRequest(f"more than {MAX_TOOLS} tools", param=param)
        tool = read(_TOOL, raw, param)
        if null(tool.input_schema):
            self.hosted.add(tool.name or tool.type or "", param)
            return
        if not tool.name:
            raise InvalidRequest(f"{param} must have a name", param=f"{param}.name")
        name, strict = self.name_of(tool.name), bool(flag(tool.strict))
        self.functions[tool.name] = function(
            name, tool.description, tool.input_schema, param, strict=strict
        )

    def choose(self, raw: Raw) -> bytes:
        """Return the `tool_choice` of chat completions for *raw*, the choice of a request.

        The result is empty if there is no choice. All tools must have been added before.

        Raises:
            InvalidRequest: *raw* is not a choice, or names a tool that was not declared.
        """
        choice = None if null(raw) else read(_CHOICE, raw, "tool_choice")
        if choice is not None and choice.type == "tool" and choice.name in self.hosted.names:
            raise self.hosted.refused(choice.name, "tool_choice")
        self.hosted.leave_out(others=bool(self.functions))
        if choice is None:
            return b""
        self.serial = flag(choice.disable_parallel_tool_use) is True
        if choice.type == "tool":
            if choice.name not in self.functions:
                message = f"no tool is named {choice.name[:64]!r}"
                raise InvalidRequest(message, param="tool_choice")
            name = orjson.dumps(self.name_of(choice.name))
            return b'{"type":"function","function":{"name":%b}}' % name
        mode = MODES.get(choice.type)
        if mode is None:
            message = f"tool_choice must be auto, any, tool or none, not {choice.type[:64]!r}"
            raise InvalidRequest(message, param="tool_choice")
        if choice.type == "any" and not self.functions:
            raise InvalidRequest("a tool is required, and there is none", param="tool_choice")
        return mode if self.functions else b""

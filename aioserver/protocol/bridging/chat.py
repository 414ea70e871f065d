"""The chat completion that a bridge requests, assembled from the parts that each API has read."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
import orjson

from aioserver.protocol.bridging.accepted_parameters import AcceptedParameters, Size, optional_in
from aioserver.protocol.bridging.hosted import Hosted
from aioserver.protocol.bridging.reading import members, string
from aioserver.protocol.json_body import null
from aioserver.protocol.steps import pause_after

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

    from msgspec import Raw

    from aioserver.protocol.bridging.turns import Turns

B = TypeVar("B", bound="BridgedChat")
# The most characters in the name of a function that all engines accept.
MAX_NAME = 64


class BridgedChat(msgspec.Struct, kw_only=True):
    """A request for chat completions that a bridge has made.

    *body* is the JSON to send, of *asked_tokens* by estimate; it is released once it was sent. It
    has the optional parameters *accepted*. *hosted* has the tools that the provider does not get.
    """

    body: bytes
    model: str
    hosted: Hosted
    asked_tokens: int
    accepted: frozenset[str]


class ToolMembers(NamedTuple):
    """The members of a body for its tools: the *functions*, and whether they may be called in
    *parallel*.
    """

    functions: bytes = b""
    parallel: bytes = b""


def tool_members(
    functions: Mapping[str, bytes],
    choice: bytes,
    parallel: Raw | bytes,
    accepted: AcceptedParameters,
) -> ToolMembers:
    """Return the members for *functions*, JSON each. OpenAI's own chat completions refuse a choice
    without tools.
    """
    if not functions:
        return ToolMembers()
    listed = b"[%b]" % b",".join(functions.values())
    return ToolMembers(
        members((b"tools", listed), (b"tool_choice", choice)),
        members(
            (b"parallel_tool_calls", parallel if accepted.takes("parallel_tool_calls") else b"")
        ),
    )


def function_name(name: str, identity: object, taken: Container[str] = ()) -> str:
    """Return *name*, or one with a digest of *identity*, the tool's, if *name* is too long or is
    *taken* by another tool.
    """
    if len(name) <= MAX_NAME and name not in taken:
        return name
    # A digest distinguishes names that are the same once they are cut.
    digest = f"{zlib.crc32(repr(identity).encode('utf-8', 'replace')):08x}"
    return f"{name[: MAX_NAME - 9]}_{digest}"


def function(
    name: str, description: Raw, parameters: Raw | bytes, param: str, *, strict: bool = False
) -> bytes:
    """Return a tool that is the function *name*.

    Raises:
        InvalidRequest: its *description* is not a text; *param* names it.
    """
    described = b"" if null(description) else string(description, f"{param}.description")
    more = members(
        (b"description", described),
        (b"parameters", parameters),
        # Chat completions are not strict by default, and not every engine knows this parameter.
        (b"strict", b"true" if strict else b""),
    )
    return b'{"type":"function","function":{"name":%b%b}}' % (orjson.dumps(name), more)


async def put_together(
    kind: type[B],
    asked: bytes,
    model: Raw,
    turns: Turns,
    offered: ToolMembers,
    options: Callable[[Size], bytes],
    accepted: AcceptedParameters,
    *,
    streamed: bool,
    form: bytes = b"",
    **further: Any,
) -> B:
    """Return the request of this *kind*, with *further* data, for the request *asked*.

    *options* returns the members that depend on the size; *form* is that of the text.
    """
    stream = b""
    if streamed:
        usage = b',"stream_options":{"include_usage":true}'
        stream = b',"stream":true' + (usage if accepted.takes("stream_options") else b"")
    name = b'""' if null(model) else string(model, "model")
    said = turns.finish()
    await pause_after(asked)
    size = Size(sum(map(len, (*said, *offered))) - turns.picture_bytes, turns.pictures)
    sized = options(size)
    start, end = b'{"model":%b,"messages":[' % name, b"]" + stream
    body = b"".join((start, *said, end, *offered, form, sized, b"}"))
    optional = optional_in(b"".join((stream, offered.parallel, sized)))
    return kind(
        body=body,
        model=orjson.loads(name),
        asked_tokens=accepted.tokens(size),
        accepted=optional,
        **further,
    )

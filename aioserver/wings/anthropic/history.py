"""The history in a request, without the thinking blocks that a bridge has written: their signature
is ours, and Anthropic's API refuses it.
"""

from __future__ import annotations

import msgspec
from msgspec import Raw

from aioserver.protocol import json_body
from aioserver.protocol.bridging.reading import elements
from aioserver.protocol.json_body import ABSENT
from aioserver.protocol.model_body import Member
from aioserver.protocol.steps import Steps, pause_after
from aioserver.wings.anthropic.bridge.blocks import SIGNATURE

_MESSAGES = Member("messages")
_CONTENT = Member("content")
_SIGNATURE = SIGNATURE.encode()


class _Block(msgspec.Struct, gc=False):
    type: str = ""
    signature: Raw = ABSENT


_BLOCK = msgspec.json.Decoder(_Block)


async def without_thinking(body: bytes) -> bytes:
    """Return the request in *body* without the thinking blocks that have our signature, in steps.

    A message with no other block is left out.

    Raises:
        InvalidRequest: it has too many values, or a message too many blocks.
    """
    place = _MESSAGES.place(body)
    if place is None or body[place.value : place.value + 1] != b"[":
        return body
    kept: list[bytes] = []
    array = memoryview(body)[place.value : place.end]
    await pause_after(array)
    steps = Steps()
    json_body.check_values(body)
    for raw in json_body.elements(array):
        message = bytes(raw)
        if message.find(_SIGNATURE) >= 0:
            message = _without(message)
        if message:
            kept.append(message)
        await steps.taken(len(message))
    view = memoryview(body)
    commas = [part for message in kept for part in (b",", message)][1:]
    return b"".join((view[: place.value], b"[", *commas, b"]", view[place.end :]))


def _without(message: bytes) -> bytes:
    place = _CONTENT.place(message)
    if place is None or message[place.value : place.value + 1] != b"[":
        return message
    blocks = elements(Raw(message[place.value : place.end]), "content")
    kept = [bytes(block) for block in blocks if not _ours(block)]
    if len(kept) == len(blocks):
        return message
    if not kept:
        return b""
    content = b"[%b]" % b",".join(kept)
    return b"".join((message[: place.value], content, message[place.end :]))


def _ours(raw: Raw) -> bool:
    """Return whether a block is a thinking block that we have written."""
    if bytes(raw).find(_SIGNATURE) < 0:
        return False
    try:
        block = _BLOCK.decode(raw)
    except msgspec.ValidationError:
        return False
    return block.type == "thinking" and bytes(block.signature) == b'"%b"' % _SIGNATURE

"""The history in a request, without the thinking that a bridge has written: its signature is ours,
and Anthropic's API refuses it.
"""

from __future__ import annotations

import msgspec
from msgspec import Raw

from aioserver.protocol import json_body
from aioserver.protocol.bridging.reading import elements
from aioserver.protocol.json_body import ABSENT, Member, pause
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

    A message that had nothing else is left out.

    Raises:
        InvalidRequest: a message has too many blocks.
    """
    place = await _MESSAGES.finding(body)
    if place is None or body[place.value : place.value + 1] != b"[":
        return body
    kept: list[bytes] = []
    for messages in json_body.elements(body[place.value : place.end]):
        for raw in messages:
            message = bytes(raw)
            if message.find(_SIGNATURE) >= 0:
                message = await _without(message)
            if message:
                kept.append(message)
        await pause()
    return b"".join((body[: place.value], b"[", b",".join(kept), b"]", body[place.end :]))


async def _without(message: bytes) -> bytes:
    place = await _CONTENT.finding(message)
    if place is None or message[place.value : place.value + 1] != b"[":
        return message
    blocks = await elements(Raw(message[place.value : place.end]), "content")
    kept = [bytes(block) for block in blocks if not _ours(block)]
    if len(kept) == len(blocks):
        return message
    if not kept:
        return b""
    content = b"[%b]" % b",".join(kept)
    return b"".join((message[: place.value], content, message[place.end :]))


def _ours(raw: Raw) -> bool:
    """Return whether a block is a thinking that we have written."""
    if bytes(raw).find(_SIGNATURE) < 0:
        return False
    try:
        block = _BLOCK.decode(raw)
    except msgspec.ValidationError:
        return False
    return block.type == "thinking" and bytes(block.signature) == b'"%b"' % _SIGNATURE

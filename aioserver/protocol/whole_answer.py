"""Look-ups in the body of a whole answer: the model's text, and whether a response is final.

Such a body may have many megabytes, so only the wanted values are built. A body is what a provider
has sent, and need not be JSON.
"""

from typing import Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Raw

from aioserver.errors import InvalidJson
from aioserver.protocol import json_body
from aioserver.protocol.sound import pieces, sound
from aioserver.protocol.steps import pause_after

T = TypeVar("T")
# The most bytes of a value that is read: an id, or a status.
MAX_VALUE_BYTES = 1024
FINAL_STATUSES = ("completed", "incomplete", "failed", "cancelled")


class _Message(msgspec.Struct, gc=False):
    content: Raw


class _Choice(msgspec.Struct, gc=False):
    message: _Message


class _Choices(msgspec.Struct, array_like=True, gc=False):
    """A list of which only the first element is read."""

    first: _Choice


class _Answer(msgspec.Struct, gc=False):
    choices: _Choices


class _Found(NamedTuple, Generic[T]):
    """A *value*, and the *body* in which it was found: without lone surrogates."""

    body: bytes
    value: T


_ANSWER = msgspec.json.Decoder(_Answer)
_RESPONSE = json_body.raw_members("id", "status")


async def text_pieces(body: bytes) -> list[slice]:
    """Return the places of the text of a whole chat completion in *body*, in pieces.

    A piece is the inside of a JSON string, as it is written; lone surrogates may be in it. There
    is none if the body has no text, or is not a chat completion.
    """
    found = await _read(body, _ANSWER)
    text = b"" if found is None else bytes(found.value.choices.first.message.content)
    if found is None or not text.startswith(b'"'):
        return []
    # If these bytes occur elsewhere, they are the same text.
    start = found.body.index(text)
    return list(pieces(found.body, start + 1, start + len(text) - 1))


async def final_response(body: bytes) -> str | None:
    """Return the id of a whole `response` object that will not change any more, or None.

    A client asks again for a response that runs in the background, so only its final state is
    kept.
    """
    found = await _read(body, _RESPONSE)
    if found is None:
        return None
    if json_body.text(found.value.status, MAX_VALUE_BYTES) not in FINAL_STATUSES:
        return None
    return json_body.text(found.value.id, MAX_VALUE_BYTES) or None


async def _read(body: bytes, decoder: msgspec.json.Decoder[T]) -> _Found[T] | None:
    """Return the value that *decoder* finds in *body*, None if it is not there, in steps."""
    try:
        body = await sound(body)
        await pause_after(body)
        value = decoder.decode(body)
    except (InvalidJson, msgspec.DecodeError, RecursionError):
        return None
    await pause_after(body)
    return _Found(body, value)

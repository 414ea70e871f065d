"""A body with a `model`, as OpenAI's API has it: its bytes, and what is read of its top level.

The body goes to the provider as it came. Where a provider is asked for another model than the client
named, the value of `model` is replaced in the bytes, and nothing else. If the key stands there several times,
that is the last of them, the one that was read: a request must not be served by another value than the
one it was routed by.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol import top_level
from aioserver.protocol.top_level import ABSENT

if TYPE_CHECKING:
    from collections.abc import Generator

# Bytes in which the name of a model is written.
MAX_MODEL_BYTES = 4096
# Keys named `model` with one value, on all levels of a body.
MAX_MODEL_KEYS = 10_000


class _Fields(msgspec.Struct, gc=False):
    model: Raw = ABSENT
    stream: Raw = ABSENT
    user: Raw = ABSENT
    store: Raw = ABSENT
    background: Raw = ABSENT


_DECODER = msgspec.json.Decoder(_Fields)
_START = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*")
_COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")
_KEY = b'"model"'
# The key with each of its letters as it is, or escaped.
_ESCAPED_KEY = b'"%b"' % b"".join(
    rb"(?:%c|\\u00%x[%x%c])" % (letter, letter >> 4, letter & 15, b"%X" % (letter & 15))
    for letter in b"model"
)


class ModelBody:
    """The body of one request, and the values of its top level that are read.

    *model* and *user* are None where the client set none; *streamed*, *stored* and *background* are
    false then.
    """

    __slots__ = ("_place", "_value", "background", "data", "model", "stored", "streamed", "user")

    def __init__(self, data: bytes) -> None:
        """Read *data*, which is UTF-8 without lone surrogates.

        Raises:
            InvalidJson: *data* is not JSON.
            InvalidRequest: *data* is no object, or a field has a wrong type.
        """
        fields = top_level.decode(_DECODER, data, "the body")
        self.data = data
        self.model = top_level.text(fields.model, MAX_MODEL_BYTES)
        if not self.model and not top_level.null(fields.model):
            raise InvalidRequest(
                f"model must be a string of 1 to {MAX_MODEL_BYTES} bytes", param="model"
            )
        streamed = top_level.flag(fields.stream)
        if streamed is None and not top_level.null(fields.stream):
            raise InvalidRequest("stream must be true or false", param="stream")
        self.streamed = bool(streamed)
        self.user = top_level.text(fields.user)
        self.stored = top_level.flag(fields.store) is True
        self.background = top_level.flag(fields.background) is True
        # The value of `model`, as it is written; empty if there is none.
        self._value = bytes(fields.model)
        # Where that value begins, once it was looked for.
        self._place: int | None = None

    def with_model(self, model: str) -> bytes:
        """Return the body with *model* in place of the client's.

        Raises:
            InvalidRequest: the body has more than MAX_MODEL_KEYS keys that may be its model's.
        """
        data, value = self.data, self._value
        written = orjson.dumps(model)
        if not value:
            match = _START.match(data)
            assert match is not None, "the body is an object"
            start = match.end()
            comma = b"" if data.startswith(b"}", start) else b","
            return b"".join((data[:start], _KEY, b":", written, comma, memoryview(data)[start:]))
        if self._place is None:
            self._place = self._find()
        view = memoryview(data)
        return b"".join((view[: self._place], written, view[self._place + len(value) :]))

    def _find(self) -> int:
        """Return where the value of the last `model` on the top level begins."""
        data, value = self.data, self._value
        escaped = b"\\u006" in data
        if not escaped and (start := data.find(_KEY)) == data.rfind(_KEY):
            # The body has no other place where the key is, in whatever depth.
            colon = _COLON.match(data, start + len(_KEY))
            assert colon is not None, "a key, since the body has it on its top level"
            return colon.end()
        key = _ESCAPED_KEY if escaped else _KEY
        # A quote inside a string is escaped, so what matches is a key, though perhaps a nested one.
        pattern = key + _COLON.pattern + b"(?=%b)" % re.escape(value)
        places: list[int] = []
        for match in re.finditer(pattern, data):
            places.append(match.end())
            if len(places) > MAX_MODEL_KEYS:
                raise InvalidRequest(
                    f"more than {MAX_MODEL_KEYS} keys model in one body", param="model"
                )
        if len(places) == 1:
            return places[0]
        # Each of them gets its number as its value; the decoder then says which one it reads.
        parts: list[bytes | memoryview] = []
        end, view = 0, memoryview(data)
        for number, place in enumerate(places):
            parts += (view[end:place], b"%d" % number)
            end = place + len(value)
        numbered = b"".join((*parts, view[end:]))
        return places[int(bytes(top_level.decode(_DECODER, numbered, "the body").model))]


def reading(data: bytes) -> Generator[None, None, ModelBody]:
    """Return the body in *data*, in steps; a lone surrogate escape in it becomes that of U+FFFD.

    Raises:
        InvalidJson: *data* is not JSON.
        InvalidRequest: *data* is no object, or a field has a wrong type.
    """
    body = yield from top_level.sound(data)
    if len(body) > top_level.STEP_BYTES:
        yield
    return ModelBody(body)

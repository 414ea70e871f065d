"""A body with a `model`, as in OpenAI's API: its bytes, and the values that are read on its top
level.

The body goes to the provider as it came. If a provider is asked for another model than the client
named, the value of `model` is replaced in the bytes, and nothing else. If the key occurs several
times, the last one is replaced, which was read: a request must not be served by another value than
the one by which it was routed. Engines differ here: some take the first of several keys, or ignore
the case of its letters, or read a list of `models`. For a caller that may not ask for all models,
`check_sole` refuses bodies that could be read in another way.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol import json_body
from aioserver.protocol.json_body import ABSENT
from aioserver.protocol.member import Member
from aioserver.protocol.sound import sound
from aioserver.protocol.steps import LARGE_BYTES, pause_after
from aioserver.protocol.stream_options import unasked

if TYPE_CHECKING:
    from collections.abc import Sequence

# Bytes in which the name of a model is written.
MAX_MODEL_BYTES = 4096
# A name of at most so many bytes, however it is written: 12 of them stand for an escaped pair of
# surrogates.
SureName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_MODEL_BYTES // 12)]
# The most bytes of the id of a response that is looked up; a longer id is not ours.
MAX_ID_BYTES = 1024
# Bytes of `metadata` that are kept.
MAX_METADATA_BYTES = 4096
# The most answers to one prompt: engines refuse to make more.
MAX_CHOICES = 1 << 14
# Bytes of a `prompt` that are searched for texts, and the separator behind each text but the last.
MAX_SEARCHED = 1 << 16
_PROMPT_ENDS = re.compile(rb'["\]][ \t\r\n]*,')


class Fields(msgspec.Struct, gc=False):
    """The fields that are read, in the form that nearly all clients send."""

    model: SureName | None = None
    stream: bool | None = None
    user: str | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: Raw = ABSENT
    previous_response_id: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    prompt: Raw = ABSENT
    stream_options: Raw = ABSENT


class _RawFields(msgspec.Struct, gc=False):
    """The same fields, whatever their types are."""

    model: Raw = ABSENT
    stream: Raw = ABSENT
    user: Raw = ABSENT
    store: Raw = ABSENT
    background: Raw = ABSENT
    metadata: Raw = ABSENT
    previous_response_id: Raw = ABSENT
    max_tokens: Raw = ABSENT
    max_completion_tokens: Raw = ABSENT
    max_output_tokens: Raw = ABSENT
    n: Raw = ABSENT
    best_of: Raw = ABSENT
    prompt: Raw = ABSENT
    stream_options: Raw = ABSENT


_DECODER = msgspec.json.Decoder(Fields)
_RAW_DECODER = msgspec.json.Decoder(_RawFields)
# The longest body that may be read twice: first in the form that nearly all clients send, then in
# any other.
MAX_READ_TWICE = 1 << 16
MODEL = Member("model")
# The keys that some engine may take for its model, beside `model`, as names of attributes.
_OTHER_NAMES = [
    "".join(letters) + more
    for letters in product(*zip("model", "MODEL", strict=True))
    for more in ("", "s", "S")
    if "".join(letters) + more != MODEL.name
]
_OTHERS: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
    msgspec.defstruct("Others", [(name, Raw, ABSENT) for name in _OTHER_NAMES], gc=False)
)


class ModelBody:
    """The body of one request, and the values of its top level that are read.

    *model*, *user*, *stored* and *previous_response_id* are None if the client has set none;
    *streamed* and *background* are false then. *several* says whether a number of choices was set.
    *usage_options* is the result of `unasked` for its `stream_options`. *metadata* is JSON; it is
    empty if the client has set none, or more than MAX_METADATA_BYTES.
    """

    # The value of `model`, as it is written, empty if there is none; None until it is needed.
    _value: bytes | None = None
    # The beginning of that value, once it was searched for.
    _place: int | None = None

    def __init__(self, data: bytes) -> None:
        """Read *data*, which is UTF-8 without lone surrogates.

        Raises:
            InvalidJson: *data* is not JSON.
            InvalidRequest: *data* is not an object, or a field has a wrong type.
        """
        self.data = data
        fields: Fields | None = None
        if len(data) <= MAX_READ_TWICE:
            try:
                fields = _DECODER.decode(data)
            except (msgspec.DecodeError, RecursionError):
                fields = None
        if fields is not None:
            options = fields.stream_options
        else:
            raw = json_body.decode(_RAW_DECODER, data, "the body")
            # Values that may be long are not kept.
            fields, self._value, options = _checked(raw), bytes(raw.model), raw.stream_options
        self._fields = fields
        self.model, self.user = fields.model, fields.user
        self.streamed = fields.stream is True
        self.several = fields.n is not None or fields.best_of is not None
        # Most have none.
        self.usage_options = b"" if options is ABSENT else unasked(options)

    @property
    def stored(self) -> bool | None:
        """Whether the answer is to be stored."""
        return self._fields.store

    @property
    def background(self) -> bool:
        """Whether the answer is to be made in the background."""
        return self._fields.background is True

    @property
    def previous_response_id(self) -> str | None:
        """The id of the response that is continued."""
        return self._fields.previous_response_id

    def largest(self, names: Sequence[str]) -> int | None:
        """Return the largest number of tokens or choices among the members of these *names*; None
        if there is none. Some clients write -1 for no bound.
        """
        numbers = filter(None, map(partial(getattr, self._fields), names))
        largest: int = max(numbers, default=0)
        return largest if largest > 0 else None

    @property
    def prompts(self) -> int:
        """The number of texts, or of lists of tokens, in its `prompt`, each of which is answered;
        for a long prompt an approximation.
        """
        prompt = memoryview(self._fields.prompt)
        searched = prompt[:MAX_SEARCHED]
        if bytes(searched[:1]) != b"[":
            return 1
        return 1 + len(_PROMPT_ENDS.findall(searched)) * len(prompt) // len(searched)

    @property
    def metadata(self) -> bytes:
        """A copy, since the body is released before its request ends."""
        return bytes(_short(self._fields.metadata))

    def with_model(self, model: str) -> bytes:
        """Return the body with *model* in place of the client's.

        Raises:
            InvalidRequest: the body has more than `member.MAX_PLACES` keys that may be its
                model's.
        """
        data, value = self.data, self._value
        if value is None:
            self._value = value = MODEL.value(data)
        written = orjson.dumps(model)
        if not value:
            return MODEL.insert(data, (written,))
        if self._place is None:
            self._place = MODEL.find(data, value).value
        view = memoryview(data)
        return b"".join((view[: self._place], written, view[self._place + len(value) :]))


def check_sole(data: bytes) -> None:
    """Check that *data*, a JSON object, names at most one model, however it is read.

    Raises:
        InvalidRequest: it has several keys `model`, or another key that could be read as `model`.
    """
    found = json_body.decode(_OTHERS, data, "the body")
    others = (name for name in _OTHER_NAMES if getattr(found, name) is not ABSENT)
    if (other := next(others, None)) is not None:
        raise InvalidRequest(
            f"this key may name a model by `model` alone, not by {other}", param=other
        )
    if value := MODEL.value(data):
        start, end = MODEL.extent(data, MODEL.find(data, value))
        view = memoryview(data)
        MODEL.check_absent(b"".join((view[:start], view[end:])))


def _checked(fields: _RawFields) -> Fields:
    """Return the values of *fields*, and refuse those without a meaning."""
    model = json_body.text(fields.model, MAX_MODEL_BYTES)
    if not model and not json_body.null(fields.model):
        raise InvalidRequest(
            f"model must be a string of 1 to {MAX_MODEL_BYTES} bytes", param="model"
        )
    streamed = json_body.flag(fields.stream)
    if streamed is None and not json_body.null(fields.stream):
        raise InvalidRequest("stream must be true or false", param="stream")
    return Fields(
        model=model,
        stream=streamed,
        user=json_body.text(fields.user),
        store=json_body.flag(fields.store),
        background=json_body.flag(fields.background),
        metadata=_short(fields.metadata),
        previous_response_id=json_body.text(fields.previous_response_id, MAX_ID_BYTES),
        max_tokens=json_body.count(fields.max_tokens),
        max_completion_tokens=json_body.count(fields.max_completion_tokens),
        max_output_tokens=json_body.count(fields.max_output_tokens),
        n=json_body.meant(fields.n),
        best_of=json_body.meant(fields.best_of),
        prompt=fields.prompt,
    )


def _short(metadata: Raw) -> Raw:
    """Return *metadata*, if it is short enough to be kept."""
    return metadata if len(memoryview(metadata)) <= MAX_METADATA_BYTES else ABSENT


def simple(data: bytes) -> bool:
    """Return whether *data* is short and needs none of the checks of `reading`."""
    if len(data) > LARGE_BYTES or not data.isascii():
        return False
    # Most bodies have no escaped character at all.
    return b"\\u" not in data or (b"\\ud" not in data and b"\\uD" not in data)


async def reading(data: bytes) -> ModelBody:
    """Return the body in *data*, in steps; each lone surrogate escape in it becomes that of
    U+FFFD.

    Raises:
        InvalidJson: *data* is not JSON.
        InvalidRequest: *data* is not an object, or a field has a wrong type.
    """
    body = await sound(data)
    await pause_after(body)
    read = ModelBody(body)
    await pause_after(body)
    return read

"""A body with a `model`, as in OpenAI's API: its bytes, and the values that are read on its top
level.

The body goes to the provider as it came. If a provider is asked for another model than the client
named, the value of `model` is replaced in the bytes, and nothing else: its place is searched for.
If the key occurs several times, the last one is replaced, which decoders read: a request must not
be served by another value than the one by which it was routed. Engines differ here: some take the
first of several keys, or ignore the case of its letters, or read a list of `models`. For a caller
that may not ask for all models, `check_sole` refuses bodies that could be read in another way.

`stream_options` say whether the client of a streamed request asks for the usage of the answer. For
a client that does not, the provider gets a body that does.

This file is one concept: the members on the top level of one body, read and replaced in place.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import orjson
from msgspec import Raw

from aioserver.errors import InvalidRequest
from aioserver.protocol import json_body
from aioserver.protocol.json_body import ABSENT
from aioserver.protocol.sound import sound
from aioserver.protocol.steps import LARGE_BYTES, pause_after

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


# Places in one body, on all its levels, where a key with one value may be, and where one with a
# long value may.
MAX_PLACES, MAX_LONG_PLACES = 10_000, 100
_SPACE = rb"[ \t\r\n]*"
_COLON = re.compile(_SPACE + b":" + _SPACE)
_START = re.compile(_SPACE + rb"\{" + _SPACE)
_COMMA_AFTER = re.compile(_SPACE + b"," + _SPACE)
# One of these bytes follows each value in an object or an array.
_VALUE_ENDS = b",}] \t\r\n"
# Keys that are checked one by one.
_FEW = 1000
# Bytes at the beginning and at the end of a value that are compared first.
_EDGE = 4096


class Place(NamedTuple):
    """The place of a member in a body: its key, its value, and the value's end."""

    key: int
    value: int
    end: int


class Member:
    """A member of the top level, by its *name*, which is ASCII without anything to escape."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key = b'"%b"' % name.encode()
        # The key with each of its letters as it is, or escaped.
        self._escaped_key = b'"%b"' % b"".join(
            rb"(?:%c|\\u00%x[%x%c])" % (letter, letter >> 4, letter & 15, b"%X" % (letter & 15))
            for letter in name.encode()
        )
        # The beginnings of the letters' escapes.
        self._escapes = {b"\\u00%x" % (letter >> 4) for letter in name.encode()}
        fields: Sequence[tuple[str, type, object]] = (("value", Raw, ABSENT),)
        shape = msgspec.defstruct("Shape", fields, gc=False, rename={"value": name})
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(shape)

    def value(self, data: bytes) -> bytes:
        """Return the value in *data*, a JSON object, as it is written; empty if there is none."""
        return bytes(self._decoder.decode(data).value)

    def place(self, data: bytes) -> Place | None:
        """Return the member's place in *data*, a JSON object; None if there is none.

        Raises:
            InvalidRequest: as `find`.
        """
        value = self.value(data)
        return self.find(data, value) if value else None

    def find(self, data: bytes, value: bytes) -> Place:
        """Return the place of the member whose *value* was returned by `value`, and is not empty.

        Raises:
            InvalidRequest: it may be in more than MAX_PLACES, or MAX_LONG_PLACES.
        """
        escaped = any(escape in data for escape in self._escapes)
        if not escaped and (start := data.find(self.key)) == data.rfind(self.key):
            # The key occurs nowhere else in the body, at any depth.
            colon = _COLON.match(data, start + len(self.key))
            assert colon is not None, "a key, since the body has it on its top level"
            return Place(start, colon.end(), colon.end() + len(value))
        places: list[Place] = []
        for number, (start, begin) in enumerate(self._starts(data, value[:_EDGE], escaped), 1):
            end = begin + len(value)
            if (
                data.startswith(value[-_EDGE:], end - min(_EDGE, len(value)))
                # A number may be the beginning of a longer one.
                and data[end : end + 1] in _VALUE_ENDS
                and (len(value) <= _EDGE or data.startswith(value, begin))
            ):
                places.append(Place(start, begin, end))
            # Comparing a long value everywhere would take the square of its length.
            limit = MAX_PLACES if len(value) <= _EDGE else MAX_LONG_PLACES
            if number > limit:
                raise InvalidRequest(
                    f"more than {limit} keys {self.name} in one body", param=self.name
                )
        if len(places) == 1:
            return places[0]
        # Each of them gets its number as its value; the decoder then shows which one it reads.
        parts: list[bytes | memoryview] = []
        end, view = 0, memoryview(data)
        for number, place in enumerate(places):
            parts += (view[end : place.value], b"%d" % number)
            end = place.end
        numbered = b"".join((*parts, view[end:]))
        return places[int(self.value(numbered))]

    def _starts(self, data: bytes, edge: bytes, escaped: bool) -> Iterator[tuple[int, int]]:
        """Yield the beginnings of the key and of its value, for each place where the value begins
        with *edge*.

        A quote inside a string is escaped, so each match is a key, though perhaps a nested one.
        """
        if escaped or data.count(self.key) > _FEW:
            key = self._escaped_key if escaped else self.key
            pattern = key + _COLON.pattern + b"(?=%b)" % re.escape(edge)
            for match in re.finditer(pattern, data):
                yield match.start(), match.end()
            return
        # A search for bytes takes a tenth of a pattern's time.
        start = -1
        while (start := data.find(self.key, start + 1)) >= 0:
            colon = _COLON.match(data, start + len(self.key))
            if colon is not None and data.startswith(edge, colon.end()):
                yield start, colon.end()

    def insert(self, data: bytes, pieces: Sequence[bytes]) -> bytes:
        """Return *data*, which has no such member, with one in front, whose value is made of
        *pieces*.
        """
        match = _START.match(data)
        assert match is not None, "the body is an object"
        start = match.end()
        comma = b"" if data.startswith(b"}", start) else b","
        return b"".join((data[:start], self.key, b":", *pieces, comma, memoryview(data)[start:]))

    @staticmethod
    def extent(data: bytes, place: Place) -> tuple[int, int]:
        """Return the bytes to remove from *data* so that it lacks the member at *place*: from, to."""
        start, end = place.key, place.end
        if (comma := _COMMA_AFTER.match(data, end)) is not None:
            return start, comma.end()
        # Without a comma after it, its comma is the last one before it, unless it is the only
        # member.
        before = data.rfind(b",", 0, start)
        alone = before < 0 or data[before + 1 : start].strip(b" \t\r\n")
        return (start if alone else before), end

    def check_absent(self, data: bytes) -> None:
        """Check that *data* lacks this member, which was removed from it.

        Raises:
            InvalidRequest: there is another one.
        """
        # If the key does not occur, however it is written, there is nothing to read.
        if (self.key in data or b"\\u00" in data) and self.value(data):
            raise InvalidRequest(f"several keys {self.name} in one body", param=self.name)


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
    safety_identifier: str | None = None
    store: bool | None = None
    background: bool | None = None
    background_options: Raw = ABSENT
    metadata: Raw = ABSENT
    previous_response_id: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    prompt: Raw = ABSENT
    stream_options: Raw = ABSENT


_DECODER = msgspec.json.Decoder(Fields)
# The same fields, whatever their types are.
_RAW_DECODER = json_body.raw_members(*Fields.__struct_fields__)
_BACKGROUND = json_body.raw_members("completion_window")
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
_OTHERS = json_body.raw_members(*_OTHER_NAMES)


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
        self.model = fields.model
        # OpenAI has put `safety_identifier` in the place of `user`.
        self.user = fields.user or fields.safety_identifier
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
    def completion_window(self) -> str | None:
        """The time within which an answer in the background is to be complete; "" if it is no
        text.

        Raises:
            InvalidRequest: the member that has it is not an object.
        """
        options = self._fields.background_options
        if json_body.null(options):
            return None
        if memoryview(options)[0] != 0x7B:
            raise InvalidRequest(
                "background_options must be an object", param="background_options"
            )
        window = _BACKGROUND.decode(options).completion_window
        return None if json_body.null(window) else json_body.text(window, MAX_ID_BYTES) or ""

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


def _checked(fields: Any) -> Fields:
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
        safety_identifier=json_body.text(fields.safety_identifier),
        store=json_body.flag(fields.store),
        background=json_body.flag(fields.background),
        background_options=fields.background_options,
        metadata=_short(fields.metadata),
        previous_response_id=json_body.text(fields.previous_response_id, MAX_ID_BYTES),
        max_tokens=json_body.count(fields.max_tokens),
        max_completion_tokens=json_body.count(fields.max_completion_tokens),
        max_output_tokens=json_body.count(fields.max_output_tokens),
        n=json_body.lenient_count(fields.n),
        best_of=json_body.lenient_count(fields.best_of),
        prompt=fields.prompt,
    )


def _short(metadata: Raw) -> Raw:
    """Return *metadata*, if it is short enough to be kept."""
    return metadata if len(memoryview(metadata)) <= MAX_METADATA_BYTES else ABSENT


def simple(data: bytes) -> bool:
    """Return whether *data* is short and needs none of the checks of `reading`."""
    # Most bodies escape no character. The search for one that does is quick at any length.
    return len(data) <= LARGE_BYTES and data.isascii() and b"\\u" not in data


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


OPTIONS, INCLUDE = Member("stream_options"), Member("include_usage")
_ASKING = b'{"include_usage":true}'
# Bytes of options that are edited.
MAX_OPTIONS_BYTES = 4096
# The values of `include_usage` by which a client does not ask, empty if it is absent.
_UNASKED = frozenset({b"", b"false", b"null"})


def unasked(options: Raw) -> bytes | None:
    """Return *options* as they are written, empty if there are none; None if they ask for the
    usage already, or cannot be edited.
    """
    if options is ABSENT:
        return b""
    if len(memoryview(options)) > MAX_OPTIONS_BYTES:
        return None
    written = bytes(options)
    if written == b"null":
        return written
    if not written.startswith(b"{") or INCLUDE.value(written) not in _UNASKED:
        return None
    return written


def asking(body: bytes, options: bytes) -> bytes:
    """Return *body* with options that ask for the usage, in place of *options*, the result of
    `unasked` for it.

    Raises:
        InvalidRequest: as `Member.find`.
    """
    if not options:
        return OPTIONS.insert(body, (_ASKING,))
    edited = _ASKING
    if options != b"null":
        included = INCLUDE.value(options)
        if included:
            place = INCLUDE.find(options, included)
            edited = b"%btrue%b" % (options[: place.value], options[place.end :])
        else:
            edited = INCLUDE.insert(options, (b"true",))
    place, view = OPTIONS.find(body, options), memoryview(body)
    return b"".join((view[: place.value], edited, view[place.end :]))

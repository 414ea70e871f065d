"""The items of OpenAI's Responses API, as bytes: those of a request, of a response, and of a
conversation that a request continues.

Items are kept, and joined, as they came: as JSON values with commas between them, the inside of an
array. Nothing below them is built, so a long conversation costs only its bytes.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import Raw

from aioserver.errors import InvalidJson, InvalidRequest, RequestTooLarge
from aioserver.protocol.json_body import ABSENT, raw_members, text
from aioserver.protocol.model_body import Member
from aioserver.protocol.sound import sound
from aioserver.protocol.steps import Steps, at_once, pause_after

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

INPUT, PREVIOUS = Member("input"), Member("previous_response_id")
# The statuses of a response that can be continued.
CONTINUABLE = frozenset({"completed", "incomplete"})
# The most commas in a value whose parts each become an object: some megabytes of text have so
# many, and a few hundred KB of numbers.
MAX_COMMAS = 200_000
_MESSAGE = b'{"type":"message","role":"user","content":'
# The spellings of a message's type, which may be left out.
_MESSAGE_TYPES = frozenset({b"", b'"message"'})
_QUESTION = b'[{"type":"input_text","text":%b}]'
_ANSWER = b'[{"type":"output_text","text":%b,"annotations":[]}]'
_ITEMS = msgspec.json.Decoder(list[Raw])
_SPACE = b" \t\r\n"
# Replaces a missing string.
_EMPTY = Raw(b'""')


_OBJECT = msgspec.json.Decoder(dict[str, Raw])
_ITEM = raw_members("id", "type", "encrypted_content", "content")


class ResponseParts(NamedTuple):
    """A response object in parts: its *id* and *status*, and its JSON as `head`, items of its
    output, `tail`.
    """

    id: str
    status: str
    head: bytes
    output: bytes
    tail: bytes


class Page(NamedTuple):
    """A part of a list of *items*, whether there are *more*, and the ids of its first and last
    one.
    """

    items: list[Raw]
    first_id: str | None
    last_id: str | None
    more: bool


def input_items(body: bytes) -> bytes:
    """Return the items of the input in *body*, a request for a response.

    A text becomes a message of the user.

    Raises:
        InvalidJson, InvalidRequest: *body* is no object.
    """
    return items_of(INPUT.value(body))


def items_of(value: bytes) -> bytes:
    """Return the items in *value*, the JSON of an array or of a text; none if it is neither."""
    if value.startswith(b'"'):
        return b"%b%b}" % (_MESSAGE, value)
    return value[1:-1].strip(_SPACE) if value.startswith(b"[") else b""


def response_parts(response: bytes) -> ResponseParts | None:
    """Return *response*, the JSON of a response object, in parts.

    None if *response* is not a response object, has no id, or is too large.

    White space on its top level is lost, and so are lone surrogates, which no provider would take
    back.
    """
    if not separable(response):
        return None
    try:
        fields = _OBJECT.decode(at_once(sound(response)))
    except (InvalidJson, msgspec.DecodeError, RecursionError):
        return None
    name, status = text(fields.get("id", _EMPTY)), text(fields.get("status", _EMPTY))
    if not name or status is None:
        return None
    # The output comes last: nothing else is then copied twice.
    output = items_of(bytes(fields.pop("output", ABSENT)))
    head = msgspec.json.encode(fields)[:-1] + b',"output":['
    return ResponseParts(name, status, head, output, b"]}")


def separable(items: bytes) -> bool:
    """Return whether *items* are few enough to be separated."""
    return len(items) <= MAX_COMMAS or items.count(b",") <= MAX_COMMAS


def separate(items: bytes) -> list[Raw]:
    """Return *items*, which are joined and `separable`, one by one."""
    return _ITEMS.decode(b"[%b]" % items)


def joined(pieces: Iterable[bytes]) -> bytes:
    """Return joined items as one; empty ones are left out."""
    return b",".join([piece for piece in pieces if piece])


def replayable(items: bytes, *, same_provider: bool) -> bytes:
    """Return those of the *items* of a response that a provider takes back without having kept
    them.

    A reasoning item without its content is a mere reference to the provider's own storage.
    Encrypted content can be read only by the provider that has written it, which is the
    *same_provider*.
    """
    if b"reasoning" not in items or not separable(items):
        return items
    kept = []
    for raw in separate(items):
        item = _read(raw)
        if (
            item is None
            or bytes(item.type) != b'"reasoning"'
            or _filled(item.content)
            or (same_provider and _filled(item.encrypted_content))
        ):
            kept.append(bytes(raw))
    return joined(kept)


async def continued(body: bytes, history: Iterable[bytes], max_bytes: int) -> bytes:
    """Return *body* with *history*, joined items, in front of its input, and without
    `previous_response_id`, in steps.

    No more of *history* is read than fits.

    Raises:
        RequestTooLarge: the result would have more than *max_bytes*.
        InvalidRequest: *body* has several keys `previous_response_id`.
    """
    place, view = INPUT.place(body), memoryview(body)
    own, size = b"", len(body)
    if place is not None:
        own = items_of(body[place.value : place.end])
        size -= place.end - place.value
    await pause_after(body)
    start = stop = 0
    if (previous := PREVIOUS.place(body)) is not None:
        start, stop = PREVIOUS.extent(body, previous)
    await pause_after(body)
    # Brackets, and a comma between two pieces.
    size += 2 - (stop - start)
    items: list[bytes] = []
    steps = Steps()
    for piece in chain(history, (own,)):
        if not piece:
            continue
        size += len(piece) + bool(items)
        if size > max_bytes:
            raise RequestTooLarge(
                f"the body has more than {max_bytes} bytes with the responses that it continues",
                param="previous_response_id",
            )
        items += (b",", piece)[not items :]
        await steps.taken(len(piece))
    listed = (b"[", *items, b"]")
    if place is None:
        result = INPUT.insert(b"".join((view[:start], view[stop:])), listed)
    else:
        cuts = [(start, stop, ()), (place.value, place.end, listed)]
        parts: list[bytes | memoryview] = []
        end = 0
        for cut, following, instead in sorted(cuts):
            parts += (view[end:cut], *instead)
            end = following
        result = b"".join((*parts, view[end:]))
    if stop:
        await pause_after(body)
        PREVIOUS.check_absent(result)
    return result


async def paging(
    pieces: Iterable[tuple[str, bytes]], *, newest_first: bool, limit: int, after: str | None
) -> Page | None:
    """Return *limit* of the items in *pieces*, which follow the item with the id *after*, in steps.

    The pieces are in the order of the list, each with a name and joined items. An item without an
    id gets an id that is made of that name, and stays the same; so does an item whose id has come
    before. None: no item has the id *after*.
    """
    listed: list[tuple[str, Raw]] = []
    # A client that asks for the items after an id would loop for ever on a list that has the id
    # twice.
    ids: set[str] = set()
    found, steps = after is None, Steps()
    for name, piece in pieces:
        if not separable(piece):
            raise InvalidRequest(f"the input has too many items: over {MAX_COMMAS} commas")
        items = separate(piece)
        for number in range(len(items))[:: -1 if newest_first else 1]:
            item = items[number]
            if len(listed) == limit:
                return _page_of(listed, more=True)
            item_id = _id(item)
            if not item_id or item_id in ids:
                item_id = _made_id(item, name, number)
            ids.add(item_id)
            if found:
                listed.append((item_id, item))
            else:
                found = item_id == after
            await steps.taken(len(memoryview(item)))
    return _page_of(listed, more=False) if found else None


def _page_of(listed: Sequence[tuple[str, Raw]], *, more: bool) -> Page:
    first_id, last_id = (listed[0][0], listed[-1][0]) if listed else (None, None)
    return Page([_with_id(item, item_id) for item_id, item in listed], first_id, last_id, more)


def _id(item: Raw) -> str:
    """Return the id of *item*; empty if it has none."""
    read = _read(item)
    if read is None or bytes(memoryview(read.id)[:1]) != b'"':
        return ""
    name: str = msgspec.json.decode(read.id, type=str)
    return name


def _made_id(item: Raw, name: str, number: int) -> str:
    """Return an id for *item*, as that *number* of the piece of that *name*."""
    read = _read(item)
    kind = "msg" if read is None or bytes(read.type) in _MESSAGE_TYPES else "item"
    return f"{kind}_{name}_{number}"


def _with_id(item: Raw, item_id: str) -> Raw:
    """Return *item* with that id, and with the fields that a client may leave out of a message."""
    try:
        fields = _OBJECT.decode(item)
    except (msgspec.DecodeError, RecursionError):
        return item
    whole = {"type": Raw(b'"message"'), **fields, "id": Raw(msgspec.json.encode(item_id))}
    if bytes(whole["type"]) in _MESSAGE_TYPES:
        whole.setdefault("status", Raw(b'"completed"'))
        content = whole.get("content", ABSENT)
        if bytes(memoryview(content)[:1]) == b'"':
            # A text alone is short for a list of one part.
            answered = bytes(whole.get("role", ABSENT)) == b'"assistant"'
            part = _ANSWER if answered else _QUESTION
            whole["content"] = Raw(part % bytes(content))
    return Raw(msgspec.json.encode(whole))


def _read(item: Raw) -> Any:
    """Return the members of *item*; None if it is no object."""
    try:
        return _ITEM.decode(item)
    except (msgspec.DecodeError, RecursionError):
        return None


def _filled(raw: Raw) -> bool:
    """Return whether *raw* is a value with content."""
    return raw is not ABSENT and bytes(memoryview(raw)[:4]) not in {b"null", b'""', b"[]"}

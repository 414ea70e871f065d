"""The regions of a prompt: each tool, each block of the system prompt, and each message, with a
digest and a length.

An engine's cache holds the beginning of a prompt, so the first region that differs from the last
turn's is where the cache was lost, and the regions before it are what the engine knows (prefix.py).
A region is named by its place in the body: `tools[7]`, `system[0]`, `messages[3]`. A text in the
place of a list is one region, and so is an empty list.

Cache markers are left out, since some clients move them from message to message. The search for
them, and for pictures, takes longer than the digest. So a `RegionReader` remembers the digests of
regions that have no marker: a turn has most of its regions from the turn before it.

A digest is the process's own keyed hash, SipHash (Aumasson, Bernstein, "SipHash: a fast short-input
PRF", 2012), which takes a fifth of the time of BLAKE2b. So it says nothing of the text, and the
digests of two processes cannot be compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from zlib import crc32

import msgspec
from msgspec import Raw
from msgspec.structs import astuple

from aioserver.protocol.json_body import ABSENT, raw_members
from aioserver.protocol.steps import LARGE_BYTES, pause, pause_after

if TYPE_CHECKING:
    from collections.abc import Sequence

# The parts of a prompt in front of the conversation, and the names of that: a body has one of them.
HEAD = ("tools", "system", "instructions")
_TALK = ("messages", "input", "prompt")
# The parts that are long lists in nearly all bodies.
_LONG = ("tools", "messages", "input")
# The elements of a list that are regions: the last one stands for all behind it, too.
MAX_ELEMENTS = 1024
# Messages that are searched for the first one of a user, and the bytes of the conversation that
# stand for that if there is none.
MAX_LOOKED_AT, OPENING_BYTES = 256, 1024
# The most bytes of a `prompt_cache_key`, as JSON; a longer one names nothing.
MAX_KEY_BYTES = 1024
# The bytes of a piece: of a longer region, each piece has a digest as well.
PIECE_BYTES = 4096
# Regions without a marker that are remembered, of some 100 bytes each, until they become the older
# ones.
MAX_REMEMBERED = 1 << 14
# The markers, each with the comma in front of it, or behind it if it comes first. A value is an
# object without another in it, a text, or a word.
_VALUE = rb'\s*:\s*(?:\{[^{}]*\}|"(?:[^"\\]|\\.)*"|[a-z0-9]+)'
_KEY = rb'(?<!\\)"(?:cache_control|cachePoint|prompt_cache_breakpoint)"'
_MARKER = re.compile(rb",\s*" + _KEY + _VALUE + rb"|" + _KEY + _VALUE + rb"\s*,?\s*")
# The words with which a marker begins, which are searched for first: that is ten times as fast.
_WORDS = (b'"cache_control"', b'"cachePoint"', b'"prompt_cache_breakpoint"')
_ROLE = raw_members("role")
# The elements that are read at once with the body. A list of more is read once more: to read few by
# a decoder of many takes as long as to read many.
FEW_ELEMENTS = 256


def _first(number: int) -> type[msgspec.Struct]:
    """Return the type of the first elements of a list, at most *number*."""
    fields = [(f"_{each}", Raw, ABSENT) for each in range(number)]
    return msgspec.defstruct(f"First{number}", fields, array_like=True)


_FEW = _first(FEW_ELEMENTS)
_FIRST_FEW: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_FEW)


@cache
def _decoder_of_most() -> msgspec.json.Decoder[Any]:
    """Return the decoder of the first MAX_ELEMENTS elements of a list: few servers need its 300 KB."""
    return msgspec.json.Decoder(_first(MAX_ELEMENTS))


# The parts of any prompt, and the name of its conversation; and those of one whose long parts are
# lists, which are read in the same pass.
_MEMBERS = (*HEAD, *_TALK, "prompt_cache_key")
_TOP = raw_members(*_MEMBERS)
_LISTS: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
    msgspec.defstruct(
        "Lists",
        [(name, _FEW if name in _LONG else Raw, ABSENT) for name in _MEMBERS],
        gc=False,
    )
)


@dataclass(slots=True)
class Regions:
    """The regions of one prompt, in order: a digest and a length in bytes for each.

    *counts* has the number of regions of each part of HEAD; those from *start* on are of *talk*, the
    conversation. *pieces* has the digests of the pieces of longer regions. *user* is the position
    of the first user message, None if there is none that was found. *opening* is a checksum of the
    regions behind the tools up to that message, or else of the first KiB of the conversation; it is
    the same in all processes. *key* is the `prompt_cache_key` as it is written, empty without one.

    *cut*: a list is longer than is read. *picture*: the prompt has a picture or a file, whose bytes
    say nothing of its tokens.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(HEAD, 0))
    start: int = 0
    talk: str = ""
    digests: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    pieces: dict[int, Sequence[int]] = field(default_factory=dict)
    user: int | None = None
    opening: int = 0
    key: bytes = b""
    cut: bool = False
    picture: bool = False


class RegionReader:
    """Reads the regions of prompts, and remembers those that have no marker.

    Always: it remembers at most 2 * MAX_REMEMBERED.
    """

    def __init__(self) -> None:
        # Whether a region has a picture, by its digest: of the newest ones, and of those before.
        self._newest: dict[int, bool] = {}
        self._older: dict[int, bool] = {}

    async def read(self, body: bytes) -> Regions | None:
        """Return the regions of the prompt in *body*, valid JSON; None if there is no prompt. A
        long body is read in steps.
        """
        parts, key = await _parts(body)
        if not parts:
            return None
        regions = Regions(talk=parts[-1][0], key=key)
        for name, elements, cut in parts:
            regions.start = len(regions.digests)
            regions.cut |= cut
            # The opening has so many of these regions, and so many bytes of each.
            opened, most = 0 if name == "tools" else len(elements), None
            if name == regions.talk:
                index = _first_user(elements)
                if index is None:
                    opened, most = 1, OPENING_BYTES
                else:
                    opened, regions.user = index + 1, regions.start + index
            await self._read(regions, elements, opened, most)
            if name in HEAD:
                regions.counts[name] = len(elements)
        return regions

    async def _read(
        self, regions: Regions, elements: Sequence[bytes | Raw], opened: int, most: int | None
    ) -> None:
        """Add *elements* to *regions*: *most* bytes of each of the first *opened* are a part of the
        opening.
        """
        taken = 0
        for element in elements:
            data = bytes(element)
            digest, pieces = _digests(data)
            pictured = self._newest.get(digest)
            if pictured is None:
                pictured, clean = self._search(data, digest)
                if clean is not data:
                    data = clean
                    digest, pieces = _digests(data)
            if pictured:
                regions.picture = True
            if pieces:
                regions.pieces[len(regions.digests)] = pieces
            if opened:
                opened -= 1
                regions.opening = crc32(data[:most], regions.opening)
            regions.digests.append(digest)
            regions.lengths.append(len(data))
            taken += len(data)
            if taken > LARGE_BYTES:
                taken = 0
                await pause()

    def _search(self, data: bytes, digest: int) -> tuple[bool, bytes]:
        """Return whether the region *data* with *digest* has a picture, and it without markers. It
        is not among the newest.
        """
        pictured = self._older.get(digest)
        if pictured is None:
            pictured, clean = has_picture(data), unmarked(data)
            if clean is not data:
                return pictured, clean
        if len(self._newest) >= MAX_REMEMBERED:
            self._newest, self._older = {}, self._newest
        self._newest[digest] = pictured
        return pictured, data


async def _parts(body: bytes) -> tuple[list[tuple[str, Sequence[bytes | Raw], bool]], bytes]:
    """Return the parts of the prompt in *body*, in the order in which an engine reads them: the
    name, the regions, and whether these are cut. Return its `prompt_cache_key`, too.
    """
    try:
        top = _LISTS.decode(body)
    except msgspec.ValidationError:
        top = None
    await pause_after(body)
    if top is None or any(_is_full(getattr(top, name)) for name in _LONG):
        top = _TOP.decode(body)
        await pause_after(body)
    parts: list[tuple[str, Sequence[bytes | Raw], bool]] = []
    for name in (*HEAD, *_TALK):
        part = getattr(top, name)
        if part is ABSENT:
            continue
        if isinstance(part, Raw):
            parts.append((name, *_elements(part)))
            await pause_after(part)
        else:
            parts.append((name, _present(part) or [b"[]"], False))
        if name in _TALK:
            break
    return parts, _key_in(top.prompt_cache_key)


def _key_in(raw: Raw) -> bytes:
    """Return *raw* as it is written, if it is a text that names a conversation; empty otherwise."""
    view = memoryview(raw)
    return bytes(view) if 2 < len(view) <= MAX_KEY_BYTES and view[0] == 0x22 else b""


def _elements(part: Raw) -> tuple[Sequence[bytes | Raw], bool]:
    """Return the regions of *part*, and whether they are cut."""
    if bytes(memoryview(part)[:1]) != b"[":
        return [part], False
    first = _FIRST_FEW.decode(part)
    if _is_full(first):
        first = _decoder_of_most().decode(part)
    elements = _present(first)
    if len(elements) >= MAX_ELEMENTS:
        return _with_rest(elements, bytes(part)), True
    return elements or [part], False


def _present(first: Any) -> list[Raw]:
    return [each for each in astuple(first) if each is not ABSENT]


def _is_full(first: Any) -> bool:
    """Return whether there may be more elements than those of *first*."""
    return isinstance(first, _FEW) and astuple(first)[-1] is not ABSENT


def _with_rest(elements: Sequence[bytes | Raw], part: bytes) -> list[bytes | Raw]:
    """Return the first *elements* of *part*, of which the last one stands for all behind it, too."""
    end = 0
    for element in elements[:-1]:
        # Elements come in order, so each is found behind the one before it.
        data = bytes(element)
        end = part.index(data, end) + len(data)
    return [*elements[:-1], part[end:]]


def _first_user(messages: Sequence[bytes | Raw]) -> int | None:
    """Return the index of the first message of a user in *messages*, values of JSON."""
    for index, message in enumerate(messages[:MAX_LOOKED_AT]):
        if bytes(memoryview(message)[:1]) != b"{":
            continue
        if bytes(_ROLE.decode(message).role) == b'"user"':
            return index
    return None


def _digests(data: bytes) -> tuple[int, Sequence[int]]:
    """Return the digest of *data*, and those of its pieces if it has several."""
    if len(data) <= PIECE_BYTES:
        return hash(data), ()
    # To hash a part of a memoryview would hash the whole of *data* first.
    pieces = [hash(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES)]
    return hash(tuple(pieces)), pieces


def unmarked(data: bytes) -> bytes:
    """Return *data* without markers; *data* itself if it has none."""
    # All words have this part, and a search for it is enough for most prompts.
    if b"cache" not in data or not any(word in data for word in _WORDS):
        return data
    clean, number = _MARKER.subn(b"", data)
    return clean if number else data


def has_picture(data: bytes) -> bool:
    """Return whether *data* has a picture or a file: its bytes say nothing of its tokens.

    It is in a `data:` URL (RFC 2397), or in an object of Anthropic's.
    """
    # Most texts have no such word.
    return b"base64" in data and (b";base64," in data or b'"base64"' in data)

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
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import msgspec
from msgspec import Raw
from msgspec.structs import astuple

from aioserver.protocol.json_body import ABSENT, raw_members
from aioserver.protocol.steps import LARGE_BYTES, pause, pause_after

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# The parts of a prompt in front of the conversation, and the names of that: a body has one of them.
HEAD = ("tools", "system", "instructions")
_TALK = ("messages", "input", "prompt")
# The elements of a list that are regions: the last one stands for all behind it, too.
MAX_ELEMENTS = 1024
# Messages that are searched for the first one of a user, and the bytes of the conversation that
# stand for that if there is none.
MAX_LOOKED_AT, OPENING_BYTES = 256, 1024
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
_TOP = raw_members(*HEAD, *_TALK)
_ROLE = raw_members("role")


# The decoders of the first elements of a list, which skip all others. To read few with the second
# one takes as long as to read them all.
FEW_ELEMENTS = 128
_FIRST: list[msgspec.json.Decoder[Any]] = [
    msgspec.json.Decoder(
        msgspec.defstruct(
            "First", [(f"_{each}", Raw, ABSENT) for each in range(number)], array_like=True
        )
    )
    for number in (FEW_ELEMENTS, MAX_ELEMENTS)
]


class Regions(NamedTuple):
    """The regions of one prompt, in order: a digest and a length in bytes for each.

    *counts* has the number of regions of each part of HEAD; those from *start* on are of *talk*, the
    conversation. *pieces* has the digests of the pieces of longer regions. *user* is the position
    of the first user message, None if there is none that was found. *opening* is a checksum of the
    regions behind the tools and up to that message, or up to the first KiB of the conversation; it
    is the same in all processes.

    *cut*: a list is longer than is read. *picture*: the prompt has a picture or a file, whose bytes
    say nothing of its tokens.
    """

    counts: tuple[int, ...]
    start: int
    talk: str
    digests: Sequence[int]
    lengths: Sequence[int]
    pieces: Mapping[int, Sequence[int]]
    user: int | None
    opening: int
    cut: bool
    picture: bool


class RegionReader:
    """Reads the regions of prompts, and remembers those that have no marker.

    Always: it remembers fewer than 2 * MAX_REMEMBERED.
    """

    def __init__(self) -> None:
        # Whether a region has a picture, by its digest: of the newest ones, and of those before.
        self._newest: dict[int, bool] = {}
        self._older: dict[int, bool] = {}

    async def read(self, body: bytes) -> Regions | None:
        """Return the regions of the prompt in *body*, valid JSON; None if there is no prompt. A
        long body is read in steps.
        """
        parts = dict(_parts(_TOP.decode(body)))
        await pause_after(body)
        if not parts:
            return None
        digests: list[int] = []
        lengths: list[int] = []
        pieces: dict[int, Sequence[int]] = {}
        counts, user, opening, cut, picture = dict.fromkeys(HEAD, 0), None, 0, False, False
        talk, start, taken = next(reversed(parts)), 0, 0
        for name, part in parts.items():
            start = len(digests)
            elements: Sequence[bytes | Raw] = _first_elements(part)
            await pause_after(part)
            # The opening has so many of these regions, and so many bytes of each.
            opened, most = 0 if name == "tools" else len(elements) or 1, None
            if name == talk:
                index = _first_user(elements)
                if index is None:
                    opened, most = 1, OPENING_BYTES
                else:
                    opened, user = index + 1, start + index
            if len(elements) >= MAX_ELEMENTS:
                elements, cut = _with_rest(elements, bytes(part)), True
            for element in elements or (part,):
                data = bytes(element)
                size = len(data)
                digest = hash(data) if size <= PIECE_BYTES else hash(_pieces(data))
                pictured = self._newest.get(digest)
                if pictured is None:
                    pictured, clean = self._searched(data, digest)
                    if clean is not data:
                        data, size = clean, len(clean)
                        digest = hash(data) if size <= PIECE_BYTES else hash(_pieces(data))
                if pictured:
                    picture = True
                if size > PIECE_BYTES:
                    pieces[len(digests)] = _pieces(data)
                if opened:
                    opened -= 1
                    opening = crc32(data[:most], opening)
                digests.append(digest)
                lengths.append(size)
                taken += size
                if taken > LARGE_BYTES:
                    taken = 0
                    await pause()
            if name in counts:
                counts[name] = len(digests) - start
        return Regions(
            tuple(counts.values()),
            start,
            talk,
            digests,
            lengths,
            pieces,
            user,
            opening,
            cut,
            picture,
        )

    def _searched(self, data: bytes, digest: int) -> tuple[bool, bytes]:
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


def _parts(top: Any) -> Iterator[tuple[str, Raw]]:
    """Yield the parts of the prompt, in the order in which an engine reads them."""
    for name in HEAD:
        if part := getattr(top, name):
            yield name, part
    for name in _TALK:
        if part := getattr(top, name):
            yield name, part
            return


def _first_elements(part: Raw) -> list[Raw]:
    """Return the first MAX_ELEMENTS of *part*; none if it is no list."""
    if bytes(memoryview(part)[:1]) != b"[":
        return []
    elements: list[Raw] = []
    for few in _FIRST:
        elements = [each for each in astuple(few.decode(part)) if each is not ABSENT]
        if len(elements) < FEW_ELEMENTS:
            break
    return elements


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


def _pieces(data: bytes) -> tuple[int, ...]:
    """Return the digests of the pieces of *data*."""
    view = memoryview(data)
    return tuple([hash(view[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES)])


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

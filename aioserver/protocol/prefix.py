"""The prefix of a prompt, identified by digests of its bytes at fixed lengths.

Engines keep the key-value cache of prompts, so a prompt whose beginning they have read before
costs only the rest. Two prompts have the same beginning if they have the same digest at a length.
The hash covers the bytes of the tools, the system prompt and the messages in this order, as the
client wrote them. Cache markers are left out, since some clients move them from message to
message.

A digest is a running BLAKE2b, read at 1, 2, 3 … 8 KiB and then at each eighth further, up to 1
MiB. So any body has at most 50 digests, and its known part is measured to a ninth of its length.
One more digest is read at the end of the first user message: it is the *identity* of a
conversation, which all later turns share. A client may name the identity itself, by OpenAI's
`prompt_cache_key`: that of a conversation stays the same then when its beginning changes.

A digest reveals nothing of the text, and two groups have different digests for the same text.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import Raw
from msgspec.structs import astuple

from aioserver.protocol.json_body import ABSENT, raw_members
from aioserver.protocol.steps import pause_after

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DIGEST_BYTES = 16
# The longest prompt whose whole length is hashed.
MAX_BYTES = 1 << 20
# Messages that are searched for the first one of a user.
MAX_LOOKED_AT = 256
# The most bytes of a `prompt_cache_key`, as JSON; a longer one names nothing.
MAX_KEY_BYTES = 1024
# Seeds whose hash is kept at its beginning.
MAX_SEEDS = 1024


def _lengths() -> tuple[int, ...]:
    lengths = [1024 * kib for kib in range(1, 9)]
    while (longer := lengths[-1] * 9 // 8) <= MAX_BYTES:
        lengths.append(longer)
    return tuple(lengths)


LENGTHS = _lengths()
# The markers, each with the comma in front of it, or behind it if it comes first. A value is an
# object without another in it, a text, or a word.
_VALUE = rb'\s*:\s*(?:\{[^{}]*\}|"(?:[^"\\]|\\.)*"|[a-z0-9]+)'
_KEY = rb'(?<!\\)"(?:cache_control|cachePoint|prompt_cache_breakpoint)"'
_MARKER = re.compile(rb",\s*" + _KEY + _VALUE + rb"|" + _KEY + _VALUE + rb"\s*,?\s*")
# Anything but the brackets that close the conversation.
_MORE = re.compile(rb"[^ \t\r\n\]},]")
# The words with which a marker begins, which are searched for first: that is ten times as fast.
_WORDS = (b'"cache_control"', b'"cachePoint"', b'"prompt_cache_breakpoint"')


# The members of a body that make up its prompt, in order, and the name of its identity.
_TOP = raw_members(
    *("tools", "system", "instructions", "messages", "input", "prompt"), "prompt_cache_key"
)
_ROLE = raw_members("role")
# The first elements of a list: all others are skipped.
MAX_ELEMENTS = 1024
_FIRST: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
    msgspec.defstruct(
        "First", [(f"_{number}", Raw, ABSENT) for number in range(MAX_ELEMENTS)], array_like=True
    )
)


class Prefix(NamedTuple):
    """The beginning of one prompt of *size* bytes.

    *digests* has the digest of its first *lengths* bytes each, in ascending order. *identity* is
    the digest up to the end of the first user message, or that of the body's `prompt_cache_key`;
    the prompt *has_history* if anything follows that message, at *identity_length*.
    """

    size: int
    lengths: Sequence[int]
    digests: Sequence[bytes]
    identity: bytes
    identity_length: int
    has_history: bool


class Parts(NamedTuple):
    """The parts of one prompt, by their names in the body, in the order in which an engine reads
    them; the last is the conversation. *elements* are the first MAX_ELEMENTS of that, if it is a
    list; *marked*: the body may have markers. *key* is its `prompt_cache_key` as it is written,
    empty without one.
    """

    parts: Mapping[str, Raw]
    elements: Sequence[Raw]
    marked: bool
    key: bytes


async def parts_of(body: bytes) -> Parts | None:
    """Return the parts of the prompt in *body*, valid JSON; None if there is no prompt. They refer
    to the body.
    """
    top = _TOP.decode(body)
    parts = {name: part for name, part in _parts(top) if part}
    await pause_after(body)
    if not parts:
        return None
    elements = first_elements(next(reversed(parts.values())))
    await pause_after(body)
    return Parts(parts, elements, unmarked(body) is not body, _key_in(top.prompt_cache_key))


async def prefix_of(body: bytes, seed: str, parts: Parts | None = None) -> Prefix | None:
    """Return the prefix of the prompt in *body*, valid JSON; None if there is no prompt. *parts*
    are its parts, if these were read already.

    The digests depend on *seed*. A long body is read in steps.
    """
    parts = parts or await parts_of(body)
    if parts is None:
        return None
    # The first user message of the conversation, the last part, ends there.
    *head, talk = map(bytes, parts.parts.values())
    cut = await _end_of_first_user(talk, parts.elements)
    await pause_after(talk)
    clean = unmarked if parts.marked else bytes
    stripped = [clean(part) for part in head]
    first, rest = clean(talk[:cut]), clean(talk[cut:])
    identity_length = sum(map(len, stripped)) + len(first)
    hashed = _Running(seed, identity_length)
    for part in (*stripped, first, rest):
        await pause_after(part)
        hashed.update(part)
    if not hashed.identity:
        return None
    has_history = _MORE.search(rest) is not None
    return Prefix(
        hashed.size,
        hashed.lengths,
        hashed.digests,
        _named(seed, parts.key) if parts.key else hashed.identity,
        identity_length,
        has_history,
    )


def _parts(top: Any) -> Iterator[tuple[str, Raw]]:
    yield "tools", top.tools
    yield "system", top.system
    yield "instructions", top.instructions
    # A body has one of the three.
    name = "messages" if top.messages else "input" if top.input else "prompt"
    yield name, getattr(top, name)


def first_elements(part: Raw) -> list[Raw]:
    """Return the first MAX_ELEMENTS of *part*; none if it is no list."""
    if bytes(memoryview(part)[:1]) != b"[":
        return []
    return [element for element in astuple(_FIRST.decode(part)) if element is not ABSENT]


async def _end_of_first_user(talk: bytes, elements: Sequence[Raw]) -> int:
    """Return the end of the first user message in *talk*, which has these first *elements*.

    For a text, or without such a message, it is the end of the first KiB, or of the whole.
    """
    end = 0
    for element in elements[:MAX_LOOKED_AT]:
        # Elements come in order, so each is found behind the one before it.
        raw = bytes(element)
        end = talk.index(raw, end) + len(raw)
        if of_user(raw):
            return end
        await pause_after(raw)
    return min(len(talk), LENGTHS[0])


def of_user(message: bytes) -> bool:
    """Return whether *message*, a value of JSON, is one of a user."""
    return message.startswith(b"{") and bytes(_ROLE.decode(message).role) == b'"user"'


def unmarked(data: bytes) -> bytes:
    """Return *data* without markers."""
    # All words have this part, and a search for it is enough for most prompts.
    if b"cache" not in data or not any(word in data for word in _WORDS):
        return data
    return _MARKER.sub(b"", data)


@lru_cache(maxsize=MAX_SEEDS)
def seeded(seed: str) -> hashlib.blake2b:
    """Return an empty hash, different for each *seed*."""
    key = hashlib.blake2b(seed.encode(), digest_size=32).digest()
    return hashlib.blake2b(digest_size=DIGEST_BYTES, key=key)


def _key_in(raw: Raw) -> bytes:
    """Return *raw* as it is written, if it is a text that names an identity; empty otherwise."""
    view = memoryview(raw)
    return bytes(view) if 2 < len(view) <= MAX_KEY_BYTES and view[0] == 0x22 else b""


def _named(seed: str, key: bytes) -> bytes:
    """Return the identity of the prompts with this *key*; it is that of no other prompt."""
    hashed = seeded(seed).copy()
    # UTF-8 has no such byte, so no prompt begins in this way.
    hashed.update(b"\xff" + key)
    return hashed.digest()


class _Running:
    """A digest that is read at each length, and at *identity_length*."""

    def __init__(self, seed: str, identity_length: int) -> None:
        self._hash = seeded(seed).copy()
        self._stops = list(LENGTHS)
        at = bisect_left(self._stops, identity_length)
        if self._stops[at : at + 1] != [identity_length]:
            self._stops.insert(at, identity_length)
        self._identity_length = identity_length
        self.size = 0
        self.lengths: list[int] = []
        self.digests: list[bytes] = []
        self.identity = b""

    def update(self, data: bytes) -> None:
        """Hash the next bytes."""
        view, start = memoryview(data), 0
        next_stop = bisect_right(self._stops, self.size)
        while start < len(data):
            stop = self._stops[next_stop] if next_stop < len(self._stops) else None
            if stop is None or stop - self.size > len(data) - start:
                if stop is not None:
                    self._hash.update(view[start:])
                self.size += len(data) - start
                return
            step = stop - self.size
            self._hash.update(view[start : start + step])
            start += step
            self.size = stop
            digest = self._hash.copy().digest()
            self.lengths.append(stop)
            self.digests.append(digest)
            if stop == self._identity_length:
                self.identity = digest
            next_stop += 1

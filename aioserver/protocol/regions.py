"""The regions of a prompt: each tool, each block of the system prompt, and each message, with a
digest and a length.

An engine's cache holds the beginning of a prompt, so the first region that differs from the last
turn's is where the cache was lost. Markers of caching are left out (prefix.py). A region is named
by its place in the body: `tools[7]`, `system[0]`, `messages[3]`. A text in the place of a list is
one region, and so is an empty list.

A region is hashed by the process's own keyed hash, SipHash (Aumasson, Bernstein, "SipHash: a fast
short-input PRF", 2012), which takes a fifth of the time of BLAKE2b; the hash of this number, of its
length, its name and a seed is its digest. So the digests of two seeds, or of two processes, cannot
be compared, and a digest says nothing of the text.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from aioserver.protocol.prefix import (
    MAX_ELEMENTS,
    MAX_LOOKED_AT,
    first_elements,
    of_user,
    unmarked,
)
from aioserver.protocol.steps import LARGE_BYTES, pause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.protocol.prefix import Parts

# The parts of a prompt in front of the conversation.
HEAD = ("tools", "system", "instructions")
# The length of a digest: that of the hash.
REGION_BYTES = 8


class Regions(NamedTuple):
    """The regions of one prompt, in order: a digest and a length in bytes for each.

    *counts* has the number of regions of each part of HEAD; all others are of *talk*, the
    conversation. *first_user* is the digest of its first user message.
    """

    counts: tuple[int, ...]
    talk: str
    digests: Sequence[bytes]
    lengths: Sequence[int]
    first_user: bytes


async def regions_of(body: bytes, parts: Parts, seed: str) -> Regions | None:
    """Return the regions of the prompt in *body*, which has these *parts*; None if it has a
    picture, or a list that is longer than is read. A long body is read in steps.
    """
    if _has_picture(body):
        return None
    digests: list[bytes] = []
    lengths: list[int] = []
    counts, taken, start, talk = dict.fromkeys(HEAD, 0), 0, 0, ""
    for talk, part in parts.parts.items():
        start = len(digests)
        elements = parts.elements if talk not in counts else first_elements(part)
        if len(elements) >= MAX_ELEMENTS:
            return None
        for element in elements or [part]:
            data = bytes(element)
            if parts.marked:
                data = unmarked(data)
            size = len(data)
            number = hash((seed, talk, size, hash(data)))
            digests.append(number.to_bytes(REGION_BYTES, "little", signed=True))
            lengths.append(size)
            taken += size
            if taken > LARGE_BYTES:
                taken = 0
                await pause()
        counts[talk] = len(digests) - start
    user = start
    for index, element in enumerate(parts.elements[:MAX_LOOKED_AT]):
        if of_user(bytes(element)):
            user += index
            break
    return Regions(tuple(counts[name] for name in HEAD), talk, digests, lengths, digests[user])


def _has_picture(body: bytes) -> bool:
    """Return whether *body* has a picture or a file: its bytes say nothing of its tokens.

    It is in a `data:` URL (RFC 2397), or in an object of Anthropic's.
    """
    # First one search from the end, which is faster than `in`: most bodies have no such word.
    return body.rfind(b"base64") >= 0 and (b";base64," in body or b'"base64"' in body)


def folded(digests: Sequence[bytes]) -> bytes:
    """Return one digest for several regions."""
    return hashlib.blake2b(b"".join(digests), digest_size=REGION_BYTES).digest()

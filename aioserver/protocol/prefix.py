"""The prefix of a prompt, identified by digests of the beginnings of its regions.

Engines keep the key-value cache of prompts, so a prompt whose beginning they have read before
costs only the rest. Two prompts have the same beginning if they have the same digest of it: it
covers the digests of all regions (regions.py) up to the end of one, or of a piece of one.

A digest is read at the first such end behind 1, 2, 3 … 8 KiB, and then behind each eighth further,
up to 1 MiB; and at the end of the prompt, where the next turn goes on. So any body has at most 52
digests, and its known part is measured to a ninth of its length, or to a piece. One of them is
read at the end of the first user message, which all later turns of a conversation share.

The *identity* of a conversation is what its home is chosen by where nothing is known. It has to be
the same in all processes, so it is a digest of the checksum of the conversation's opening, and of
the lengths of the regions there. A client may name the identity itself, by OpenAI's
`prompt_cache_key`: then it stays the same when the conversation's beginning changes. The digests of
the beginnings are those of this process.

Neither reveals anything of the text, and two groups have different ones for the same text.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from aioserver.protocol.regions import OPENING_BYTES, PIECE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aioserver.protocol.regions import Regions

IDENTITY_BYTES = 16
# The longest beginning that has a digest, other than the whole prompt.
MAX_BYTES = 1 << 20


def _lengths() -> tuple[int, ...]:
    lengths = [1024 * kib for kib in range(1, 9)]
    while (longer := lengths[-1] * 9 // 8) <= MAX_BYTES:
        lengths.append(longer)
    return tuple(lengths)


LENGTHS = _lengths()
_NEVER = 1 << 62


class Prefix(NamedTuple):
    """The beginning of one prompt of *size* bytes.

    *digests* has the digest of its first *lengths* bytes each, in ascending order. *identity* is
    that of the conversation, whose opening has *identity_length* bytes, or that of the body's
    `prompt_cache_key`; the prompt *has_history* if anything follows the opening.
    """

    size: int
    lengths: Sequence[int]
    digests: Sequence[int]
    identity: bytes
    identity_length: int
    has_history: bool


def prefix_of(regions: Regions, seed: str) -> Prefix:
    """Return the prefix of the prompt with these *regions*, which depends on *seed*."""
    size, user = sum(regions.lengths), regions.user
    if user is None:
        opened = regions.start
        talk = sum(regions.lengths[opened:])
        identity_length = size - talk + min(talk, OPENING_BYTES)
    else:
        opened = user + 1
        identity_length = sum(regions.lengths[:opened])
    # A key begins with a quotation mark, so no opening is taken for one.
    name = regions.key or f"{regions.opening} {regions.lengths[:opened]}".encode()
    identity = blake2b(b"%b %b" % (name, seed.encode()), digest_size=IDENTITY_BYTES)
    lengths: list[int] = []
    digests: list[int] = []
    stops = iter(LENGTHS)
    stop = next(stops)
    # The last digest that was read, and those of what stands behind it.
    chain: list[object] = [seed]
    for end, digest in _ends(regions):
        chain.append(digest)
        if end >= stop or end in {identity_length, size}:
            whole = hash(tuple(chain))
            chain = [whole]
            lengths.append(end)
            digests.append(whole)
            while stop <= end:
                stop = next(stops, _NEVER)
    return Prefix(
        size, lengths, digests, identity.digest(), identity_length, size > identity_length
    )


def _ends(regions: Regions) -> Iterator[tuple[int, int]]:
    """Yield the end and the digest of each region, or of each of its pieces."""
    end = 0
    for index, (digest, length) in enumerate(zip(regions.digests, regions.lengths, strict=True)):
        begin, end = end, end + length
        if length <= PIECE_BYTES:
            yield end, digest
            continue
        for number, piece in enumerate(regions.pieces[index], 1):
            yield min(end, begin + number * PIECE_BYTES), piece

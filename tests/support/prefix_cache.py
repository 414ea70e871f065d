"""A simulated engine with a prefix cache, without time of its own: blocks of 16 tokens, each by
all before it, of which the least recently used is evicted first, and which expire.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 16
# The parts of a prompt in the order in which they are read, with the bytes of a token in each.
BYTES = {"tools": 3, "system": 5, "messages": 4}


class PrefixCache:
    """A cache of *blocks*, which keeps each for *life* seconds since its last use."""

    def __init__(self, blocks: int, life: float) -> None:
        self._most, self._life = blocks, life
        # The time of the last use of each block, the least recent first.
        self._used: OrderedDict[int, float] = OrderedDict()

    def read(self, body: dict[str, Any], now: float) -> tuple[int, int]:
        """Read the prompt of *body*; return its tokens, and how many of them were cached."""
        tokens = [token for name in BYTES for token in _tokens_of(body, name)]
        blocks, chain = [], 0
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            chain = hash((chain, *tokens[start : start + BLOCK]))
            blocks.append(chain)
        known = 0
        for block in blocks:
            if now - self._used.get(block, -self._life - 1) > self._life:
                break
            known += 1
        self._keep(blocks, now)
        return len(tokens), known * BLOCK

    def flood(self, now: float) -> None:
        """Read so much else that nothing else is left."""
        self._keep([hash((now, number)) for number in range(self._most)], now)

    def _keep(self, blocks: list[int], now: float) -> None:
        for block in reversed(blocks):
            self._used[block] = now
            self._used.move_to_end(block)
        while len(self._used) > self._most:
            self._used.popitem(last=False)


def _tokens_of(body: dict[str, Any], name: str) -> Iterator[str]:
    for region in body.get(name, ()):
        yield from _tokens(json.dumps(region), BYTES[name])


@lru_cache(maxsize=4096)
def _tokens(text: str, size: int) -> tuple[str, ...]:
    return tuple(text[start : start + size] for start in range(0, len(text), size))

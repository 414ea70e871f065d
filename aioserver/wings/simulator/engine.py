"""The timing of an inference engine with a prefix cache. It has some slots, reads one prompt at a
time, and caches blocks of prompts and answers.

vLLM and llama.cpp work like this. A token stands for 4 bytes of text. The cache holds blocks of
tokens, each by the hash of itself and all before it, and evicts the least recently used one first.
So the longest common beginning with an earlier prompt is known.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How fast an engine is.

    *slots*: requests that it answers at once; others wait in order of arrival. *prefill*: tokens
    of a prompt that it reads in a second, one prompt at a time. *decode*: tokens of each answer
    that it writes in a second. *cache*: tokens that its cache holds, in blocks of *block*.
    """

    slots: int = 4
    prefill: float = 4000.0
    decode: float = 40.0
    cache: int = 65_536
    block: int = 16


class Engine:
    """An engine with these *options*, whose time is that of the event loop.

    Always: at most `slots` requests are inside, and at most one prompt is being read.
    """

    def __init__(self, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self._slots = asyncio.Semaphore(self.options.slots)
        self._reading = asyncio.Lock()
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        # Totals since its start.
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0

    @asynccontextmanager
    async def read(self, prompt: bytes) -> AsyncIterator[int]:
        """Wait for a slot, and read *prompt*; inside the block, the answer is written. Yields the
        number of the prompt's tokens that came from the cache. Cancelling is safe.
        """
        size = self.options.block
        async with self._slots:
            async with self._reading:
                tokens = count_tokens(prompt)
                blocks = block_hashes(prompt, size)
                cached = self._known(blocks) * size
                await asyncio.sleep((tokens - cached) / self.options.prefill)
                self._keep(blocks)
            self.prompt_tokens += tokens
            self.cached_tokens += cached
            yield cached

    def wrote(self, text: bytes) -> None:
        """Keep the blocks of *text*: a prompt and its answer."""
        self._keep(block_hashes(text, self.options.block))

    def _known(self, blocks: Sequence[bytes]) -> int:
        known = 0
        while known < len(blocks) and blocks[known] in self._blocks:
            known += 1
        return known

    def _keep(self, blocks: Sequence[bytes]) -> None:
        # The first block is the newest: a chain is of no use without its beginning.
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) * self.options.block > self.options.cache:
            self._blocks.popitem(last=False)


def count_tokens(text: bytes) -> int:
    """Return how many tokens *text* has."""
    return len(text) // BYTES_PER_TOKEN


def block_hashes(text: bytes, block: int) -> list[bytes]:
    """Return the hash of each whole block of *block* tokens of *text*, and of all before it."""
    size = block * BYTES_PER_TOKEN
    running = hashlib.blake2b(digest_size=16)
    hashes = []
    for start in range(0, len(text) // size * size, size):
        running.update(text[start : start + size])
        hashes.append(running.copy().digest())
    return hashes

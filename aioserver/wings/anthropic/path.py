"""The fast path of a message whose events pass (streams/fast_path.py)."""

from __future__ import annotations

import re

from aioserver.protocol.eventstream import utf8
from aioserver.protocol.openai import PLAIN
from aioserver.streams.fast_path import FIRST_LINES, MAX_CHUNK_BYTES, FastPath

# An event that has a text and nothing else, behind the first line of its chunk.
_TEXT = re.compile(
    rb"event: content_block_delta\n"
    rb'data: \{"type": ?"content_block_delta", ?"index": ?\d{1,9}, ?'
    rb'"delta": ?\{"type": ?"text_delta", ?"text": ?"%b"\}\}\n\n\r\n' % PLAIN.pattern
)


class MessagePath(FastPath):
    """Forwards unchanged the events that only add a text to a block.

    Their text has only characters that stand for themselves in JSON, so that nothing in it can be
    taken for another member.
    """

    __slots__ = ()

    def forward(self, read: bytes) -> bool:
        """Forward *read*, as `FastPath.forward` does."""
        size = len(read)
        if not self.open or size > MAX_CHUNK_BYTES:
            return False
        line = FIRST_LINES[size]
        start = len(line)
        if (
            not read.startswith(line)
            or _TEXT.fullmatch(read, start) is None
            or not (read.isascii() or utf8(read))
        ):
            return False
        self._outbox.put(self, read)
        if (kept := self._kept) is not None:
            blocks = kept.blocks
            blocks += read[start : size - 2]
            if len(blocks) > kept.mark and kept.grown():
                self._stream.recount()
        self.forwarded_at = now = self._clock()
        if now - self.read_at > self._silence:
            self._silence = self._stream.record.silent(self.read_at, now)
        self.read_at = now
        self._stream.last += 1
        self._meter.events += 1
        return True

"""What an answer has said so far that is translated, and how another one goes on with it: its
chunks are read by the same writer (protocol/said.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

from aioserver.protocol.bridging.chunks import C
from aioserver.protocol.said import MAX_SAID, ChatRest, Said

if TYPE_CHECKING:
    from aioserver.protocol.bridging.chunks import ChunkReader
    from aioserver.protocol.said import Tokens


class BridgedSaid(Said, Generic[C]):
    """What the answer of a chat completion has said that *writer* has translated."""

    checked = True
    # The writer is counted by its sink.
    size = 0

    def __init__(self, writer: ChunkReader[C]) -> None:
        self.writer = writer

    @property
    def events(self) -> int:
        """How many events have had text."""
        return self.writer.texts

    def text(self) -> str | None:
        """Return the text, as `Said.text`."""
        text = self.writer.said
        return text if text and len(text.encode()) <= MAX_SAID else None

    def rest(self, earlier: Tokens) -> ChatRest:
        """Return what writes the rest as chunks, which the same writer reads."""
        self.writer.half.clear()
        return ChatRest(earlier)

"""The transcript of a translated answer, and its continuation: the same writer reads the chunks of
both (protocol/transcript.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

from aioserver.protocol.bridging.chunks import C
from aioserver.protocol.transcript import MAX_TRANSCRIPT, ChatRest, Transcript

if TYPE_CHECKING:
    from aioserver.protocol.bridging.chunks import ChunkReader
    from aioserver.protocol.transcript import Tokens


class BridgedTranscript(Transcript, Generic[C]):
    """The transcript of a chat completion that *writer* has translated."""

    # The sink counts the writer.
    size = 0

    def __init__(self, writer: ChunkReader[C], *, checked: bool = True) -> None:
        self.writer, self.checked = writer, checked

    @property
    def events(self) -> int:
        """The number of events with text."""
        return self.writer.texts

    def text(self) -> str | None:
        """Return the text, as `Transcript.text`."""
        text = self.writer.transcript
        if text is None or (self.writer.texts and not text):
            return None
        return text if len(text.encode()) <= MAX_TRANSCRIPT else None

    def rest(self, earlier: Tokens) -> ChatRest:
        """Return the object that writes the rest as chunks, which the same writer reads."""
        self.writer.half.clear()
        return ChatRest(earlier)

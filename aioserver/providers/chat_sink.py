"""The sink of a chat completion for the faces that show frames: each event is read, and becomes `chunk` objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.protocol.openai import TEXT_START
from aioserver.providers.sinks import ReadingSink, complete
from aioserver.streams import entries

if TYPE_CHECKING:
    from aioserver.protocol.openai import Reading
    from aioserver.streams.contracts import Path
    from aioserver.streams.stream import Stream


class ChatSink(ReadingSink):
    """Reads the provider's events and appends their `chunk` objects to a log."""

    def fast(self) -> Path | None:
        """Return the stream's fast path, once the shape of the provider's events is known.

        There is none while half a character waits for its other half.
        """
        if self._shape is None or not self._splitter.idle or self._reading.half:
            return None
        return self._stream.open_fast_path(self._shape)

    def _may_be_text(self, part: bytes) -> bool:
        return part.startswith(TEXT_START)

    def _append(self, parts: list[bytes]) -> None:
        self._stream.append(entries.CHUNK, parts, more=self._over)
        self._count_text()

    def _complete(self) -> None:
        complete_chat(self._stream, self._reading)


def complete_chat(stream: Stream, reading: Reading) -> None:
    """End the log of *stream* well, with the metadata that the provider has sent."""
    stream.outcome.usage = reading.usage
    complete(stream, finish_reason=reading.finish_reason, usage=reading.usage)

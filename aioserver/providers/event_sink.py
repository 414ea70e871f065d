"""The sink of a chat completion for the OpenAI face: its bytes go into the log as they come.

It ends with `[DONE]`. Where that is missing after a finish_reason, it is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from aioserver.protocol import eventstream
from aioserver.protocol.openai import bounded, usage_of
from aioserver.providers.error_mapping import error_object_fault
from aioserver.providers.sinks import PassingSink, complete

if TYPE_CHECKING:
    from aioserver.provider_errors import ProviderFault
    from aioserver.streams.contracts import Path
    from aioserver.streams.stream import Stream

DONE = b"data: [DONE]\n\n"
# A quote inside a JSON string is escaped, so these are never text that a model has written. They are
# looked for with `find` and not with a regular expression, since every byte that passes is searched.
_FINISH, _FINISH_SPACED = b'"finish_reason":"', b'"finish_reason": "'
ERROR_NAME = b'"error"'
_USAGE = b'"usage"'


class EventSink(PassingSink):
    """Appends the events of a chat completion to a log."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        # Whether a finish_reason has come.
        self._finished = False

    def fast(self) -> Path | None:
        """Return the stream's fast path; none after a finish_reason, since usage may follow."""
        if self._finished or not self._splitter.idle:
            return None
        return self._stream.open_fast_path()

    @property
    def _complete_without_mark(self) -> bool:
        return self._finished

    def _up_to_end(self, block: bytes) -> tuple[bytes, bool, bytes]:
        # Not `in`: for bytes that costs more than twice as much.
        find = block.find
        ended = False
        if find(b"[DONE]") >= 0 and (start := _done_line(block)) >= 0:
            ended = True
            block = block[:start]
        if not self._finished:
            self._finished = find(_FINISH) >= 0 or find(_FINISH_SPACED) >= 0
        if self._finished and find(_USAGE) >= 0:
            self._stream.details.usage = usage_in(block) or self._stream.details.usage
        if find(ERROR_NAME) >= 0:
            block, error = before_error(block)
            return block, ended and not error, error
        return block, ended, b""

    def _fault(self, event: bytes) -> ProviderFault:
        return error_object_fault((error_in(event) or {}).get("error"))

    def _complete(self) -> None:
        complete(self._stream, DONE)


def before_error(block: bytes, kind: str = "") -> tuple[bytes, bytes]:
    """Return the events of *block* before the first that reports an error, and that event; b"" if none does.

    *kind* is that of `error_in`.
    """
    events = eventstream.split(block)
    for number, event in enumerate(events):
        if error_in(event, kind) is not None:
            return b"".join(events[:number]), event
    return block, b""


def error_in(event: bytes, kind: str = "") -> dict[str, Any] | None:
    """Return the content of *event* if it reports an error; otherwise None.

    It has an error object; or it is one, if *kind* is passed: an event of this type.
    """
    for part in eventstream.parse(event):
        try:
            content = orjson.loads(part.data)
        except orjson.JSONDecodeError:
            continue
        if isinstance(content, dict) and (
            content.get("error") or (kind and content.get("type") == kind)
        ):
            return content
    return None


def usage_in(block: bytes) -> dict[str, Any] | None:
    """Return the usage in the last event of *block* that has one; None if no event has.

    It is the usage of a chunk, or of the response in an event.
    """
    for event in reversed(eventstream.parse(block)):
        try:
            content = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            continue
        if (usage := usage_of(content)) is not None:
            return bounded(usage)
    return None


def _done_line(block: bytes) -> int:
    """Return the index at which the line `data: [DONE]` begins, -1 if there is none."""
    index = -1
    while (index := block.find(b"[DONE]", index + 1)) >= 0:
        line = block[max(0, index - 8) : index].rstrip(b" ")
        if line.endswith((b"\ndata:", b"\rdata:")) or line == b"data:":
            return block.rindex(b"data:", 0, index)
    return -1

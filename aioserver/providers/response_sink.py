"""The sink of a streamed response (`/v1/responses`): its bytes go into the log as they come.

It ends with `response.completed`, `response.incomplete` or `response.failed`. An error that the provider reports
otherwise becomes a `response.failed`, the one error that all clients of this API take for an end.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import orjson

from aioserver.protocol import eventstream
from aioserver.protocol.responses import ENDS, up_to_end
from aioserver.providers.error_mapping import error_object_fault
from aioserver.providers.event_sink import ERROR_NAME, before_error, error_in, usage_in
from aioserver.providers.sinks import PassingSink

if TYPE_CHECKING:
    from aioserver.provider_errors import ProviderFault
    from aioserver.streams.contracts import Path
    from aioserver.streams.stream import Stream

# Events of a response in which its id is looked for.
MAX_ID_SAMPLES = 4
# The type of the events that are error objects themselves.
_ERROR = "error"


class ResponseSink(PassingSink):
    """Appends the events of a response to a log, which remembers them in its `error_format`."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        # Events in which the provider's id of the response is still looked for.
        self._id_samples_left = MAX_ID_SAMPLES

    def fast(self) -> Path | None:
        """Return the stream's fast path; none before the id of the response."""
        stream = self._stream
        if self._id_samples_left or not self._splitter.idle or stream.details.error_format is None:
            return None
        return stream.open_fast_path()

    def _up_to_end(self, block: bytes) -> tuple[bytes, bool, bytes]:
        block, ended = up_to_end(block)
        if ended:
            self._stream.details.usage = usage_in(block)
        if block.find(ERROR_NAME) >= 0:
            block, error = before_error(block, _ERROR)
            return block, ended and not error, error
        return block, ended, b""

    def _fault(self, event: bytes) -> ProviderFault:
        content = error_in(event, _ERROR) or {}
        return error_object_fault(content.get("error") or content)

    def _end_with_error(self, event: bytes, fault: ProviderFault) -> None:
        kind = (error_in(event, _ERROR) or {}).get("type")
        if kind in ENDS:
            super()._end_with_error(event, fault)
            return
        # An event without a type is replaced.
        if isinstance(kind, str):
            self._append(event)
        self._stream.fail(fault)

    def _append(self, block: bytes) -> None:
        if block:
            if self._id_samples_left:
                self._add_response_id(block)
            remember(self._stream, block)
        super()._append(block)

    def _add_response_id(self, block: bytes) -> None:
        """Let the stream be found by the id that the provider has given to the response, too."""
        for event in eventstream.parse(block)[: self._id_samples_left]:
            self._id_samples_left -= 1
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
                response_id = orjson.loads(event.data)["response"]["id"]
                if isinstance(response_id, str) and response_id:
                    self._stream.add_alias(response_id)
                    self._id_samples_left = 0
                    return


def remember(stream: Stream, block: bytes) -> None:
    """Let *stream* remember the events of *block*, the next ones of a response, as far as its errors need them."""
    form = stream.details.error_format
    if form is not None:
        size = form.size
        form.note(block, stream.last + 1)
        if form.size != size:
            stream.recount()

"""The sinks of a streamed response (`/v1/responses`): one whose bytes come as they are, and one
made of a chat completion.

The bytes of a response go into the log as they come. It ends with `response.completed`,
`response.incomplete` or `response.failed`. An error that the provider reports in another way
becomes a `response.failed`, the one error that all clients of this API take for an end.

The chunks of a chat completion become the events of a response. The log has the bytes that a
provider with responses of its own would have sent. So all later steps work as for such a provider:
the faces, the resume by `starting_after`, the memory of the last response object. An answer ends
as providers/sinks.py says of chat completions, and the response with it: normally with
`response.completed` or `response.incomplete`, or with the `response.failed` that a fault has on
every face of this API.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import orjson

from aioserver.protocol import eventstream
from aioserver.providers.error_mapping import error_object_fault
from aioserver.providers.reading_sinks import BridgingSink
from aioserver.providers.sinks import (
    PassingSink,
    before_error,
    error_in,
    usage_in,
)
from aioserver.streams.fast_path import ERROR_NAME
from aioserver.wings.responses.bridge.output import Call
from aioserver.wings.responses.events import (
    ENDS,
    failed,
    is_content,
    remember,
    up_to_end,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.provider_errors import ProviderFault
    from aioserver.streams.contracts import Path
    from aioserver.streams.stream import Stream
    from aioserver.wings.responses.bridge.events import ResponseWriter

# Events of a response in which its id is searched for.
MAX_ID_SAMPLES = 4
# The type of the events that are error objects themselves.
_ERROR = "error"


class ResponseSink(PassingSink):
    """Appends the events of a response to a log, which remembers them."""

    def __init__(self, stream: Stream, is_content: Callable[[bytes], bool] = is_content) -> None:
        super().__init__(stream, is_content)
        # Events in which the provider's id of the response is still searched for.
        self._id_samples_left = MAX_ID_SAMPLES

    def fast(self) -> Path | None:
        """Return the path; not the stream's before the id of the response is known."""
        if self._id_samples_left or not self._splitter.idle:
            return super().fast()
        return self._stream.open_fast_path()

    def _up_to_end(self, block: bytes, plain: int = 0) -> tuple[bytes, bool, bytes]:  # noqa: ARG002 - see PassingSink
        block, ended = up_to_end(block)
        if ended:
            self._stream.outcome.usage = usage_in(block)
        if block.find(ERROR_NAME) >= 0:
            block, error = before_error(block, _ERROR)
            return block, ended and not error, error
        return block, ended, b""

    def _failure(self, held: Sequence[bytes]) -> ProviderFault | None:
        for event in eventstream.each(held[-1] if held else b"", backwards=True):
            error = failed(event.data)
            return None if error is None else error_object_fault(error)
        return None

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
            self._show(event)
        self._stream.fail(fault)

    def _show(self, block: bytes, events: int = 0) -> None:
        if block:
            if self._id_samples_left:
                self._add_response_id(block)
            remember(self._stream, block)
        super()._show(block, events)

    def _add_response_id(self, block: bytes) -> None:
        """Let the stream be found by the provider's id of the response, too."""
        for event in eventstream.parse(block)[: self._id_samples_left]:
            self._id_samples_left -= 1
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
                response_id = orjson.loads(event.data)["response"]["id"]
                if isinstance(response_id, str) and response_id:
                    self._stream.add_alias(response_id)
                    self._id_samples_left = 0
                    return


class BridgeSink(BridgingSink[Call]):
    """Reads the provider's chunks, and appends the events of a response to a log."""

    def __init__(self, stream: Stream, writer: ResponseWriter) -> None:
        super().__init__(stream, writer)
        self._writer = writer

    def let_go(self) -> None:
        """Show that the response was created."""
        super().let_go()
        if not (self._stream.answered_at or self._stream.ended):
            self._append(self._open())

    def _open(self) -> list[bytes]:
        super()._open()
        self._stream.add_alias(self._writer.response_id)
        return self._writer.begin()

    def _finish(self) -> list[bytes]:
        return self._writer.finish(int(time.time()))

    def _close(self, events: list[bytes]) -> None:
        remember(self._stream, b"".join(events))
        super()._close(events)

    def _append(self, parts: list[bytes]) -> None:
        if not parts:
            return
        block = b"".join(parts)
        remember(self._stream, block)
        self._stream.forward(block, len(parts), more=self._over)
        self._count_text()

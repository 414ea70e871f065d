"""The sinks of a streamed answer of Anthropic's Messages API: one whose bytes come as they are,
and one made of a chat completion; and the meaning of the API's errors.

The bytes of an answer go into the log as they come. It ends with `message_stop`, which is added if
the answer breaks off after a stop_reason. An event `error` that ends it passes unchanged, unless
another attempt may follow, or it is about our key. `ping` is not content: it is held until there
is content.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioserver.protocol import eventstream
from aioserver.protocol.openai import bounded
from aioserver.provider_errors import (
    ProviderError,
    ProviderFault,
    ProviderRateLimited,
    ProviderRefused,
)
from aioserver.providers import error_mapping
from aioserver.providers.reading_sinks import BridgingSink
from aioserver.providers.sinks import PassingSink
from aioserver.wings.anthropic import wire
from aioserver.wings.anthropic.bridge.events import Call, MessageWriter
from aioserver.wings.anthropic.bridge.refused import translate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.streams.contracts import Path
    from aioserver.streams.stream import Stream

_USAGE, _STOP_REASON = b'"usage"', b'"stop_reason"'
# The most bytes of an error that a client gets as it is.
MAX_PASSED_BYTES = 65_536


class MessageSink(PassingSink):
    """Appends the events of a message to a log."""

    end_mark = "a stop_reason and without message_stop"

    def __init__(
        self, stream: Stream, is_content: Callable[[bytes], bool] = wire.is_content
    ) -> None:
        super().__init__(stream, is_content)
        self._usage: dict[str, Any] = {}
        # Whether a stop_reason has come.
        self._finished = False

    def fast(self) -> Path | None:
        """Return the path; the stream's between two events."""
        return self._stream.open_fast_path() if self._splitter.idle else super().fast()

    @property
    def _complete_without_mark(self) -> bool:
        return self._finished

    def _add_mark(self) -> None:
        self._show(wire.STOPPED)

    def _up_to_end(self, block: bytes, plain: int = 0) -> tuple[bytes, bool, bytes]:  # noqa: ARG002 - see PassingSink
        ended, error = False, b""
        if wire.ending(block):
            block, ended, error = _up_to_end(block)
        if block.find(_USAGE) >= 0 or block.find(_STOP_REASON) >= 0:
            self._note(block)
        return block, ended, error

    def _fault(self, event: bytes) -> ProviderFault:
        return event_fault(self._stream.outcome.provider, event)

    def _note(self, block: bytes) -> None:
        """Note the usage in *block*, and whether the message has stopped."""
        for event in eventstream.split(block):
            # The reading of an event must not depend on others that came in the same read.
            if event.find(_USAGE) >= 0 or event.find(_STOP_REASON) >= 0:
                content = wire.content_of(event)
                usage = wire.billed(wire.usage_in(content))
                if content.get("type") == "message_start":
                    # At this moment only the count of the prompt is true, since nothing was
                    # written yet.
                    usage.pop("output_tokens", None)
                self._usage = bounded({**self._usage, **usage})
                self._finished = self._finished or wire.stops(content)
        if self._usage:
            self._stream.outcome.usage = wire.with_total(self._usage)


class BridgeSink(BridgingSink[Call]):
    """Reads the provider's chunks, and appends the events of a message to a log."""

    def __init__(self, stream: Stream, writer: MessageWriter) -> None:
        super().__init__(stream, writer)
        self._writer = writer
        # White space alone is kept, and kept events do not commit to the answer.
        self._is_content = lambda _data: writer.committed

    @property
    def kept_pieces(self) -> int:
        """The pieces of calls that wait for the end of another one."""
        return super().kept_pieces + self._writer.kept_pieces

    def feed(self, data: bytes) -> bool:
        """Append the events for *data*, as `StreamSink.feed`."""
        try:
            return super().feed(data)
        except ProviderRefused as fault:
            translate(fault, fault.provider_body)
            raise

    def _open(self) -> list[bytes]:
        super()._open()
        return self._writer.begin()

    def _finish(self) -> list[bytes]:
        return self._writer.finish()

    def _append(self, parts: list[bytes]) -> None:
        if parts:
            self._stream.forward(b"".join(parts), len(parts), more=self._over)
            self._count_text()


def _up_to_end(block: bytes) -> tuple[bytes, bool, bytes]:
    """Return the events of *block* before its end, whether it ends well, and the event of an error
    that ends it.

    The event of a good end is among these events.
    """
    events = eventstream.split(block)
    for number, event in enumerate(events):
        if not wire.ending(event):
            continue
        content = wire.content_of(event)
        if content.get("type") == "message_stop":
            last = number == len(events) - 1
            return (block if last else b"".join(events[: number + 1])), True, b""
        if content.get("type") == "error" or isinstance(content.get("error"), dict):
            return b"".join(events[:number]), False, event
    return block, False, b""


def check_status(name: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raise the fault for a *status* of the provider *name*, with the error that a client gets as
    it is.

    Raises:
        ProviderFault: as `error_mapping.check_status`.
    """
    try:
        error_mapping.check_status(name, status, headers, body)
    except (ProviderRateLimited, ProviderError, ProviderRefused) as fault:
        json = error_mapping.matches_type(headers, "application/json")
        if json and len(body) <= MAX_PASSED_BYTES:
            fault.provider_answer = (status, body) if error_mapping.parses(body) else None
        raise


def event_fault(name: str, event: bytes) -> ProviderFault:
    """Return the fault of the provider *name* that *event* reports, an `error`."""
    error = wire.content_of(event).get("error")
    kind = error.get("type") if isinstance(error, dict) else None
    status = wire.STATUSES.get(kind, 500) if isinstance(kind, str) else 500
    data = eventstream.parse(event)[0].data
    try:
        check_status(name, status, {"content-type": "application/json"}, data)
    except ProviderFault as fault:
        return fault
    raise AssertionError("each status of an error is a fault")

"""The sink of a streamed answer of Anthropic's Messages API: its bytes go into the log as they come.

How an answer may end:

    message_stop               well
    an event `error`           the fault that its type means; nothing after it passes. The event itself passes, unless
                               another attempt may follow, or it is about our key
    an event that is not JSON  ProviderBadResponse
    the body ends otherwise    ProviderDisconnected, also after a stop_reason
    there is no body           ProviderBadResponse

`ping` is no answer: it passes, and another attempt may follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioserver.protocol import anthropic, eventstream
from aioserver.protocol.eventstream import EventTooLong
from aioserver.protocol.openai import bounded
from aioserver.provider_errors import (
    ProviderAuthError,
    ProviderBadResponse,
    ProviderDisconnected,
    ProviderFault,
)
from aioserver.providers.error_mapping import event_fault, message_error_fault
from aioserver.providers.sinks import before_broken, plausible
from aioserver.streams import entries

if TYPE_CHECKING:
    from aioserver.streams.stream import Stream

_USAGE = b'"usage"'


class MessageSink:
    """Appends the provider's bytes, as they are, to a log: one entry for each read.

    Always: an entry holds whole events only; nothing is appended after an error or an end.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._splitter = eventstream.Splitter(stream.max_bytes)
        self._usage: dict[str, Any] = {}
        self._begun = False

    @property
    def progress(self) -> int:
        """The number of the newest event in the log."""
        return self._stream.last

    def feed(self, data: bytes) -> bool:
        """Append the events that are whole now; return False at the end of the answer.

        Raises:
            ProviderFault: the first event is an error, or a later one is about our key. Any other error ends the log.
            ProviderBadResponse: an event is too long, or is not JSON, as far as `plausible` can tell.
        """
        self._begun = True
        try:
            block = self._splitter.feed(data)
        except EventTooLong as exc:
            raise event_fault(exc) from exc
        if not block:
            return True
        ended, error = False, b""
        if anthropic.ending(block):
            block, ended, error = _up_to_end(block)
        broken = not plausible(block)
        if broken:
            block, ended, error = before_broken(block), False, b""
        if block.find(_USAGE) >= 0:
            self._note_usage(block)
        self._append(block, more=ended or broken or bool(error))
        if broken:
            raise ProviderBadResponse("the provider sent an event that is not JSON")
        if error:
            self._end_with_error(error)
        elif ended:
            stream = self._stream
            metadata = {"provider": stream.details.provider, "model": stream.details.model}
            stream.end(entries.COMPLETE, {"metadata": metadata})
        return not (ended or error)

    def end(self) -> None:
        """Refuse the end of the body, since no `message_stop` has come.

        Raises:
            ProviderDisconnected: always, but
            ProviderBadResponse: for an empty body.
        """
        if not self._begun:
            raise ProviderBadResponse("the provider's stream is empty")
        raise ProviderDisconnected("the provider's stream ended without message_stop")

    def fast(self) -> None:
        """Return None: each event has two lines, which the fast path does not take."""

    def _append(self, block: bytes, *, more: bool) -> None:
        if not block:
            return
        stream = self._stream
        count = eventstream.count(block)
        if count and not stream.answered:
            if not all(_is_ping(event) for event in eventstream.split(block)):
                stream.mark_answered()
            elif more:
                # A fault follows at once: without the head it still has its HTTP status.
                return
            else:
                count = 0
        # Comments and pings alone pass, and are not counted before the answer.
        stream.forward(block, count, more=more)

    def _note_usage(self, block: bytes) -> None:
        for event in eventstream.split(block):
            # The reading of an event must not depend on those that came in the same read.
            if event.find(_USAGE) >= 0:
                usage = anthropic.usage_in(anthropic.content_of(event))
                self._usage = bounded({**self._usage, **usage})
        if self._usage:
            self._stream.details.usage = anthropic.with_total(self._usage)

    def _end_with_error(self, event: bytes) -> None:
        """End the log with the fault that the provider reports in *event*.

        Raises:
            ProviderFault: nothing of the answer has come, or the fault is about our key, which is never shown.
        """
        stream = self._stream
        fault: ProviderFault = message_error_fault(stream.details.provider, event)
        if not stream.answered or isinstance(fault, ProviderAuthError):
            raise fault
        self._append(event, more=True)
        stream.error = fault
        # Without `data`: the provider's own event has been passed on.
        stream.end(entries.ERROR, fault.as_chunk())


def _up_to_end(block: bytes) -> tuple[bytes, bool, bytes]:
    """Return the events of *block* before its end, whether it ends well, and the event of an error that ends it.

    The event of a good end is among those before it.
    """
    events = eventstream.split(block)
    for number, event in enumerate(events):
        if not anthropic.ending(event):
            continue
        content = anthropic.content_of(event)
        if content.get("type") == "message_stop":
            last = number == len(events) - 1
            return (block if last else b"".join(events[: number + 1])), True, b""
        if content.get("type") == "error" or isinstance(content.get("error"), dict):
            return b"".join(events[:number]), False, event
    return block, False, b""


def _is_ping(event: bytes) -> bool:
    return anthropic.content_of(event).get("type") == "ping"

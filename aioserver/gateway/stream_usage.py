"""Attempts at a streamed chat completion that ask the provider to report its usage.

Engines report no usage for a stream unless they are asked to, and its cost would be unknown. So if
a client does not ask, its request is changed to do so (protocol/model_body.py). If the answer
passes as the provider's bytes, the event that has only the usage is taken out of it
(providers/sinks.py); the WebSocket and SSE faces show it.

If an engine refuses `stream_options`, the request is sent once more without, at once and in the
same place: this is no retry. If that is answered, the option is not sent to the model for five
minutes, neither here nor over a bridge (bridging.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.errors import InvalidRequest
from aioserver.gateway.bridging import LearningAttempt
from aioserver.protocol.bridging.refusals import STATUSES, refusal
from aioserver.protocol.model_body import OPTIONS, asking
from aioserver.providers.sinks import BodySink, EventSink

if TYPE_CHECKING:
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.stream import Stream


class UsageAttempt(LearningAttempt):
    """One attempt at a streamed request whose client does not ask for the usage.

    Always: `_asks` says whether the request that was sent last asks for it.
    """

    _asks: bool = False

    def body_to_send(self) -> bytes:
        """Return the body to send; it asks for the usage unless the provider is not to be asked."""
        body, request = super().body_to_send(), self.request
        options, self._asks = request.usage_options, False
        if (
            options is None
            or OPTIONS.name in self._learnt
            or not (self.provider.settings.stream_usage or request.reading is not None)
            or self._capabilities.refuses(OPTIONS.name, self.asked_model)
        ):
            return body
        try:
            body = asking(body, options)
        except InvalidRequest:
            # The body has the key in too many places.
            return body
        self._asks = True
        return body

    def stream_sink(self, stream: Stream) -> StreamSink:
        """Return the sink that fills *stream* with the events of the answer."""
        if self.request.reading is not None:
            return super().stream_sink(stream)
        return EventSink(stream, self.request.api.content, hides_usage=self._asks)

    def repeats(self) -> bool:
        """Return whether the request is to be sent once more, in its original form, since the
        provider refuses to report the usage.
        """
        sink = self.sink
        if not self._asks or self.status not in STATUSES or not isinstance(sink, BodySink):
            return False
        if not refusal(sink.body).names(OPTIONS.name):
            return False
        self.provider.meter.attempts["http_4xx"].value += 1
        return self._repeats_without(OPTIONS.name)

"""An attempt at a streamed chat completion that is asked to report its usage.

Without being asked, engines report none for a stream, and nobody would know what it costs. So where
a client does not ask, its request does (protocol/stream_options.py). Where the answer passes as the
provider's bytes, the event that has nothing but the usage is taken out of it (providers/sinks.py);
the WebSocket and SSE faces show it.

An engine that refuses `stream_options` is asked once more without, at once and in the same place:
this is no retry. If it answers that, its model is not asked again for five minutes, neither here
nor over a bridge (bridging.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.errors import InvalidRequest
from aioserver.gateway.bridging import LearningAttempt
from aioserver.protocol.bridging.refusals import STATUSES, refusal
from aioserver.protocol.stream_options import OPTIONS, asking
from aioserver.providers.sinks import BodySink, EventSink

if TYPE_CHECKING:
    from aioserver.providers.sinks import StreamSink
    from aioserver.streams.stream import Stream


class UsageAttempt(LearningAttempt):
    """One try of a request for a stream whose client does not ask for the usage.

    Always: `_asks` says whether what was sent last does.
    """

    _asks = False

    def body_to_send(self) -> bytes:
        """Return the body to send, which asks for the usage unless the provider is not to be
        asked.
        """
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
            # It has the key in too many places.
            return body
        self._asks = True
        return body

    def stream_sink(self, stream: Stream) -> StreamSink:
        """Return what fills *stream* with the events of the answer."""
        if self.request.reading is not None:
            return super().stream_sink(stream)
        return EventSink(stream, self.request.api.content, hides_usage=self._asks)

    def repeats(self) -> bool:
        """Return whether the request is to be sent once more, as it was before the provider was
        asked for the usage, since that is refused.
        """
        sink = self.sink
        if not self._asks or self.status not in STATUSES or not isinstance(sink, BodySink):
            return False
        if not refusal(sink.body).names(OPTIONS.name):
            return False
        self.provider.meter.attempts["http_4xx"].value += 1
        return self._repeats_without(OPTIONS.name)

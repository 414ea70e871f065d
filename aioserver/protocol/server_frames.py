"""The frames of the WebSocket and SSE faces as a client reads them; messages.py writes them.

A frame with an `event_id` is an event of an answer; one without is a remark to this connection. Fields,
types and statuses that are unknown here are a later server's, and are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

# The statuses that end an answer, if the frame has an `event_id`.
ENDS = frozenset({"complete", "error", "cancelled"})

_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_EventNumber = Annotated[int, msgspec.Meta(ge=1)]


class BadFrame(ValueError):
    """The bytes are no frame of an aioserver."""


class Chunk(msgspec.Struct, frozen=True):
    """The content of a frame; its fields depend on its status."""

    type: str = ""
    data: Any = None
    metadata: dict[str, Any] = {}
    error: str = ""
    code: str = ""
    retryable: bool = False
    retry_after: _Seconds | None = None
    position: int = 0
    eta: _Seconds = 0.0


class Frame(msgspec.Struct, frozen=True):
    """One frame. *request_id* is None in a remark about the whole socket."""

    status: str
    chunk: Chunk
    request_id: str | None = None
    event_id: _EventNumber | None = None

    @property
    def ends(self) -> bool:
        """Whether this is the last event of its answer."""
        return self.event_id is not None and self.status in ENDS


_DECODER = msgspec.json.Decoder(Frame)


def parse(data: bytes) -> Frame:
    """Parse one frame.

    Raises:
        BadFrame: *data* is not JSON, or not such a frame.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"no frame of an aioserver: {error}") from None

"""The frames that the WebSocket and SSE faces send: how they are written, and how a client reads
them.

    {"request_id":"6f0c","event_id":3,"status":"chunk",
     "chunk":{"type":"text","data":"Hel","metadata":{}}}

The frames of clients are in client_frames.py. A frame with an `event_id` is an event of an answer;
one without is a remark to this connection. A client ignores fields, types and statuses that it
does not know: they belong to a later server.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import orjson


def frame_head(request_id: str | None) -> bytes:
    """Return the bytes with which every frame of one request begins; rendered once per stream."""
    return b'{"request_id":%b,' % orjson.dumps(request_id)


def frame(head: bytes, event_id: int, status: bytes, chunk: bytes) -> bytes:
    """Return an event of a stream as a frame; *chunk* is JSON."""
    return b'%b"event_id":%d,"status":"%b","chunk":%b}' % (head, event_id, status, chunk)


def text_frame(head: bytes, event_id: int, text: bytes) -> bytes:
    """Return the frame of a `chunk` event with a text.

    *text* is what follows the opening quote of a JSON string, its closing quote included.
    """
    return (
        b'%b"event_id":%d,"status":"chunk",'
        b'"chunk":{"type":"text","data":"%b,"metadata":{}}}' % (head, event_id, text)
    )


def loose_frame(request_id: str | None, status: str, chunk: dict[str, Any]) -> bytes:
    """Return a frame that is not an event of a stream: `queued`, `pong`, or an error of the
    socket.
    """
    return orjson.dumps({"request_id": request_id, "status": status, "chunk": chunk})


# The statuses that end an answer, if the frame has an `event_id`.
ENDS = frozenset({"complete", "error", "cancelled"})

_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_EventNumber = Annotated[int, msgspec.Meta(ge=1)]


class BadFrame(ValueError):
    """The bytes are not a frame of an aioserver."""


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
        raise BadFrame(f"not a frame of an aioserver: {error}") from None

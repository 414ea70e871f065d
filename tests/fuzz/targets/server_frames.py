"""The frames that a server sends, as the client library reads them: against the standard library's
JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

from aioserver.client.answer import (
    Complete,
    Event,
    Processing,
    Queued,
    Reasoning,
    Text,
    ToolCalls,
    event_of,
)
from aioserver.client.faults import Broken
from aioserver.client.transport import fault_of
from aioserver.protocol import frames
from tests.fuzz.inputs import parts

WORDS = (
    *(b'"event_id":', b'"status":', b'"chunk":', b'"metadata":', b'"retry_after":', b'"usage":'),
    *(
        b'"processing"',
        b'"complete"',
        b'"tool_calls"',
        b'"reasoning"',
        b'"data":',
        b"[{}]",
        b"0.5",
    ),
)


def run(data: bytes) -> None:
    """Check that each line is a frame with values of the right kinds, or is refused as one
    error.
    """
    for line in parts(data).content.split(b"\n"):
        with contextlib.suppress(frames.BadFrame):
            frame = frames.parse(line)
            # What is unknown is passed over, also if it is not UTF-8.
            _check_frame(frame, json.loads(line.decode(errors="replace")))
            with contextlib.suppress(Broken):
                _check_event(event_of(frame))


def _check_frame(frame: frames.Frame, plain: Any) -> None:
    assert frame.request_id == plain.get("request_id")
    assert frame.event_id == plain.get("event_id")
    assert frame.status == plain["status"]
    assert frame.event_id is None or frame.event_id >= 1
    fault = fault_of(frame)
    assert fault.retryable in {True, False}
    for seconds in (fault.retry_after or 0.0, frame.chunk.eta):
        assert 0 <= seconds < math.inf


def _check_event(event: Event | None) -> None:
    match event:
        case Text(text) | Reasoning(text):
            assert isinstance(text, str)
        case ToolCalls(deltas):
            assert all(isinstance(delta, dict) for delta in deltas)
        case Queued(position, eta):
            assert isinstance(position, int)
            assert eta >= 0
        case Processing(provider, model, conversation_id):
            assert isinstance(provider, str)
            assert isinstance(model, str)
            assert isinstance(conversation_id, str | None)
        case Complete(finish_reason, usage, provider, model):
            assert isinstance(finish_reason, str | None)
            assert isinstance(usage, dict)
            assert isinstance(provider, str)
            assert isinstance(model, str)

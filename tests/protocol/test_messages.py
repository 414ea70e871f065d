"""The frames that go to clients, byte for byte."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from aioserver.errors import ServerAtCapacity
from aioserver.protocol import frames

unhurried = settings(max_examples=40)


@unhurried
@given(
    st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(1, 2**40),
    st.sampled_from([b"processing", b"chunk", b"complete", b"error", b"cancelled"]),
)
def test_an_event_of_a_log_is_a_frame(request_id: str | None, number: int, status: bytes) -> None:
    frame = frames.frame(frames.frame_head(request_id), number, status, b'{"a":"\\u20ac"}')

    assert json.loads(frame) == {
        "request_id": request_id,
        "event_id": number,
        "status": status.decode(),
        "chunk": {"a": "€"},
    }


def test_the_frame_of_the_contract_is_byte_for_byte() -> None:
    head = frames.frame_head("6f0c")
    chunk = b'{"type":"text","data":"Hel","metadata":{}}'

    assert frames.frame(head, 3, b"chunk", chunk) == (
        b'{"request_id":"6f0c","event_id":3,"status":"chunk",'
        b'"chunk":{"type":"text","data":"Hel","metadata":{}}}'
    )


def test_a_loose_frame_has_no_event_id() -> None:
    error = ServerAtCapacity("full", retry_after=2.0)

    assert json.loads(frames.loose_frame(None, "error", error.as_chunk())) == {
        "request_id": None,
        "status": "error",
        "chunk": {
            "error": "full",
            "code": "server_at_capacity",
            "retryable": True,
            "retry_after": 2.0,
        },
    }
    assert frames.loose_frame("p", "pong", {}) == (
        b'{"request_id":"p","status":"pong","chunk":{}}'
    )

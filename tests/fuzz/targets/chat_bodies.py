"""Bodies of chats: `/v1/chat/completions` with its model, and questions on the SSE face."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from aioserver.errors import InvalidJson, InvalidRequest
from aioserver.protocol import client_frames, model_body
from aioserver.protocol.client_frames import PAYLOAD_FIELDS
from aioserver.protocol.steps import at_once
from aioserver.wings.responses.items import continued
from tests.fuzz.inputs import parts, windows

WORDS = (
    *(b'"%b":' % name.encode() for name in PAYLOAD_FIELDS),
    *(b'"model":', rb'"mod\u0065l":', b'"stream":', b'"store":', b'"input":', b'"user":'),
    *(b'"previous_response_id":', b'"stream_options":', b'"include_usage":', b'"request_id":"r"'),
    *(b"{}", b"[]", b'"model"', rb"\ud800", rb"\udc00", rb"\u0000", b"-0", b"1E5", b"NaN"),
    *(b"\t", b'"role":"user"'),
)
if TYPE_CHECKING:
    from aioserver.protocol.client_frames import Chat
    from aioserver.protocol.model_body import ModelBody
    from tests.fuzz.inputs import Input

MODEL = 'n"é'


def run(data: bytes) -> None:
    """Read the content as either body, at once and in small windows."""
    case = parts(data)
    _read(case)
    with windows(case.window):
        _read(case)


def _read(case: Input) -> None:
    if case.choice % 2:
        with contextlib.suppress(InvalidJson, InvalidRequest):
            _check_question(at_once(client_frames.reading_question(case.content)))
        return
    try:
        body = at_once(model_body.reading(case.content))
    except (InvalidJson, InvalidRequest):
        body = None
    if body is not None:
        _check_completion(body, case.content)
    else:
        assert not _plain_chat(case.content), "a good body is refused"


def _check_question(chat: Chat) -> None:
    assert len(chat.digest()) == 32
    json.loads(chat.options)
    json.loads(chat.messages or chat.text or b"")


def _check_completion(body: ModelBody, content: bytes) -> None:
    before = _loaded(body.data)
    assert len(body.data) == len(content)
    if model_body.simple(content):
        assert body.data == content
    assert body.model == before.get("model")
    assert body.streamed == (before.get("stream") is True)
    store, previous = before.get("store"), before.get("previous_response_id")
    assert body.stored == (store if isinstance(store, bool) else None)
    assert body.previous_response_id == (previous if isinstance(previous, str) else None)
    # In a larger body the model may have more places than are told apart.
    if len(content) < 2000:
        after = _loaded(body.with_model(MODEL))
        assert after == {**before, "model": MODEL}, "something else was replaced"
        if body.usage_options is not None:
            asking = _loaded(model_body.asking(body.data, body.usage_options))
            options = {**(before.get("stream_options") or {}), "include_usage": True}
            assert asking == {**before, "stream_options": options}, "something else was edited"
        with contextlib.suppress(InvalidRequest):
            longer = _loaded(at_once(continued(body.data, [b'{"a":"b"}'], 1 << 20)))
            own = before.pop("input", None)
            before.pop("previous_response_id", None)
            if isinstance(own, str):
                own = [{"type": "message", "role": "user", "content": own}]
            items = [{"a": "b"}, *own] if isinstance(own, list) else [{"a": "b"}]
            assert longer == {**before, "input": items}, "another conversation"


def _loaded(body: bytes) -> dict[str, Any]:
    loaded = json.loads(body, parse_int=_number, parse_float=_number, parse_constant=_no_constant)
    assert isinstance(loaded, dict)
    return loaded


def _number(written: str) -> tuple[str, ...]:
    return (written,)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _plain_chat(body: bytes) -> bool:
    try:
        loaded = json.loads(body.decode("ascii"), parse_constant=_no_constant)
    except (ValueError, AssertionError, RecursionError):
        return False
    return (
        isinstance(loaded, dict)
        and isinstance(loaded.get("model", "m"), str)
        and 0 < len(loaded.get("model", "m")) < 100
        and isinstance(loaded.get("stream", True), bool)
        and body.count(b"[") + body.count(b"{") < 100
    )

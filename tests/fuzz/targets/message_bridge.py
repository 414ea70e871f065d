"""The bridge from Messages: any request for a message as one for a chat completion, and the chunks
of its answer as events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from aioserver.errors import AioserverError
from aioserver.protocol import model_body
from aioserver.protocol.steps import at_once
from aioserver.streams.stream import Stream
from aioserver.wings.anthropic.bridge.events import MessageWriter
from aioserver.wings.anthropic.bridge.request import chat_request
from aioserver.wings.anthropic.sink import BridgeSink
from aioserver.wings.anthropic.wire import MessageErrors
from tests.fuzz.inputs import fed, of_bridge
from tests.support.message_events import check_run, put_together, read_events
from tests.support.reference_messages import check_order

if TYPE_CHECKING:
    from collections.abc import Iterable

WORDS = (
    *(b'"choices":[{"index":0,', b'"delta":{', b'"content":"a"', b'"finish_reason":"stop"'),
    *(b'"tool_calls":[{', b'"function":{', b'"name":"f"', b'"arguments":"{', b'"id":"c1"'),
    *(b'"reasoning":"r"', b'"refusal":"n"', b'"usage":{', b'"index":1', b'"arguments":"}"'),
    *(b'"messages":[', b'"role":"user"', b'"role":"assistant"', b'"type":"tool_use"'),
    *(b'"type":"tool_result"', b'"tool_use_id":"c1"', b'"input":{}', b'"type":"text"'),
    *(b'"tools":[{', b'"input_schema":{}', b'"tool_choice":', b'"role":"system"'),
)
ASKED = b'{"model":"m","messages":[{"role":"user","content":"x"}],"thinking":{"type":"adaptive"}}'


def run(data: bytes) -> None:
    """Take the content for the body of a request, or for an answer."""
    of_bridge(data, _check_request, _play)


def _check_request(content: bytes) -> None:
    try:
        body = at_once(model_body.reading(content))
        chat = at_once(chat_request(body.with_model("m"), reasoning_field="reasoning"))
    except AioserverError:
        return
    sent = orjson.loads(chat.body)
    assert sent["model"] == "m"
    assert ("stream" in sent) == body.streamed
    check_order(sent["messages"])
    assert len(sent.get("tools", ())) == len(chat.tools.functions)
    assert chat.asked_tokens > 0


def _play(reads: Iterable[bytes]) -> list[Any]:
    stream = Stream("r1", "me", window=30.0, max_bytes=1 << 22)
    stream.outcome.provider, stream.outcome.model = "sim", "a-model"
    stream.append_processing()
    stream.events = MessageErrors()
    writer = MessageWriter(at_once(chat_request(ASKED)), "0" * 32, 1 << 22)
    fault = fed(BridgeSink(stream, writer), stream, reads)
    events = read_events(b"".join(entry.data for entry in stream.entries))
    if not fault:
        check_run(events)
    else:
        assert events.pop()["type"] == "error"
        if events:
            put_together(events)
            assert events[-1]["type"] != "message_stop"
    return [fault, stream.end_status, stream.outcome.usage, events]

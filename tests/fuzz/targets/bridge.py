"""The bridge: any request for a response as one for a chat completion, and the chunks of its
answer as events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from aioserver.errors import AioserverError
from aioserver.protocol import eventstream, model_body
from aioserver.protocol.steps import at_once
from aioserver.streams.stream import Stream
from aioserver.wings.responses.bridge.events import ResponseWriter
from aioserver.wings.responses.bridge.output import Frame
from aioserver.wings.responses.bridge.request import chat_request
from aioserver.wings.responses.events import ResponseEvents
from aioserver.wings.responses.sinks import BridgeSink
from tests.fuzz.inputs import fed, of_bridge
from tests.support.reference_messages import check_order
from tests.support.response_events import check_run

if TYPE_CHECKING:
    from collections.abc import Iterable

WORDS = (
    *(b'"choices":[{"index":0,', b'"delta":{', b'"content":"a"', b'"finish_reason":"stop"'),
    *(b'"tool_calls":[{', b'"function":{', b'"name":"f"', b'"arguments":"{', b'"id":"c1"'),
    *(b'"reasoning":"r"', b'"refusal":"n"', b'"usage":{', b'"index":1', b'"logprobs":'),
    *(b'"input":[', b'"role":"user"', b'"type":"function_call"', b'"call_id":"c1"', b'"output":'),
    *(b'"tools":[{', b'"type":"function"', b'"type":"custom"', b'"tool_choice":', b'"text":{'),
)
ASKED = b'{"model":"m","input":"x","stream":true,"tools":[{"type":"custom","name":"f"}],"top_logprobs":1}'


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
    repeated = orjson.loads(b"{%b}" % chat.repeated)
    assert repeated["store"] == (body.stored is not False)


def _play(reads: Iterable[bytes]) -> list[Any]:
    stream = Stream("r1", "me", window=30.0, max_bytes=1 << 22)
    stream.outcome.provider, stream.outcome.model = "sim", "a-model"
    stream.append_processing()
    stream.events = form = ResponseEvents()
    request = at_once(chat_request(ASKED))
    writer = ResponseWriter(request, Frame("resp_1", 0, "m", request.repeated), 1 << 22)
    fault = fed(BridgeSink(stream, writer), stream, reads)
    blocks = eventstream.parse(b"".join(entry.data for entry in stream.entries))
    events = [orjson.loads(block.data) for block in blocks]
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(len(events)))
    assert form.last_sequence == len(events) - 1
    if not fault:
        # The time of its end.
        check_run(events)["completed_at"] = None
    return [fault, stream.end_status, stream.outcome.usage, events]

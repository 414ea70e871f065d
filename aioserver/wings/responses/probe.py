"""An operator's test of tool calls, as a request for a response (gateway/probe.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from aioserver.gateway import probe
from aioserver.protocol import eventstream
from aioserver.wings.responses.attempt import ResponseAttempt, ResponseRequest

if TYPE_CHECKING:
    from aioserver.config import settings


def new() -> probe.Probe:
    """Return a new one."""
    request = ResponseRequest(_body, None, streamed=True)
    return probe.Probe(request=request, make_attempt=ResponseAttempt, calls=_calls)


def _body(provider: settings.Provider, model: str | None) -> bytes:
    tool = {
        "type": "function",
        "name": probe.TOOL,
        "description": probe.DESCRIPTION,
        "parameters": probe.PARAMETERS,
    }
    return orjson.dumps(
        {
            "model": model or provider.model,
            "max_output_tokens": probe.MAX_TOKENS,
            "stream": True,
            "store": False,
            "input": probe.QUESTION,
            "tools": [tool],
            "parallel_tool_calls": False,
            "reasoning": {"effort": "low"},
        }
    )


def _calls(events: bytes) -> list[str]:
    done = [
        orjson.loads(event.data)["item"]
        for event in eventstream.parse(events)
        if event.event == b"response.output_item.done"
    ]
    return [item["arguments"] for item in done if item["type"] == "function_call"]

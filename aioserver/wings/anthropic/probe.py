"""An operator's test of tool calls, as a request for a message (gateway/probe.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from aioserver.gateway import probe
from aioserver.protocol import eventstream
from aioserver.providers.request import ProviderRequest
from aioserver.wings.anthropic import wire
from aioserver.wings.anthropic.api import MESSAGES
from aioserver.wings.anthropic.attempt import MessageAttempt

if TYPE_CHECKING:
    from aioserver.config import settings


def new() -> probe.Probe:
    """Return a new one."""
    request = ProviderRequest(MESSAGES, _body, streamed=True)
    return probe.Probe(request=request, make_attempt=MessageAttempt, calls=_calls)


def _body(provider: settings.Provider, model: str | None) -> bytes:
    tool = {
        "name": probe.TOOL,
        "description": probe.DESCRIPTION,
        "input_schema": probe.PARAMETERS,
    }
    return orjson.dumps(
        {
            "model": model or provider.model,
            "max_tokens": probe.MAX_TOKENS,
            "stream": True,
            "messages": [{"role": "user", "content": probe.QUESTION}],
            "tools": [tool],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "output_config": {"effort": "low"},
            "top_k": 40,
        }
    )


def _calls(events: bytes) -> list[str]:
    calls: list[str] = []
    for event in eventstream.split(events):
        content = wire.content_of(event)
        if content.get("type") == "content_block_start":
            if content["content_block"]["type"] == "tool_use":
                calls.append("")
        elif content.get("type") == "content_block_delta" and calls:
            calls[-1] += content["delta"].get("partial_json", "")
    return calls

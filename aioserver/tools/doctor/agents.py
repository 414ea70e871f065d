"""The check whether agents can work with a provider, by questions as agents ask them.

Each question wants one call of a tool. It goes to a server in this process, which translates it for
a provider that has chat completions only. The check finds models that answer with text instead of a
call, and engines that leave calls in the text.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from aioserver.gateway.bridging import ABSENT_STATUSES
from aioserver.protocol import eventstream
from aioserver.server.runner import Runner
from aioserver.tools.doctor.results import Result, ok, skip, warn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.providers.provider import Provider
    from aioserver.server.app import Server

QUESTION = "Call the tool `note` once, with the word ready. Say nothing else."
TOOL = {"name": "note", "description": "Notes a word."}
PARAMETERS = {
    "type": "object",
    "properties": {"word": {"type": "string"}},
    "required": ["word"],
}
# Tokens that an answer may have: some models think first.
MAX_TOKENS = 512
# The body for each path below `/v1`. It has every parameter that an engine may not know.
QUESTIONS: dict[str, dict[str, Any]] = {
    "responses": {
        "max_output_tokens": MAX_TOKENS,
        "store": False,
        "input": QUESTION,
        "tools": [{"type": "function", **TOOL, "parameters": PARAMETERS}],
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low"},
    },
    "messages": {
        "max_tokens": MAX_TOKENS,
        "messages": [{"role": "user", "content": QUESTION}],
        "tools": [{**TOOL, "input_schema": PARAMETERS}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "output_config": {"effort": "low"},
        "top_k": 40,
    },
}
HINT = (
    "agents need a model that was trained for calls, and an engine that finds them in its "
    "answers (vLLM: --enable-auto-tool-choice, --tool-call-parser; llama.cpp: --jinja)"
)


async def agents(server: Server, provider: Provider) -> AsyncIterator[Result]:
    """Ask *provider* each question over *server*."""
    model, bridged = f"{provider.name}/{provider.settings.model}", provider.meter.bridged
    runner = Runner(server)
    await runner.setup()
    try:
        (listening, *_) = await runner.listen()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{listening.port}") as session:
            for path, question in QUESTIONS.items():
                shown, before, began = f"/v1/{path}", bridged[path].value, time.perf_counter()
                if path == "messages" and provider.settings.messages is False:
                    yield skip(f"{shown}: not asked for, as messages is false")
                    continue
                body = {"model": model, "stream": True, **question}
                async with session.post(shown, json=body) as response:
                    status, data = response.status, await response.read()
                took, calls = time.perf_counter() - began, _calls(data)
                if calls is None:
                    hint = "docs/errors.md explains the codes of errors"
                    if path == "messages" and status in ABSENT_STATUSES:
                        hint = (
                            "`messages: auto` has its requests translated, if it has no such path"
                        )
                    yield warn(f"{shown}: no whole answer: HTTP {status}", hint)
                elif bridged[path].value == before:
                    yield ok(f"{shown}: it has that, and answers", seconds=took)
                elif len(calls) == 1 and '"word"' in calls[0]:
                    yield ok(f"{shown}, translated: its tool was called", seconds=took)
                else:
                    text = f"{len(calls)} calls of its tool came, or without its argument"
                    yield warn(f"{shown}, translated: {text}", HINT)
    finally:
        await runner.cleanup()


def _calls(data: bytes) -> list[str] | None:
    """Return the arguments of each call in the events of an answer, of either API; None if the
    answer is not complete.
    """
    calls: list[str] = []
    for event in eventstream.parse(data):
        match orjson.loads(event.data):
            case {"item": {"type": "function_call", "arguments": str(arguments)}} if arguments:
                calls.append(arguments)
            case {"content_block": {"type": "tool_use"}}:
                calls.append("")
            case {"delta": {"partial_json": str(part)}} if calls:
                calls[-1] += part
            case {"type": "response.completed" | "response.incomplete" | "message_stop"}:
                return calls
    return None

"""What becomes of a request over a bridge that an engine refuses, in the words of engines that exist
(tests/support/engine_refusals.py): it is sent once more without what was refused, or its client
learns that it is too long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from aioserver.gateway.bridging import MIN_LEFT, SPARE
from tests.support.engine_refusals import EVERY, Refused
from tests.support.server import HTTP_CLIENT, QUICK
from tests.support.web_app import served

if TYPE_CHECKING:
    from tests.support.server import MakeServer

WANTED = 32_000
TOOL = {"type": "object", "properties": {"a": {"type": "string"}}}
ASKED: dict[str, dict[str, Any]] = {
    "messages": {
        "max_tokens": WANTED,
        "messages": [{"role": "user", "content": "Hello"}],
        "tools": [{"name": "f", "input_schema": TOOL}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "output_config": {"effort": "low"},
        "top_k": 5,
    },
    "responses": {
        "max_output_tokens": WANTED,
        "input": "Hello",
        "tools": [{"type": "function", "name": "f", "parameters": TOOL}],
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low"},
    },
}
CHUNKS = (
    b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n'
    b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b"data: [DONE]\n\n"
)


class Engines:
    """Engines, each of which refuses its first request in one way; *bodies* has what each got."""

    def __init__(self) -> None:
        self.bodies: list[list[dict[str, Any]]] = [[] for _ in EVERY]

    async def complete(self, request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        self.bodies[number].append(await request.json())
        if len(self.bodies[number]) == 1:
            refused = EVERY[number]
            return web.Response(
                status=refused.status, body=refused.data, content_type="application/json"
            )
        return web.Response(body=CHUNKS, content_type="text/event-stream")


def expected(refused: Refused, sent: dict[str, Any]) -> dict[str, Any] | None:
    """The request that is sent once more, where the first was *sent*; None: none is."""
    again = dict(sent)
    if words := [word for word in refused.words if word in sent]:
        return {name: value for name, value in sent.items() if name not in words}
    if refused.renames:
        again["max_completion_tokens"] = again.pop("max_tokens")
    elif refused.limit is not None:
        left = refused.limit - (refused.asked or 0) - SPARE
        if not MIN_LEFT <= left < WANTED:
            return None
        again["max_tokens"] = left
    elif refused.most is not None:
        again["max_tokens"] = refused.most
    return again if again != sent else None


@pytest.mark.parametrize("path", ASKED)
async def test_what_an_engine_refuses_is_learned(make_server: MakeServer, path: str) -> None:
    engines = Engines()
    app = web.Application()
    app.router.add_post("/{number}/v1/chat/completions", engines.complete)
    async with served(app) as url:
        entries = {
            f"llm.providers.p{number}": {
                "base_url": f"{url}/{number}/v1",
                "model": "m",
                "http_client": {**HTTP_CLIENT},
                "messages": "bridge",
                "responses": False,
            }
            for number in range(len(EVERY))
        }
        server = await make_server(QUICK, **entries)
        for number, refused in enumerate(EVERY):
            body = {"model": f"p{number}", "stream": True, **ASKED[path]}
            async with server.session.post(f"{server.v1}/{path}", json=body) as response:
                answer = await response.text()

            first, *more = engines.bodies[number]
            again = expected(refused, first)
            if again is None:
                assert not more, refused.engine
                assert response.status == refused.status, refused.engine
                words = "prompt is too long" if path == "messages" else "context_length_exceeded"
                assert (words in answer) == refused.too_long, refused.engine
                continue
            assert response.status == 200, (refused.engine, answer)
            assert "Hi" in answer
            (second,) = more
            if refused.limit is not None and refused.asked is None:
                # By an estimate of the prompt, which is short.
                bound = second.pop("max_tokens")
                assert again.pop("max_tokens") - 200 < bound < refused.limit, refused.engine
            assert second == again, refused.engine

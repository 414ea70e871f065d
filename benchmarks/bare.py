"""The bare pass-through that aioserver is compared with: what aiohttp costs when nothing is kept.

An ordinary aiohttp program that relays a provider's answers as HTTP, SSE and WebSocket. It has no
limits, no log, no resume, no retries and no metrics, so that a ratio to it says what those cost.

    python benchmarks/bare.py --port 8003 --provider http://127.0.0.1:9100 [--loop asyncio]
"""

import argparse
import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

import uvloop
from aiohttp import ClientSession, TCPConnector, WSMsgType, web

COMPLETIONS = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
SESSION = web.AppKey("session", ClientSession)
LARGEST = 16 << 20  # bytes of a body, as aioserver has it


async def session(
    app: web.Application, provider: str, authority: str | None
) -> AsyncIterator[None]:
    encryption = ssl.create_default_context(cafile=authority)
    # limit=0: aiohttp's default of 100 connections would queue what the other side lets through.
    async with ClientSession(provider, connector=TCPConnector(limit=0, ssl=encryption)) as app[
        SESSION
    ]:
        yield


async def completions(request: web.Request) -> web.StreamResponse:
    """Relay a request, its answer as it comes."""
    body = await request.read()
    async with request.app[SESSION].post(COMPLETIONS, data=body, headers=JSON) as answer:
        if answer.content_type != "text/event-stream":
            return web.Response(
                body=await answer.read(), status=answer.status, content_type=answer.content_type
            )
        response = web.StreamResponse(status=answer.status, headers=EVENT_STREAM)
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


async def chat(request: web.Request) -> web.WebSocketResponse:
    """Answer each chat message of a socket, one after the other."""
    socket = web.WebSocketResponse(compress=False)
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await answer_chat(request.app[SESSION], socket, json.loads(message.data))
    return socket


async def answer_chat(
    provider: ClientSession, socket: web.WebSocketResponse, command: dict[str, Any]
) -> None:
    request_id, number = command["request_id"], 0

    async def send(status: str, chunk: dict[str, Any]) -> None:
        nonlocal number
        number += 1
        frame = {"request_id": request_id, "event_id": number, "status": status, "chunk": chunk}
        await socket.send_str(json.dumps(frame, separators=(",", ":")))

    body = {
        "model": "mock-model",
        "stream": True,
        "messages": [{"role": "user", "content": command["payload"]["text"]}],
    }
    finish_reason = None
    async with provider.post(COMPLETIONS, json=body) as answer:
        if answer.status != 200:
            await send("error", {"error": f"the provider answered {answer.status}"})
            return
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                if text := choice["delta"].get("content"):
                    await send("chunk", {"type": "text", "data": text, "metadata": {}})
                finish_reason = choice["finish_reason"] or finish_reason
    await send("complete", {"metadata": {"finish_reason": finish_reason}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--provider", required=True, help="where the requests go on to")
    parser.add_argument("--authority", help="a certificate that the provider's is checked against")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    options = parser.parse_args()

    app = web.Application(client_max_size=LARGEST)
    app.cleanup_ctx.append(lambda app: session(app, options.provider, options.authority))
    app.router.add_post(COMPLETIONS, completions)
    app.router.add_get("/ws/chat", chat)
    web.run_app(
        app,
        host="127.0.0.1",
        port=options.port,
        backlog=4096,
        access_log=None,
        print=None,
        loop=uvloop.new_event_loop() if options.loop == "uvloop" else asyncio.new_event_loop(),
    )


if __name__ == "__main__":
    main()

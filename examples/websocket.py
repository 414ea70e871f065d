"""Ask over the WebSocket face and print each frame as it comes.

    python examples/websocket.py ["Hello"] [--url ws://localhost:8000/ws/chat]

The frames, and what else can be sent: docs/faces.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import uuid

import aiohttp


async def main() -> None:
    """Send one question, and print the frames up to the end of its answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("text", nargs="?", default="Hello")
    parser.add_argument("--url", default="ws://localhost:8000/ws/chat")
    options = parser.parse_args()
    command = {
        "action": "chat",
        "request_id": str(uuid.uuid4()),
        "payload": {"text": options.text},
    }
    async with aiohttp.ClientSession() as session, session.ws_connect(options.url) as ws:
        await ws.send_json(command)
        async for message in ws:
            print(message.data)
            if json.loads(message.data)["status"] in {"complete", "error", "cancelled"}:
                break


if __name__ == "__main__":
    try:
        asyncio.run(main())
        sys.stdout.flush()
    except* BrokenPipeError:  # as of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

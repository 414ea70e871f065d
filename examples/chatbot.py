"""A chatbot in the terminal.

The server keeps the conversation; an empty line or Ctrl-D ends it.
"""

import asyncio
import sys

from aioserver.client import AnswerError, Client


async def main(url: str = "http://127.0.0.1:8000") -> None:
    """Answer each line of stdin."""
    async with Client(url) as client:
        conversation = client.conversation()
        while question := (await asyncio.to_thread(sys.stdin.readline)).strip():
            try:
                async for piece in conversation.chat(question):
                    print(piece, end="", flush=True)
                print("\n")
            except AnswerError as error:
                print(f"[{error}]\n")


asyncio.run(main(*sys.argv[1:]))

"""The CPU time of an event over the bridges, as a ratio to one of chat completions that pass; that
of a long history; and how long a stream waits while large requests are translated.

    python benchmarks/bridge.py                    # about a minute
    python benchmarks/bridge.py --events 20000 --rounds 5

The provider sends the next event once the client has the last one, so that each is read alone;
`--block` sends so many at once. The paths take turns, and the least of all rounds counts: what
else the machine does only adds. The gap is the longest time between two events of a stream whose
next event is sent at once, while CROWD requests of 2 MiB come at once, by the path that these
take; those of chat completions pass, and tell what of it is the machine's and this program's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml
from engines import started
from process import usage

from tests.support.server import HTTP_CLIENT

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}],
}
EVENT = b"data: %b\n\n" % json.dumps(CHUNK).encode()
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
HELLO = [{"role": "user", "content": "Hello"}]
# By the path: a request, and what each event of a text has in it.
PATHS: dict[str, tuple[dict[str, Any], bytes]] = {
    "chat/completions": ({"model": "m", "messages": HELLO, "stream": True}, b'"content": " word"'),
    "messages": (
        {"model": "m", "max_tokens": 1000, "messages": HELLO, "stream": True},
        b'"text_delta"',
    ),
    "responses": ({"model": "m", "input": "Hello", "stream": True}, b'"delta":" word"'),
}


class Provider:
    """Answers each request with *events* events, *block* at a time, once `told` of the last."""

    def __init__(self, events: int, block: int) -> None:
        self.events, self.block = events, block
        self.arrived = asyncio.Semaphore(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                writer.close()
                return
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            body = await reader.readexactly(size)
            if b'"stream":true' not in body and b'"stream": true' not in body:
                text = json.dumps(
                    {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}
                ).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(text), text)
                )
                continue
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            data = EVENT * self.block
            for _ in range(self.events // self.block):
                writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                for _ in range(self.block):
                    await self.arrived.acquire()
            writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(END), END))


async def stream(
    port: int, path: str, provider: Provider, gaps: list[float] | None = None
) -> None:
    """Ask for one stream below *path*, and read it to its end; *gaps* gets the seconds between its
    reads.
    """
    body, mark = PATHS[path]
    reader, writer = await ask(port, path, body)
    rest = b""
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head[:20]:
        raise SystemExit(f"{path}: {head!r} {await reader.read()!r}")
    before = time.perf_counter()
    while True:
        data = await reader.read(1 << 16)
        now = time.perf_counter()
        if gaps is not None:
            gaps.append(now - before)
        before = now
        seen = rest + data
        for _ in range(seen.count(mark)):
            provider.arrived.release()
        # A mark may be cut.
        last = seen.rfind(mark)
        rest = seen[max(last + len(mark) if last >= 0 else 0, len(seen) - len(mark) + 1) :]
        if not data or b"0\r\n\r\n" in data:
            break
    writer.close()


async def ask(port: int, path: str, body: object) -> Any:
    """Send a request with this *body* to *path*, and return the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    content = json.dumps(body).encode()
    writer.write(
        b"POST /v1/%b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n%b"
        % (path.encode(), len(content), content)
    )
    return reader, writer


def history(size: int) -> dict[str, Any]:
    """Return a request for a message with about *size* bytes of turns, half of them with calls."""
    turns: list[dict[str, Any]] = []
    text = "The quick brown fox — jumps over “the” lazy dog.\n" * 20
    while size > 0:
        name = f"toolu_{len(turns)}"
        use = {"type": "tool_use", "id": name, "name": "Bash", "input": {"command": text[:300]}}
        result = {"type": "tool_result", "tool_use_id": name, "content": text}
        turns += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": [{"type": "text", "text": text}, use]},
            {"role": "user", "content": [result]},
        ]
        size -= 4 * len(text.encode())
    return {"model": "m", "max_tokens": 1000, "messages": [*turns, *HELLO]}


async def whole(port: int, body: object, path: str = "messages") -> None:
    """Ask for a message that is not streamed, or for what *path* has, and read it."""
    reader, writer = await ask(port, path, body)
    answer = await reader.read()
    writer.close()
    if b" 200 " not in answer[:20]:
        raise SystemExit(answer[:500].decode())


async def measure(options: argparse.Namespace, pid: int, port: int, provider: Provider) -> None:
    """Measure, and print."""

    async def cost(run: Callable[[], Any]) -> float:
        before, _ = usage(pid)
        await run()
        return usage(pid)[0] - before

    least: dict[str, float] = {}
    for _ in range(options.rounds):
        for path in PATHS:
            spent = await cost(partial(stream, port, path, provider))
            least[path] = min(spent, least.get(path, spent))
    for path, spent in least.items():
        each = spent / provider.events * 1e6
        print(f"{path:20} {each:6.1f} µs an event  {spent / least['chat/completions']:.2f}")
    sizes: dict[int, float] = {}
    for size in (1, 4):
        body = history(size << 20)
        await whole(port, body)
        spent = min([await cost(partial(many, port, body)) for _ in range(options.rounds)])
        sizes[size] = spent / TURNS
        print(f"a history of {size} MiB {spent / TURNS * 1e3:6.1f} ms")
    print(f"4 MiB to 1 MiB       {sizes[4] / sizes[1]:.2f}")
    await measure_gaps(options, port, provider)


async def measure_gaps(options: argparse.Namespace, port: int, provider: Provider) -> None:
    """Measure the gaps in a stream beside large requests, and print them."""
    text = "The quick brown fox — jumps over “the” lazy dog.\n" * 20
    turns = [{"role": "user", "content": text} for _ in range((2 << 20) // len(text.encode()))]
    crowds = {
        "chat/completions": {"model": "m", "messages": turns},
        "messages": history(2 << 20),
        "responses": {"model": "m", "input": turns},
    }
    for path, body in crowds.items():
        longest = []
        for _ in range(options.rounds):
            gaps: list[float] = []
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stream(port, "chat/completions", provider, gaps))
                for _ in range(CROWD):
                    tasks.create_task(whole(port, body, path))
            longest.append(max(gaps))
        print(f"{path:20} {min(longest) * 1e3:6.1f} ms is the longest gap beside {CROWD} of 2 MiB")


TURNS, CROWD = 5, 20


async def many(port: int, body: object) -> None:
    """Ask for some messages, one after the other."""
    for _ in range(TURNS):
        await whole(port, body)


async def main() -> None:
    """Run the server and the provider, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=5000)
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    provider = Provider(options.events, options.block)
    listener = await asyncio.start_server(provider.serve, "127.0.0.1", 0, limit=1 << 24)
    address = listener.sockets[0].getsockname()
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "wb") as log:  # noqa: ASYNC230
        engine = {
            "base_url": f"http://127.0.0.1:{address[1]}/v1",
            "model": "m",
            "messages": "bridge",
            "responses": False,
            "http_client": {**HTTP_CLIENT, "requests_per_minute": 1_000_000},
        }
        file = Path(folder, "config.yaml")
        file.write_text(  # noqa: ASYNC240
            yaml.safe_dump(
                {
                    "llm": {"active": "engine", "providers": {"engine": engine}},
                }
            )
        )
        with started(
            ["serve", "--config", str(file), "--port", "0"], "aioserver is ready: ", log
        ) as (pid, url):
            await measure(options, pid, int(url.rpartition(":")[2].strip("/")), provider)
    listener.close()


if __name__ == "__main__":
    asyncio.run(main())

"""What two deploys do to agents' streams: none is cut or refused, and none is asked for twice.

    python benchmarks/deploys.py                    500 streams of 20 to 60 s, and 100 resumed answers
    python benchmarks/deploys.py --streams 50 --seconds 10

The streams begin within the first part of the time, on a server of several workers whose
`shutdown_timeout` is 5 s; SIGUSR2 comes twice, before any of them can end. The resumed answers are
begun before the first of them, and read by new connections behind the second. PSS is the memory of
all processes: with one generation, and with three. The log of the server is kept where anything
went wrong, and its warnings are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
from aiohttp import web
from engines import started

REPLACED = "all workers are replaced"
# Pieces of each answer.
PIECES = 20
HEADERS = {"x-session-id": "an agent"}


class SlowProvider:
    """A provider whose answers take from a third of *seconds* to all of them; *asked* counts
    them.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._dice = seconds, random.Random(1)
        self.asked = 0
        self.app = web.Application()
        self.app.router.add_post("/v1/chat/completions", self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        self.asked += 1
        pause = self._dice.uniform(self._seconds / 3, self._seconds) / PIECES
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(PIECES):
            await response.write(event({"content": f"{number} "}))
            await asyncio.sleep(pause)
        await response.write(event({}, "stop") + b"data: [DONE]\n\n")
        return response


def event(delta: dict[str, str], finish: str | None = None) -> bytes:
    """Return an event of a chat completion."""
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: %b\n\n" % json.dumps({"id": "c", "choices": choices}).encode()


WHOLE = "".join(f"{number} " for number in range(PIECES))


async def stream(session: aiohttp.ClientSession, url: str, delay: float) -> str:
    """Ask after *delay* seconds, and return how the answer has ended."""
    await asyncio.sleep(delay)
    body = {"messages": [{"role": "user", "content": "Go"}], "stream": True}
    try:
        async with session.post(
            f"{url}/v1/chat/completions", json=body, headers=HEADERS
        ) as response:
            if response.status != 200:
                return f"refused: {await response.text()}"
            text = await response.text()
    except aiohttp.ClientError as exc:
        return f"cut: {exc!r}"
    return "whole" if text.endswith("[DONE]\n\n") else f"cut, with the end {text[-200:]!r}"


async def resumed(url: str, name: str, begun: asyncio.Event, deployed: asyncio.Event) -> str:
    """Begin an answer, leave, and read the rest once all is *deployed*; return how that went."""
    texts: list[str] = []

    async def read(session: aiohttp.ClientSession, frame: dict[str, Any], count: int) -> str:
        async with session.ws_connect(f"{url}/ws/chat") as ws:
            await ws.send_json(frame)
            while len(texts) < count:
                seen = await ws.receive_json()
                if seen["status"] == "chunk":
                    numbers.append(seen["event_id"])
                    texts.append(seen["chunk"].get("data") or "")
                elif seen["status"] in ("complete", "error", "cancelled"):
                    return f"{seen['status']} {seen['chunk'].get('code', '')}".strip()
            return ""

    numbers: list[int] = []
    async with aiohttp.ClientSession() as session:
        asked = {"action": "chat", "request_id": name, "payload": {"text": "Go"}}
        await read(session, asked, 2)
        begun.set()
        await deployed.wait()
        last = {"last_event_id": numbers[-1]}
        again = {"action": "resume", "request_id": name, "payload": last}
        end = await read(session, again, PIECES + 1)
    exact = "".join(texts) == WHOLE and numbers == sorted(set(numbers))
    return "exactly the rest" if end == "complete" and exact else f"{end}: {texts}"


def tree(pid: int) -> list[int]:
    """Return the process *pid* and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in tree(int(child)))]


def pss(pid: int) -> tuple[int, float]:
    """Return how many processes there are at *pid* and below, and their PSS in MB."""
    pids, total = tree(pid), 0
    for each in pids:
        rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
        (line,) = (line for line in rollup.splitlines() if line.startswith("Pss:"))
        total += int(line.split()[1])
    return len(pids), total / 1024


async def until(log: Path, times: int) -> None:
    """Wait until the workers were replaced so many *times*."""
    async with asyncio.timeout(180):
        while (await asyncio.to_thread(log.read_text)).count(REPLACED) < times:  # noqa: ASYNC110 - it is a process
            await asyncio.sleep(0.1)


async def run(given: argparse.Namespace, log: IO[bytes]) -> bool:
    """Run it all with this *log*, and print what has come of it; return whether all was well."""
    path = Path(log.name)
    provider = SlowProvider(given.seconds)
    runner = web.AppRunner(provider.app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
    websocket = {
        "shutdown_timeout": 5,
        "concurrency": {
            "max_connections": 2000,
            "connection_queue_size": 2000,
            "queue_timeout": 30,
            "uvicorn": {"workers": given.workers},
        },
    }
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    client = {"concurrent_requests": 2000, "max_connections": 2000, "read_timeout": 600}
    sim = {"base_url": url, "model": "m", "http_client": client}
    settings = {
        "chat": {"websocket": websocket, "streams": {"max_detached": 1000}},
        "llm": {"active": "sim", "providers": {"sim": sim}},
        "logging": {"level": "INFO"},
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(json.dumps(settings))
        arguments = ("serve", "--config", str(config), "--port", "0")
        server = started(arguments, "aioserver is ready: ", log, RUNTIME_DIRECTORY=folder)
        with server as (pid, address):
            base = address.rstrip("/")
            deployed = asyncio.Event()
            begun = [asyncio.Event() for _ in range(given.resumed)]
            again = [
                asyncio.create_task(resumed(base, f"r{number}", each, deployed))
                for number, each in enumerate(begun)
            ]
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            async with aiohttp.ClientSession(connector=connector) as session:
                streams = [
                    asyncio.create_task(
                        stream(session, base, number / given.streams * given.seconds / 4)
                    )
                    for number in range(given.streams)
                ]
                for each in begun:
                    await each.wait()
                before = pss(pid)
                for times in (1, 2):
                    os.kill(pid, signal.SIGUSR2)
                    await until(path, times)
                after = pss(pid)
                deployed.set()
                ends, rests = await asyncio.gather(*streams), await asyncio.gather(*again)
    await runner.cleanup()
    count = len(ends) + len(rests)
    for end in sorted(set(ends)):
        print(f"streams {end}: {ends.count(end)}")
    for rest in sorted(set(rests)):
        print(f"resumed, {rest}: {rests.count(rest)}")
    print(f"provider calls an answer: {provider.asked / count:.3f}")
    (few, small), (many, large) = before, after
    print(f"PSS: {small:.0f} MB of {few} processes, {large:.0f} MB of {many}: {large / small:.2f}")
    good = ends.count("whole") == len(ends) and rests.count("exactly the rest") == len(rests)
    return good and provider.asked == count


def main() -> None:
    """Parse the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60.0, help="the longest answer")
    parser.add_argument("--resumed", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    with tempfile.NamedTemporaryFile(prefix="deploys-", suffix=".log", delete=False) as log:
        good = asyncio.run(run(parser.parse_args(), log))
    path = Path(log.name)
    if good:
        path.unlink()
        return
    lines = path.read_text().splitlines()
    print(*(line for line in lines if " INFO " not in line), f"the log is kept: {path}", sep="\n")
    sys.exit(1)


if __name__ == "__main__":
    main()

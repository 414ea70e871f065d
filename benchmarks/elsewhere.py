"""What an answer costs that is read at another instance: CPU and latency of an event.

    python benchmarks/elsewhere.py                     200 streams of 20 events/s
    python benchmarks/elsewhere.py --streams 1000 --rate 10 --trees . ../before
    python benchmarks/elsewhere.py --pause 0           readers that come all at once
    python benchmarks/elsewhere.py --tls               TLS between the instances
    python benchmarks/elsewhere.py --face websocket    on /ws/chat; responses: on that of /v1/responses
    python benchmarks/elsewhere.py --instances 3       the readers at two other instances by turns
    python benchmarks/elsewhere.py --attaches 1000     so many answers of 20 events that have ended
    python benchmarks/elsewhere.py --questions 1000    so many answers of 20 events at A, none elsewhere
    python benchmarks/elsewhere.py --kill              A is killed: latency is that until a reader knows

Answers run at instance A without a reader of their own, one reader each at B (all instances but A
together), over one Redis. CPU is that of the processes in /proc, in µs an event, or of an ended
answer; *local* is the same with all readers at A. Latency is that from the provider's write to the
reader, or from the request for an ended answer to its end, in ms. Other *trees* take their turns
with this one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
from aiohttp import web
from certificate import Encrypted

from tests.support.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[1]
# Seconds that are measured, and those before.
MEASURED, BEFORE = 8.0, 4.0
# The default of `backlog`.
BACKLOG = 2048
# The events of an answer that has ended.
ENDED = 20
TICK = os.sysconf("SC_CLK_TCK")


def cpu_of(pid: int) -> float:
    """Return the seconds of CPU that the process *pid* has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


class Provider:
    """A provider whose events are the time of their own writing, *rate* of them a second; 0: an
    answer has ENDED of them, at once.
    """

    def __init__(self, rate: float) -> None:
        self._pause = 1 / rate if rate else 0.0
        self.app = web.Application()
        self.app.router.add_post("/v1/chat/completions", self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in itertools.count() if self._pause else range(ENDED):
                delta = {"content": f"@{time.monotonic():.6f} "}
                choice = [{"index": 0, "delta": delta}]
                await response.write(b"data: %b\n\n" % json.dumps({"choices": choice}).encode())
                await asyncio.sleep(self._pause)
            end = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
            await response.write(b"data: %b\n\n" % json.dumps({"choices": end}).encode())
            await response.write(b"data: [DONE]\n\n")
        return response


class Readers:
    """The readers of all streams on *face*: *latencies* in seconds, while *measures*."""

    def __init__(self, face: str) -> None:
        self._face = face
        self.latencies: list[float] = []
        self.heard: set[str] = set()
        self.measures = False

    async def begin(self, session: aiohttp.ClientSession, url: str, name: str) -> str:
        """Ask the instance *url* for an answer, and leave; return the name by which it is read."""
        if self._face == "responses":
            path, wanted = "/v1/responses", b'"id":"'
            options = {"stream": True, "background": True, "store": True}
            body = {"model": "m", "input": "hello", **options}
        else:
            path, wanted, body = "/sse/chat", b"@", {"request_id": name, "text": "hello"}
        async with session.post(url + path, json=body) as response:
            assert response.status == 200, await response.text()
            while wanted not in (line := await response.content.readline()):
                assert line
            response.close()
        if self._face == "responses":
            return line.partition(wanted)[2].partition(b'"')[0].decode()
        return name

    async def read(self, session: aiohttp.ClientSession, url: str, name: str) -> None:
        """Read the answer *name* at the instance *url*, until it ends, or cancelled."""
        if self._face == "sse":
            headers = {"Last-Event-ID": "0"}
            async with session.get(f"{url}/sse/chat/{name}", headers=headers) as response:
                assert response.status == 200, await response.text()
                async for line in response.content:
                    self._note(name, line)
            return
        if self._face == "websocket":
            path, ends = "/ws/chat", ('"status":"complete"',)
            frame = {"action": "resume", "request_id": name, "payload": {"last_event_id": 0}}
        else:
            path, ends = "/v1/responses", ('"type":"response.completed"',)
            frame = {"type": "response.resume", "response_id": name}
        async with session.ws_connect(url.replace("http", "ws", 1) + path) as ws:
            await ws.send_json(frame)
            async for message in ws:
                assert '"error":{' not in message.data, message.data
                self._note(name, message.data.encode())
                if any(end in message.data for end in ends):
                    return

    async def ask(self, session: aiohttp.ClientSession, url: str, name: str) -> None:
        """Ask the instance *url* for the answer *name*, and read it to its end."""
        body, began = {"request_id": name, "text": "hello"}, time.monotonic()
        async with session.post(f"{url}/sse/chat", json=body) as response:
            assert response.status == 200, await response.text()
            await response.read()
        self.latencies.append(time.monotonic() - began)
        self.heard.add(name)

    async def told(self, session: aiohttp.ClientSession, url: str, name: str) -> None:
        """Read the answer *name* at the instance *url* until it ends with an error."""
        headers = {"Last-Event-ID": "0"}
        async with session.get(f"{url}/sse/chat/{name}", headers=headers) as response:
            async for line in response.content:
                if line.startswith(b"event: error"):
                    self.latencies.append(time.monotonic())
                    self.heard.add(name)
                    return

    def _note(self, name: str, line: bytes) -> None:
        if self.measures and (at := line.find(b"@")) > 0:
            self.latencies.append(time.monotonic() - float(line[at + 1 : at + 14].split()[0]))
            self.heard.add(name)


@contextlib.asynccontextmanager
async def instance(tree: Path, config: Path) -> AsyncIterator[tuple[int, str]]:
    """Run an instance of *tree*; return its pid and URL."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aioserver", "serve", "--config", str(config), "--port", "0"),
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = (await process.stdout.readline()).decode()
        yield process.pid, line.split(": ", 1)[1].strip().rstrip("/") + "/sse/chat"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def tls(folder: Path, *, made: bool) -> dict[str, object]:
    """Return the settings of TLS between instances, if it is to be *made*."""
    if not made:
        return {}
    encrypted = Encrypted.made_in(folder)
    files = {"cert_file": encrypted.certificate, "ca_file": encrypted.authority}
    return {"tls": {name: str(file) for name, file in files.items()}}


async def run(tree: Path, given: argparse.Namespace, *, local: bool) -> dict[str, float]:
    """Run one round; return CPU an event of each process, latencies, and silent readers."""
    ended = given.attaches or given.questions
    provider = web.AppRunner(Provider(0.0 if ended else given.rate).app)
    await provider.setup()
    await web.TCPSite(provider, "127.0.0.1", 0, backlog=BACKLOG).start()
    base = f"http://127.0.0.1:{provider.addresses[0][1]}/v1"
    count = ended or given.streams
    most = 4 * count
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        redis = stack.enter_context(RedisServer(Path(folder)))
        client = {
            "max_connections": most,
            "concurrent_requests": most,
            "read_timeout": 600,
            "requests_per_minute": 1_000_000,
        }
        settings = {
            "chat": {
                "websocket": {
                    "shutdown_timeout": 0.1,
                    "concurrency": {
                        "max_connections": most,
                        "connection_queue_size": most,
                        "uvicorn": {"backlog": max(most, BACKLOG)},
                    },
                },
                "streams": {"max_detached": most, "resume_window": 600},
            },
            "llm": {
                "active": "sim",
                "providers": {"sim": {"base_url": base, "model": "m", "http_client": client}},
            },
            "cluster": {"redis_url": redis.url, **tls(Path(folder), made=given.tls)},
            "logging": {"level": "WARNING"},
        }
        config = Path(folder) / "config.yaml"
        config.write_text(json.dumps(settings))
        served = [
            await stack.enter_async_context(instance(tree, config)) for _ in range(given.instances)
        ]
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(None)
            )
        )
        roots = [url.removesuffix("/sse/chat") for _pid, url in served]
        await asyncio.sleep(BEFORE)
        readers = Readers(given.face)
        names = [f"r{each}" for each in range(count)]
        if not given.questions:
            names = [await readers.begin(session, roots[0], name) for name in names]
        at = roots[:1] if local else roots[1:]
        pids = {"A": [served[0][0]], "B": [pid for pid, _url in served[1:]], "Redis": [redis.pid]}

        def cpu() -> dict[str, float]:
            return {name: sum(map(cpu_of, each)) for name, each in pids.items()}

        tasks = []
        if given.questions:
            before = cpu()
            for name in names:
                await readers.ask(session, roots[0], name)
        elif given.attaches:
            await asyncio.sleep(BEFORE)
            before = cpu()
            for name, url in zip(names, itertools.cycle(at), strict=False):
                began = time.monotonic()
                await readers.read(session, url, name)
                readers.latencies.append(time.monotonic() - began)
                readers.heard.add(name)
        elif given.kill:
            for name, url in zip(names, itertools.cycle(at), strict=False):
                tasks.append(asyncio.ensure_future(readers.told(session, url, name)))
            await asyncio.sleep(BEFORE)
            # It has no CPU time behind its end.
            pids["A"] = []
            before = cpu()
            began = time.monotonic()
            os.kill(served[0][0], signal.SIGKILL)
            await asyncio.wait(tasks, timeout=BEFORE)
            readers.latencies = [moment - began for moment in readers.latencies]
        else:
            for name, url in zip(names, itertools.cycle(at), strict=False):
                tasks.append(asyncio.ensure_future(readers.read(session, url, name)))
                # A storm of attaches is another measurement.
                await asyncio.sleep(given.pause)
            await asyncio.sleep(BEFORE)
            for task in tasks:
                if task.done():
                    task.result()
            before = cpu()
            readers.measures = True
            await asyncio.sleep(MEASURED)
            readers.measures = False
        events = len(readers.latencies)
        result = {name: 1e6 * (used - before[name]) / events for name, used in cpu().items()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await provider.cleanup()
    late = sorted(readers.latencies)
    result["all"] = sum(result.values())
    result["p50"] = 1e3 * late[len(late) // 2]
    result["p99"] = 1e3 * late[len(late) * 99 // 100]
    result["silent"] = count - len(readers.heard)
    return result


async def main() -> None:
    """Run the rounds, and print the median of each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--face", choices=["sse", "websocket", "responses"], default="sse")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--attaches", type=int, default=0)
    parser.add_argument("--questions", type=int, default=0)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--trees", type=Path, nargs="+", default=[ROOT])
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(given.rounds):
        for tree in given.trees:
            for local in (False,) if given.kill or given.questions else (False, True):
                name = f"{tree.name or 'this tree'}, {'local' if local else 'elsewhere'}"
                found.setdefault(name, []).append(await run(tree.resolve(), given, local=local))
    columns = ["A", "B", "Redis", "all", "p50", "p99", "silent"]
    print(f"{'':30}", *(f"{column:>8}" for column in columns))
    for name, rounds in found.items():
        medians = [statistics.median(each[column] for each in rounds) for column in columns]
        print(f"{name:30}", *(f"{value:8.2f}" for value in medians))


if __name__ == "__main__":
    asyncio.run(main())

"""What an answer costs that is read at another instance: CPU and latency of an event.

    python benchmarks/elsewhere.py                     200 streams of 20 events/s
    python benchmarks/elsewhere.py --streams 1000 --rate 10 --trees . ../before
    python benchmarks/elsewhere.py --pause 0           readers that come all at once
    python benchmarks/elsewhere.py --tls               TLS between the instances

Answers run at instance A without a reader of their own, one reader each at B, over one Redis. CPU is
that of the processes in /proc, in µs an event; *local* is the same with all readers at A. Latency is
that from the provider's write to the reader, in ms. Other *trees* take their turns with this one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
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
TICK = os.sysconf("SC_CLK_TCK")


def cpu_of(pid: int) -> float:
    """Return the seconds of CPU that the process *pid* has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


class Provider:
    """A provider whose events are the time of their own writing, *rate* of them a second."""

    def __init__(self, rate: float) -> None:
        self._pause = 1 / rate
        self.app = web.Application()
        self.app.router.add_post("/v1/chat/completions", self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                delta = {"content": f"@{time.monotonic():.6f} "}
                choice = [{"index": 0, "delta": delta}]
                await response.write(b"data: %b\n\n" % json.dumps({"choices": choice}).encode())
                await asyncio.sleep(self._pause)
        return response


class Readers:
    """The readers of all streams: *latencies* in seconds, while *measures*."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.heard: set[str] = set()
        self.measures = False

    async def read(self, session: aiohttp.ClientSession, url: str, name: str) -> None:
        """Read the answer *name* at the instance *url*, until cancelled."""
        headers = {"Last-Event-ID": "0"}
        async with session.get(f"{url}/{name}", headers=headers) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if self.measures and (at := line.find(b"@")) > 0:
                    self.latencies.append(
                        time.monotonic() - float(line[at + 1 : at + 14].split()[0])
                    )
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
    provider = web.AppRunner(Provider(given.rate).app)
    await provider.setup()
    await web.TCPSite(provider, "127.0.0.1", 0, backlog=2048).start()
    base = f"http://127.0.0.1:{provider.addresses[0][1]}/v1"
    most = 4 * given.streams
    with tempfile.TemporaryDirectory() as folder:
        redis = RedisServer(Path(folder))
        with redis:
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
                        "concurrency": {"max_connections": most, "connection_queue_size": most},
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
            async with (
                instance(tree, config) as (a, at_a),
                instance(tree, config) as (b, at_b),
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=0),
                    timeout=aiohttp.ClientTimeout(None),
                ) as session,
            ):
                names = [f"r{number}" for number in range(given.streams)]
                await asyncio.sleep(BEFORE)
                for name in names:
                    body = {"request_id": name, "text": "hello"}
                    async with session.post(at_a, json=body) as response:
                        assert response.status == 200, await response.text()
                        while b"@" not in await response.content.readline():
                            pass
                        response.close()
                readers = Readers()
                tasks = []
                for name in names:
                    reading = readers.read(session, at_a if local else at_b, name)
                    tasks.append(asyncio.ensure_future(reading))
                    # A storm of attaches is another measurement.
                    await asyncio.sleep(given.pause)
                await asyncio.sleep(BEFORE)
                for task in tasks:
                    if task.done():
                        task.result()
                pids = {"A": a, "B": b, "Redis": redis.pid}
                before = {name: cpu_of(pid) for name, pid in pids.items()}
                readers.measures = True
                await asyncio.sleep(MEASURED)
                readers.measures = False
                events = len(readers.latencies)
                result = {
                    name: 1e6 * (cpu_of(pid) - before[name]) / events for name, pid in pids.items()
                }
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    await provider.cleanup()
    late = sorted(readers.latencies)
    result["all"] = sum(result.values())
    result["p50"] = 1e3 * late[len(late) // 2]
    result["p99"] = 1e3 * late[len(late) * 99 // 100]
    result["silent"] = given.streams - len(readers.heard)
    return result


async def main() -> None:
    """Run the rounds, and print the median of each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--trees", type=Path, nargs="+", default=[ROOT])
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(given.rounds):
        for tree in given.trees:
            for local in (False, True):
                name = f"{tree.name or 'this tree'}, {'local' if local else 'elsewhere'}"
                found.setdefault(name, []).append(await run(tree.resolve(), given, local=local))
    columns = ["A", "B", "Redis", "all", "p50", "p99", "silent"]
    print(f"{'':30}", *(f"{column:>8}" for column in columns))
    for name, rounds in found.items():
        medians = [statistics.median(each[column] for each in rounds) for column in columns]
        print(f"{name:30}", *(f"{value:8.2f}" for value in medians))


if __name__ == "__main__":
    asyncio.run(main())

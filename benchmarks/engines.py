"""What placement by prefix is worth over sockets: the trace of groups.py, four times as fast, on
four processes `aioserver provider --engine`, behind a server that is a process, too.

    python benchmarks/engines.py                   26 s, of which 6 do not count
    python benchmarks/engines.py --workers 2       behind a server of two processes
    python benchmarks/engines.py --kill            and an engine is killed after 15 s

Round robin and the ideal placement are those of the same trace in virtual time, where nothing else
uses the machine; so the ratios are no better than they would be if all were measured in one way.
The engines, the server and this program share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
import orjson
from groups import run
from trace_of_chats import ENGINES, Load, Trace, Turn

from aioserver.wings.simulator.engine import block_hashes, count_tokens
from tests.support.server import HTTP_CLIENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LOAD = Load(speed=4.0, seconds=26.0, warm_up=6.0)
KILLED_AFTER = 15.0
BLOCK = 16
SSE_DONE = b"data: [DONE]"


@contextlib.contextmanager
def started(
    arguments: Sequence[str], said: str, log: IO[bytes], **environ: str
) -> Iterator[tuple[int, str]]:
    """Run aioserver with *arguments* for the block; give its pid, and the address that follows
    *said* in its output.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "aioserver", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, **environ},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(said):
                yield process.pid, line.removeprefix(said).split()[0]
                break
        else:
            raise SystemExit(f"aioserver {' '.join(arguments)} has not started")
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def configuration(urls: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of a server that has the engines at *urls* as one group."""
    limits = {
        **HTTP_CLIENT,
        "concurrent_requests": LOAD.places,
        "queue_size": 1000,
        "queue_timeout": 120.0,
        "read_timeout": 120.0,
    }
    names = [f"e{number}" for number in range(len(urls))]
    group = {"members": names, "choose": "least_busy", "affinity": "prefix"}
    providers = {
        name: {"base_url": url, "model": "m", "http_client": limits}
        for name, url in zip(names, urls, strict=True)
    }
    return {"llm": {"active": "group", "models": {"group": group}, "providers": providers}}


class SocketRun(Trace):
    """One run against the server at *url*."""

    def __init__(self, seed: int, load: Load, url: str, session: aiohttp.ClientSession) -> None:
        super().__init__(seed, load)
        self._url, self._session = f"{url.rstrip('/')}/v1/chat/completions", session
        self._given: set[bytes] = set()
        # Requests that failed before their first event, and after it.
        self.failed: list[str] = []
        self.broken = 0

    async def ask(self, turn: Turn, user: int, first: Callable[[], None]) -> str:  # noqa: ARG002 - one of all
        """Ask the server, and count what its usage says."""
        prompt = b"".join(map(orjson.dumps, turn.messages))
        blocks = block_hashes(prompt, BLOCK)
        known = 0
        while known < len(blocks) and blocks[known] in self._given:
            known += 1
        body = {
            "model": "group",
            "messages": turn.messages,
            "max_tokens": turn.answer_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        said, usage, ended = "", None, False
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    raise _FailedError(f"{response.status}: {(await response.text())[:200]}")
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line.startswith(SSE_DONE):
                        ended = True
                        continue
                    event = orjson.loads(line[6:])
                    if "error" in event:
                        raise _FailedError(str(event["error"]))
                    usage = event.get("usage") or usage
                    for choice in event["choices"]:
                        if text := choice["delta"].get("content"):
                            if not said:
                                first()
                            said += text
            if not ended:
                raise _FailedError("no end")
        except (_FailedError, aiohttp.ClientError) as error:
            if said:
                self.broken += 1
            else:
                self.failed.append(repr(error))
            return said or "?"
        if self.counts and usage is not None:
            result = self.result
            result.prompt += count_tokens(prompt)
            result.cached += usage["prompt_tokens_details"]["cached_tokens"]
            result.ideal += known * BLOCK
            result.output += usage["completion_tokens"]
        whole = prompt + orjson.dumps({"role": "assistant", "content": said})
        self._given.update(blocks, block_hashes(whole, BLOCK))
        return said


class _FailedError(Exception):
    """An answer that is an error, or is not whole."""


async def measured(seed: int, load: Load, url: str, victim: int | None) -> SocketRun:
    """Run the trace against the server at *url*; the process *victim* is killed meanwhile."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        if victim is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(KILLED_AFTER, os.kill, victim, signal.SIGKILL)
        trace = SocketRun(seed, load, url, session)
        await trace.play()
        return trace


def main() -> None:
    """Print one line for each seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kill", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended
    options = LOAD.options
    engine = f"slots={options.slots},prefill={options.prefill:.0f},decode={options.decode:.0f}"
    for seed in given.seed or [1, 2, 3]:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aioserver-")))
            log = stack.enter_context((folder / "log").open("wb"))
            engines = [
                stack.enter_context(
                    started(
                        ("provider", "--port", "0", "--engine", engine),
                        "simulated provider on ",
                        log,
                    )
                )
                for _ in range(ENGINES)
            ]
            config = folder / "config.yaml"
            urls = [url for _, url in engines]
            # JSON is YAML.
            config.write_text(json.dumps(configuration(urls)))
            _, url = stack.enter_context(
                started(
                    ("serve", "--config", str(config), "--port", "0"),
                    "aioserver is ready: ",
                    log,
                    RUNTIME_DIRECTORY=str(folder),
                    AIOSERVER__CHAT__WEBSOCKET__CONCURRENCY__UVICORN__WORKERS=str(given.workers),
                )
            )
            load_before = os.getloadavg()[0]
            victim = engines[-1][0] if given.kill else None
            trace = asyncio.run(measured(seed, LOAD, url, victim))
            result = trace.result
        line = (
            f"seed {seed}, {given.workers} workers: hits of ideal {result.hits:.3f}, "
            f"{len(trace.failed)} failed without an event, {trace.broken} after one"
        )
        if not given.kill:
            robin, ideal = run(seed, LOAD, "round robin"), run(seed, LOAD, "ideal")
            line += (
                f", output of round robin {result.output / max(1, robin.output):.2f}, "
                f"p90 of ideal {result.p90 / max(1e-9, ideal.p90):.2f} ({result.p90:.3f} s)"
            )
        print(f"{line}; load {load_before:.1f} to {os.getloadavg()[0]:.1f}", flush=True)
        for failure in trace.failed[:3]:
            print(f"  {failure}")


if __name__ == "__main__":
    main()

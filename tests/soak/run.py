"""A run: the processes, the load and the samples, written as JSON lines."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import aiohttp

from tests.soak.load import (
    FLAPPING,
    GROUP,
    KEYS,
    MEMBERS,
    PROBED,
    PROBED_BESIDE_DEPLOYS,
    PROVIDERS,
    Load,
    probe,
)
from tests.soak.talks import BRIDGED
from tests.support.history import sql
from tests.support.keys import bearer
from tests.support.process import Process, ServerProcess
from tests.support.server import SIM_HTTP_CLIENT, provider_entry
from tests.support.server import write as write_configuration
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.soak.claims import Line

# Seconds.
SAMPLE_INTERVAL = 5.0
WINDOW = 60.0
# Resume windows, kept connections and their timers are shorter.
QUIET_WITHIN = 120.0
ADDRESS = re.compile(r"[^\n]*?(http://127\.0\.0\.1:\d+/v1)\b")
# A first token after 50 ms, then 200 tokens a second.
PROVIDER = ("--port", "0", "--ttft", "0.05", "--interval", "0.005")
LIMITS: dict[str, Any] = {
    "max_connections": 200,
    "max_keepalive": 20,
    "keepalive_expiry": 5.0,
    "concurrent_requests": 200,
    "read_timeout": 3.0,
    "max_retries": 1,
}
# What a group is about: requests that wait for the first of several places, and homes of
# conversations.
PLACES = {"concurrent_requests": 2, "queue_size": 10, "queue_timeout": 5.0}
FLEET: dict[str, Any] = {
    "members": [*MEMBERS, {"provider": FLAPPING, "model": "fault-flap-3"}],
    "choose": "least_busy",
    "affinity": "prefix",
}
# A server that keeps few conversations: thousands would take longer than a run.
PROGRAM = """
from aioserver.__main__ import main
from aioserver.wings.conversations import memory as conversations
conversations.MAX_CONVERSATIONS = 200
main()
"""
WORKERS = "chat.websocket.concurrency.uvicorn.workers"
# Bounds that are met within the first minutes. If bodies were not let go, `max_body_bytes` would
# refuse the probes.
CHANGES: dict[str, Any] = {
    "logging.level": "INFO",
    "auth.keys": KEYS,
    "chat.websocket.concurrency.max_connections": 300,
    "chat.websocket.concurrency.connection_queue_size": 300,
    "chat.websocket.concurrency.uvicorn.backlog": 2048,
    "chat.websocket.concurrency.uvicorn.keepalive_timeout": 5,
    "chat.websocket.concurrency.max_body_bytes": 8 << 20,
    "chat.websocket.max_message_size": 1 << 18,
    "chat.streams.resume_window": 20.0,
    "chat.streams.store_window": 20.0,
    "chat.streams.max_stream_bytes": 1 << 18,
    "chat.streams.max_kept_bytes": 4 << 20,
    "chat.streams.max_response_bytes": 1 << 20,
    **{f"{SIM_HTTP_CLIENT}.{name}": value for name, value in LIMITS.items()},
}


async def soak(
    minutes: float, path: Path, seed: int = 1, workers: int = 1, deploys: float = 0.0
) -> list[Line]:
    """Run *workers* processes for *minutes*, and replace them every *deploys* minutes, unless that
    is 0; return the lines, which are written to *path* as they come.
    """
    run: list[Line] = []
    began = perf_counter()

    with path.open("w") as file, tempfile.TemporaryDirectory() as folder:

        def write(kind: str, **values: Any) -> None:
            line = {"kind": kind, "t": round(perf_counter() - began, 1), **values}
            run.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()

        async with await Process.start("-m", "aioserver", "provider", *PROVIDER) as provider:
            url = (await provider.prints(ADDRESS))[1]
            changes = (
                CHANGES
                | {WORKERS: workers}
                | sql(Path(folder) / "events.db")
                | {
                    f"llm.providers.{name}": provider_entry(url, name, **LIMITS)
                    for name in PROVIDERS
                }
                | {
                    f"llm.providers.{name}": provider_entry(url, name, **(LIMITS | PLACES))
                    for name in (*MEMBERS, FLAPPING)
                }
                | {
                    "llm.models": {GROUP: FLEET},
                    f"llm.providers.{BRIDGED}": {
                        **provider_entry(url, BRIDGED, **LIMITS),
                        "responses": False,
                    },
                }
            )
            config = Path(folder) / "config.yaml"
            write_configuration(url, changes, config)
            replaceable = ("--replaceable",) if deploys and workers == 1 else ()
            program = ("-c", PROGRAM, "serve", "--config", config, *replaceable)
            async with await ServerProcess.start(*program) as server:
                await server.ready()
                target = url.removesuffix("/v1")
                await _load(server, target, minutes * 60, seed, deploys * 60, write)
    return run


async def _load(
    server: ServerProcess,
    provider: str,
    seconds: float,
    seed: int,
    deploys: float,
    write: Callable[..., None],
) -> None:
    load, stop = Load(server.base, seed), asyncio.Event()
    async with aiohttp.ClientSession(headers=bearer("root")) as session:
        # Modules are loaded, and pools made, by a first request.
        await probe(server.base, provider, 2.0)
        start = await _quiet(session, server.base)
        write("start", seconds=seconds, seed=seed, **start)
        async with asyncio.TaskGroup() as group:
            working = group.create_task(load.run(stop))
            sampling = group.create_task(_sample(session, server.base, load, write))
            replacing = group.create_task(_deploy(server, deploys, write))
            await _probe(server.base, provider, seconds, deploys > 0, write)
            stop.set()
            await working
            sampling.cancel()
            replacing.cancel()
        end = await _quiet(session, server.base)
    server.signal()
    exit_code = await server.ended(60.0)
    write(
        "end",
        **end,
        asked=load.asked,
        outcomes=load.outcomes,
        violations=load.violations[:20],
        exit_code=exit_code,
        tracebacks=server.log.count("Traceback"),
    )


async def _probe(
    base: str, provider: str, seconds: float, deploys: bool, write: Callable[..., None]
) -> None:
    """Measure one window after the other: nine at least, so that a third has three."""
    windows = max(9, round(seconds / WINDOW))
    faces = PROBED_BESIDE_DEPLOYS if deploys else PROBED
    for _ in range(windows):
        write("window", **await probe(base, provider, seconds / windows, faces))


async def _deploy(server: ServerProcess, interval: float, write: Callable[..., None]) -> None:
    while interval:
        await asyncio.sleep(interval)
        server.signal(signal.SIGUSR2)
        write("deploy")


async def _sample(
    session: aiohttp.ClientSession, base: str, load: Load, write: Callable[..., None]
) -> None:
    while True:
        write("sample", asked=load.asked, **await _state(session, base))
        await asyncio.sleep(SAMPLE_INTERVAL)


async def _quiet(session: aiohttp.ClientSession, base: str) -> Line:
    """Wait until nothing is under way and nothing kept; return the state then, or what is left."""
    state: Line = {}

    async def look() -> None:
        while True:
            state.update(await _state(session, base))
            if not any(state[name] for name in ("running", "kept", "pool", "connections")):
                return
            await asyncio.sleep(1.0)

    looking = asyncio.create_task(look())
    try:
        await until(looking.done, QUIET_WITHIN)
    except AssertionError:
        looking.cancel()
    return state


async def _state(session: aiohttp.ClientSession, base: str) -> Line:
    """Return the numbers of the server that are looked at."""
    async with session.get(f"{base}/stats") as response:
        stats = await response.json()
    providers = stats["providers"].values()
    return {
        "rss": stats["process"]["rss_bytes"],
        "fds": stats["process"]["open_fds"],
        "tasks": stats["process"]["tasks"],
        "cpu": stats["process"]["cpu"],
        "connections": stats["connections"]["active"],
        "waiting": stats["connections"]["waiting"],
        "running": stats["requests"]["running"],
        "kept": stats["streams"]["bytes"],
        "stored": stats["streams"]["responses"],
        "detached": stats["streams"]["detached"],
        "in_flight": sum(provider["in_flight"] for provider in providers),
        "queued": sum(provider["waiting"] for provider in providers),
        "grouped": sum(group["waiting"] for group in stats["groups"].values()),
        "pool": sum(provider["pool"]["open"] for provider in providers),
    }

"""No file descriptor is left: what is served goes on, nobody else is blamed, and the server
recovers.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from aioserver.faces.admission import MAX_REFUSED_CLOSING
from aioserver.monitoring.monitor import MAX_WATCHERS
from aioserver.server.preflight import wanted_files
from tests.support.chat import CHAT, chat
from tests.support.process import loop_name, serving
from tests.support.raw import Raw
from tests.support.server import (
    CONCURRENCY,
    ENDLESS,
    NOWHERE,
    SILENT,
    SIM_HTTP_CLIENT,
    UVICORN,
    configured,
)
from tests.support.simulator import Simulator
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from tests.support.process import ServerProcess

# Python runs a module of this name at its start.
LIMITED = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0}))\n"


def limited(folder: Path, files: int) -> dict[str, str]:
    """The environment of a process that may have *files* open at once."""
    (folder / "sitecustomize.py").write_text(LIMITED.format(files))
    return {"PYTHONPATH": str(folder)}


def places(number: int, queue_timeout: float = 0.0) -> dict[str, Any]:
    """Places for *number* connections, which stay for as long as a busy machine may need: no
    client here answers a ping, many say nothing, and the provider runs in the test's process.
    """
    return {
        "chat.websocket.ping_interval": 600.0,
        f"{UVICORN}.keepalive_timeout": 600,
        f"{SIM_HTTP_CLIENT}.read_timeout": 600.0,
        f"{SIM_HTTP_CLIENT}.connect_timeout": 60.0,
        f"{CONCURRENCY}.max_connections": number,
        f"{CONCURRENCY}.connection_queue_size": number,
        f"{CONCURRENCY}.queue_timeout": queue_timeout,
    }


async def metrics(process: ServerProcess) -> dict[str, float]:
    """Every sample of /metrics, over a connection of its own."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{process.base}/metrics") as response,
    ):
        samples = re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", await response.text(), re.MULTILINE)
    return {name: float(value) for name, value in samples}


def entries(process: ServerProcess) -> int:
    """How large the kernel's table of its descriptors is."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("\nFDSize:")[1].split()[0])


async def serves(process: ServerProcess) -> dict[str, float]:
    """The metrics, once a new client is answered."""
    async with asyncio.timeout(patience(20)):
        while True:
            # uvloop closes what it cannot accept; asyncio lets it wait for a second.
            with contextlib.suppress(aiohttp.ClientError):
                return await metrics(process)
            await asyncio.sleep(0.05)


@pytest.mark.both_loops
async def test_without_descriptors_what_is_served_goes_on_and_new_clients_are_served_later(
    tmp_path: Path,
) -> None:
    files = 90
    async with (
        Simulator(ENDLESS) as simulator,
        serving(
            tmp_path / "c.yaml",
            simulator.base_url.replace("127.0.0.1", "localhost"),
            changes=places(4),
            environ=limited(tmp_path, files),
        ) as process,
        Raw(await process.ready()) as ws,
        Raw(process) as operator,
        contextlib.AsyncExitStack() as silent,
    ):
        await ws.upgrade()
        await ws.send_json(chat("runs"))
        assert (await ws.json_frame())["status"] == "processing"
        await operator.get("/health")
        await operator.answer()
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(files + 10):
            await silent.enter_async_context(Raw(process))
        await until(lambda: process.open_files >= files - 1, 40.0, lambda: process.open_files)

        # The running answer needs no descriptor, another one a connection to the provider.
        await ws.send_json(chat("another"))
        frames = [await ws.json_frame()]
        while frames[-1]["status"] != "error":
            frames.append(await ws.json_frame())
        frames += [await ws.json_frame() for _ in range(20)]

        running = [frame["event_id"] for frame in frames if frame["request_id"] == "runs"]
        assert running == [*range(2, len(running) + 2)]
        (error,) = [frame["chunk"] for frame in frames if frame["status"] == "error"]
        assert (error["code"], error["retryable"]) == ("pool_timeout", True)
        assert "descriptor" in error["error"]

        for path in ("/metrics", "/stats", "/ready", "/dashboard", "/v1/models"):
            await operator.get(path)
            assert (await operator.answer()).status == 200, path
        process.signal(signal.SIGHUP)
        await process.logs("not applied: ")

        await silent.aclose()
        numbers = await serves(process)
        assert numbers["aioserver_max_fds"] == files
        assert numbers['aioserver_reloads_total{outcome="invalid"}'] == 1
        assert numbers["aioserver_open_fds"] <= files
        assert numbers['aioserver_rejections_total{code="pool_timeout"}'] == 1
        assert numbers['aioserver_connections{face="websocket"}'] == 1
        failed = 'aioserver_provider_attempts_total{outcome="connect_error",provider="sim"}'
        assert numbers[failed] == 0, "the provider is not to blame"
        await ws.send_json(chat("again"))
        while (frame := await ws.json_frame())["request_id"] != "again":
            pass
        assert frame["status"] == "processing"
        while (frame := await ws.json_frame())["request_id"] != "again":
            pass
        assert frame["status"] == "chunk"
        assert process.log.count("no file descriptor is free for a connection to") == 1
        # asyncio reports each connection that it cannot accept, of which one is logged in ten
        # seconds; uvloop none.
        reports = process.log.count("out of system resource")
        assert (reports > 0) == (loop_name() == "asyncio")
        assert reports <= (loop.time() - began) / 10 + 2


async def test_where_the_limit_is_as_large_as_asked_for_all_caps_can_be_reached(
    tmp_path: Path,
) -> None:
    """Everything that has a cap is there as often as it may be, and the next client is refused in
    words.
    """
    number = 4
    changes = {
        **places(number, 60.0),
        **{f"{SIM_HTTP_CLIENT}.{name}": number for name in ("max_connections", "max_keepalive")},
        f"{SIM_HTTP_CLIENT}.concurrent_requests": number,
        f"{UVICORN}.backlog": 1024,
    }
    settings = configured("http://127.0.0.1/v1", changes, tmp_path / "c.yaml").settings
    files = wanted_files(settings)
    async with (
        Simulator(SILENT) as simulator,
        serving(
            tmp_path / "c.yaml",
            simulator.base_url,
            changes=changes,
            environ=limited(tmp_path, files),
        ) as process,
        contextlib.AsyncExitStack() as stack,
    ):
        await process.ready()
        clients = [await stack.enter_async_context(Raw(process)) for _ in range(2 * number)]
        for name, raw in enumerate(clients):
            await raw.upgrade()
            await raw.send_json(chat(f"r{name}"))
        await simulator.until(lambda stats: stats.active == number)
        for _ in range(MAX_WATCHERS):
            raw = await stack.enter_async_context(Raw(process))
            await raw.get("/events")
            assert (await raw.head()).status == 200
        for _ in range(MAX_REFUSED_CLOSING):
            raw = await stack.enter_async_context(Raw(process))
            assert (await raw.upgrade()).status == 101

        async with Raw(process) as raw:
            await raw.post("/v1/chat/completions", CHAT)
            answer = await raw.answer()
        numbers = await metrics(process)

        assert (answer.status, answer.code) == (503, "server_at_capacity")
        assert numbers["aioserver_open_fds"] <= numbers["aioserver_max_fds"] == files
        assert "open files" not in process.log
        assert "descriptor" not in process.log


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says how large the table is")
async def test_the_table_of_descriptors_has_room_for_what_a_reload_allows(tmp_path: Path) -> None:
    async with serving(tmp_path / "c.yaml", NOWHERE, "--port", "0", changes=places(4)) as process:
        await process.ready()
        before, wanted = entries(process), wanted_files(process.settings)
        more = {**places(700), f"{UVICORN}.backlog": 1024}
        process.change({"logging.level": "INFO", **more})
        process.signal(signal.SIGHUP)
        await process.logs("configuration applied: ")
        after, wanted_now = entries(process), wanted_files(process.settings)

    assert before >= wanted
    assert after >= wanted_now > before, "it was made larger at once, and not by the clients"

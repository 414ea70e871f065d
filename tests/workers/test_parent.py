"""Several real processes on one port: served, reloaded, replaced, killed and stopped.

A parent and two workers take two seconds to start, so each test tells a whole story, most on one
kind of loop.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import aiohttp
import pytest

from aioserver.files.x509 import certificates
from tests.support.chat import CHAT, STREAMED
from tests.support.keys import COOKIE, bearer, cookie, key_of, keys_of
from tests.support.logs import without_lateness
from tests.support.process import Process, loop_name, run_command, serving
from tests.support.raw import CLOSE, Raw, closing
from tests.support.server import CONCURRENCY, NOWHERE, QUICK, UVICORN, write
from tests.support.simulator import Simulator
from tests.support.systemd import Systemd
from tests.support.tls import TLS, TlsClient, pair
from tests.support.waiting import patience, until, until_result
from tests.support.worker_processes import alone, gone, incidents_of, workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.process import ServerProcess

TWO = {f"{UVICORN}.workers": 2}
REPLACED = "all workers are replaced"
DIED = 'aioserver_worker_deaths_total{cause="signal"} 1.0'
LIMIT = f"{CONCURRENCY}.max_connections"


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(QUICK) as made:
        yield made


async def limits_heard(process: ServerProcess) -> list[int]:
    """How many connections each worker serves at once that answers."""
    async with (
        aiohttp.ClientSession(headers=bearer("root")) as session,
        session.get(f"{process.base}/stats") as response,
    ):
        instances = (await response.json())["instances"].values()
    return [each["connections_limit"] for each in instances if each is not None]


async def limits_of(process: ServerProcess) -> list[int]:
    """How many connections each worker serves at once."""
    limits = []
    for worker in workers(process):
        async with alone(process, worker):
            limits += await limits_heard(process)
    return limits


async def share(process: ServerProcess, total: int) -> None:
    """Wait until the workers together serve *total* connections at once, and each of them some.

    The state of all is asked for until then: to ask each alone would stop the others, whose leases
    then move.
    """

    await until_result(partial(limits_heard, process), lambda limits: sum(limits) == total)
    assert min(await limits_of(process)) > 0


async def caller_of(process: ServerProcess, worker: int, session: str) -> str | None:
    """Whose browser session *session* is, as the *worker* knows it."""
    async with (
        alone(process, worker),
        aiohttp.ClientSession(headers=cookie(session)) as client,
        client.get(f"{process.base}/session") as response,
    ):
        name: str | None = (await response.json())["name"]
        return name


class Load:
    """Clients that ask one question after the other, each on a connection that it keeps."""

    def __init__(self, process: ServerProcess, clients: int) -> None:
        self.served = 0
        self.faults: list[object] = []
        self._url = f"{process.base}/v1/chat/completions"
        self._over = False
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(clients)]

    async def _ask(self, number: int) -> None:
        body = {**(STREAMED if number % 2 else CHAT), "user": f"client {number}"}
        async with aiohttp.ClientSession() as session:
            while not self._over:
                try:
                    async with session.post(self._url, json=body) as response:
                        answer = await response.read()
                    if response.status != 200 or (number % 2 and b"[DONE]" not in answer):
                        self.faults.append((response.status, answer))
                    self.served += 1
                except aiohttp.ClientError as exc:
                    self.faults.append(exc)
                await asyncio.sleep(0.02)

    async def end(self) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)


async def metrics_of(process: ServerProcess) -> str:
    """The page `/metrics`, as an admin gets it."""
    async with Raw(process) as raw:
        await raw.get("/metrics", f"x-api-key: {key_of('root')}")
        return (await raw.answer()).body.decode()


async def test_a_replacement_loses_and_refuses_nothing(
    tmp_path: Path, simulator: Simulator
) -> None:
    async with serving(tmp_path / "c.yaml", simulator.base_url, changes=TWO) as process:
        await process.ready()
        former = workers(process)
        assert len(former) == 2
        load = Load(process, 8)
        async with Raw(process) as idle:
            await idle.upgrade()

            process.signal(signal.SIGUSR2)
            # Answered with a close code, since its process ends.
            opcode, payload = await idle.frame()
            assert (opcode, closing(payload)[0]) == (CLOSE, 1012)
            await idle.send_frame(CLOSE, payload)
        await process.logs(REPLACED)
        await until(lambda: all(map(gone, former)), 20.0, lambda: process.log)
        served = load.served
        await until(lambda: load.served > served + 20)
        await load.end()

        assert load.faults == []
        assert len(workers(process)) == 2
        assert not {*former} & {*workers(process)}
        process.signal()
        assert await process.ended() == 0
    assert process.out.count("aioserver is ready") == 1
    log = without_lateness(process.log)
    for sign in ("Traceback", " ERROR ", "bug in", "was ended by"):
        assert sign not in log, process.log


async def test_a_killed_worker_is_followed_and_a_reload_reaches_all(
    tmp_path: Path, simulator: Simulator
) -> None:
    changes = {**TWO, **keys_of("root"), LIMIT: 9, "logging.level": "INFO"}
    with Systemd(str(tmp_path / "notify")) as systemd:
        environ = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "60000000"}
        async with serving(
            tmp_path / "c.yaml", simulator.base_url, changes=changes, environ=environ
        ) as process:
            ready = await process.living(systemd.message_with("READY"))
            assert ready["STATUS"] == "2 of 2 workers: 0 of 9 connections, 0 waiting"
            await process.ready()
            await process.living(systemd.message_with("WATCHDOG"))
            assert await limits_of(process) == [5, 4], "shares whose sum is the limit"

            first, second = workers(process)
            async with aiohttp.ClientSession() as client:
                body = {"key": key_of("root")}
                async with client.post(f"{process.base}/session", json=body) as response:
                    session = response.cookies[COOKIE].value
            os.kill(first, signal.SIGKILL)
            await until(lambda: gone(first))
            async with Raw(process) as raw:
                await raw.post("/v1/chat/completions", CHAT, f"x-api-key: {key_of('root')}")
                assert (await raw.answer()).status == 200, "its sibling goes on"
            await process.logs("worker 0 serves")
            assert "worker 0 was ended by SIGKILL" in process.log
            # Whichever worker is asked.
            await until_result(partial(metrics_of, process), lambda text: DIED in text)
            told = partial(incidents_of, process, "worker_died", bearer("root"))
            (text,) = await until_result(told, bool)
            assert text.startswith("a worker has died (signal)")
            assert second in workers(process)
            assert len(workers(process)) == 2
            for worker in workers(process):
                assert await caller_of(process, worker, session) == "root"

            process.change({**changes, LIMIT: 7, f"{UVICORN}.workers": 3})
            process.signal(signal.SIGHUP)
            await process.living(systemd.message_with("RELOADING"))
            await process.living(systemd.message_with("READY"))
            await share(process, 7)
            assert (
                "uvicorn.workers has changed, and stays as it was until a restart" in process.log
            )

            process.change({**changes, LIMIT: 0})
            process.signal(signal.SIGHUP)
            await process.living(systemd.message_with("RELOADING"))
            await process.living(systemd.message_with("READY"))
            assert "not applied: " in process.log
            await share(process, 7)
            # One that starts now cannot take over what is not valid.
            os.kill(second, signal.SIGKILL)
            await process.logs("worker 1 serves")
            await share(process, 7)

            process.signal()
            stopping = await process.living(systemd.message())
            while "READY" in stopping or "WATCHDOG" in stopping:
                stopping = await process.living(systemd.message())
            assert stopping["STOPPING"] == "1"
            assert await process.ended() == 0


async def test_the_next_request_is_served_where_all_workers_of_a_full_server_were_killed(
    tmp_path: Path, simulator: Simulator
) -> None:
    changes = {**TWO, LIMIT: 2, f"{CONCURRENCY}.queue_timeout": 0}
    async with serving(tmp_path / "c.yaml", simulator.base_url, changes=changes) as process:
        await process.ready()
        url = f"{process.base}/v1/chat/completions"
        # In the first seconds of the workers' server no place moves.
        joined = "the instances share their limits exactly"
        await until(lambda: process.log.count(joined) == 2, 30.0, lambda: process.log)
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession())
            # Clients leave if nothing refers to them.
            clients: list[aiohttp.ClientWebSocketResponse] = []
            while len(clients) < 2:
                if (opened := await _opened(session, process)) is not None:
                    clients.append(opened)
            async with session.post(url, json=CHAT) as response:
                assert response.status == 503, "the server is full"

            for worker in workers(process):
                os.kill(worker, signal.SIGKILL)

            async with aiohttp.ClientSession() as other, other.post(url, json=CHAT) as response:
                assert response.status == 200, await response.text()
        process.signal()
        assert await process.ended() == 0


async def _opened(
    session: aiohttp.ClientSession, process: ServerProcess
) -> aiohttp.ClientWebSocketResponse | None:
    """A WebSocket that has a place; None if it was refused, since that is on its way."""
    client = await session.ws_connect(f"{process.base}/ws/chat")
    await client.send_json({"action": "ping"})
    frame = await client.receive_json(timeout=patience(20))
    if frame["status"] == "pong":
        return client
    await client.close()
    return None


async def test_every_limit_of_http_reaches_each_worker(
    tmp_path: Path, simulator: Simulator
) -> None:
    changes = {
        **TWO,
        "chat.websocket.max_message_size": 2000,
        f"{UVICORN}.backlog": 77,
        f"{UVICORN}.keepalive_timeout": 0.5,
        f"{UVICORN}.max_keepalive_requests": 2,
        f"{UVICORN}.h11_max_request_line_size": 300,
        f"{UVICORN}.h11_max_incomplete_event_size": 400,
        f"{UVICORN}.h11_max_header_size": 900,
    }
    async with serving(tmp_path / "c.yaml", simulator.base_url, changes=changes) as process:
        await process.ready()
        for worker in workers(process):
            async with alone(process, worker):
                async with Raw(process) as raw:
                    await raw.get("/" + "x" * 400)
                    assert (await raw.answer()).status == 414
                async with Raw(process) as raw:
                    await raw.get("/health", f"x: {'y' * 500}")
                    assert (await raw.answer()).status == 431
                async with Raw(process) as raw:
                    await raw.get("/health", *(f"x{n}: {'y' * 300}" for n in range(4)))
                    assert (await raw.answer()).status == 431
                async with Raw(process) as raw:
                    await raw.post("/v1/chat/completions", {**CHAT, "user": "x" * 2000})
                    assert (await raw.answer()).status == 413
                async with Raw(process) as raw:
                    await raw.get("/metrics")
                    metrics = (await raw.answer()).body
                    assert b"aioserver_listen_queue_limit 77.0" in metrics
                    await raw.get("/health")
                    assert (await raw.answer()).headers["connection"] == "close"
                async with Raw(process) as raw:
                    await raw.get("/health")
                    await raw.answer()
                    assert await raw.to_the_end() == b"", "after keepalive_timeout"

        # Killed, a parent can end nobody: its workers notice.
        children = workers(process)
        async with Raw(process) as busy:
            await busy.upgrade()
            process.signal(signal.SIGKILL)
            opcode, payload = await busy.frame()
            assert (opcode, closing(payload)[0]) == (CLOSE, 1012), "they end in good order"
            await busy.send_frame(CLOSE, payload)
        await until(lambda: all(map(gone, children)), 10.0)
        assert await process.ended() == -signal.SIGKILL
        assert process.log.count("the parent process is gone") == 2


async def test_a_second_signal_ends_all_at_once(tmp_path: Path, simulator: Simulator) -> None:
    changes = {**TWO, "chat.websocket.shutdown_timeout": 600.0}
    simulator.behaviour = QUICK.__class__(ttft=0, interval=0.05, tokens=4000)
    async with serving(tmp_path / "c.yaml", simulator.base_url, changes=changes) as process:
        await process.ready()
        children = workers(process)
        async with Raw(process) as raw:
            await raw.ask_sse("r1", text="x")
            await simulator.until(lambda stats: stats.active == 1)
            process.signal()
            await process.logs("stopping")

            process.signal(signal.SIGINT)

            assert await process.ended(10) == 1
        assert all(map(gone, children))


async def test_what_keeps_it_from_starting_is_reported_once(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    options = ("--config", str(file), "--loop", loop_name())
    write(NOWHERE, {**TWO, LIMIT: 0}, file)

    code, out, log = await run_command("serve", *options)
    assert (code, out) == (2, "")
    assert log.count("\n") == log.count("c.yaml:") == log.count("max_connections") > 0

    with socket.create_server(("127.0.0.1", 0)) as taken:
        write(NOWHERE, {**TWO, "chat.websocket.port": taken.getsockname()[1]}, file)
        code, out, log = await run_command("serve", *options)
    assert (code, out) == (1, "")
    assert log.count("cannot listen on") == 1
    assert "Traceback" not in log

    # A successor of a version that needs more than its parent gives.
    environ = {"AIOSERVER_WORKER": "2/2", "AIOSERVER_FDS": "lifeline=0"}
    async with await Process.start(
        "-m", "aioserver", "serve", *options, environ=environ
    ) as process:
        assert await process.ended() == 1
    assert (
        process.log.count("\n")
        == process.log.count("the parent process is of another version")
        == 1
    )


@pytest.mark.stress
@pytest.mark.timeout(300)
async def test_nothing_is_lost_while_workers_are_replaced_and_reloaded_all_the_time(
    tmp_path: Path, simulator: Simulator
) -> None:
    # With room for all clients in each worker, since the shares are fixed.
    room = {LIMIT: 300, f"{CONCURRENCY}.connection_queue_size": 300, f"{UVICORN}.backlog": 512}
    changes = {f"{UVICORN}.workers": 3, "logging.level": "WARNING", **room}
    async with serving(tmp_path / "c.yaml", simulator.base_url, changes=changes) as process:
        await process.ready()
        load = Load(process, 40)
        for _ in range(6):
            former = workers(process)
            process.signal(signal.SIGUSR2)
            for limit in range(3):
                process.change({**changes, LIMIT: 290 - limit})
                process.signal(signal.SIGHUP)
                await asyncio.sleep(0.3)
            await until(lambda gone_by=former: not {*gone_by} & {*workers(process)}, 60.0)  # type: ignore[misc]
            assert len(workers(process)) == 3
        await load.end()

        assert load.faults == []
        assert load.served > 1000
        process.signal()
        assert await process.ended() == 0
    assert "Traceback" not in process.log


async def test_workers_renew_the_certificate_and_are_replaced_in_the_middle_of_handshakes(
    tmp_path: Path, simulator: Simulator
) -> None:
    """Each watches for itself; a replacement loses no client that is about to connect."""
    changes = {**TWO, TLS: pair(tmp_path)}
    file = tmp_path / "config.yaml"
    async with serving(file, simulator.base_url, changes=changes) as process:
        await process.ready()
        assert process.base.startswith("https://")

        pair(tmp_path)
        await until(lambda: process.log.count("a certificate in effect until") == 2, 30.0)
        async with TlsClient(process.port) as client:
            shown = client.tls.getpeercert(binary_form=True)
        assert shown == certificates((tmp_path / "tls.pem").read_bytes())[0].der

        former = workers(process)
        async with AsyncExitStack() as stack:
            clients = [TlsClient(process.port) for _ in range(12)]
            for client in clients:
                stack.callback(client.socket.close)
                await client.connect()
            process.signal(signal.SIGUSR2)
            await process.logs("replacing 2 workers")
            for client in clients:
                await client.handshake()
                await client.send(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert (await client.to_the_end()).startswith(b"HTTP/1.1 200 OK")
        await process.logs(REPLACED)
        await until(lambda: all(map(gone, former)), 30.0, lambda: process.log)
        process.signal()
        assert await process.ended() == 0
    assert "Traceback" not in process.log

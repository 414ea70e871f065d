"""systemd's side of the bargain is played by a real datagram socket and real processes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import resource
import select
import signal
import socket
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from aioserver.config.faults import ConfigurationError
from aioserver.server import listener, systemd
from aioserver.server.systemd import Notifier
from aioserver.telemetry import kernel
from tests.support.process import ServerProcess, serving
from tests.support.server import NOWHERE, QUICK, UVICORN, runner_of
from tests.support.simulator import Simulator
from tests.support.systemd import Systemd
from tests.support.waiting import patience, until, until_result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

USUAL = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "http"}


@pytest.fixture(params=["path", "abstract"])
async def manager(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Systemd]:
    """systemd, listening on a path or on an abstract name."""
    path = str(tmp_path / "notify")
    with Systemd(path if request.param == "path" else f"@aioserver-test{path}") as made:
        yield made


@pytest.fixture
async def watching(tmp_path: Path) -> AsyncIterator[Systemd]:
    with Systemd(str(tmp_path / "notify")) as made:
        yield made


@pytest.fixture
def port() -> Iterator[socket.socket]:
    """A listening socket as systemd makes it: it outlives the processes that serve it."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def taken(
    manager: Systemd, status: Callable[[], str] = lambda: "3 of 9", **environ: str
) -> Notifier:
    return Notifier.take({"NOTIFY_SOCKET": manager.address, **environ}, status)


# What it tells.


async def test_systemd_hears_of_the_start_and_of_the_end(manager: Systemd) -> None:
    notifier = taken(manager)

    notifier.ready()
    notifier.stopping()
    notifier.close()

    assert await manager.message() == {"READY": "1", "STATUS": "3 of 9"}
    assert await manager.message() == {"STOPPING": "1", "STATUS": "stopping"}


async def test_a_reload_has_a_beginning_on_the_clock_of_systemd_and_an_end(
    manager: Systemd,
) -> None:
    notifier = taken(manager)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000

    notifier.reloading()
    notifier.ready()
    notifier.close()

    notice = await manager.message()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notice["RELOADING"] == "1"
    assert before <= int(notice["MONOTONIC_USEC"]) <= after
    assert (await manager.message())["READY"] == "1"


async def test_the_variables_are_for_this_process_alone(watching: Systemd) -> None:
    environ = {
        "NOTIFY_SOCKET": watching.address,
        "WATCHDOG_USEC": "1000000",
        "WATCHDOG_PID": str(os.getpid()),
        "LISTEN_PIDFDID": "1",
        **USUAL,
        "LISTEN_FDS": "0",
        "HOME": "here",
    }

    Notifier.take(environ)
    systemd.inherited(environ)

    assert environ == {"HOME": "here"}


@pytest.mark.parametrize("address", [None, "vsock:2:1234", "relative/path"])
async def test_without_systemd_nothing_happens(address: str | None) -> None:
    environ = {"WATCHDOG_USEC": "1000"} | ({"NOTIFY_SOCKET": address} if address else {})
    statuses = itertools.count()
    notifier = Notifier.take(environ, lambda: str(next(statuses)))

    notifier.ready()
    notifier.reloading()
    notifier.stopping()
    notifier.close()

    assert next(statuses) == 1, "each beat asks for the status again"


@pytest.mark.parametrize("address", ["/nowhere/notify", "/" + "long" * 100, "/a\0b", "@" * 400])
async def test_a_broken_address_hurts_nobody_and_is_reported_once(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier.take({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000000"})

    notifier.ready()
    notifier.reloading()
    notifier.stopping()
    notifier.close()

    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


async def test_a_systemd_that_does_not_read_is_not_waited_for(
    watching: Systemd, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = taken(watching)

    for _ in range(2000):  # the kernel holds 10 to 512
        notifier.reloading()

    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert watching.unread()
    notifier.ready()
    assert (await watching.message())["READY"] == "1"
    notifier.close()


# The watchdog.


async def test_the_watchdog_is_fed_with_what_the_status_is_by_then(watching: Systemd) -> None:
    counts = iter(range(1000))
    notifier = Notifier(watching.address, 0.05, lambda: str(next(counts)))

    notifier.ready()

    assert (await watching.message())["STATUS"] == "0"
    for count in range(1, 6):
        assert await watching.message() == {"WATCHDOG": "1", "STATUS": str(count)}
    notifier.close()


async def test_a_reload_that_is_over_starts_no_second_feeding(watching: Systemd) -> None:
    notifier = taken(watching, WATCHDOG_USEC="60000000")

    for _ in range(3):
        notifier.ready()
    notifier.close()

    assert sum(b"WATCHDOG=1" in message for message in watching.unread()) == 1


async def test_the_watchdog_of_another_process_is_not_fed(watching: Systemd) -> None:
    notifier = taken(watching, WATCHDOG_USEC="1000", WATCHDOG_PID=str(os.getppid()))

    notifier.ready()
    notifier.close()

    assert [b"READY=1" in message for message in watching.unread()] == [True]


@pytest.mark.parametrize("period", ["", "0", "-5", "1e6", "x", "٣"])
async def test_a_watchdog_without_a_time_is_none(watching: Systemd, period: str) -> None:
    notifier = taken(watching, WATCHDOG_USEC=period)

    notifier.ready()
    notifier.close()

    assert [b"READY=1" in message for message in watching.unread()] == [True]


async def test_a_blocked_loop_starves_the_watchdog(watching: Systemd) -> None:
    notifier = Notifier(watching.address, 0.2)
    notifier.ready()
    await watching.message_with("WATCHDOG")
    watching.unread()

    came, _, _ = select.select([watching], [], [], 0.5)  # blocks the loop, and listens

    assert not came
    await watching.message_with("WATCHDOG")
    notifier.close()


async def test_a_watchdog_is_fed_where_no_descriptor_is_free(watching: Systemd) -> None:
    notifier = Notifier(watching.address, 0.05)
    notifier.ready()
    await watching.message_with("WATCHDOG")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            socket.socket()
        watching.unread()
        for _ in range(2):
            await asyncio.wait_for(watching.message_with("WATCHDOG"), patience(10))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    notifier.close()


async def test_no_beat_comes_after_the_end(watching: Systemd) -> None:
    notifier = Notifier(watching.address, 0.05)
    notifier.ready()
    await watching.message_with("WATCHDOG")

    notifier.close()
    watching.unread()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watching.message(), 0.2)


# Sockets that are passed.


def passed(sock: socket.socket, **environ: str) -> list[socket.socket]:
    """The sockets that are inherited where a copy of *sock* is the first descriptor."""
    return systemd.inherited({**USUAL, **environ}, first=os.dup(sock.fileno()))


def test_a_passed_socket_is_taken_and_not_passed_on(port: socket.socket) -> None:
    (sock,) = passed(port)

    with sock:
        assert sock.getsockname() == port.getsockname()
        assert not sock.get_inheritable()
        assert sock.family == socket.AF_INET


def test_several_are_taken_in_order(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as former,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as two,
    ):
        two.bind(str(tmp_path / "socket"))
        two.listen()
        first = max(former.fileno(), two.fileno()) + 100
        os.dup2(former.fileno(), first)
        os.dup2(two.fileno(), first + 1)

        sockets = systemd.inherited({**USUAL, "LISTEN_FDS": "2"}, first=first)

        assert [listener.address_of(sock) for sock in sockets] == [
            former.getsockname(),
            (str(tmp_path / "socket"), 0),
        ]
        assert listener.hosts(sockets) == ["127.0.0.1"]
        for sock in sockets:
            sock.close()


@pytest.mark.parametrize(
    "environ",
    [
        {"LISTEN_PID": str(os.getppid())},
        {"LISTEN_PID": ""},
        {"LISTEN_PID": "x"},
        {"LISTEN_FDS": "0"},
        {"LISTEN_FDS": "-1"},
        {"LISTEN_FDS": "x"},
        {"LISTEN_FDS": ""},
    ],
)
def test_sockets_for_another_process_are_left_alone(environ: dict[str, str]) -> None:
    assert systemd.inherited({**USUAL, **environ}) == []
    assert listener.hosts([]) is None


def test_sockets_that_are_no_listening_streams_are_refused_all_at_once(tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    with (
        socket.create_server(("127.0.0.1", 0)) as good,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as silent,
    ):
        descriptors = [good.fileno(), datagrams.fileno(), silent.fileno(), file]
        first = max(descriptors) + 100
        for at, number in enumerate(descriptors):
            os.dup2(number, first + at)
        environ = {**USUAL, "LISTEN_FDS": "5", "LISTEN_FDNAMES": "a:b:c:d:e"}

        with pytest.raises(ConfigurationError) as caught:
            systemd.inherited(environ, first=first)

        os.close(file)
        os.close(first + 3)
        assert list(caught.value.faults) == [
            f"LISTEN_FDS: descriptor {first + 1} (b) is no stream socket (ListenStream=)",
            f"LISTEN_FDS: descriptor {first + 2} (c) does not listen (Accept=no)",
            f"LISTEN_FDS: descriptor {first + 3} (d) is no socket: Socket operation on non-socket",
            f"LISTEN_FDS: descriptor {first + 4} (e) is no socket: Bad file descriptor",
        ]
        for at in range(3):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(first + at)  # closed


async def test_a_passed_socket_gets_backlog_and_bounds_like_one_of_ours(
    tmp_path: Path, port: socket.socket
) -> None:
    (sock,) = passed(port)
    async with runner_of(tmp_path, **{f"{UVICORN}.backlog": 77}) as (runner, websocket):
        (listening,) = await listener.listen(runner.server, websocket, inherited=[sock])

        assert (listening.host, listening.port) == port.getsockname()
        assert listening.queue_limit == 77
        assert kernel.accept_queue(port) == (0, 77)
        lowat = port.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
        assert lowat == listener.MAX_NOT_SENT
        uvloop = "uvloop" in type(asyncio.get_running_loop()).__module__
        assert len(runner.sites) == (listener.UVLOOP_WATCHERS if uvloop else 1)


@pytest.mark.parametrize("kind", ["path", "abstract"])
async def test_a_passed_unix_socket_is_served_and_its_file_left_alone(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "socket"
    name = str(path) if kind == "path" else f"\0aioserver-test{path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
        unix.bind(name)
        unix.listen()
        async with runner_of(tmp_path) as (runner, websocket):
            (listening,) = await listener.listen(runner.server, websocket, inherited=passed(unix))
            for asked in ("/health", "/metrics"):
                client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                client.connect(name)
                reader, writer = await asyncio.open_unix_connection(sock=client)
                writer.write(f"GET {asked} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                assert (await reader.read()).startswith(b"HTTP/1.0 200 OK\r\n")
                writer.close()
                await writer.wait_closed()

        assert listening.url == f"unix:{name.replace(chr(0), '@')}"
        assert path.exists() == (kind == "path")


async def test_the_word_of_a_proxy_behind_a_unix_socket_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = str(tmp_path / "socket")
    changes = {f"{UVICORN}.access_log": True, "auth.trusted_proxies": ["unix"]}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
        unix.bind(name)
        unix.listen()
        async with runner_of(tmp_path, **changes) as (runner, websocket):
            await listener.listen(runner.server, websocket, inherited=passed(unix))
            with caplog.at_level(logging.INFO, "aioserver.access"):
                reader, writer = await asyncio.open_unix_connection(name)
                writer.write(
                    b"GET /health HTTP/1.0\r\nHost: localhost\r\n"
                    b"X-Forwarded-For: 203.0.113.9\r\n\r\n"
                )
                assert (await reader.read()).startswith(b"HTTP/1.0 200 OK\r\n")
                writer.close()
                await writer.wait_closed()

    (line,) = [
        record.fields  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "aioserver.access"
    ]
    assert line["address"] == "203.0.113.9"


# Processes.


@asynccontextmanager
async def serving_for(
    systemd: Systemd, path: Path, base_url: str, sockets: list[socket.socket], **environ: str
) -> AsyncIterator[ServerProcess]:
    """A process that has told *systemd* that it takes work."""
    environ["NOTIFY_SOCKET"] = systemd.address
    async with serving(
        path / "config.yaml", base_url, sockets=sockets, environ=environ
    ) as process:
        await process.living(systemd.message_with("READY"))
        yield process


async def fetched(port: socket.socket, path: str = "/health") -> tuple[int, Any]:
    url = f"http://127.0.0.1:{port.getsockname()[1]}{path}"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.json()


async def test_a_service_serves_the_passed_socket_feeds_its_watchdog_and_ends_well(
    tmp_path: Path, watching: Systemd, port: socket.socket
) -> None:
    async with (
        Simulator(QUICK) as simulator,
        serving_for(
            watching, tmp_path, simulator.base_url, [port], WATCHDOG_USEC="2000000"
        ) as process,
    ):
        url = f"http://127.0.0.1:{port.getsockname()[1]}/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, json=body) as response,
        ):
            assert response.status == 200
            assert (await response.json())["choices"]
            async with (
                session.ws_connect(f"http://127.0.0.1:{port.getsockname()[1]}/ws/chat"),
                asyncio.timeout(patience(30)),
            ):
                while "1 of 50" not in (await watching.message_with("WATCHDOG"))["STATUS"]:
                    pass

        process.signal()
        await process.living(watching.message_with("STOPPING"))
        code = await process.ended()

    assert code == 0, process.log
    assert "Traceback" not in process.log
    assert f"listening on http://127.0.0.1:{port.getsockname()[1]} backlog=128" in process.log


async def test_a_reload_that_is_asked_for_during_the_start_comes_behind_it(
    tmp_path: Path, watching: Systemd
) -> None:
    changes = {"chat.websocket.host": "localhost"}
    environ = {"NOTIFY_SOCKET": watching.address}
    async with serving(
        tmp_path / "config.yaml", NOWHERE, changes=changes, environ=environ
    ) as process:
        await process.logs("configuration: ")
        first = asyncio.ensure_future(watching.message())
        async with asyncio.timeout(patience(30)):
            while not first.done():
                process.signal(signal.SIGHUP)
                await asyncio.wait([first], timeout=0.001)
            assert "READY" in await first
        await process.living(watching.message_with("RELOADING"))
        await process.living(watching.message_with("READY"))
        process.signal()
        assert await process.ended() == 0


async def test_connections_that_come_while_nobody_serves_are_answered_by_the_next(
    tmp_path: Path, watching: Systemd, port: socket.socket
) -> None:
    async with serving_for(watching, tmp_path, NOWHERE, [port]) as first:
        assert (await fetched(port))[0] == 200
        first.signal()
        assert await first.ended() == 0

    waiting = [asyncio.create_task(fetched(port)) for _ in range(40)]
    await until(lambda: waiting_in(port) == len(waiting))
    async with serving_for(watching, tmp_path, NOWHERE, [port]) as second:
        answers = await asyncio.gather(*waiting)
        second.signal()
        assert await second.ended() == 0

    assert [status for status, _ in answers] == [200] * 40


def waiting_in(port: socket.socket) -> int:
    """The number of connections that wait in the kernel."""
    queue = kernel.accept_queue(port)
    assert queue is not None
    return queue.waiting


# Python runs a module of this name at its start. A signal's handler runs in the thread of the
# event loop.
BLOCKABLE = """
import signal, time
seconds = iter((0.6, 1000))
def blocked(number, frame):
    time.sleep(next(seconds))
signal.signal(signal.SIGUSR1, blocked)
"""


async def test_a_service_whose_loop_is_blocked_shows_it_and_leaves_its_stacks_if_it_lasts(
    tmp_path: Path, watching: Systemd, port: socket.socket
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKABLE)
    environ = {"PYTHONPATH": str(tmp_path), "WATCHDOG_USEC": "1000000"}
    metrics = f"http://127.0.0.1:{port.getsockname()[1]}/metrics"
    async with serving_for(watching, tmp_path, NOWHERE, [port], **environ) as process:
        await watching.message_with("WATCHDOG")

        process.signal(signal.SIGUSR1)
        async with aiohttp.ClientSession() as session:
            await until_result(lambda: _has_been_late(session, metrics), bool)

        before = process.log.count("in blocked")
        process.signal(signal.SIGUSR1)
        await until(lambda: process.log.count("in blocked") > before, 30.0)
        process.signal(signal.SIGABRT)  # as systemd does when the time is over
        assert await process.ended() == -signal.SIGABRT

    assert process.log.count("in blocked") >= before + 2


async def _has_been_late(session: aiohttp.ClientSession, metrics: str) -> bool:
    """Whether the loop was later than half a second at least once."""
    async with session.get(metrics) as response:
        samples = dict(line.rsplit(" ", 1) for line in (await response.text()).splitlines())
    most = 'aioserver_loop_lag_seconds_bucket{le="0.5"}'
    return float(samples["aioserver_loop_lag_seconds_count"]) > float(samples[most])


async def test_a_passed_socket_that_others_can_reach_needs_a_guard_as_a_host_does(
    tmp_path: Path,
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as everybody:
        async with serving(tmp_path / "config.yaml", NOWHERE, sockets=[everybody]) as process:
            code = await process.ended()

    assert code == 2
    assert "0.0.0.0 is open to others" in process.log

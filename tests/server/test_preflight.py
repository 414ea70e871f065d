"""Each condition for serving is one clear line and an exit code where it does not hold."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.server import preflight
from tests.support.server import CONCURRENCY, NOWHERE, configured, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def refused(
    path: Path,
    *python: str,
    changes: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> tuple[int, str]:
    """The exit code, and all that was said, of a process that does not come to serve."""
    write(NOWHERE, changes or {}, path / "c.yaml")
    done = subprocess.run(
        [sys.executable, *python, "-m", "aioserver", "--config", str(path / "c.yaml")],
        capture_output=True,
        text=True,
        timeout=30,
        env=environ,
        preexec_fn=before,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_python_without_asserts_is_refused(tmp_path: Path) -> None:
    code, message = refused(tmp_path, "-O")
    assert code == 2
    assert (
        message
        == "python -O (or PYTHONOPTIMIZE) removes checks that aioserver needs: leave it out\n"
    )


def test_aiohttp_without_its_c_parser_is_refused(tmp_path: Path) -> None:
    code, message = refused(tmp_path, environ={"AIOHTTP_NO_EXTENSIONS": "1"})
    assert code == 2
    assert message == "AIOHTTP_NO_EXTENSIONS switches aiohttp's C parser off: unset it\n"


def test_a_c_parser_that_is_not_there_is_refused(tmp_path: Path) -> None:
    hidden = (
        "import sys; sys.modules['aiohttp._http_parser'] = None; sys.argv[0] = 'aioserver'; "
        "from aioserver.__main__ import main; main()"
    )
    write(NOWHERE, {}, tmp_path / "c.yaml")
    done = subprocess.run(
        [sys.executable, "-c", hidden, "--config", str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("aiohttp has no C parser here: install one of its wheels")
    assert done.stderr.count("\n") == 1


def files(soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_files_for_the_clients_are_refused(tmp_path: Path) -> None:
    code, message = refused(tmp_path, before=files(100, 100))
    wanted = preflight.wanted_files(configured(NOWHERE, {}, tmp_path / "w.yaml").settings)
    assert code == 1
    assert message == (
        "100 open files are too few for chat.websocket.concurrency.max_connections=50: raise it "
        f"to {wanted} (ulimit -Hn {wanted}; systemd: LimitNOFILE={wanted}), or lower that\n"
    )


def test_files_for_every_cap_are_counted(tmp_path: Path) -> None:
    changes = {
        f"{CONCURRENCY}.max_connections": 100,
        f"{CONCURRENCY}.connection_queue_size": 128,
        "llm.providers.sim.http_client.max_connections": 30,
    }
    settings = configured(NOWHERE, changes, tmp_path / "c.yaml").settings
    assert preflight.wanted_files(settings) == 100 + 128 + 256 + 256 + 30 + 64


LIMITED = """
import resource, sys
from aioserver.server import preflight
from aioserver.config import Configuration
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
print(preflight.raise_file_limit(Configuration.load(sys.argv[1], environ={}).settings))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "then", "warned"),
    [
        (200, 4000, 4000, False),  # raised as far as it goes
        (3000, 4000, 3000, False),  # enough as it is
        (200, 300, 300, True),  # for the clients, but not for all at once
    ],
)
def test_the_limit_of_files_is_raised_where_need_be(
    tmp_path: Path, soft: int, hard: int, then: int, warned: bool
) -> None:
    write(NOWHERE, {}, tmp_path / "c.yaml")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "c.yaml"), str(soft), str(hard)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    warning, limit = done.stdout.splitlines()
    assert int(limit) == then
    assert warning.startswith("300 open files are fewer than") if warned else warning == "None"


CANNOT = """
import resource, sys
from aioserver.server import preflight
from aioserver.config import Configuration
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 4000))

def refused(event, args):
    if event == "resource.setrlimit":
        raise ValueError("as where a filter of system calls says no")

sys.addaudithook(refused)
print(preflight.raise_file_limit(Configuration.load(sys.argv[1], environ={}).settings))
"""


def test_a_limit_of_files_that_cannot_be_raised_is_a_warning(tmp_path: Path) -> None:
    write(NOWHERE, {}, tmp_path / "c.yaml")
    done = subprocess.run(
        [sys.executable, "-c", CANNOT, str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.startswith("200 open files are fewer than all limits together may take")


ROOM = """
import sys
from aioserver.server import preflight
from aioserver.config import Configuration
settings = Configuration.load(sys.argv[1], environ={}).settings
preflight.make_room_for_files(settings)
print(preflight.wanted_files(settings))
print(*(line for line in open("/proc/self/status") if line.startswith("FDSize")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says how large the table is")
def test_the_table_of_descriptors_is_as_large_as_it_may_become(tmp_path: Path) -> None:
    write(NOWHERE, {}, tmp_path / "c.yaml")
    done = subprocess.run(
        [sys.executable, "-c", ROOM, str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    wanted, _name, entries = done.stdout.split()
    assert int(entries) >= int(wanted) > 512


def test_a_port_in_use_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        changes = {"chat.websocket.port": port, "logging.level": "ERROR"}
        code, message = refused(tmp_path, changes=changes)
    assert code == 1
    assert message == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use: "
        "end what listens there, or choose another port (--port)\n"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_ours_is_one_line(tmp_path: Path, host: str) -> None:
    changes = {"chat.websocket.host": host, "auth": {"open": True}, "logging.level": "ERROR"}
    code, message = refused(tmp_path, changes=changes)
    assert code == 1
    assert message.startswith(f"cannot listen on {host}:0: ")
    assert message.count("\n") == 1


def test_certificates_that_are_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    changes = {
        "llm.providers.sim.base_url": "https://127.0.0.1:9/v1",
        "llm.providers.sim.ca_file": str(tmp_path / "ca.pem"),
        "logging.level": "ERROR",
    }
    code, message = refused(tmp_path, changes=changes)
    assert code == 2
    assert message == f"llm.providers.sim.ca_file: {tmp_path / 'ca.pem'} holds no certificates\n"

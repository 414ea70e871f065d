"""The units for systemd: hardened, valid, in step with the shipped configuration, and they
start.
"""

from __future__ import annotations

import asyncio
import configparser
import re
import shlex
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from aioserver.config import Configuration
from aioserver.config.shipped import SHIPPED
from tests.support.process import Process
from tests.support.server import NOWHERE, configured
from tests.support.systemd import Systemd
from tests.support.tools import DEPLOY, edited, installed

if TYPE_CHECKING:
    from pathlib import Path

PYTHON = "/opt/aioserver/bin/python"
CONFIG = "/etc/aioserver/config.yaml"


def unit(name: str) -> dict[str, dict[str, str]]:
    """A unit's sections; of a key that is there several times the last value."""
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    parser.read_string((DEPLOY / name).read_text())
    return {section: dict(parser[section]) for section in parser.sections()}


SERVICE, SOCKET = unit("aioserver.service")["Service"], unit("aioserver.socket")["Socket"]


def run(*command: str) -> str:
    """The output of *command*, which must succeed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


SERVICES = ["aioserver.service", "aioserver@.service"]


@pytest.mark.parametrize("name", SERVICES)
def test_the_service_is_hardened(name: str) -> None:
    run(
        installed("systemd-analyze"),
        "security",
        "--offline=yes",
        "--no-pager",
        "--threshold=20",  # 2.0 of 10; without a threshold nothing is a failure
        str(DEPLOY / name),
    )


@pytest.mark.parametrize("name", SERVICES)
def test_systemd_understands_every_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(
        edited(name, {f"ExecStart={PYTHON}": f"ExecStart={sys.executable}"})
    )
    changes = {} if name == "aioserver.service" else {"#Service=": "Service="}
    (tmp_path / "aioserver.socket").write_text(edited("aioserver.socket", changes))

    output = run(
        installed("systemd-analyze"),
        "verify",
        "--man=no",
        str(tmp_path / name.replace("@", "@1")),
        str(tmp_path / "aioserver.socket"),
    )

    ours = [line for line in output.splitlines() if re.search(r"aioserver(@1?)?\.", line)]
    assert ours == []


def test_the_units_are_in_step_with_the_shipped_configuration() -> None:
    settings = Configuration.load(SHIPPED, environ={}).settings
    websocket = settings.chat.websocket
    limits = websocket.concurrency
    kept = settings.chat.streams.max_kept_bytes + limits.max_body_bytes
    descriptors = (
        limits.max_connections
        + limits.connection_queue_size
        + sum(provider.http_client.max_connections for provider in settings.llm.providers.values())
    )

    assert int(SERVICE["TimeoutStopSec"]) > websocket.drain_delay + websocket.shutdown_timeout + 5
    assert int(SERVICE["WatchdogSec"]) == 20
    assert int(SERVICE["LimitNOFILE"]) > 64 * descriptors
    assert SERVICE["MemoryMax"].endswith("G")
    assert int(SERVICE["MemoryMax"][:-1]) * 2**30 > 2 * kept
    assert SERVICE["RestartPreventExitStatus"] == "2"
    assert SERVICE["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert int(SOCKET["Backlog"]) == limits.uvicorn.backlog
    assert SOCKET["ListenStream"] == f"127.0.0.1:{websocket.port}"
    assert SOCKET["Accept"] == "no"


def test_the_services_differ_in_nothing_but_their_number() -> None:
    template = unit("aioserver@.service")["Service"]

    assert template.pop("Sockets") == "aioserver.socket"
    assert template.pop("User") == "aioserver", "one directory needs one user"
    # While one of them ends, the others serve.
    found = re.search(r"__SHUTDOWN_TIMEOUT=(\d+)", (DEPLOY / "aioserver@.service").read_text())
    assert found is not None
    assert int(template["TimeoutStopSec"]) > int(found[1]) + 5
    assert template | {"TimeoutStopSec": SERVICE["TimeoutStopSec"]} == SERVICE


async def test_the_command_of_the_service_serves_the_socket_of_the_socket_unit(
    tmp_path: Path,
) -> None:
    config = tmp_path / "config.yaml"
    configured(NOWHERE, {}, config)
    program, *arguments = shlex.split(SERVICE["ExecStart"])
    assert program == PYTHON
    assert arguments.count(CONFIG) == 1
    arguments = [str(config) if argument == CONFIG else argument for argument in arguments]

    with (
        Systemd(str(tmp_path / "notify")) as systemd,
        socket.create_server(("127.0.0.1", 0)) as port,
    ):
        environ = {
            "NOTIFY_SOCKET": systemd.address,
            "WATCHDOG_USEC": f"{SERVICE['WatchdogSec']}000000",
        }
        async with await Process.start(*arguments, sockets=[port], environ=environ) as process:
            ready = await process.living(systemd.message_with("READY"))
            assert "connections" in ready["STATUS"]
            await process.living(systemd.message_with("WATCHDOG"))
            reader, writer = await asyncio.open_connection(*port.getsockname())
            writer.write(b"GET /ready HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert (await reader.readline()).split()[1] == b"200"
            writer.close()
            await writer.wait_closed()

            process.signal()
            code = await process.ended()

    assert code == 0, process.log


@pytest.mark.parametrize("word", ["key", "secret", "token", "password"])
def test_no_secret_is_in_the_environment_of_the_unit(word: str) -> None:
    assert word not in SERVICE["Environment"].lower()


async def test_two_services_serve_one_socket_and_either_may_end(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    configured(NOWHERE, {}, config)
    _, *arguments = shlex.split(unit("aioserver@.service")["Service"]["ExecStart"])
    arguments = [str(config) if argument == CONFIG else argument for argument in arguments]

    async def status(port: socket.socket) -> bytes:
        reader, writer = await asyncio.open_connection(*port.getsockname())
        writer.write(b"GET /ready HTTP/1.0\r\nHost: localhost\r\n\r\n")
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return line.split()[1]

    with socket.create_server(("127.0.0.1", 0)) as port:
        async with (
            await Process.start(*arguments, sockets=[port]) as first,
            await Process.start(*arguments, sockets=[port]) as second,
        ):
            for process in (first, second):
                await process.prints(re.compile("aioserver is ready"))
            first.signal()
            assert await first.ended() == 0
            assert await status(port) == b"200"
            second.signal()
            assert await second.ended() == 0

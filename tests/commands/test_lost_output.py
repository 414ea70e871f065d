"""Stdout or stderr is closed, on a full disk, or read by nobody.

A server serves on all the same. Any other command says in one line that it could not write its
results.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.chat import CHAT
from tests.support.process import Process, loop_name
from tests.support.server import QUICK, write
from tests.support.simulator import Simulator
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from pathlib import Path

# Spoils descriptors of this process, and becomes the program.
SPOILED = """
import os, sys
how, descriptors, *program = sys.argv[1:]
for descriptor in map(int, descriptors.split(",")):
    os.close(descriptor)
    if how == "full":
        other = os.open("/dev/full", os.O_WRONLY)
    elif how == "unread":
        reader, other = os.pipe()
        os.close(reader)
    else:
        continue
    os.dup2(other, descriptor)
    os.set_inheritable(descriptor, True)
os.execv(sys.executable, [sys.executable, *program])
"""
SPOILS = [("closed", "0,1,2"), ("full", "1,2"), ("unread", "1"), ("unread", "2")]


@pytest.mark.parametrize(("how", "descriptors"), SPOILS)
async def test_a_server_serves_on_whatever_becomes_of_its_output(
    tmp_path: Path, how: str, descriptors: str
) -> None:
    file = tmp_path / "c.yaml"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        base = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with Simulator(QUICK, keep=0) as simulator, aiohttp.ClientSession() as session:
            write(simulator.base_url, {"logging.level": "INFO"}, file)
            serve = ("-m", "aioserver", "serve", "--config", str(file), "--loop", loop_name())
            program = ("-c", SPOILED, how, descriptors, *serve)
            async with await Process.start(*program, sockets=[listening]) as process:
                for _ in range(3):
                    async with session.post(f"{base}/v1/chat/completions", json=CHAT) as response:
                        assert response.status == 200
                        assert (await response.json())["choices"]

                process.signal()
                assert await process.ended() == 0

    assert "Traceback" not in process.log
    if "1" not in descriptors:
        assert process.out.startswith("aioserver is ready: http://")
    if "2" not in descriptors:
        assert "stopped" in process.log
        assert ("cannot be written" in process.log) == (how != "closed")


async def test_the_simulated_provider_serves_on_without_a_reader_of_its_stdout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("provider", "--port", str(port))
    async with await Process.start(
        "-c", SPOILED, "unread", "1", "-m", "aioserver", *options
    ) as process:
        await process.logs("stdout cannot be written")
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/v1/models") as response,
        ):
            assert response.status == 200

        process.signal()
        assert await process.ended() == 0

    assert "Traceback" not in process.log


RESULTS = {
    "check": ["check"],
    "schema": ["check", "--schema"],
    "init": ["init", "new.yaml"],
    "help": ["--help"],
}


# All commands write alike, so some of them stand for a reader that has gone and for the ways in
# which Python opens stdout. `check` flushes, and the schema has more than a buffer takes.
WRITTEN = [
    *((name, "full", {}) for name in ("check", "schema", "init", "help")),
    ("schema", "unread", {}),
    ("check", "full", {"PYTHONUNBUFFERED": "1"}),
    ("help", "unread", {"PYTHONIOENCODING": "ascii"}),
]


@pytest.mark.parametrize(("name", "how", "environ"), WRITTEN)
def test_results_that_cannot_be_written_are_one_clear_line(
    tmp_path: Path, name: str, how: str, environ: dict[str, str]
) -> None:
    program = ["-c", SPOILED, how, "1", "-m", "aioserver", *RESULTS[name]]

    done = subprocess.run(
        [sys.executable, *program],
        cwd=tmp_path,
        # Whatever this machine has in its environment: a stdout without a buffer keeps nothing.
        env={**os.environ, "PYTHONUNBUFFERED": "", **environ},
        capture_output=True,
        text=True,
        timeout=LATE,
        check=False,
    )

    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "cannot be written" in line]
    reason = os.strerror(errno.ENOSPC)
    # A reader that has gone is told nothing: it wanted no more.
    expected = [f"aioserver: stdout cannot be written: {reason}"] if how == "full" else []
    assert lines == expected
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if name == "init":
        assert (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize(
    ("descriptors", "arguments", "code"),
    [
        ("1,2", ["--version"], 1),
        ("2", ["--version"], 0),
        ("2", ["usage", "nowhere"], 1),
    ],
)
def test_a_lost_stderr_gives_no_command_an_exit_code_of_the_interpreter(
    tmp_path: Path, descriptors: str, arguments: list[str], code: int
) -> None:
    program = ["-c", SPOILED, "full", descriptors, "-m", "aioserver", *arguments]

    done = subprocess.run(
        [sys.executable, *program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdout=subprocess.DEVNULL,
        timeout=LATE,
        check=False,
    )

    assert done.returncode == code

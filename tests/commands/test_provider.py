"""The `provider` command, as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
import pytest
from click.testing import CliRunner

from aioserver.__main__ import cli
from aioserver.commands.provider import provider
from aioserver.providers.simulator import faults
from aioserver.providers.simulator.exchange import Behaviour

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHAT = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}


@asynccontextmanager
async def running(*options: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and its base URL."""
    command = (sys.executable, "-m", "aioserver", "provider", "--port", "0", "--ttft", "0")
    process = await asyncio.create_subprocess_exec(
        *command, *options, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        hint = (await process.stdout.readline()).decode()
        base_url = line.split()[3]
        assert f"BASE_URL={base_url} " in hint
        yield process, base_url
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_runs_until_a_signal_also_with_a_running_stream(number: signal.Signals) -> None:
    async with (
        running("--interval", "60") as (process, base_url),
        aiohttp.ClientSession() as session,
        session.post(f"{base_url}/chat/completions", json=CHAT) as response,
    ):
        assert await response.content.readline()
        process.send_signal(number)
        async with asyncio.timeout(5):
            assert await process.wait() == 0


def test_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = provider("127.0.0.1", port, Behaviour())
    out, err = capsys.readouterr()

    assert (code, out) == (1, "")
    assert err == f"cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize(
    ("options", "statuses"),
    [
        (("--fault", "status-418"), {418}),
        (("--fault", "fault-flap-2", "--fail-rate", "1"), {200, 502}),
        (("--fault", "status-418", "--fail-rate", "0"), {200}),
        (("--fail-rate", "1", "--fail-status", "529"), {529}),
        ((), {200}),
    ],
)
async def test_a_fault_by_its_name(options: tuple[str, ...], statuses: set[int]) -> None:
    seen = set()
    async with (
        running("--interval", "0", *options) as (_, base_url),
        aiohttp.ClientSession() as session,
    ):
        for _ in range(4):
            async with session.post(f"{base_url}/chat/completions", json=CHAT) as response:
                seen.add(response.status)

    assert seen == statuses


def test_the_list_of_faults_names_all_of_them() -> None:
    result = CliRunner().invoke(cli, ["provider", "--list-faults"])

    assert result.exit_code == 0
    assert {name for name in faults.FAULTS if f"fault-{name}" not in result.output} == set()
    assert "--fault NAME" in result.output.splitlines()[0]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("stal-3", "did you mean stall?"),
        ("fault-stal", "did you mean stall?"),
        ("zzzz", "no fault 'zzzz' (--list-faults"),
        ("status-1", "did you mean status?"),
    ],
)
def test_an_unknown_fault_is_a_usage_error_with_the_nearest_name(name: str, hint: str) -> None:
    result = CliRunner().invoke(cli, ["provider", "--fault", name])

    assert result.exit_code == 2
    assert hint in result.output.replace("\n", " ")

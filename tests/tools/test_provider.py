"""The `provider` command, as a process of its own."""

from __future__ import annotations

import re
import signal
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
import pytest
from click.testing import CliRunner

from aioserver.__main__ import cli
from aioserver.tools.provider import provider
from aioserver.wings.simulator import faults
from tests.support.chat import STREAMED
from tests.support.process import Process
from tests.support.simulator import Behaviour

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LISTENING = re.compile(r"(?:\S+ ){3}(\S+)[^\n]*\n[^\n]*BASE_URL=\1 [^\n]*\n")


@asynccontextmanager
async def running(*options: str) -> AsyncIterator[tuple[Process, str]]:
    """The process and its base URL."""
    program = ("-m", "aioserver", "provider", "--port", "0", "--ttft", "0", *options)
    async with await Process.start(*program) as process:
        yield process, (await process.prints(LISTENING))[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_runs_until_a_signal_also_with_a_running_stream(number: signal.Signals) -> None:
    options = ("--interval", "60", "--model", "qwen3", "--model", "embed")
    async with (
        running(*options) as (process, base_url),
        aiohttp.ClientSession() as session,
        session.get(f"{base_url}/models") as models,
        session.post(f"{base_url}/chat/completions", json={"model": "m", **STREAMED}) as response,
    ):
        assert [model["id"] for model in (await models.json())["data"]] == ["qwen3", "embed"]
        assert await response.content.readline()
        process.signal(number)
        assert await process.ended(5) == 0


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
        (("--fault", "fault-flap-2"), {200, 502}),
        (("--fault", "status-418", "--fail-rate", "0"), {200}),
        (("--fail-rate", "1", "--fail-status", "529"), {529}),
    ],
)
async def test_a_fault_by_its_name(options: tuple[str, ...], statuses: set[int]) -> None:
    seen = set()
    async with (
        running("--interval", "0", "--no-responses", *options) as (_, base_url),
        aiohttp.ClientSession() as session,
    ):
        async with session.post(f"{base_url}/responses", json={"model": "m"}) as response:
            assert response.status == 404
        for _ in range(4):
            async with session.post(
                f"{base_url}/chat/completions", json={"model": "m", **STREAMED}
            ) as response:
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

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

from aioserver.commands.provider import provider
from aioserver.providers.simulator import Behaviour

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROGRAM = """
import sys
from aioserver.commands.provider import provider
from aioserver.providers.simulator import Behaviour
sys.exit(provider("127.0.0.1", 0, Behaviour(ttft=0, interval=60)))
"""


@asynccontextmanager
async def running() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and its base URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, stdout=asyncio.subprocess.PIPE
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
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    async with (
        running() as (process, base_url),
        aiohttp.ClientSession() as session,
        session.post(f"{base_url}/chat/completions", json=body) as response,
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

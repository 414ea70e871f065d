"""The tools, our clients and the health check, with a server that speaks TLS."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.support.process import Process
from tests.support.server import QUICK
from tests.support.tls import TLS, authority, pair, put

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

pytestmark = [pytest.mark.real_time]

CLIENT = """
import asyncio, sys
from aioserver.client.client import Client
from aioserver.client.sync import Client as Plain

async def main(url):
    async with Client(url) as client:
        print(await client.chat("hi").text())

url = sys.argv[1]
asyncio.run(main(url))
asyncio.run(main(url.replace("https", "wss")))
with Plain(url) as client:
    print(client.chat("hi").text())
"""


@pytest.fixture
async def secure(make_server: MakeServer, tmp_path: Path) -> RunningServer:
    return await make_server(QUICK, **{TLS: pair(tmp_path)})


async def run(*arguments: str, environ: Mapping[str, str]) -> tuple[int, str]:
    async with await Process.start(*arguments, environ=environ) as process:
        code = await process.ended(60.0)
    return code, process.out + process.log


def trusting(folder: Path) -> dict[str, str]:
    return {"SSL_CERT_FILE": str(folder / "ca.pem")}


async def test_our_clients_take_https_and_wss(secure: RunningServer, tmp_path: Path) -> None:
    code, said = await run("-c", CLIENT, secure.base, environ=trusting(tmp_path))

    assert code == 0, said
    assert len([line for line in said.splitlines() if line.strip()]) >= 3


async def test_tools_take_https(secure: RunningServer, tmp_path: Path) -> None:
    async def tool(*arguments: str) -> None:
        command = ("-m", "aioserver", *arguments)
        code, said = await run(*command, environ=trusting(tmp_path))
        assert code == 0, said

    await asyncio.gather(
        tool("bench", secure.base, "--clients", "2", "--requests", "2", "--json"),
        tool("chat", secure.base, "hi"),
        tool("top", "--once", secure.base),
    )


@pytest.mark.parametrize("command", ["chat", "doctor", "top"])
async def test_tools_say_what_is_wrong_with_the_address(
    secure: RunningServer, command: str
) -> None:
    plain = secure.base.replace("https", "http")
    before = ["--once"] if command == "top" else []
    behind = ["hi"] if command == "chat" else []

    for url, words in ((secure.base, "SSL_CERT_FILE="), (plain, "this port speaks TLS")):
        said = await run(
            *("-m", "aioserver", command, *before, url, *behind),
            environ={"SSL_CERT_FILE": "/dev/null"},
        )
        assert said[0] == 1, said
        assert words in said[1]


async def test_doctor_says_how_an_authority_is_trusted(
    secure: RunningServer, tmp_path: Path
) -> None:
    command = ("-m", "aioserver", "doctor", secure.base)

    code, said = await run(*command, environ=trusting(tmp_path))
    assert "fail" not in said, said
    assert code == 0
    assert "certificate that is valid for 99 days" in said or "valid for 100 days" in said
    assert "a proxy in front gives it" in said

    code, said = await run(*command, environ={"SSL_CERT_FILE": "/dev/null"})
    assert code == 1
    assert "SSL_CERT_FILE=authority.pem aioserver doctor" in said
    assert "ca_file" not in said


@pytest.mark.parametrize("walled", [False, True])
async def test_health_check_asks_by_the_configured_scheme(
    make_server: MakeServer, tmp_path: Path, *, walled: bool
) -> None:
    wall = {"client_ca_file": str(tmp_path / "clients.pem")} if walled else {}
    put(tmp_path / "clients.pem", authority("others").cert_pem.bytes())
    server = await make_server(**{TLS: {**pair(tmp_path, hosts=("chat.example",)), **wall}})
    environ = {
        "AIOSERVER_CONFIG": server.file,
        "AIOSERVER__CHAT__WEBSOCKET__PORT": str(server.port),
        "AIOSERVER__AUTH__ALLOWED_HOSTS": "[x]",
    }

    async def check(**more: str) -> int:
        command = ("-m", "aioserver.tools.health")
        code, said = await run(*command, environ={**environ, **more})
        assert not code or said
        return code

    assert await check() == 0
    assert await check(AIOSERVER__CHAT__WEBSOCKET__PORT="9") == 1

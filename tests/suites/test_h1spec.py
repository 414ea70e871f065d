"""Two suites for HTTP/1.1 with one name: of dropseed, and of uNetworking (both on github.com).

The scores are in docs/testing.md: 33 of 33, and 31 of 33.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.programs import program_path, run

if TYPE_CHECKING:
    from tests.support.server import MakeServer

pytestmark = [pytest.mark.suites, pytest.mark.real_time]

VARIABLE = "AIOSERVER_H1SPECS"
HINT = (
    f"{VARIABLE} must name a folder with checkouts dropseed and uNetworking; see docs/testing.md"
)
# The hosts of their requests.
HOSTS = {"auth.allowed_hosts": ["example.com"]}
DROPSEED = "from h1spec import main; main()"
TESTS = 33
# The server would have to send a body back.
NEED_AN_ECHO = {"Valid POST request with body", "Chunked Transfer-Encoding"}


def checkout(name: str) -> Path:
    if not os.environ.get(VARIABLE):
        pytest.skip(HINT)
    return Path(os.environ[VARIABLE]) / name


async def test_all_of_dropseed_pass(make_server: MakeServer) -> None:
    folder = checkout("dropseed")
    server = await make_server(**HOSTS)

    ended = await run(
        *(sys.executable, "-c", DROPSEED, "--strict", f"127.0.0.1:{server.port}"), home=folder
    )

    assert f"{TESTS}/{TESTS} passed" in ended.out, ended.out
    assert ended.code == 0


async def test_all_of_unetworking_pass_that_need_no_echo(
    make_server: MakeServer, tmp_path: Path
) -> None:
    program = checkout("uNetworking") / "http_test.ts"
    deno = program_path("deno", "npm install deno")
    server = await make_server(**HOSTS)

    ended = await run(
        *(deno, "run", "--no-check", "--allow-net", program, "127.0.0.1", str(server.port)),
        home=tmp_path,
    )

    failed = set(re.findall(r"❌ (.*?):", ended.out + ended.log))
    assert failed == NEED_AN_ECHO, ended
    assert f"{TESTS - len(failed)} out of {TESTS} tests passed" in ended.out

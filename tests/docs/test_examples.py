"""The examples run as they stand."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest

from aioserver.client.sync import Client
from tests.support.command import serving
from tests.support.process import Process
from tests.support.server import ENDLESS
from tests.support.tools import free_port
from tests.support.waiting import LATE, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import MakeServer

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRON = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTHONUNBUFFERED": "1"}
# Of each example: its arguments, its stdin, and what its output must match.
RUNS = {
    "chatbot.py": ("{http}", "Hello\nAnd then?\n", r"(?s)\A\w.+\n\n\w.+\n\n\Z"),
    "many_questions.py": (
        "--url {http} --questions 30 --at-once 5",
        "",
        r"(?m)^7: \d+ characters: '",
        r"(?m)^30 questions in [\d.]+ s: 30 answered$",
    ),
}
# These serve until they are told to end, and have tests of their own; these are lines of the
# README, which have a file of tests.
SERVERS, LINES = {"embedded.py", "flask_view.py"}, {"unbroken.py", "websocket.py"}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*RUNS, *SERVERS, *LINES}


def test_every_example_is_introduced_by_the_page_beside_it() -> None:
    page = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".html"}}

    assert set(re.findall(r"\[`(\S+)`\]\(\S+\)", page)) == files


def test_the_chatbot_has_twenty_lines() -> None:
    code = (EXAMPLES / "chatbot.py").read_text().partition("import ")
    lines = [line for line in (code[1] + code[2]).splitlines() if line.strip()]

    assert len(lines) <= 20


@pytest.mark.parametrize("example", RUNS)
def test_example_runs_as_it_stands(quick_server: str, example: str) -> None:
    arguments, stdin, *expected = RUNS[example]

    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *arguments.format(http=quick_server).split()],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LATE,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    for pattern in expected:
        assert re.search(pattern, done.stdout), done.stdout


def read(url: str) -> tuple[int, str, str | None]:
    """Status, text and `Retry-After` of a GET."""
    try:
        with urllib.request.urlopen(url, timeout=LATE) as response:
            return response.status, response.read().decode(), None
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers["Retry-After"]


def test_embedded_server_has_its_routes_and_the_program_s(tmp_path: Path) -> None:
    port = free_port()
    command = (sys.executable, EXAMPLES / "embedded.py", "--port", str(port))
    quick = (sys.executable, "-m", "aioserver", "provider", "--port", "0", "--interval", "0")
    with serving(quick, tmp_path) as provider:
        settings = {
            "AIOSERVER__LLM__ACTIVE": "local",
            "AIOSERVER__LLM__PROVIDERS__LOCAL__BASE_URL": provider,
            "PYTHONUNBUFFERED": "1",
        }
        with serving(command, tmp_path, settings) as url:
            assert url == f"http://127.0.0.1:{port}"
            haiku = read(f"{url}/haiku?about=snow")
            with Client(url) as client:
                chat = client.chat("Hello").text()
            missing = read(f"{url}/haiku/nowhere")

    assert haiku[0] == 200
    assert "haiku about snow" in haiku[1]
    assert "Hello" in chat
    assert missing[0] == 404


async def test_flask_view_streams_and_says_why_it_cannot(make_server: MakeServer) -> None:
    pytest.importorskip("flask")
    server = await make_server()
    async with flask(server.base) as url, flask("http://127.0.0.1:9") as lost:
        status, text, _ = await asyncio.to_thread(read, f"{url}/ask?text=Hello")
        refused = await asyncio.to_thread(read, f"{lost}/ask?text=Hello")

    assert status == 200
    assert "Hello" in text
    assert refused[0] == 503
    assert "cannot be reached: Connection refused" in refused[1]
    assert refused[2] == "5"


async def test_browser_that_leaves_the_flask_view_ends_the_answer(make_server: MakeServer) -> None:
    pytest.importorskip("flask")
    server = await make_server(ENDLESS)
    async with flask(server.base) as url, aiohttp.ClientSession() as browser:
        async with browser.get(f"{url}/ask?text=Hello") as response:
            await response.content.readany()
            assert server.held()["running"] == 1
            response.close()

        await until(lambda: not server.held()["running"], state=server.held)


@asynccontextmanager
async def flask(server: str) -> AsyncIterator[str]:
    """The Flask example in front of *server*; yields its address."""
    program = (EXAMPLES / "flask_view.py", "--url", server, "--port", "0")
    async with await Process.start(*program, environ=ENVIRON) as process:
        await process.logs("Press CTRL+C to quit")
        match = re.search(r"Running on (http://\S+)", process.log)
        assert match is not None
        yield match[1]

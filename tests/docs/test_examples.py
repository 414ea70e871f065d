"""The examples run as they stand, on every Python that is supported and installed here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.command import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parents[2] / "examples"
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
OURS = f"{sys.version_info.major}.{sys.version_info.minor}"
# Another version finds the packages of this one. Their compiled parts do not fit it; aiohttp and its
# dependencies then fall back to the same code in Python.
PACKAGES = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
# Of each example: its arguments, and what its output must match.
RUNS = {
    "unbroken.py": (
        "--url {http} --every 7",
        *(rf"(?m)^{face}, cut [1-9]\d* times: \w" for face in ("websocket", "sse", "responses")),
    ),
    "websocket.py": ("Hello --url {ws}/ws/chat", '"status":"chunk"', '"status":"complete"'),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a simulated provider that is quicker than `demo`."""
    folder = tmp_path_factory.mktemp("server")
    command = (sys.executable, "-m", "aioserver")
    quick = ("provider", "--port", "0", "--ttft", "0", "--interval", "0.001")
    with serving((*command, *quick), folder) as provider:
        settings = {
            "AIOSERVER__LLM__ACTIVE": "local",
            "AIOSERVER__LLM__PROVIDERS__LOCAL__BASE_URL": provider,
        }
        with serving((*command, "serve", "--port", "0"), folder, settings) as address:
            yield address


@pytest.fixture(params=VERSIONS)
def python(request: pytest.FixtureRequest) -> str:
    """An interpreter of that version which can import aiohttp."""
    version: str = request.param
    path = sys.executable if version == OURS else shutil.which(f"python{version}")
    if path is None:
        pytest.skip(f"no Python {version} is installed")
    probe = subprocess.run(
        [path, "-c", "import aiohttp"], env=PACKAGES, capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"the Python {version} here cannot import aiohttp")
    return path


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs_as_it_stands(server: str, python: str, example: str) -> None:
    arguments, *expected = RUNS[example]
    addresses = {"http": server, "ws": server.replace("http", "ws", 1)}

    done = subprocess.run(
        [python, EXAMPLES / example, *arguments.format(**addresses).split()],
        env=PACKAGES,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    for pattern in expected:
        assert re.search(pattern, done.stdout), done.stdout

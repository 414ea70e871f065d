"""The README's lines work as they are pasted, and its numbers are those of the last benchmark.

The lines run in a copy of the clone's top folder. `.venv` there is the environment of the tests,
with the mark that it is installed, so that nothing is fetched. Two things differ from what a
reader has: the port, which may be taken here, and the speed of `demo`, which is a quicker
simulated provider.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioserver.__main__ import COMMANDS
from aioserver.wings.simulator.model import SAMPLES
from tests.support.command import serving
from tests.support.tools import free_port
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
START, *LINES = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
TESTS = next(line for line in LINES if "run_tests" in line)  # which would run this file, too
# By a part of a line: what tells its program the port here, and what its output must show.
CASES = {
    "examples/websocket.py": ("--url ws://localhost:{port}/ws/chat", '"status":"complete"'),
    "examples/unbroken.py": ("--url http://localhost:{port}", "responses, cut "),
    "aioserver check": ("", "llm:"),
    "aioserver chat": ("", "simulated model"),
    "aioserver bench": ("http://localhost:{port}", "complete: 150 of 150 answers"),
    "aioserver top": ("http://localhost:{port}", "demo"),
    "/sse/chat": ("", "event: complete"),
    "/v1/chat/completions": ("", "data: [DONE]"),
    "/v1/messages": ("", "event: message_stop"),
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The top folder of a clone in which `run_production.sh` has been run before."""
    folder = tmp_path_factory.mktemp("clone")
    for name in (
        "aioserver",
        "deploy",
        "examples",
        "setup.cfg",
        "setup.py",
        "pyproject.toml",
        "config.yaml",
    ):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "run_production.sh", folder)  # a link would lead it out of the folder
    environment = folder / ".venv"
    environment.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    stamp = (
        "cat setup.cfg setup.py pyproject.toml deploy/venv.sh | cksum >.venv/installed-production"
    )
    subprocess.run(["bash", "-c", stamp], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def port(clone: Path) -> Iterator[int]:
    """The port of the server that the README's first line has started."""
    number = free_port()
    quick = ("provider", "--port", "0", "--ttft", "0", "--interval", "0.002")
    demo = "AIOSERVER__LLM__PROVIDERS__DEMO__"
    with serving((sys.executable, "-m", "aioserver", *quick), clone) as provider:
        settings = {
            "AIOSERVER__CHAT__WEBSOCKET__PORT": str(number),
            f"{demo}SIMULATED": "false",
            f"{demo}BASE_URL": provider,
            # On a busy machine a place may become free late.
            "AIOSERVER__CHAT__WEBSOCKET__CONCURRENCY__QUEUE_TIMEOUT": "60",
        }
        with serving(("bash", "-c", f"exec {START}"), clone, settings) as url:
            assert url.endswith(f":{number}")
            yield number


def pasted(command: list[str], folder: Path) -> str:
    """The output of *command*, which must succeed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=2 * LATE,  # a library that is new here is compiled when it is first imported
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_first_line_starts_it() -> None:
    assert START == "./run_production.sh"


def test_commands_in_the_text_are_those_of_the_environment() -> None:
    # The environment is not activated, and nothing is installed elsewhere.
    commands = "|".join(COMMANDS)
    assert not re.findall(rf"(?<![\w/.-])aioserver (?:{commands})\b.*", README)


def test_line_that_runs_the_tests_is_there_to_paste() -> None:
    script = ROOT / TESTS.partition("#")[0].strip()

    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("line", [line for line in LINES if line != TESTS])
def test_line_works_as_pasted(clone: Path, port: int, line: str) -> None:
    if line.startswith("curl") and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    ((argument, expected),) = [case for part, case in CASES.items() if part in line]
    line = f"{line} {argument.format(port=port)}".replace("localhost:8000", f"localhost:{port}")

    output = pasted(["bash", "-c", line], clone)

    assert expected in output


def test_line_that_demo_gives_works_as_pasted(clone: Path, port: int) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (line,) = re.findall(r"^```sh\n(.*?)^```$", "\n".join(SAMPLES), re.MULTILINE | re.DOTALL)

    output = pasted(["bash", "-c", line.replace(":8000", f":{port}")], clone)

    assert "data: [DONE]" in output


@pytest.mark.parametrize("program", ["unbroken.py", "websocket.py", "many_questions.py"])
def test_example_whose_reader_has_read_enough_ends_quietly(
    clone: Path, port: int, program: str
) -> None:
    url = f"http://localhost:{port}"
    if program == "websocket.py":
        url = f"ws://localhost:{port}/ws/chat"
    with subprocess.Popen(
        [sys.executable, "-u", f"examples/{program}", "--url", url],
        cwd=clone,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.read(1)
        running.stdout.close()

        assert running.stderr.read() == b""
        assert running.wait(LATE) == 0


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_python_works_as_pasted(clone: Path, port: int, code: str) -> None:
    output = pasted([sys.executable, "-c", code.replace(":8000", f":{port}")], clone)

    assert "model" in output


def test_the_example_with_anthropics_sdk_works_as_pasted(clone: Path, port: int) -> None:
    page = (ROOT / "docs/anthropic.md").read_text()
    (code,) = re.findall(r"^```python\n(from anthropic .*?)^```$", page, re.MULTILINE | re.DOTALL)

    output = pasted([sys.executable, "-c", code.replace(":8000", f":{port}")], clone)

    assert "model" in output


def test_ratios_are_those_of_the_last_table() -> None:
    benchmarks = (ROOT / "benchmarks/README.md").read_text()
    last = benchmarks.partition("\n## Last table\n")[2].partition("\n## ")[0]
    medians = {
        cells[0]: (cells[1], match[1])
        for row in last.splitlines()
        if row.startswith("|") and (match := re.search(r"\*\*([\d.]+)\*\*", row))
        for cells in [[cell.strip() for cell in row.strip("|").split("|")]]
    }

    row = r"^\| (.+?) \| ([\d.]+) times as many \| (better|worse) \|$"
    shown = re.findall(row, README, re.MULTILINE)

    assert len(shown) == 3
    for name, ratio, verdict in shown:
        wanted, median = medians[name]
        assert ratio == median, name
        better = float(ratio) > 1 if wanted == "more" else float(ratio) < 1
        assert verdict == ("better" if better else "worse"), name


def test_first_screen_is_short() -> None:
    assert README.count("\n") <= 150
    first_screen = README[: README.index("## Start")]
    assert "docs/images/queue.png" in first_screen
    assert "benchmarks/run.py" in first_screen

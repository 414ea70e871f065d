"""The image itself, where a container engine is installed: built, started without a right to
write, examined, stopped.

It takes minutes, and the network: conftest.py leaves it out but in CI (`CI=true`), and where there
is no engine. `test_image.py` reads the recipe, and `test_package.py` does what it does in a plain
folder.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.tools import DEPLOY, ENGINES

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
# Seconds to download and install, and for any other command.
BUILD_TIMEOUT, TIMEOUT = 900, 60


def engine() -> str:
    """The path of an engine."""
    program = next(filter(None, map(shutil.which, ENGINES)), None)
    assert program is not None, "no container engine is installed"
    return program


def run(*command: str, timeout: float = TIMEOUT) -> str:
    """Run *command*; its failure is the test's. Returns what it wrote."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def base_is_there(program: str) -> bool:
    """Whether the image that the recipe begins with is there, or can be had."""
    (base,) = set(re.findall(r"^FROM (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
    for words in (("image", "inspect", base), ("pull", base)):
        done = subprocess.run(
            [program, *words], capture_output=True, timeout=BUILD_TIMEOUT, check=False
        )
        if done.returncode == 0:
            return True
    return False


def ready(program: str, name: str) -> bool:
    """Wait until the server in the container *name* is ready; return False if it has ended
    before.
    """
    command = [program, "logs", "--follow", name]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as following:
        deadline = threading.Timer(TIMEOUT, following.kill)
        deadline.start()
        try:
            assert following.stdout is not None
            return any("aioserver is ready" in line for line in following.stdout)
        finally:
            deadline.cancel()
            following.kill()


@pytest.fixture
def container() -> Iterator[tuple[str, str]]:
    """The engine, and the name of a running container of the image. At the end nothing of them is
    left.
    """
    program, name = engine(), f"aioserver-test-{uuid.uuid4().hex[:12]}"
    if not base_is_there(program):
        pytest.skip("the image that the recipe begins with cannot be had")
    # Podman's own format of images has no health check.
    kind = ["--format", "docker"] if program.endswith("podman") else []
    run(program, "build", *kind, "-f", "deploy/Dockerfile", "-t", name, ".", timeout=BUILD_TIMEOUT)
    try:
        run(
            *(program, "run", "--detach", "--name", name, "--network", "none"),
            *("--read-only", "--cap-drop", "ALL", "--stop-timeout", "45"),
            *("-e", "AIOSERVER__AUTH__OPEN=true", name),
        )
        try:
            yield program, name
        finally:
            run(program, "rm", "--force", name)
    finally:
        run(program, "rmi", "--force", name)


@pytest.mark.timeout(BUILD_TIMEOUT + 300)
def test_the_image_serves_without_a_right_to_write_and_ends_in_order(
    container: tuple[str, str],
) -> None:
    program, name = container

    assert ready(program, name)
    answer = run(program, "exec", name, "aioserver", "chat", "localhost:8000", "Who are you?")
    examined = run(program, "exec", name, "aioserver", "doctor", "127.0.0.1:8000")
    health = run(program, "inspect", "--format", "{{json .Config.Healthcheck}}", name)
    user = run(program, "exec", name, "python", "-c", "import os; print(os.getuid(), os.getgid())")
    run(program, "stop", name)
    code = run(program, "inspect", "--format", "{{.State.ExitCode}}", name)

    assert "simulated model" in answer
    assert "fail" not in examined
    assert "aioserver.tools.health" in health
    assert user.split() == ["10001", "10001"]
    assert code.strip() == "0"

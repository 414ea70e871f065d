"""The server through which the workers of one parent share, where the configuration names none."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from aioserver.workers.private_server import LIVED, PAUSE, PrivateServer, SharedServer
from tests.support.redis_server import program_of_server
from tests.support.server import NOWHERE, configured

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.clock import FakeClock


def nothing() -> None:
    """Prepare nothing in the new process."""


def test_a_server_that_was_killed_is_started_again_at_once_or_after_a_pause(
    tmp_path: Path, clock: FakeClock
) -> None:
    private = PrivateServer.start(
        program_of_server(), environ={"RUNTIME_DIRECTORY": str(tmp_path)}
    )
    server = SharedServer(private, clock)

    def kill() -> None:
        os.kill(private.pid, signal.SIGKILL)
        os.waitpid(private.pid, 0)
        server.ended(private.pid)

    try:
        first, url = private.pid, server.url
        server.ended(first + 1)
        server.turn()
        assert (server.start_at, private.pid) == (None, first)

        kill()
        server.turn()
        assert server.start_at == clock.now + PAUSE, "it had not lived for long"
        clock.now += PAUSE
        server.turn()
        second = private.pid
        assert server.url == url
        assert second != first

        clock.now += LIVED
        kill()
        server.turn()
        assert private.pid not in {first, second}
    finally:
        server.stop()
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_cannot_be_started_again_is_tried_again(
    tmp_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "valkey-server"
    program.symlink_to(program_of_server())
    private = PrivateServer.start(str(program), environ={"RUNTIME_DIRECTORY": str(tmp_path)})
    server = SharedServer(private, clock)
    try:
        program.unlink()
        os.kill(private.pid, signal.SIGKILL)
        os.waitpid(private.pid, 0)
        clock.now += LIVED
        server.ended(private.pid)

        server.turn()

        assert server.start_at == clock.now + PAUSE
        assert "the workers' server cannot be started: " in caplog.text
    finally:
        server.stop()


def test_a_server_of_the_configuration_needs_no_other_one(tmp_path: Path) -> None:
    changes = {"cluster.redis_url": "redis://localhost:1/0"}
    settings = configured(NOWHERE, changes, tmp_path / "c.yaml").settings

    assert SharedServer.open(settings, os.environ, nothing).url is None


@pytest.mark.parametrize("replace_timeout", [0.0, 600.0])
def test_without_a_program_that_runs_the_shares_are_fixed_and_that_is_said(
    replace_timeout: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"chat.websocket.replace_timeout": replace_timeout}
    settings = configured(NOWHERE, changes, tmp_path / "c.yaml").settings
    program = tmp_path / "valkey-server"
    version = "import sys; print('v=8.1.1 ') if '--version' in sys.argv else sys.exit(3)"
    program.write_text(f"#!{sys.executable}\n{version}")
    program.chmod(0o755)

    server = SharedServer.open(settings, {"PATH": str(tmp_path)}, nothing)

    assert server.url is None
    assert "each worker has a fixed share of every limit, and streams of its own: " in caplog.text
    thrice = "up to three times its concurrent_requests" in caplog.text
    assert thrice == (replace_timeout > 0)
    server.ended(1)
    server.turn()
    server.stop()

"""A Redis-compatible server of the test's own, on a UNIX socket in a temporary folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PROGRAMS = ("valkey-server", "redis-server")
OPTIONS = ("--port", "0", "--save", "", "--appendonly", "no", "--loglevel", "warning")


class ValkeyServer:
    """The server: `url` leads to it. It may be started again, and is then empty."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "valkey.sock"
        self._folder = folder
        self.url = f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        found = [path for name in PROGRAMS if (path := shutil.which(name)) is not None]
        if not found:
            why = "no valkey-server or redis-server is installed"
            if os.environ.get("CI") == "true":
                pytest.fail(why)
            pytest.skip(why)
        self._process = subprocess.Popen(
            [found[0], *OPTIONS, "--unixsocket", str(self._socket), "--dir", str(self._folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 10
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                if client.connect_ex(str(self._socket)) == 0:
                    return
            assert time.monotonic() < end, "the server did not start"
            assert self._process.poll() is None, "the server ended"
            time.sleep(0.002)

    def kill(self) -> None:
        """End it as a crash does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._socket.unlink(missing_ok=True)

    def stop_running(self) -> None:
        """Let it do nothing until `go_on`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.go_on()
            self.kill()

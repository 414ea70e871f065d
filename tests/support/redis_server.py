"""A Redis or Valkey server of a test's own, on a UNIX socket in a temporary folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, Self

import hiredis

from aioserver.workers.private_server import find_program
from tests.support.tools import installed
from tests.support.waiting import LATE, until
from tests.support.writing import write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Reply = Any


def program_of_server() -> str:
    """The path of a server. Without one the test skips, or fails with CI=true; the extra `cluster`
    brings one.
    """
    return find_program(os.environ) or installed("valkey-server")


class RedisServer:
    """The server. Without the program the test skips, or fails with CI=true.

    `with RedisServer(tmp_path) as server: …`; *options* are those of its command line.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.path = folder / "redis.sock"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @property
    def url(self) -> str:
        """The address for `cluster.redis_url`."""
        return f"unix://{self.path}"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()

    def start(self, *more: str) -> None:
        """Start it, empty, and wait until it answers."""
        program = program_of_server()
        self.path.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [
                *(program, "--port", "0", "--unixsocket", str(self.path), "--save", ""),
                *("--appendonly", "no", "--dir", str(self.path.parent), "--io-threads", "1"),
                *(*self._options, *more),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.perf_counter() + 10
        while not self._listens():
            assert self._process.poll() is None, "it has ended"
            assert time.perf_counter() < deadline, "it does not start"
            time.sleep(0.002)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.path)) == 0

    def kill(self) -> None:
        """Kill it, if it lives; what it held is lost."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop the process; it keeps its connections, and reads nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on after `pause`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def call(self, *command: str | bytes | float) -> Reply:
        """Return its reply to *command*; an error reply is a `hiredis.ReplyError`."""
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(LATE)
            self._socket.connect(str(self.path))
            self._reader = hiredis.Reader()
        self._socket.sendall(hiredis.pack_command(command))  # type: ignore[arg-type]
        while (reply := self._reader.gets()) is False:
            data = self._socket.recv(65536)
            assert data, "it has closed the connection"
            self._reader.feed(data)
        return reply


def away(server: RedisServer) -> Callable[[], None]:
    """Kill the server; it comes back empty. Return what ends it."""
    server.kill()
    return server.start


def paused(server: RedisServer) -> Callable[[], None]:
    """Stop its process. Return what ends it."""
    server.pause()
    return server.go_on


def full(server: RedisServer) -> Callable[[], None]:
    """Let every writing call fail for memory. Return what ends it."""
    server.call("CONFIG", "SET", "maxmemory", "1")
    return lambda: server.call("CONFIG", "SET", "maxmemory", "0")


def replica(server: RedisServer) -> Callable[[], None]:
    """Let every writing call fail, as at a replica. Return what ends it."""
    server.call("REPLICAOF", "127.0.0.1", "1")
    return lambda: server.call("REPLICAOF", "NO", "ONE")


class Road:
    """What stands between the servers and Redis: it passes bytes on, late or never, or answers
    itself.
    """

    def __init__(self, folder: Path, redis: RedisServer, name: str = "road") -> None:
        self.path, self._redis = folder / f"{name}.sock", redis
        self.delay = 0.0
        # What is answered instead to whatever is asked.
        self.reply = b""
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await until(lambda: not self._writers)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_unix_connection(os.fspath(self._redis.path))
        except OSError:
            writer.close()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._pass(reader, back, writer), self._pass(there, writer, None))
        self._writers -= {writer, back}

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        asking: asyncio.StreamWriter | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await reader.read(65536):
                if asking is not None and self.reply:
                    write(asking, self.reply)
                else:
                    loop.call_later(self.delay, _write_late, writer, data)
        except OSError:
            pass
        finally:
            loop.call_later(self.delay, writer.close)


def _write_late(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionResetError):
        write(writer, data)

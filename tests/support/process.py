"""`aioserver serve` as a process of its own, started as systemd would start it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

# Puts the inherited descriptors where systemd puts them, says whom they are for, and becomes the program.
LAUNCHER = """
import fcntl, os, sys
count, *rest = sys.argv[1:]
given, program = rest[:int(count)], rest[int(count):]
for at, high in enumerate([fcntl.fcntl(int(one), fcntl.F_DUPFD, 100) for one in given]):
    os.dup2(high, 3 + at)
    os.close(high)
pid = str(os.getpid())
os.environ.update(LISTEN_PID=pid, LISTEN_FDS=count, WATCHDOG_PID=pid)
os.execv(sys.executable, [sys.executable, *program])
"""


class Systemd:
    """The socket on which systemd listens: a path, or `@` and an abstract name."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(address.replace("@", "\0", 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    async def told(self) -> dict[str, str]:
        """The next datagram."""
        data = await self._loop.sock_recv(self._socket, 4096)
        return dict(line.split("=", 1) for line in data.decode().split("\n"))

    async def told_of(self, name: str, value: str = "1") -> dict[str, str]:
        """The next datagram that says *name*."""
        while (told := await self.told()).get(name) != value:
            pass
        return told

    def heard(self) -> list[bytes]:
        """What has come and was not looked at."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self._socket.recv(4096))
        return found


class Served:
    """A process; what is left of it at the end is killed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(
        cls,
        *program: str | Path,
        sockets: Sequence[socket.socket] = (),
        **environ: str,
    ) -> Self:
        """Start *program*, arguments of the interpreter, with *sockets* as descriptors 3, 4, …."""
        numbers = [sock.fileno() for sock in sockets]
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                LAUNCHER,
                str(len(numbers)),
                *map(str, numbers),
                *map(str, program),
                env={**os.environ, **environ},
                pass_fds=numbers,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self.process.returncode is None:
            self.process.kill()
        out, err = await self.process.communicate()
        if exc is not None:
            exc.add_note(f"stdout: {out.decode()}\nstderr: {err.decode()}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, within: float = 30.0) -> tuple[int, str]:
        """Its exit code, and what it said on stderr and was not read."""
        assert self.process.stderr is not None
        async with asyncio.timeout(within):
            said = await self.process.stderr.read()
            return await self.process.wait(), said.decode()

    async def says(self, words: str, within: float = 30.0) -> str:
        """Wait for a line of stderr with *words* in it; returns all lines up to it."""
        assert self.process.stderr is not None
        lines = []
        async with asyncio.timeout(within):
            while line := (await self.process.stderr.readline()).decode():
                lines.append(line)
                if words in line:
                    return "".join(lines)
        raise AssertionError(f"it ended without saying {words!r}: {''.join(lines)}")

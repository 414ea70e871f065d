"""Programs of Python in processes of their own, above all `aioserver serve`."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import uvloop

from aioserver.config import Configuration
from tests.support import zygote
from tests.support.jumping_loop import JumpingLoop
from tests.support.server import write
from tests.support.waiting import LATE, patience, until

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
    from types import TracebackType

T = TypeVar("T")
READY = re.compile(r"aioserver is ready: https?://[^ ]+:(\d+)\n")
WITHOUT_RICH = (
    "import sys; sys.modules['rich'] = None; from aioserver.__main__ import main; main()"
)
# Puts the inherited descriptors where systemd puts them, names the process that they and the
# watchdog are for, and becomes the program.
LAUNCHER = """
import fcntl, os, sys
count, *rest = sys.argv[1:]
descriptors, program = rest[:int(count)], rest[int(count):]
for at, copy in enumerate([fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in descriptors]):
    os.dup2(copy, 3 + at)
    os.close(copy)
pid = str(os.getpid())
os.environ.update(LISTEN_PID=pid, LISTEN_FDS=count, WATCHDOG_PID=pid)
os.execv(sys.executable, [sys.executable, *program])
"""


class Process:
    """A process, which is killed at the end of its block if it still lives.

    `async with await Process.start("-m", "aioserver", "check") as process: …`. If the block fails,
    the exception shows what the process has written.
    """

    def __init__(self, process: asyncio.subprocess.Process | zygote.Forked) -> None:
        self._process = process
        self._out, self._log = bytearray(), bytearray()
        assert process.stdout is not None
        assert process.stderr is not None
        self._reading = asyncio.gather(
            self._read(process.stdout, self._out), self._read(process.stderr, self._log)
        )

    @classmethod
    async def start(
        cls,
        *program: str | Path,
        sockets: Sequence[socket.socket] = (),
        environ: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> Self:
        """Start *program*, arguments of the interpreter, with *sockets* as descriptors 3, 4, ….

        *environ* is put over the environment of the tests. *stdin* is what is read there, at most
        64 KiB. `aioserver` is forked if it can be: see `zygote`.
        """
        arguments, inherited = tuple(map(str, program)), {**os.environ, **(environ or {})}
        descriptors = [sock.fileno() for sock in sockets]
        read, write = os.pipe()
        with os.fdopen(read), os.fdopen(write, "wb") as pipe:
            pipe.write(stdin)
            pipe.close()
            if zygote.can_fork(arguments, inherited):
                loop = asyncio.get_running_loop()
                if isinstance(loop, JumpingLoop):
                    loop.real_time = True
                return cls(await zygote.fork(arguments, inherited, descriptors, read))
            # Without it a process starts sooner.
            launcher = ("-IS", "-c", LAUNCHER, len(descriptors), *descriptors)
            return cls(
                await asyncio.create_subprocess_exec(
                    sys.executable,
                    *map(str, launcher if descriptors else ()),
                    *arguments,
                    env=inherited,
                    pass_fds=descriptors,
                    stdin=read,
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
        trace: TracebackType | None,
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self.ended()
        if exc is not None:
            exc.add_note(f"stdout: {self.out}\nstderr: {self.log}")

    async def _read(self, stream: asyncio.StreamReader, into: bytearray) -> None:
        while data := await stream.read(65536):
            into += data

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def open_files(self) -> int:
        """The number of its open file descriptors now."""
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    @property
    def out(self) -> str:
        """Everything that it has written to stdout so far."""
        return self._out.decode(errors="replace")

    @property
    def log(self) -> str:
        """Everything that it has written to stderr so far."""
        return self._log.decode(errors="replace")

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it *number*."""
        self._process.send_signal(number)

    async def ended(self, within: float = LATE) -> int:
        """Wait for its end; returns its exit code. `out` and `log` are complete then.

        Raises:
            TimeoutError: it has not ended within *within* seconds.
        """
        async with asyncio.timeout(patience(within)):
            await asyncio.shield(self._reading)
            return await self._process.wait()

    async def logs(self, words: str, within: float = LATE) -> None:
        """Wait until *words* are in its log.

        Raises:
            AssertionError: it has ended without them, or *within* seconds have passed.
        """
        await until(lambda: words in self.log or self._reading.done(), within, lambda: self.log)
        assert words in self.log, self.log

    async def prints(self, pattern: re.Pattern[str], within: float = LATE) -> re.Match[str]:
        """Wait until its stdout starts with *pattern*.

        Raises:
            AssertionError: it has ended without that, or *within* seconds have passed.
        """
        await until(
            lambda: pattern.match(self.out) is not None or self._reading.done(),
            within,
            lambda: (self.out, self.log),
        )
        match = pattern.match(self.out)
        assert match is not None, (self.out, self.log)
        return match

    async def living(self, result: Awaitable[T], within: float = LATE) -> T:
        """Await *result*, which needs the process.

        Raises:
            AssertionError: the process has ended before.
            TimeoutError: *within* seconds have passed.
        """
        task = asyncio.ensure_future(result)
        async with asyncio.timeout(patience(within)):
            await asyncio.wait((task, self._reading), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            raise AssertionError(f"it ended with {await self.ended()}")
        return await task


class ServerProcess(Process):
    """`aioserver serve`. `port` is that of its faces, once it is `ready`."""

    port = 0
    file: Path
    base_url: str

    @property
    def base(self) -> str:
        """Its address."""
        scheme = "https" if self.out.startswith("aioserver is ready: https") else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    @property
    def settings(self) -> Any:
        """The settings in its file now."""
        return Configuration.load(self.file, environ={}).settings

    async def ready(self) -> Self:
        """Wait until it serves."""
        self.port = int((await self.prints(READY))[1])
        return self

    def change(self, changes: dict[str, Any]) -> None:
        """Write another configuration; SIGHUP makes the process read it."""
        write(self.base_url, changes, self.file)


def loop_name() -> str:
    """The name of the test's kind of event loop, for `--loop`."""
    return "uvloop" if isinstance(asyncio.get_running_loop(), uvloop.Loop) else "asyncio"


@asynccontextmanager
async def serving(
    file: Path,
    base_url: str,
    *options: str,
    changes: dict[str, Any] | None = None,
    sockets: Sequence[socket.socket] = (),
    environ: Mapping[str, str] | None = None,
    module: str = "aioserver",
) -> AsyncIterator[ServerProcess]:
    """Start to serve on the test's kind of loop, with *changes* written to *file*.

    *module* is run in place of `aioserver` where a test changes the world first.
    """
    write(base_url, {"logging.level": "INFO", **(changes or {})}, file)
    program = ("-m", module, "serve", "--config", str(file), "--loop", loop_name(), *options)
    async with await ServerProcess.start(*program, sockets=sockets, environ=environ) as process:
        process.file, process.base_url = file, base_url
        yield process


async def run_command(*arguments: str, program: str = "") -> tuple[int, str, str]:
    """The exit code, stdout and stderr of `aioserver` with *arguments*, or of *program* with
    them.
    """
    how = ("-c", program) if program else ("-m", "aioserver")
    async with await Process.start(*how, *arguments) as process:
        code = await process.ended(60.0)
    return code, process.out, process.log

"""`aioserver serve` as a process of its own: what tests of its start, its end and its signals stand on."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

from tests.support.server import configured, write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

READY = re.compile(rb"aioserver is ready: http://[^ ]+:(\d+)\n")


class Served:
    """One process. `port` is that of its faces; `log` what it has written to stderr so far."""

    def __init__(self, process: asyncio.subprocess.Process, file: Path, base_url: str) -> None:
        self.process = process
        self.file = file
        self.settings = configured(base_url, {}, file.with_name("like.yaml")).settings
        self.port = 0
        self.log = b""
        self.out = b""
        self._base_url = base_url
        self._reading = asyncio.ensure_future(self._read())

    @property
    def base(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.port}"

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while data := await self.process.stderr.read(65536):
            self.log += data

    async def ready(self) -> Self:
        """Wait until it serves."""
        assert self.process.stdout is not None
        self.out = await asyncio.wait_for(self.process.stdout.readline(), 30)
        match = READY.fullmatch(self.out)
        assert match is not None, (self.out, self.log)
        self.port = int(match[1])
        return self

    def change(self, changes: dict[str, Any]) -> None:
        """Write another configuration."""
        write(self._base_url, changes, self.file)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it *number*."""
        self.process.send_signal(number)

    async def ended(self, within: float = 30.0) -> int:
        """Its exit code."""
        async with asyncio.timeout(within):
            await self._reading
            return await self.process.wait()


@asynccontextmanager
async def serving(
    file: Path,
    base_url: str,
    *options: str,
    changes: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    python: tuple[str, ...] = (),
    **kwargs: Any,
) -> AsyncIterator[Served]:
    """A process that starts to serve on the test's kind of loop; at the end it is killed if it lives."""
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    write(base_url, {"logging.level": "INFO", **(changes or {})}, file)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *python,
        *("-m", "aioserver", "serve", "--config", str(file), "--loop", loop, *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(environ or {})},
        **kwargs,
    )
    served = Served(process, file, base_url)
    try:
        yield served
    finally:
        if process.returncode is None:
            process.kill()
        assert process.stdout is not None
        await process.stdout.read()
        await served.ended()

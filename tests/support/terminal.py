"""A program of Python on a real pseudo-terminal, as a person has it in front of them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from tests.support import zygote
from tests.support.waiting import LATE, patience, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

# Makes the terminal the controlling one, whose keys send signals; then puts other descriptors in
# its place.
LAUNCHER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
stdin, stdout, *program = sys.argv[1:]
for descriptor, copy in enumerate((stdin, stdout)):
    if int(copy) >= 0:
        os.dup2(int(copy), descriptor)
os.execv(sys.executable, [sys.executable, *program])
"""
CTRL_C, CTRL_D = "\x03", "\x04"
# What a terminal obeys: cursor, colours, bracketed paste, the title.
CONTROL = re.compile(r"\x1b\[[?\d;]*[A-Za-z]|\x1b\][^\x07]*\x07")


class Terminal:
    """A pseudo-terminal, and the process whose controlling terminal it is."""

    def __init__(
        self,
        ours: int,
        theirs: int,
        settings: list[Any],
        process: asyncio.subprocess.Process | zygote.Forked,
    ) -> None:
        self._ours = ours
        # It stays open, so that the terminal is there when the process has ended.
        self._theirs = theirs
        self._settings = settings
        self._seen = bytearray()
        # Where the next `shows` begins to look.
        self._looked = 0
        self.process = process
        asyncio.get_running_loop().add_reader(ours, self._read)

    @property
    def seen(self) -> str:
        """Everything that was written to the terminal so far, byte for byte."""
        return self._seen.decode(errors="replace")

    @property
    def text(self) -> str:
        """The same without what a terminal obeys."""
        return CONTROL.sub("", self.seen).replace("\r", "")

    @property
    def as_before(self) -> bool:
        """Whether the terminal has the settings that it had at the start: it echoes, for
        example.
        """
        return termios.tcgetattr(self._theirs) == self._settings

    def type(self, text: str) -> None:
        """Press the keys of *text*; Enter is a carriage return."""
        os.write(self._ours, text.replace("\n", "\r").encode())

    def hang_up(self) -> None:
        """Close the terminal's window."""
        if self._ours < 0:
            return
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._theirs)
        os.close(self._ours)
        self._ours = -1

    async def shows(self, words: str, within: float = LATE) -> None:
        """Wait until *words* are written, behind those of the last call.

        Raises:
            AssertionError: *within* seconds have passed without them.
        """

        def visible() -> bool:
            at = self.text.find(words, self._looked)
            if at >= 0:
                self._looked = at + len(words)
            return at >= 0

        await until(visible, within, lambda: self.text)

    async def ended(self, within: float = LATE) -> int:
        """Wait for the end of the process; returns its exit code, minus a signal's number."""
        async with asyncio.timeout(patience(within)):
            return await self.process.wait()

    def _read(self) -> None:
        self._seen += os.read(self._ours, 65536)


@asynccontextmanager
async def terminal(
    *program: str,
    columns: int = 80,
    lines: int = 24,
    environ: Mapping[str, str] | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
) -> AsyncIterator[Terminal]:
    """Start the interpreter with *program* on a terminal, in a session of its own; kill it at the
    end. `aioserver` is forked if it can be: see `zygote`.

    *environ* is put over the environment of the tests; *stdin* and *stdout* are descriptors in the
    terminal's place.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    settings = termios.tcgetattr(theirs)
    others = [-1 if descriptor is None else descriptor for descriptor in (stdin, stdout)]
    drawing = {"COLUMNS", "LINES", "NO_COLOR"}
    inherited = {name: value for name, value in os.environ.items() if name not in drawing}
    inherited.update({"TERM": "xterm-256color", **(environ or {})})
    process: asyncio.subprocess.Process | zygote.Forked
    if zygote.can_fork(program, inherited):
        standard = [theirs if descriptor is None else descriptor for descriptor in (stdin, stdout)]
        process = await zygote.fork_on(theirs, program, inherited, *standard)
    else:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-IS", "-c", LAUNCHER, *map(str, others), *program),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=inherited,
            start_new_session=True,
            pass_fds=[descriptor for descriptor in others if descriptor >= 0],
        )
    os.set_blocking(ours, False)
    shown = Terminal(ours, theirs, settings, process)
    try:
        yield shown
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        shown.hang_up()

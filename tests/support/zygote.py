"""`aioserver`, or the `worker` of these tests, forked from a process that has imported it, which takes
a sixth of the CPU time that it takes to execute it.

Each process of the tests starts one such process when it needs it first, and that one ends with
it. A forked `aioserver` differs from an executed one in `/proc/PID/cmdline`, in what was read from
the environment before the fork, and in modules that it has and does not need: see `can_fork`.
"""

from __future__ import annotations

import asyncio
import atexit
import fcntl
import functools
import gc
import importlib
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parents[2]
# The interpreter and the libraries read these variables once, at their start or import.
READ_ONCE = ("PYTHON", "LD_", "MALLOC_", "SSL_", "OPENSSL_", "AIOHTTP_", "LANG", "LC_")
# The most bytes of a request, and the least descriptor that no request has.
LIMIT, FREE = 1 << 17, 200
WORKER = "tests.support.worker"


# What draws, and is imported by a command that draws.
DRAWING = {
    "bench": "aioserver.tools.bench.table",
    "chat": "aioserver.tools.chat.markdown",
    "top": "aioserver.tools.top.screen",
}


class Request(NamedTuple):
    """What to run: the arguments of the interpreter, which begin with `-m` and a module, and whether
    stderr is the terminal of a session of its own.
    """

    program: tuple[str, ...]
    environ: dict[str, str]
    folder: str
    terminal: bool


class Forked:
    """A forked process, with what tests use of `asyncio.subprocess.Process`."""

    def __init__(
        self, out: asyncio.StreamReader | None = None, err: asyncio.StreamReader | None = None
    ) -> None:
        self.stdout, self.stderr = out, err
        self.pid = 0
        self._end: asyncio.Future[bytes]

    async def begin(self, state: asyncio.StreamReader) -> None:
        """Wait until it is forked. *state* has its process id, and later its wait status."""
        self.pid = int.from_bytes(await state.readexactly(4), "little")
        self._end = asyncio.ensure_future(state.read())

    @property
    def returncode(self) -> int | None:
        """Its exit code, or the signal that has ended it, negative; None while it lives."""
        if not self._end.done():
            return None
        return os.waitstatus_to_exitcode(int.from_bytes(self._end.result(), "little"))

    async def wait(self) -> int:
        """Wait for its end; returns its `returncode`."""
        await asyncio.shield(self._end)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it *number*, if it lives."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, if it lives."""
        self.send_signal(signal.SIGKILL)


class _Reading(asyncio.StreamReaderProtocol):
    """Closes its pipe at the end of the stream, on either event loop."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


def can_fork(program: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether *program* can be forked: it is `aioserver` itself, with the variables that are read
    once as the tests have them, on Linux.
    """
    read_once = {name: text for name, text in environ.items() if name.startswith(READ_ONCE)}
    return (
        program[:2] in {("-m", "aioserver"), ("-m", WORKER)}
        and hasattr(os, "pidfd_open")
        and read_once == _zygote()[1]
    )


async def fork(
    program: Sequence[str], environ: Mapping[str, str], sockets: Sequence[int], stdin: int
) -> Forked:
    """Fork to run *program*, with *sockets* as descriptors 3, 4, …, as systemd passes them."""
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    try:
        process = Forked(await _stream(out), await _stream(err))
        request = Request(tuple(program), dict(environ), str(Path.cwd()), terminal=False)
        return await _begun(process, request, (stdin, its_out, its_err, *sockets))
    finally:
        os.close(its_out)
        os.close(its_err)


async def fork_on(
    terminal: int, program: Sequence[str], environ: Mapping[str, str], stdin: int, stdout: int
) -> Forked:
    """Fork to run *program* in a session of its own, whose controlling terminal *terminal* is."""
    request = Request(tuple(program), dict(environ), str(Path.cwd()), terminal=True)
    return await _begun(Forked(), request, (stdin, stdout, terminal))


async def _begun(process: Forked, request: Request, descriptors: Sequence[int]) -> Forked:
    state, its_state = os.pipe()
    try:
        socket.send_fds(_zygote()[0], [pickle.dumps(request)], [its_state, *descriptors])
    finally:
        os.close(its_state)
    await process.begin(await _stream(state))
    return process


async def _stream(pipe: int) -> asyncio.StreamReader:
    stream = asyncio.StreamReader()
    protocol = functools.partial(_Reading, stream)
    await asyncio.get_running_loop().connect_read_pipe(protocol, os.fdopen(pipe, "rb", 0))
    return stream


@functools.cache
def _zygote() -> tuple[socket.socket, dict[str, str]]:
    """Start the process; returns the socket to it, and what its libraries read once."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        # Tests know the processes of a server by the word aioserver in the command line.
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.zygote", str(its.fileno()), "aioserver"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
        )

    @atexit.register
    def end() -> None:
        ours.close()
        process.wait()

    return ours, {name: os.environ[name] for name in os.environ if name.startswith(READ_ONCE)}


def _serve(control: socket.socket) -> bool:
    """Fork for each request until the tests have ended; returns whether this is a fork."""
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.data is not None:
                pid, state = key.data
                selector.unregister(key.fd)
                os.close(key.fd)
                os.write(state, os.waitpid(pid, 0)[1].to_bytes(4, "little"))
                os.close(state)
                continue
            message, descriptors, _, _ = socket.recv_fds(control, LIMIT, 100)
            if not message:
                return False
            request: Request = pickle.loads(message)
            state, *others = descriptors
            if request.program[1] == WORKER:
                importlib.import_module(WORKER)
            elif request.program[2:] and request.program[2] in COMMANDS:
                load(request.program[2])
                if request.program[2] in DRAWING:
                    importlib.import_module(DRAWING[request.program[2]])
            gc.freeze()
            pid = os.fork()
            if pid == 0:
                selector.close()
                control.detach()
                _become(request, others[:3], others[3:])
                return True
            os.write(state, pid.to_bytes(4, "little"))
            for descriptor in others:
                os.close(descriptor)
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, state))


def _become(request: Request, standard: Sequence[int], sockets: Sequence[int]) -> None:
    """Have the descriptors, the environment and the arguments of an executed process."""
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    if request.terminal:
        os.setsid()
        fcntl.ioctl(2, termios.TIOCSCTTY, 0)
    # These were made for what the zygote has, in which one may seek.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        text = _text(number, getattr(sys, name))
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, FREE) for descriptor in sockets]
    os.closerange(3, FREE)
    for number, copy in enumerate(copies, 3):
        os.dup2(copy, number)
        os.close(copy)
    os.environ.clear()
    os.environ.update(request.environ)
    if sockets:
        pid = str(os.getpid())
        os.environ.update(LISTEN_PID=pid, LISTEN_FDS=str(len(sockets)), WATCHDOG_PID=pid)
    time.tzset()
    os.chdir(request.folder)
    sys.path[0] = request.folder
    sys.argv = [str(ROOT / "aioserver/__main__.py"), *request.program[2:]]
    sys.orig_argv = [sys.executable, *request.program]


def _text(number: int, like: TextIO) -> IO[Any]:
    """Open the descriptor *number* as the interpreter does at its start."""
    # stderr has lines even where it is no terminal.
    buffering = 1 if number == 2 or os.isatty(number) else -1
    mode = "w" if number else "r"
    return open(number, mode, buffering, like.encoding, like.errors, closefd=False)


if __name__ == "__main__":
    import aioserver.commands.serve
    import aioserver.workers.parent  # noqa: F401 - a server with workers needs it
    from aioserver.__main__ import COMMANDS, load, main

    gc.collect()
    if _serve(socket.socket(fileno=int(sys.argv[1]))):
        if sys.orig_argv[2] == WORKER:
            importlib.import_module(WORKER).main()
        else:
            main()

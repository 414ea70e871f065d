"""The parent of several workers: it holds the port, starts `serve` once for each, and replaces
workers that end.

    signals, ends of processes, messages of workers
        → supervisor → processes, signals, notifications to systemd

It has no event loop, no threads and no application: it waits for one signal after the other, with
all of them blocked (sigtimedwait(2)). A worker's message is a signal, too (O_ASYNC; fcntl(2)). A
worker is `serve` in a forked process, and shares what the parent has imported (fork_server.py). If
other code was installed meanwhile, the worker and all later workers are executed as a new program
(fork and exec). A worker reports to its parent, over a socket of its own, as a service reports to
systemd; the parent reports the state of all workers to systemd.

Linux only, as the files in memory are.

This file is one concept: the parent's loop and everything that it shares with its workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from aioserver.auth.sessions import new_secret
from aioserver.config.faults import ConfigurationError
from aioserver.monitoring.alerts import still_run
from aioserver.server import listener, reload, systemd
from aioserver.telemetry import logs
from aioserver.workers.fork_server import Image, close_others, end_with, pass_on
from aioserver.workers.loads import Loads
from aioserver.workers.private_server import SharedServer
from aioserver.workers.supervisor import Supervisor, Timeouts
from aioserver.workers.worker import Worker, as_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.config import Configuration
    from aioserver.config.settings import Settings

logger = logging.getLogger("aioserver.parent")

# The signals that the parent waits for. The others keep their default.
SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCHLD,
    # A worker has sent a message.
    signal.SIGIO,
)
# Seconds within which a worker must send a message, if systemd names none: the value of our unit
# file.
PERIOD = 20.0
# Seconds for a worker to end beside `drain_delay` and `shutdown_timeout`.
END = 5.0
# Lets the kernel send a signal to this process when its parent ends; prctl(2).
PR_SET_PDEATHSIG = 1
MAX_MESSAGE = 4096
# Settings that only a new parent changes; replaced workers take over the rest.
HELD = (
    "chat.websocket.host",
    "chat.websocket.port",
    "chat.websocket.concurrency.uvicorn.backlog",
    "chat.websocket.concurrency.uvicorn.workers",
)
# A worker's report of its state.
LOAD = re.compile(r"(\d+) of (\d+) connections, (\d+) waiting")
FORMER = re.compile(r"; (\d+) answers, longest (\d+) s")


class Parent:
    """Runs the workers of *configuration* until it is told to stop.

    *serve* does a worker's work, and returns its exit code; *program* is a command line that does
    the same. *environ* is the environment in which the configuration is read again. *announce* is
    called with the address once all workers serve.
    """

    def __init__(
        self,
        configuration: Configuration,
        environ: Mapping[str, str],
        inherited: Sequence[socket.socket],
        serve: Callable[[], int],
        program: list[str],
        announce: Callable[[str], None],
    ) -> None:
        self._source = configuration.source
        # The settings with which the sockets and the workers that serve were made.
        self._at_start = self._began = configuration.settings
        self._environ = environ
        self._serve, self._program = serve, program
        # The image from which workers are forked; None: they are executed.
        self._image: Image | None = None
        self._announce = announce
        self._hosts = listener.hosts(inherited)
        self._sockets = list(inherited)
        self._workers = self._at_start.chat.websocket.concurrency.uvicorn.workers
        address, watchdog = systemd.manager(os.environ)
        self._systemd = systemd.Notifier(address, None, self._status)
        self._watchdog = watchdog
        self._period = watchdog or PERIOD
        # When the watchdog of systemd is fed; None before the start is over, or without a
        # watchdog.
        self._feed_at: float | None = None
        self._announced = False
        # Whether systemd was told of a reload that is not over.
        self._reloading = False
        self._asked: set[signal.Signals] = set()
        self._supervisor = Supervisor(
            self,
            self._workers,
            time.monotonic,
            period=self._period,
            timeouts=_timeouts(self._at_start),
        )
        # The contents of the configuration file that workers start with, by number.
        self._contents = {0: as_file("configuration", configuration.content)}
        self._number = 0
        self._session_secret = as_file("session secret", new_secret())
        self._loads = Loads.create(self._workers)
        # The slots of the processes that have not been reaped.
        self._slots: dict[int, int] = {}
        self._host = secrets.token_hex(4)
        self._shared_server = SharedServer()
        # The other end is open in this process alone, until it ends.
        self._lifeline, self._held = os.pipe()
        # The sockets on which workers send their messages, by process id.
        self._ears: dict[int, socket.socket] = {}
        self._mask: set[Any] = set()

    def listen(self) -> None:
        """Open the port, unless it was inherited; connections wait in it until workers accept
        them.

        Raises:
            OSError: the address is in use, or is not one of this machine.
        """
        settings = self._at_start.chat.websocket
        if not self._sockets:
            infos = socket.getaddrinfo(settings.host, settings.port, **listener.LOOK_UP)
            self._sockets = listener.bind(settings.host, settings.port, infos)
            for sock in self._sockets:
                sock.listen(settings.concurrency.uvicorn.backlog)
        self._url = listener.url_of(*listener.address_of(self._sockets[0]), settings.scheme)

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, after `listen`. Return the exit code."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._image = Image()
        logger.info("workers: %d, %s", self._workers, _limits(self._at_start))
        self._shared_server = SharedServer.open(self._at_start, os.environ, self._enter_child)
        self._supervisor.start()
        while (code := self._supervisor.code) is None:
            self._wait()
            self._hear()
            self._reap()
            if self._announced and not self._supervisor.stopping:
                for number in sorted(self._asked):
                    self._read(number)
                self._asked.clear()
            self._supervisor.turn()
            self._shared_server.turn()
            self._report()
        self._shared_server.stop()
        if code == 0:
            logger.info("stopped")
        return code

    # The interface that the supervisor needs.

    def start(self, slot: int, configuration: int, deaths: tuple[str, ...] = ()) -> int:
        """Start the worker *slot*; see `Processes`."""
        ear, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ear.setblocking(False)
        # Each message raises a SIGIO.
        fcntl.fcntl(ear, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(ear, fcntl.F_SETFL, fcntl.fcntl(ear, fcntl.F_GETFL) | os.O_ASYNC)
        forked = self._forks()
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ear.close()
                raise
            if pid == 0:
                end_with(partial(self._become, slot, configuration, theirs, deaths, forked=forked))
        self._ears[pid] = ear
        self._slots[pid] = slot
        return pid

    def send(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process that has not been reaped."""
        os.kill(pid, number)

    def _worker(
        self, slot: int, descriptors: Mapping[str, int], deaths: tuple[str, ...]
    ) -> Worker:
        """Return the description that the worker *slot* gets of itself, and of the *deaths* of
        others.
        """
        return Worker(
            slot,
            self._workers,
            self._period,
            descriptors,
            self._shared_server.url,
            first=not self._announced,
            host=self._host,
            deaths=deaths,
        )

    # Steps of `run`.

    def _wait(self) -> None:
        """Wait for a signal, and do what it asks; return as well when something is due."""
        times = (
            self._supervisor.wake_at(),
            self._feed_at,
            self._shared_server.start_at,
        )
        due = min((moment for moment in times if moment is not None), default=None)
        info: signal.struct_siginfo | None
        if due is None:
            info = signal.sigwaitinfo(SIGNALS)
        else:
            info = signal.sigtimedwait(SIGNALS, max(0.0, due - time.monotonic()))
        match info.si_signo if info is not None else None:
            case signal.SIGTERM | signal.SIGINT:
                self._stop()
            case signal.SIGHUP | signal.SIGUSR2 as number:
                self._asked.add(signal.Signals(number))

    def _hear(self) -> None:
        for pid, ear in self._ears.items():
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                # An empty read: the worker has closed its end.
                while data := ear.recv(MAX_MESSAGE):
                    lines = data.decode(errors="replace").split("\n")
                    message = dict(line.partition("=")[::2] for line in lines)
                    self._supervisor.heard(pid, message)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (slot := self._slots.pop(pid, None)) is not None:
                self._loads.reaped(slot)
            self._supervisor.ended(pid, os.waitstatus_to_exitcode(status))
            self._shared_server.ended(pid)
            if (ear := self._ears.pop(pid, None)) is not None:
                ear.close()

    def _report(self) -> None:
        """Report changes to systemd, and on stdout."""
        supervisor = self._supervisor
        if not supervisor.started:
            return
        now = time.monotonic()
        if supervisor.stopping:
            pass
        elif not self._announced:
            self._announced = True
            self._announce(f"aioserver is ready: {self._url}")
            self._systemd.ready()
            if self._watchdog is not None:
                self._feed_at = now
        elif self._reloading and not (supervisor.reloading or supervisor.replacing):
            self._reloading = False
            self._systemd.ready()
        if self._feed_at is not None and now >= self._feed_at:
            assert self._watchdog is not None
            self._feed_at = now + self._watchdog / 2
            if supervisor.alive:
                self._systemd.alive()

    def _stop(self) -> None:
        if not self._supervisor.stopping:
            logger.info("stopping")
            self._systemd.stopping()
            # The workers have their own copies, which they close in good order.
            for sock in self._sockets:
                sock.close()
        self._supervisor.stop()

    def _read(self, number: signal.Signals) -> None:
        """Read the configuration again, and if it is valid, let the workers apply it, or replace
        them.
        """
        self._systemd.reloading()
        self._reloading = True
        try:
            configuration = reload.read_again(
                self._source, self._environ, self._hosts, self._at_start
            )
        except ConfigurationError as exc:
            for fault in exc.faults:
                logger.warning("not applied: %s", fault)
            return
        settings = configuration.settings
        reload.log_remarks(configuration)
        for key in reload.only_by_restart(settings, self._at_start, HELD):
            logger.warning("%s has changed, and stays as it was until a restart", key)
        replaced = number is signal.SIGUSR2
        if not replaced:
            for key in reload.only_by_restart(settings, self._began):
                if key not in HELD:
                    logger.warning("%s has changed, and stays as it was until SIGUSR2", key)
        logs.apply(settings.logging)
        self._number += 1
        self._contents[self._number] = as_file("configuration", configuration.content)
        if replaced:
            self._began = settings
            self._supervisor.replace(self._number, _timeouts(settings))
        else:
            logger.info("reloading %d workers, %s", self._workers, _limits(settings))
            self._supervisor.reload(self._number, _timeouts(settings))
        for old in self._contents.keys() - self._supervisor.configurations:
            os.close(self._contents.pop(old))

    def _status(self) -> str:
        supervisor = self._supervisor
        statuses = supervisor.statuses()
        loads = [
            [int(number) for number in match.groups()]
            for match in map(LOAD.search, statuses)
            if match is not None
        ]
        text = f"{len(statuses)} of {self._workers} workers"
        if supervisor.replacing:
            text += ", being replaced"
        # New workers have not said yet what they hold.
        if loads:
            inside, limit, waiting = map(sum, zip(*loads, strict=True))
            text += f": {inside} of {limit} connections, {waiting} waiting"
        former = supervisor.former()
        # One that has become a former process just now has not said yet what runs in it.
        if said := [match for status, _ in former if (match := FORMER.search(status))]:
            answers = sum(int(match[1]) for match in said)
            longest = max(int(match[2]) for match in said)
            until = time.time() + max(left for _, left in former)
            text += "; " + still_run(answers, longest, len(said), until)
        return text

    def _enter_child(self) -> None:
        """Prepare a child process that is no worker, before it executes another program: it ends
        with the parent.
        """
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def _forks(self) -> bool:
        """Return whether a worker can be forked; if it cannot now, no later one will be."""
        if self._image is not None and (why := self._image.differs()) is not None:
            logger.warning("workers share no more memory until a restart: %s", why)
            self._image = None
        return self._image is not None

    def _become(
        self,
        slot: int,
        configuration: int,
        ear: socket.socket,
        deaths: tuple[str, ...],
        *,
        forked: bool,
    ) -> int:
        """Become the worker *slot*, in the process that was just forked. Return the exit code.

        *forked*: whether it runs what this process has imported, and not another program.
        """
        # Ctrl-C in the terminal goes to the parent, which passes it on.
        os.setsid()
        named = {
            "ear": ear.fileno(),
            "lifeline": self._lifeline,
            "configuration": self._contents[configuration],
            "session_secret": self._session_secret,
            "loads": self._loads.fd,
        }
        numbers = pass_on([*(sock.fileno() for sock in self._sockets), *named.values()])
        count = len(self._sockets)
        descriptors = dict(zip(named, numbers[count:], strict=True))
        worker = self._worker(slot, descriptors, deaths)
        os.environ.update(worker.variables(), LISTEN_FDS=str(count), LISTEN_PID=str(os.getpid()))
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        if not forked:
            os.execv(sys.executable, self._program)  # noqa: S606 - no shell is meant
        close_others()
        return self._serve()


def _limits(settings: Settings) -> str:
    limits = settings.chat.websocket.concurrency
    return (
        f"together max_connections={limits.max_connections} "
        f"connection_queue_size={limits.connection_queue_size}"
    )


def _timeouts(settings: Settings) -> Timeouts:
    websocket = settings.chat.websocket
    end = websocket.drain_delay + websocket.shutdown_timeout + END
    return Timeouts(end, websocket.replace_timeout)

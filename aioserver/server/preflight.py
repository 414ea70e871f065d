"""The conditions under which this process can serve; each unmet one is reported in one clear line.

Python must run without `-O`, since asserts state our invariants. aiohttp must have its parser in
C: the parser in Python is slow, and has had security holes that the one in C had not. There must
be enough descriptors for all limits of the configuration together.

Then the kernel and the C library are told what this process will need.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import sys
from typing import TYPE_CHECKING

from aiohttp import http_parser

from aioserver.faces.admission import MAX_REFUSED_CLOSING
from aioserver.monitoring.monitor import MAX_WATCHERS
from aioserver.telemetry.kernel import file_limit

if TYPE_CHECKING:
    from aioserver.config.settings import Settings

# Descriptors for the event loop, the log, listening sockets, and files being read.
SPARE_FILES = 64
# The most entries of the kernel's table of descriptors that are made at the start: half a MiB.
MOST_ENTRIES = 1 << 16
# Two options of glibc's `mallopt`, with our values: the bytes from which on a block is mapped by
# itself, and the freed bytes at the end of the heap that are kept. An agent's body has 0.1 to 2 MB.
MAPPED_FROM, KEPT_FREE = (-3, 4 << 20), (-1, 8 << 20)


class Unfit(Exception):
    """This process cannot serve.

    *code* is its exit code: 2 for the way it was started, otherwise 1.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def check_interpreter() -> None:
    """Refuse an interpreter that runs without our asserts or without aiohttp's parser in C.

    Raises:
        Unfit: the interpreter is refused; the message says what to do.
    """
    if sys.flags.optimize:
        raise Unfit(
            "python -O (or PYTHONOPTIMIZE) removes checks that aioserver needs: leave it out", 2
        )
    if os.environ.get("AIOHTTP_NO_EXTENSIONS"):
        raise Unfit("AIOHTTP_NO_EXTENSIONS switches aiohttp's C parser off: unset it", 2)
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise Unfit(
            "aiohttp has no C parser here: install one of its wheels "
            "(pip install --force-reinstall --only-binary aiohttp aiohttp)",
            1,
        )


def check_workers() -> None:
    """Refuse several workers on a system that lacks what their parent needs.

    Raises:
        Unfit: the system is not Linux.
    """
    if not hasattr(os, "memfd_create"):
        raise Unfit(
            "several workers need Linux, and so does --replaceable: "
            "set chat.websocket.concurrency.uvicorn.workers to 1",
            2,
        )


def wanted_files(settings: Settings) -> int:
    """Return the number of descriptors that all limits of *settings* together may need."""
    limits = settings.chat.websocket.concurrency
    pools = [
        # The simulator has the other ends of its connections in this process, too.
        provider.http_client.max_connections * (1 + provider.simulated)
        for provider in settings.llm.providers.values()
        if provider.usable
    ]
    # The requests that are passed on to other instances, and those that they pass on.
    shared = settings.cluster.redis_url is not None or limits.uvicorn.workers > 1
    return (
        limits.max_connections * (1 + shared)
        + limits.connection_queue_size
        + MAX_REFUSED_CLOSING
        + MAX_WATCHERS
        + sum(pools)
        + SPARE_FILES
    )


def raise_file_limit(settings: Settings) -> str | None:
    """Raise the limit of open files to the need of *settings*, or as far as is allowed.

    Return a warning if that is not enough.

    Raises:
        Unfit: the limit is not even enough for `max_connections` clients.
    """
    wanted = wanted_files(settings)
    if (soft := file_limit(wanted)) >= wanted:
        return None
    clients = settings.chat.websocket.concurrency.max_connections
    advice = f"raise it to {wanted} (ulimit -Hn {wanted}; systemd: LimitNOFILE={wanted})"
    if soft < clients + SPARE_FILES:
        raise Unfit(
            f"{soft} open files are too few for "
            f"chat.websocket.concurrency.max_connections={clients}: {advice}, or lower that",
            1,
        )
    return f"{soft} open files are fewer than all limits together may take: {advice}"


def make_room_for_files(settings: Settings) -> None:
    """Enlarge the kernel's table of this process' descriptors to the need of *settings*.

    It is for a process that has no other thread yet, or for a thread beside the event loop's. If
    there are several threads, Linux enlarges the table (at 256 descriptors, 512, 1,024 and so on)
    only once every processor has released the old one (`expand_fdtable` in fs/file.c). This blocks
    the calling thread, and no other, for some 5 to 25 ms.
    """
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    entries = min(wanted_files(settings), MOST_ENTRIES)
    if soft != resource.RLIM_INFINITY:
        entries = min(entries, soft)
    with contextlib.suppress(OSError):
        os.close(fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, entries - 1))


def keep_freed_memory() -> None:
    """Let the C library keep some freed memory for the next bodies.

    By default glibc gives the memory of a large body back to the kernel after each request, and the
    next body costs as many page faults again: 140 for 1 MB, a sixth of the request's CPU time.
    """
    library = ctypes.CDLL(None)
    # Other C libraries have no such function.
    if hasattr(library, "mallopt"):
        for option, value in (MAPPED_FROM, KEPT_FREE):
            library.mallopt(option, value)


def cannot_listen(host: str, port: int, exc: OSError) -> str:
    """Return a line that says why *host*:*port* cannot be listened on, and what to do."""
    fault = f"cannot listen on {host}:{port}: {exc.strerror or exc}"
    match exc.errno:
        case errno.EADDRINUSE:
            return f"{fault}: end what listens there, or choose another port (--port)"
        case errno.EACCES:
            return f"{fault}: choose a port above 1023 (--port)"
        case errno.EADDRNOTAVAIL:
            return f"{fault}: choose an address of this machine (--host)"
    return f"{fault}: see chat.websocket.host"

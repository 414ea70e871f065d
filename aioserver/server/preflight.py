"""What must hold before serving, each with one clear line where it does not.

Python without `-O` (asserts state our invariants), aiohttp's parser in C (the one in Python is slow,
and had holes that the other has not), and descriptors enough for every cap of the configuration.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
from typing import TYPE_CHECKING

from aiohttp import http_parser

from aioserver.faces.admission import MAX_REFUSED_CLOSING
from aioserver.monitoring.monitor import MAX_WATCHERS

if TYPE_CHECKING:
    from aioserver.config.settings import Settings

SPARE = 64  # descriptors: the loop, the log, listening sockets, files being read


class Unfit(Exception):
    """This process cannot serve. *code*: with which to exit: 2 how it was started, 1 else."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def check_interpreter() -> None:
    """Refuse to run where our own checks, or aiohttp's good parser, are switched off.

    Raises:
        Unfit: with what to do.
    """
    if sys.flags.optimize:
        raise Unfit(
            "python -O (or PYTHONOPTIMIZE) removes checks that this needs: leave it out", 2
        )
    if os.environ.get("AIOHTTP_NO_EXTENSIONS"):
        raise Unfit("AIOHTTP_NO_EXTENSIONS switches aiohttp's C parser off: unset it", 2)
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise Unfit(
            "aiohttp has no C parser here: install one of its wheels "
            "(pip install --force-reinstall --only-binary aiohttp aiohttp)",
            1,
        )


def wanted_files(settings: Settings) -> int:
    """How many descriptors every cap of *settings* together may take."""
    limits = settings.chat.websocket.concurrency
    pools = [
        one.http_client.max_connections * (1 + one.simulated)  # which has the other end here, too
        for one in settings.llm.providers.values()
        if one.usable
    ]
    return (
        limits.max_connections
        + limits.connection_queue_size
        + MAX_REFUSED_CLOSING
        + MAX_WATCHERS
        + sum(pools)
        + SPARE
    )


def raise_file_limit(settings: Settings) -> str | None:
    """Raise the limit of open files as far as need be and may be; a warning where it stays low.

    Raises:
        Unfit: not even `max_connections` clients can be served.
    """
    wanted = wanted_files(settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Not to a hard limit that is none: macOS refuses that. A filter of system calls may refuse all.
        more = wanted if hard == resource.RLIM_INFINITY else hard
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None
    clients = settings.chat.websocket.concurrency.max_connections
    way = f"raise it to {wanted} (ulimit -Hn {wanted}; systemd: LimitNOFILE={wanted})"
    if soft < clients + SPARE:
        raise Unfit(
            f"{soft} open files are too few for "
            f"chat.websocket.concurrency.max_connections={clients}: {way}, or lower that",
            1,
        )
    return f"{soft} open files are fewer than all limits together may take: {way}"


def cannot_listen(host: str, port: int, exc: OSError) -> str:
    """Why *host*:*port* cannot be listened on, and what to do."""
    where = f"cannot listen on {host}:{port}: {exc.strerror or exc}"
    match exc.errno:
        case errno.EADDRINUSE:
            return f"{where}: end what listens there, or choose another port (--port)"
        case errno.EACCES:
            return f"{where}: choose a port above 1023 (--port)"
        case errno.EADDRNOTAVAIL:
            return f"{where}: choose an address of this machine (--host)"
    return f"{where}: see chat.websocket.host"

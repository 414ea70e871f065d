"""The standard streams of a server, which may be closed, on a full disk, or without a reader.

None of that may keep the server from serving, or change its exit code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger("aioserver.output")

STDIN, STDOUT, STDERR = 0, 1, 2


def open_closed() -> None:
    """Open /dev/null in place of the standard descriptors that are closed.

    Otherwise the next sockets get their numbers: uvloop ends the process when it closes such a
    socket, and faulthandler writes its stacks to the peer of such a socket.
    """
    for descriptor in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            _silence(descriptor)
    if sys.stderr is None:
        # Not `open(STDERR)`, whose buffer would be flushed at the end. It lives as long as the
        # process.
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def announce(text: str) -> None:
    """Print *text* at once; if stdout cannot be written, log that and go on."""
    try:
        # In one write, even if stdout is unbuffered: stderr may go to the same file.
        print(f"{text}\n", end="", flush=True)
    except OSError as error:
        logger.warning(
            "stdout cannot be written: %s; the server serves on", error.strerror or error
        )
        _silence(STDOUT)


def give_up() -> None:
    """Discard the buffered output of stdout and stderr that cannot be written.

    Otherwise Python would try to write it at the end of the process, and exit with code 120.
    """
    for stream, descriptor in ((sys.stdout, STDOUT), (sys.stderr, STDERR)):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                _silence(descriptor)


def _silence(descriptor: int) -> None:
    # OSError: no descriptor is free, and nothing can be done.
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)

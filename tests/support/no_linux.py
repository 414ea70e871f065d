"""Runs `python -m aioserver …` as if on a system that is no Linux: `python -m tests.support.no_linux
serve`.

What only Linux has is taken away before aioserver is imported: names of the standard library, the
files below /proc and /sys, and the name of the platform. What other systems have in its place
(kqueue) cannot be put there, so the event loop keeps `epoll`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib
import os
import runpy
import signal
import socket
import sys
from typing import Any

# As of Python 3.15 on macOS 15. Those of `socket` begin with one of these, too.
NAMES = {
    os: (
        *("memfd_create", "pidfd_open", "sched_getaffinity", "sched_setaffinity", "eventfd"),
        *("posix_fadvise", "posix_fallocate", "pipe2", "splice", "copy_file_range", "setns"),
        *("getrandom", "unshare", "timerfd_create", "O_TMPFILE", "O_PATH", "O_DIRECT"),
    ),
    socket: (
        *("TCP_INFO", "TCP_USER_TIMEOUT", "TCP_QUICKACK", "TCP_DEFER_ACCEPT", "TCP_NOTSENT_LOWAT"),
        *("TCP_KEEPIDLE", "TCP_CONGESTION", "TCP_CORK", "TCP_SYNCNT", "TCP_LINGER2"),
        *("SOCK_SEQPACKET", "SOCK_NONBLOCK", "SOCK_CLOEXEC", "SO_PEERCRED", "SO_DOMAIN"),
        *("SO_PROTOCOL", "SO_MARK", "SO_INCOMING_CPU", "MSG_NOSIGNAL", "MSG_ERRQUEUE"),
    ),
    signal: ("pidfd_send_signal", "sigtimedwait", "sigwaitinfo", "SIGRTMIN", "SIGRTMAX", "SIGPWR"),
    fcntl: ("F_ADD_SEALS", "F_GET_SEALS", "F_SETPIPE_SZ", "F_GETPIPE_SZ", "F_OFD_SETLK"),
}
HIDDEN = ("/proc", "/sys")


class Library(ctypes.CDLL):
    """A C library without what GNU's alone has."""

    def __getattr__(self, name: str) -> Any:
        if name == "prctl":
            raise AttributeError(name)
        return super().__getattr__(name)


def refuse_linux_files(event: str, arguments: tuple[object, ...]) -> None:
    """Let nobody open or list what other systems do not have: a hook of `sys.addaudithook`."""
    if event in {"open", "os.listdir", "os.scandir"} and str(arguments[0]).startswith(HIDDEN):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])


def ioctl(fd: int, request: int, argument: bytes) -> bytes:
    """Refuse what is asked of a socket; aioserver has no other use of `fcntl.ioctl`."""
    raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")


def main() -> None:
    """Take away what is Linux's alone, then be `python -m aioserver`."""
    # Libraries are made for one system, and may know on which they run.
    for library in ("asyncio", "aiohttp.web", "urllib.request", "uvloop"):
        importlib.import_module(library)
    for module, names in NAMES.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    if hasattr(os, "process_cpu_count"):
        os.process_cpu_count = os.cpu_count  # which reads a name that was taken away
    ctypes.CDLL = Library  # type: ignore[misc]
    fcntl.ioctl = ioctl  # type: ignore[assignment]
    sys.addaudithook(refuse_linux_files)
    sys.platform = "darwin"
    runpy.run_module("aioserver", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

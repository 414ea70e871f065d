"""What the kernel says of a listening socket (Linux: tcp(7), TCP_INFO) and of this process, where it does."""

from __future__ import annotations

import resource
import socket
import struct
from pathlib import Path
from typing import Any, NamedTuple


class AcceptQueue(NamedTuple):
    """Connections that wait to be accepted, and how many of them the kernel holds."""

    waiting: int
    limit: int


def accept_queue(sock: socket.socket) -> AcceptQueue | None:
    """The accept queue of *sock*: TCP_INFO of a listener has it in `unacked` and `sacked`."""
    if not hasattr(socket, "TCP_INFO") or sock.family == socket.AF_UNIX:
        return None
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return AcceptQueue(*struct.unpack_from("=2I", info, 24))


def process() -> dict[str, Any]:
    """Descriptors and memory of this process; None where the system does not say."""
    fds = Path("/proc/self/fd")
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        open_fds: int | None = fds.stat().st_size or len(
            list(fds.iterdir())
        )  # the size: Linux 6.2
        rss: int | None = pages * resource.getpagesize()
    except (OSError, ValueError):
        open_fds = rss = None
    return {
        "open_fds": open_fds,
        "max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "rss_bytes": rss,
    }

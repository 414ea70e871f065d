"""The kernel's data about a listening socket (Linux: tcp(7), TCP_INFO), this process and what it may
still take, and the process's limit of open files.
"""

from __future__ import annotations

import contextlib
import re
import resource
import socket
import struct
import sys
from pathlib import Path
from typing import NamedTuple, TypedDict

# Bytes to read of `struct tcp_info`, which hold `tcpi_unacked` and `tcpi_sacked`, and their
# offset.
TCP_INFO_BYTES = 104
QUEUE_OFFSET = 24
# Up to `tcpi_min_rtt`, in microseconds, which Linux has since 4.6.
ROUND_TRIP_BYTES, ROUND_TRIP_OFFSET = 152, 148
DESCRIPTORS, MEMORY = Path("/proc/self/fd"), Path("/proc/self/statm")
# Files below the root: the range of local ports, the memory of the machine (proc(5)), and the groups
# of processes with bounds of their own (cgroups(7)).
PORTS, MACHINE = "proc/sys/net/ipv4/ip_local_port_range", "proc/meminfo"
OWN_CGROUP, CGROUPS = "proc/self/cgroup", "sys/fs/cgroup"


class AcceptQueue(NamedTuple):
    """Connections that wait to be accepted, and the most that the kernel lets wait."""

    waiting: int
    limit: int


class ProcessUsage(TypedDict):
    """Descriptors and resident memory of this process.

    None if the system does not show them.
    """

    open_fds: int | None
    max_fds: int
    rss_bytes: int | None


def accept_queue(sock: socket.socket) -> AcceptQueue | None:
    """Return the accept queue of a listening socket; None for UNIX sockets, and outside Linux.

    TCP_INFO of a listener has the queue's numbers in `tcpi_unacked` and `tcpi_sacked`.
    """
    if not hasattr(socket, "TCP_INFO") or sock.family == socket.AF_UNIX:
        return None
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    return AcceptQueue(*struct.unpack_from("=2I", info, QUEUE_OFFSET))


def least_round_trip(sock: socket.socket) -> float:
    """Return the least round-trip time of a connection, in seconds.

    0.0 if it is not known.
    """
    if not hasattr(socket, "TCP_INFO") or sock.family == socket.AF_UNIX:
        return 0.0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, ROUND_TRIP_BYTES)
    except (OSError, ValueError):
        # The connection is lost.
        return 0.0
    if len(info) < ROUND_TRIP_BYTES:
        return 0.0
    (microseconds,) = struct.unpack_from("=I", info, ROUND_TRIP_OFFSET)
    return float(microseconds) / 1e6


def process_usage() -> ProcessUsage:
    """Return the present descriptors and memory of this process."""
    open_fds: int | None = None
    rss_bytes: int | None = None
    try:
        pages = int(MEMORY.read_bytes().split()[1])
        # Since Linux 6.2 the size of the directory is the number of descriptors; before, it is 0.
        open_fds = DESCRIPTORS.stat().st_size or len(list(DESCRIPTORS.iterdir()))
        rss_bytes = pages * resource.getpagesize()
    except (OSError, ValueError):
        pass
    max_fds = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {"open_fds": open_fds, "max_fds": max_fds, "rss_bytes": rss_bytes}


def local_ports(root: Path) -> int | None:
    """Return the number of local ports for connections to one address; None if the system does not
    show it.
    """
    if not (numbers := _text(root / PORTS).split()):
        return None
    low, high = map(int, numbers)
    return high - low + 1


def free_memory(root: Path) -> int | None:
    """Return the bytes that this process could take: those of the machine, or of its cgroup (v2)
    if that has less; None if the system does not show them.
    """
    if (available := re.search(r"MemAvailable:\s+(\d+)", _text(root / MACHINE))) is None:
        return None
    free = int(available[1]) * 1024
    folder = root / CGROUPS / _text(root / OWN_CGROUP).strip().rpartition(":")[2].lstrip("/")
    # The limit of a group holds for all groups in it.
    for level in (folder, *folder.parents):
        # A group without a limit has the word `max`, or no such file.
        with contextlib.suppress(ValueError):
            bound, used = (int(_text(level / f"memory.{name}")) for name in ("max", "current"))
            free = min(free, max(0, bound - used))
    return free


def _text(file: Path) -> str:
    """Return the text of *file*, empty if it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""


def file_limit(wanted: int) -> int:
    """Raise the limit of open files if it is below *wanted*, as far as is allowed, and return it.

    `sys.maxsize` stands for no limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS refuses an infinite soft limit. A filter of system calls may refuse any limit.
        new_limit = wanted if hard == resource.RLIM_INFINITY else hard
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (new_limit, hard))
            soft = new_limit
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft

"""What the kernel says of a listening socket, where it does (Linux: tcp(7), TCP_INFO)."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple


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

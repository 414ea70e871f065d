"""The protocols of systemd, without its library: sd_notify(3), sd_watchdog_enabled(3),
sd_listen_fds(3).

systemd passes its variables in the environment. They are removed from it here, since they are
meant for this process and not for its children. A notification is one datagram, which is sent or
lost: no call waits for it, and a server whose systemd does not listen continues to serve.

The watchdog is fed from the event loop, so that a blocked loop starves it. Before systemd kills
such a process, its stacks are dumped: once just before the deadline, by the timer of
`faulthandler`, which needs neither the loop nor the interpreter's lock, and again on systemd's
SIGABRT.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import socket
import time
from typing import TYPE_CHECKING

from aioserver.config.faults import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

logger = logging.getLogger("aioserver.systemd")

# The first descriptor that systemd passes: SD_LISTEN_FDS_START.
FIRST = 3
STDERR = 2
# The part of the watchdog's time after which stacks are dumped, just before systemd's signal.
STACKS_AT = 0.9
FAMILIES = {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}


class Notifier:
    """Tells systemd the state of the service; does nothing without systemd.

    *address*: a path, or `@` and an abstract name; None without systemd. *watchdog*: the seconds
    of silence after which systemd assumes a hang. From the first `ready()` to `close()` a
    keep-alive is sent every half of them, with the line that *status* returns. *channel*: a
    connected socket to a parent process that gets the same messages, in place of an address; it is
    closed at the end.

    Always: no method raises or waits. Called on the event loop.
    """

    def __init__(
        self,
        address: str | None = None,
        watchdog: float | None = None,
        status: Callable[[], str] = str,
        channel: socket.socket | None = None,
    ) -> None:
        self._address = address
        self._channel = channel
        self._watchdog = watchdog
        self._status = status
        self._timer: asyncio.TimerHandle | None = None
        # Open from the first datagram to `close`. A new socket might find no free descriptor
        # later, and a server that still serves must not be killed for that.
        self._socket: socket.socket | None = None
        # Whether the last datagram could not be sent, which is logged once.
        self._failing = False

    @classmethod
    def take(cls, environ: MutableMapping[str, str], status: Callable[[], str] = str) -> Notifier:
        """Return a notifier by the variables of systemd in *environ*, and remove them from it."""
        return cls(*manager(environ), status)

    def ready(self) -> None:
        """Report that the server takes work, at the start and at the end of a reload."""
        self._send("READY=1", f"STATUS={self._status()}")
        if self._watchdog is not None and self._timer is None:
            self._feed()

    def reloading(self) -> None:
        """Report that a reload begins; `ready()` reports its end, whatever the outcome."""
        # CLOCK_MONOTONIC on Linux: systemd compares it with the moment of its own request.
        self._send(
            "RELOADING=1",
            f"MONOTONIC_USEC={time.monotonic_ns() // 1000}",
            "STATUS=reading the configuration",
        )

    def alive(self) -> None:
        """Feed the watchdog once, for a process that has no event loop."""
        self._send("WATCHDOG=1", f"STATUS={self._status()}")

    def stopping(self) -> None:
        """Report that the server stops. The watchdog is still fed, since a stop may hang, too."""
        self._status = lambda: "stopping"
        self._send("STOPPING=1", "STATUS=stopping")

    def close(self) -> None:
        """Stop feeding the watchdog, and dump no stacks. Nothing is sent afterwards."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            faulthandler.cancel_dump_traceback_later()
        for sock in (self._socket, self._channel):
            if sock is not None:
                sock.close()
        self._socket = self._channel = None

    def _feed(self) -> None:
        assert self._watchdog is not None
        # In this order: a receiver of the keep-alive can rely on the dump of the stacks.
        faulthandler.dump_traceback_later(self._watchdog * STACKS_AT, file=STDERR)
        self._send("WATCHDOG=1", f"STATUS={self._status()}")
        self._timer = asyncio.get_running_loop().call_later(self._watchdog / 2, self._feed)

    def _send(self, *lines: str) -> None:
        data = "\n".join(lines).encode()
        try:
            if self._channel is not None:
                self._channel.send(data)
            elif self._address is not None:
                self._send_to(self._address, data)
        # ValueError: the address is not possible.
        except (OSError, ValueError) as exc:
            if not self._failing:
                logger.warning("the message %s cannot be sent to systemd: %s", lines[0], exc)
            self._failing = True
        else:
            self._failing = False

    def _send_to(self, address: str, data: bytes) -> None:
        if address.startswith("@"):
            address = f"\0{address[1:]}"
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        self._socket.sendto(data, address)


def manager(environ: MutableMapping[str, str]) -> tuple[str | None, float | None]:
    """Return the address of systemd and the seconds of its watchdog, and remove its variables from
    *environ*.

    Each is None if there is none.
    """
    address = environ.pop("NOTIFY_SOCKET", "")
    period = environ.pop("WATCHDOG_USEC", "")
    process = environ.pop("WATCHDOG_PID", "")
    if address and address[0] not in "/@":
        logger.warning("NOTIFY_SOCKET is neither a path nor an abstract name: not used")
        address = ""
    watched = address and _number(period) and process in {"", str(os.getpid())}
    return address or None, _number(period) / 1e6 if watched else None


def inherited(environ: MutableMapping[str, str], first: int = FIRST) -> list[socket.socket]:
    """Return the listening sockets that systemd passed on, and remove its variables from
    *environ*.

    The caller closes them. *first*: the number of the first descriptor.

    Raises:
        ConfigurationError: a descriptor is no listening stream socket; none is left open then.
    """
    count = _number(environ.pop("LISTEN_FDS", ""))
    process = environ.pop("LISTEN_PID", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    named = len(names) == count and all(names)
    environ.pop("LISTEN_PIDFDID", None)
    if process != str(os.getpid()):
        return []
    sockets: list[socket.socket] = []
    faults = []
    for index in range(count):
        number = first + index
        name = f"descriptor {number}" + (f" ({names[index]})" if named else "")
        try:
            os.set_inheritable(number, False)
            sock = socket.socket(fileno=number)
        except OSError as exc:
            faults.append(f"LISTEN_FDS: {name} is no socket: {exc.strerror}")
            continue
        sockets.append(sock)
        if sock.family not in FAMILIES or sock.type != socket.SOCK_STREAM:
            faults.append(f"LISTEN_FDS: {name} is no stream socket (ListenStream=)")
        elif not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            faults.append(f"LISTEN_FDS: {name} does not listen (Accept=no)")
    if faults:
        for sock in sockets:
            sock.close()
        raise ConfigurationError(faults)
    return sockets


def _number(text: str) -> int:
    """Return *text* as a number, 0 if it is not one."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0

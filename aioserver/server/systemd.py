"""Under systemd, by hand: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

What systemd says is in the environment, and is taken out of it here: it is for this process and not
for its children. What it is told is one datagram a time, which is sent or lost, never waited for: a
service whose systemd does not listen serves on.

The watchdog is fed from the event loop, so a loop that is blocked starves it. What systemd then
kills leaves its stacks behind: once just before the deadline, by the timer of `faulthandler`, which
needs neither the loop nor the interpreter's lock, and once on systemd's SIGABRT.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import socket
import time
from typing import TYPE_CHECKING

from aioserver.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

logger = logging.getLogger("aioserver.systemd")

FIRST = 3  # of the descriptors that systemd passes: SD_LISTEN_FDS_START
STDERR = 2
STACKS_AT = 0.9  # of the watchdog's time: the dump is out when systemd's signal comes
FAMILIES = {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}


class Notifier:
    """Tells systemd how the service is; where there is no systemd it does nothing.

    *address*: a path, or `@` and an abstract name. *watchdog*: seconds after which systemd takes
    silence for a hang; a beat goes out every half of it, with what *status* says, from the first
    `ready()` to `close()`.

    Always: no method raises or waits. Called on the event loop.
    """

    def __init__(
        self,
        address: str | None = None,
        watchdog: float | None = None,
        status: Callable[[], str] = str,
    ) -> None:
        self._address = address
        self._watchdog = watchdog
        self._status = status
        self._beat: asyncio.TimerHandle | None = None
        self._deaf = False  # the last datagram did not arrive: said once

    @classmethod
    def take(cls, environ: MutableMapping[str, str], status: Callable[[], str] = str) -> Notifier:
        """What systemd says in *environ*, which loses it."""
        address = environ.pop("NOTIFY_SOCKET", "")
        period = environ.pop("WATCHDOG_USEC", "")
        process = environ.pop("WATCHDOG_PID", "")
        if address and address[0] not in "/@":
            logger.warning("NOTIFY_SOCKET is neither a path nor an abstract name: not used")
            address = ""
        watched = address and _number(period) and process in {"", str(os.getpid())}
        return cls(address or None, _number(period) / 1e6 if watched else None, status)

    def ready(self) -> None:
        """It takes work; also said when a reload is over."""
        self._tell("READY=1", f"STATUS={self._status()}")
        if self._watchdog is not None and self._beat is None:
            self._feed()

    def reloading(self) -> None:
        """A reload begins: `ready()` ends it, whatever came of it."""
        # CLOCK_MONOTONIC on Linux: systemd compares it with the moment of its own request.
        self._tell(
            "RELOADING=1",
            f"MONOTONIC_USEC={time.monotonic_ns() // 1000}",
            "STATUS=reading the configuration",
        )

    def stopping(self) -> None:
        """It takes no more work, and ends what runs. The beats go on: an end may block, too."""
        self._status = lambda: "stopping"
        self._tell("STOPPING=1", "STATUS=stopping")

    def close(self) -> None:
        """No more beats, and no more stacks."""
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None
            faulthandler.cancel_dump_traceback_later()

    def _feed(self) -> None:
        assert self._watchdog is not None
        self._tell("WATCHDOG=1", f"STATUS={self._status()}")
        faulthandler.dump_traceback_later(self._watchdog * STACKS_AT, file=STDERR)
        self._beat = asyncio.get_running_loop().call_later(self._watchdog / 2, self._feed)

    def _tell(self, *lines: str) -> None:
        if self._address is None:
            return
        address = self._address
        if address.startswith("@"):
            address = f"\0{address[1:]}"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), address)
        except (OSError, ValueError) as exc:  # ValueError: no such address is possible
            if not self._deaf:
                logger.warning("systemd cannot be told %s: %s", lines[0], exc)
            self._deaf = True
        else:
            self._deaf = False


def inherited(environ: MutableMapping[str, str], first: int = FIRST) -> list[socket.socket]:
    """The listening sockets that systemd opened for this process; *environ* loses their names.

    The caller closes them. *first*: the number of the first descriptor.

    Raises:
        ConfigurationError: one of them is no listening stream socket; none is left open then.
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
    for at in range(count):
        number = first + at
        name = f"descriptor {number}" + (f" ({names[at]})" if named else "")
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
    """*text* as a number; 0 where it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0

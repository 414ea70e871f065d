"""The server through which the workers of one parent share limits and streams, where the configuration names none.

The parent starts it before its workers, and again when it ends: a server that comes back is empty, which the workers notice
and bear (cluster/shares.py). Without a program, or without the package that talks to it, there is none, and the workers
have fixed shares for good.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from typing import TYPE_CHECKING

from aioserver.cluster.private_server import PrivateServer, PrivateServerFailed, find_program

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config.settings import Settings

logger = logging.getLogger("aioserver.parent")

# Seconds until a server that has ended soon after its start, or cannot be started, is started again.
PAUSE = 1.0
# Seconds after which its end is no reason for a pause.
LIVED = 10.0


class SharedServer:
    """The private server of this parent, if it has one.

    Always: the server of *url* runs, or is started again at `start_at`, a monotonic time.
    """

    def __init__(
        self,
        server: PrivateServer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._clock = clock
        self._started = clock()
        self.start_at: float | None = None

    @classmethod
    def open(
        cls, settings: Settings, environ: Mapping[str, str], before_exec: Callable[[], None]
    ) -> SharedServer:
        """Start the server if *settings* name no other one, and say what the workers share. `stop` must be called.

        *before_exec*: see `PrivateServer.start`.
        """
        if settings.cluster.redis_url is not None:
            logger.info("the workers share limits and streams through cluster.redis_url")
            return cls()
        program = find_program(environ) if importlib.util.find_spec("redis") else None
        why, server = "none is installed (pip install '.[cluster]')", None
        if program is not None:
            try:
                server = PrivateServer.start(program, environ=environ, before_exec=before_exec)
            except PrivateServerFailed as exc:
                why = str(exc)
        if server is None:
            logger.warning(
                "each worker has a fixed share of every limit, and streams of its own: %s", why
            )
            return cls()
        logger.info(
            "the workers share limits and streams through a server of their own: %s", program
        )
        return cls(server)

    @property
    def url(self) -> str | None:
        """Where the workers reach it; None if there is none."""
        return None if self._server is None else self._server.url

    def ended(self, pid: int) -> None:
        """Note that the process *pid* was reaped, which may be the server's."""
        if self._server is not None and pid == self._server.pid and self.start_at is None:
            now = self._clock()
            self.start_at = now if now - self._started >= LIVED else now + PAUSE
            logger.warning("the workers' server has ended, and is started again")

    def turn(self) -> None:
        """Start the server again, if that is due."""
        if self._server is None or self.start_at is None or self._clock() < self.start_at:
            return
        self.start_at = None
        self._started = self._clock()
        try:
            self._server.start_again()
        except PrivateServerFailed as exc:
            logger.warning("the workers' server cannot be started: %s", exc)
            self.start_at = self._clock() + PAUSE

    def stop(self) -> None:
        """End the server: no worker is left."""
        if self._server is not None:
            self._server.stop()
            self._server = None

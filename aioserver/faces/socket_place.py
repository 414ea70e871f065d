"""The place of one WebSocket, for which it waits in a task of its own, since it has to go on reading."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol, Self

from aioserver.errors import AioserverError, public

if TYPE_CHECKING:
    from aioserver.auth.callers import Caller
    from aioserver.faces.admission import Admission
    from aioserver.limits.gate import Place

logger = logging.getLogger("aioserver.connections")


class AdmittedSocket(Protocol):
    """A WebSocket that wants a place."""

    caller: Caller

    @property
    def face(self) -> str:
        """The face that it speaks."""

    def entered(self) -> None:
        """Begin to work: the socket has its place."""

    def refused(self, error: AioserverError) -> None:
        """Close with *error*: the socket gets no place."""

    def show_position(self, position: int, eta: float) -> None:
        """Tell the client its position in the queue; *eta* in seconds."""


class SocketPlace:
    """The place of *socket*: taken at once, or awaited while the socket's reader goes on.

    Within its `with` the socket is told once that it has `entered`, or was `refused`; neither, if the
    `with` ends before. At its end the place is given back, or the wait is cancelled.
    """

    __slots__ = ("_admission", "_over", "_place", "_socket", "_task")

    def __init__(self, admission: Admission, socket: AdmittedSocket) -> None:
        self._admission = admission
        self._socket = socket
        self._place: Place | None = None
        self._task: asyncio.Task[Place] | None = None
        self._over = False

    def __enter__(self) -> Self:
        self._place = self._admission.try_enter()
        try:
            if self._place is not None:
                self._socket.entered()
            else:
                socket = self._socket
                wait = self._admission.wait(socket.face, socket.caller.name, socket.show_position)
                self._task = asyncio.ensure_future(wait)
                self._task.add_done_callback(self._settle)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over = True
        if self._place is not None:
            self._place.release()
        if self._task is not None:
            self._task.cancel()

    def _settle(self, task: asyncio.Task[Place]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._place = task.result()
            if self._over:
                self._place.release()
                return
            try:
                self._socket.entered()
            except Exception as exc:  # noqa: BLE001 - logged below, and the client is told
                error = exc
        if error is not None and not self._over:
            if not isinstance(error, AioserverError):
                logger.error("bug in a socket's wait", exc_info=error)
                self._admission.metrics.bugs.note(error)
            self._socket.refused(public(error))

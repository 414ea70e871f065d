"""The counted place of a WebSocket, which waits for it in a task of its own while the reader of the socket goes on."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Self

from aioserver.errors import AioserverError, public

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.faces.admission import Admission
    from aioserver.limits.gate import Place

logger = logging.getLogger("aioserver.connections")


class SocketPlace:
    """The place of one WebSocket: taken at once, or awaited while the socket's reader goes on.

    *caller*: the name of the key that the socket came with.

    Within its `with` either *on_entered* or *on_refused* is called, once; neither is, if the `with`
    ends before. At its end the place is given back, or the wait is cancelled.
    """

    def __init__(
        self,
        admission: Admission,
        face: str,
        caller: str,
        *,
        on_entered: Callable[[], None],
        on_refused: Callable[[AioserverError], None],
        on_position: Callable[[int, float], None],
    ) -> None:
        self._admission = admission
        self._face = face
        self._caller = caller
        self._on_entered = on_entered
        self._on_refused = on_refused
        self._on_position = on_position
        self._place: Place | None = None
        self._task: asyncio.Task[Place] | None = None
        self._over = False

    def __enter__(self) -> Self:
        self._place = self._admission.try_enter()
        if self._place is not None:
            self._on_entered()
        else:
            wait = self._admission.wait(self._face, self._caller, self._on_position)
            self._task = asyncio.ensure_future(wait)
            self._task.add_done_callback(self._settle)
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
            else:
                self._on_entered()
        elif not self._over:
            if not isinstance(error, AioserverError):
                logger.error("bug in a socket's wait", exc_info=error)
                self._admission.metrics.bugs.value += 1
            self._on_refused(public(error))

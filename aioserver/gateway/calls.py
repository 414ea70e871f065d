"""Answers without a log: not streamed, and nobody can come back for them.

A call runs in the task of the handler that waits for it, and ends with it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aioserver.errors import ServerShutdown

if TYPE_CHECKING:
    from aioserver.gateway.router import Request, Router
    from aioserver.providers.request import Answer
    from aioserver.telemetry.request_log import RequestLog


class Calls:
    """The calls under way.

    Always: each call is in the request log once it has ended, however it ends.
    """

    def __init__(self, router: Router, request_log: RequestLog) -> None:
        self._router = router
        self._request_log = request_log
        # The tasks of the handlers that wait.
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        """The number of calls under way."""
        return len(self._tasks)

    async def answer(self, request: Request) -> Answer:
        """Return the answer to *request*. Cancelling ends the request.

        Raises:
            ServerShutdown: `close` was called meanwhile.
            AioserverError: as `Router.call`.
        """
        record = request.begin_record(self._request_log)
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            answer = await self._router.call(request)
        except asyncio.CancelledError:
            if task not in self._tasks and not task.uncancel():
                # Only `close` has cancelled this task.
                shutdown = shutdown_error()
                self._request_log.finish(record, shutdown)
                raise shutdown from None
            record.abandoned = True
            self._request_log.finish(record, None, cancelled=True)
            raise
        except Exception as exc:
            self._request_log.finish(record, exc)
            raise
        finally:
            self._tasks.discard(task)
        record.usage = answer.usage
        self._request_log.finish(record, None)
        return answer

    def close(self) -> None:
        """End every call with `ServerShutdown`."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            # `answer` raises `ServerShutdown` for this cancellation.
            task.cancel()


def shutdown_error() -> ServerShutdown:
    """Return a new error for a request that cannot be served any more."""
    return ServerShutdown("the server is stopping", retry_after=5.0)

"""Answers that are not streamed: calls, and the wait for answers that a stream keeps.

A call has no log, so no client can come back for it: it runs in the task of the handler that waits
for it, and ends with it. Other answers are kept in a stream.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from aioserver.errors import AioserverError, InternalError, ServerShutdown, StreamNotFound
from aioserver.limits.deadline import Guard
from aioserver.providers.request import Answer
from aioserver.streams.cursor import ConditionReader
from aioserver.streams.ending import run_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aioserver.gateway.request import Request
    from aioserver.streams.lifetime import Lifetime
    from aioserver.streams.stream import Stream
    from aioserver.telemetry.request_log import RequestLog


logger = logging.getLogger("aioserver.gateway")

ENDED = attrgetter("ended")


class Calls:
    """The calls under way.

    Always: each call is in the request log once it has ended, in whatever way.
    """

    def __init__(self, request_log: RequestLog) -> None:
        self._request_log = request_log
        # The tasks of the waiting handlers.
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        """The number of calls under way."""
        return len(self._tasks)

    async def answer(
        self, request: Request, ask: Callable[[Request], Awaitable[Answer]]
    ) -> Answer:
        """Return the answer to *request*, which *ask* gets from a provider. The body is released.
        Cancelling ends the request.

        Raises:
            ServerShutdown: `close` was called meanwhile.
            InternalError: there was a bug, which is logged.
            AioserverError: as *ask*.
        """
        record = request.begin_record(self._request_log)
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if (bound := request.provider_request.bound) is None:
                if request.waits:
                    await request.granted()
                answer = await ask(request)
            else:
                with Guard(bound, self._request_log.metrics.count_deadline):
                    await request.granted()
                    answer = await ask(request)
        except asyncio.CancelledError:
            if task not in self._tasks and not task.uncancel():
                # Only `close` has cancelled this task.
                shutdown = shutdown_error()
                self._request_log.finish(record, shutdown)
                raise shutdown from None
            record.abandoned = True
            self._request_log.finish(record, None, cancelled=True)
            raise
        except AioserverError as error:
            self._request_log.finish(record, error)
            raise
        except Exception as exc:
            self._request_log.finish(record, exc)
            logger.exception("bug in an answer")
            self._request_log.metrics.bugs.note(exc)
            bug = InternalError("internal error")
            bug.counted, bug.paid = True, record.outcome.sent_at > 0
            raise bug from exc
        finally:
            self._tasks.discard(task)
            request.release()
        self._request_log.finish(record, None)
        return answer

    def close(self) -> None:
        """End every call with `ServerShutdown`."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            # `answer` raises `ServerShutdown` for this cancellation.
            task.cancel()


@asynccontextmanager
async def kept_answer(stream: Stream, lifetime: Lifetime) -> AsyncIterator[Answer]:
    """Wait for the whole answer in *stream*, and return it; cancelling leaves the stream running.

    Within the `async with` the stream has a reader, and so is not dropped: its answer counts for
    `max_kept_bytes` until it is written.

    Raises:
        ProviderFault: no provider answered.
        StreamNotFound: another request of the caller has cancelled the answer meanwhile.
    """
    reader = ConditionReader(stream, ENDED)
    try:
        lifetime.reader_added(stream)
        await reader.reached
        # The reader has everything, and is not late.
        reader.next_index = stream.offset + len(stream.entries)
        answer = stream.whole
        if not isinstance(answer, Answer):
            raise stream.error or StreamNotFound("this answer was cancelled")
        yield answer
    finally:
        run_all((reader.leave, partial(lifetime.reader_removed, stream)))


def shutdown_error() -> ServerShutdown:
    """Return a new error for a request that cannot be served any more."""
    return ServerShutdown("the server is stopping", retry_after=5.0)

"""The producers: one task for each log, which fills it, and its end.

A producer goes on whatever its clients do. Its done callback ends the log, so that its readers
never wait for ever, however it ends.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from aioserver.errors import AioserverError, InternalError, StreamNotFound, public
from aioserver.provider_errors import ProviderDisconnected
from aioserver.streams.contracts import PLAIN_EVENTS
from aioserver.streams.ending import run_all
from aioserver.streams.entries import CANCELLED
from aioserver.tracebacks import forget_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine

    from aioserver.streams.stream import Stream
    from aioserver.telemetry.request_log import RequestLog

logger = logging.getLogger("aioserver.gateway")


def all_has_come(stream: Stream) -> bool:
    """Return whether the whole answer is in *stream*. If only its end mark is missing, that is
    not waited for any longer: a deadline or a stop then cuts nothing off.
    """
    if stream.ended or stream.ending is not None:
        return True
    return stream.source is not None and stream.source.complete()


class Producers:
    """The tasks that fill logs.

    Always: a stream that was started has one producer task, or the last event in its log.

    *on_end* is called with each stream whose producer has ended.
    """

    def __init__(
        self, request_log: RequestLog, on_end: Callable[[Stream], None] | None = None
    ) -> None:
        self._request_log = request_log
        self._loop = asyncio.get_running_loop()
        # Each producer's stream, and the callback for its end.
        self._streams: dict[asyncio.Task[None], tuple[Stream, Callable[[], None]]] = {}
        self._on_end = on_end

    def __len__(self) -> int:
        return len(self._streams)

    def start(
        self, stream: Stream, producer: Coroutine[Any, Any, None], release: Callable[[], None]
    ) -> None:
        """Let *producer* fill *stream*; *release* is called when it has ended, however it ends."""
        try:
            task = self._loop.create_task(producer)
        except BaseException:
            # Python would warn about a coroutine that never begins.
            producer.close()
            raise
        self._streams[task] = stream, release
        stream.producer = task
        task.add_done_callback(self._settle)

    async def end(
        self, reason: Callable[[], AioserverError], callers: Collection[str] | None = None
    ) -> None:
        """End every log, or those of *callers*, with *reason*, and wait for their producers."""
        ended = []
        for task, (stream, _release) in self._streams.items():
            owner: Any = stream.caller
            if callers is None or owner.name in callers:
                if not all_has_come(stream):
                    stream.cancel_reason = reason()
                task.cancel()
                ended.append(task)
        if ended:
            await asyncio.wait(ended)
            await asyncio.sleep(0)  # the tasks' done callbacks run

    def _settle(self, task: asyncio.Task[None]) -> None:
        """End the log whose producer *task* is done, and the record of its request.

        This is a callback and not a `finally`: a task that is cancelled before its first step
        never enters its `try`, and its readers would wait for ever. For the same reason each step
        runs even if another raises.
        """
        stream, release = self._streams.pop(task)
        stream.producer = None
        fault = None if task.cancelled() else task.exception()
        bugs = [] if fault is None or isinstance(fault, AioserverError) else [fault]
        steps = [release]
        if stream.held is not None:
            steps.append(stream.held.release)
        steps += (partial(self._end, stream, task, fault), partial(self._finish_record, stream))
        if self._on_end is not None:
            steps.append(partial(self._on_end, stream))
        try:
            run_all(steps)
        except Exception as exc:  # noqa: BLE001 - logged below
            bugs.append(exc)
        if bugs:
            for bug in bugs:
                logger.error("bug in an answer", exc_info=bug)
            # They count as one bug, since it is one request.
            self._request_log.metrics.bugs.note(bugs[0])

    def _end(self, stream: Stream, task: asyncio.Task[None], fault: BaseException | None) -> None:
        """End the log of *stream* as its producer *task* has ended: with *fault*, if any."""
        if stream.ended:
            return
        reason = stream.cancel_reason
        try:
            if stream.ending is not None and fault is None:
                # All of the answer has come, and its last event may have been read already.
                stream.end_now()
            elif not task.cancelled():
                error = public(fault or ProviderDisconnected("the answer has no end"))
                error.paid = error.paid or (stream.sent and isinstance(error, InternalError))
                stream.fail(error)
            elif reason is None:
                # The OpenAI face can tell a cancelled answer from a complete one only by an error.
                cut = StreamNotFound("this answer was cancelled")
                data = stream.final_error(cut, stream.last + 1)
                stream.end(CANCELLED, {}, data=data)
            else:
                stream.fail(reason)
        finally:
            if not stream.ended:
                # The error could not be written in the form of this answer's events.
                stream.events = PLAIN_EVENTS
                bug = InternalError("internal error")
                bug.paid = stream.sent
                stream.fail(bug)

    def _finish_record(self, stream: Stream) -> None:
        """Count and log the request of *stream*, which has ended."""
        if stream.error is not None:
            # Otherwise the question would be kept for the whole window.
            forget_frames(stream.error)
        record = stream.record
        # The two events that open and end the stream do not count.
        record.events = stream.last - 2 if stream.answered_at else 0
        record.abandoned = stream.abandoned
        self._request_log.finish(record, stream.error, cancelled=stream.end_status == CANCELLED)

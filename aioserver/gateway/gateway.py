"""The one road from a face to a provider; the owner of every answer under way.

    ask      a question of the WebSocket and SSE faces → its stream, found or new
    relay    a streamed request of the OpenAI face → its stream
    call     one that is not streamed → the answer

A new stream gets one producer task, owned here, whatever becomes of the client. Its end is made by
the task's done callback, so that no way of ending leaves readers waiting for ever.

What becomes of it when nobody reads it is told in lifetime.py.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import TYPE_CHECKING, Any

from aioserver.errors import (
    AioserverError,
    InvalidApiKey,
    RequestConflict,
    ServerShutdown,
    StreamNotFound,
    public,
)
from aioserver.gateway.prompts import Questions
from aioserver.limits.quota import REVOKED
from aioserver.protocol.openai import final_response
from aioserver.provider_errors import ProviderDisconnected
from aioserver.providers.request import Answer
from aioserver.streams.entries import CANCELLED, CHUNK, COMPLETE, ERROR
from aioserver.streams.lifetime import EndReader, Lifetime

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Iterator

    from aioserver.auth.callers import Caller
    from aioserver.config import settings
    from aioserver.gateway.conversations import Conversations
    from aioserver.gateway.prompts import Question
    from aioserver.gateway.router import Route, Router
    from aioserver.protocol.messages import Chat
    from aioserver.providers.request import Ask
    from aioserver.streams.store import Streams
    from aioserver.streams.stream import Stream
    from aioserver.telemetry.request_log import RequestLog

logger = logging.getLogger("aioserver.gateway")


class Gateway:
    """Owns the producers.

    Always: each running stream has one producer task, or none any more and its end in the log.
    """

    def __init__(
        self,
        router: Router,
        streams: Streams,
        conversations: Conversations,
        service: settings.Service,
        bounds: settings.Streams,
        records: RequestLog,
    ) -> None:
        self._router = router
        self._streams = streams
        self._questions = Questions(conversations, service, bounds)
        self._records = records
        self._loop = asyncio.get_running_loop()
        self._producers: dict[asyncio.Task[None], Stream] = {}
        self._tasks: dict[Stream, asyncio.Task[None]] = {}
        self._calls: set[asyncio.Task[Any]] = set()  # of handlers whose answer no log keeps
        self._stopping = False
        self.lifetime = Lifetime(streams, bounds, self._stop)
        self.apply(service, bounds)

    def apply(self, service: settings.Service, bounds: settings.Streams) -> None:
        """Answer by these settings from now on, at the providers that the router has now."""
        self._bounds = bounds
        self._questions.apply(service, bounds)
        self.lifetime.apply(bounds)
        for provider in self._router.providers.values():
            provider.on_wait = self.lifetime.make_room

    def ask(
        self, caller: Caller, chat: Chat, scope: str | None = None, *, face: str = "websocket"
    ) -> Stream:
        """The stream that answers *chat*: the one of that request id, or a new one.

        *scope* names the conversation where the chat names none. A new stream that gets no reader
        before its window is over is cancelled.

        Raises:
            RequestConflict: the request id is known with another payload.
            InvalidRequest: nested too deeply to be passed on.
            ModelNotFound, NoProvider: nobody to ask.
            ConcurrencyExceeded, RateLimitExceeded: no more for this key.
            ServerAtCapacity, ServerShutdown: no room for another answer.
        """
        digest = chat.digest()
        if (known := self._known(caller, chat.request_id, digest)) is not None:
            return known
        route = self._router.route(chat.model, chat.provider)
        question = self._questions.make(caller, chat, scope, route)
        stream = self._open(chat.request_id, caller, self._bounds.resume_window, digest)
        stream.conversation_id = question.conversation_id
        self._begin(stream, question.ask, route, face, chat.request_id)
        self._start(stream, self._answer(route, stream, question))
        return stream

    def relay(
        self,
        caller: Caller,
        route: Route,
        ask: Ask,
        *,
        name: str,
        key: str | None,
        digest: bytes,
        stored: bool = False,
    ) -> Stream:
        """The stream that answers a streamed OpenAI request; *key*: its Idempotency-Key.

        One that is *stored* can be found again by the id that its provider gives it.

        Raises:
            As `ask`.
        """
        if key is None and not stored:
            stream = self._open(name, caller, 0.0, private=True)
        elif key is None:
            stream = self._open(uuid.uuid4().hex, caller, self._bounds.resume_window)
        elif (known := self._known(caller, key, digest)) is not None:
            return known
        else:
            stream = self._open(key, caller, self._bounds.resume_window, digest)
        self._begin(stream, ask, route, "openai", name)
        self._start(stream, self._router.fill(route, stream, ask))
        return stream

    async def call(
        self,
        caller: Caller,
        route: Route,
        ask: Ask,
        *,
        name: str,
        key: str | None,
        digest: bytes,
        stored: bool = False,
    ) -> Answer:
        """The answer to an OpenAI request that is not streamed.

        Cancelling ends it, unless it has a *key* or is *stored*: see `relay`.

        Raises:
            ProviderFault: nobody gave one. Otherwise as `ask`.
        """
        self._check()
        if key is None and not stored:
            if caller.allowance is None:
                return await self._call_alone(route, ask, name)
            with caller.allowance.used():
                return await self._call_alone(route, ask, name)
        stream = None if key is None else self._known(caller, key, digest)
        if stream is None:
            kept = key or uuid.uuid4().hex
            stream = self._open(kept, caller, self._bounds.resume_window, digest)
            self._begin(stream, ask, route, "openai", name)
            self._start(stream, self._call(route, stream, ask, stored=stored))
        reader = EndReader(stream)
        stream.add_reader(reader)
        self.lifetime.read(stream)
        try:
            await reader.ended.wait()
        finally:
            stream.remove_reader(reader)
            self.lifetime.unread(stream)
        if isinstance(stream.whole, Answer):
            return stream.whole
        raise stream.error or StreamNotFound("this answer was cancelled")

    def find(self, caller: Caller, request_id: str) -> Stream:
        """The caller's stream of that name.

        Raises:
            StreamNotFound: never seen, expired, or another caller's.
        """
        stream = self._streams.find(caller, request_id)
        if stream is None:
            raise StreamNotFound("no such stream: never seen, or kept no longer")
        return stream

    def of(self, caller: Caller) -> Iterator[Stream]:
        """The caller's own streams that are kept."""
        return self._streams.of(caller)

    def cancel(self, caller: Caller, request_id: str) -> Stream:
        """End a stream for everybody who reads it; one that has ended stays as it is.

        Raises:
            StreamNotFound: as `find`.
        """
        stream = self.find(caller, request_id)
        self.lifetime.end(stream, left=False)
        return stream

    async def revoke(self, callers: Collection[str]) -> None:
        """End every answer of these callers with `invalid_api_key`: their keys are gone."""
        ending = []
        for task, stream in self._producers.items():
            owner: Any = stream.caller
            if owner.name in callers:
                stream.why_cancelled = InvalidApiKey(REVOKED)
                task.cancel()
                ending.append(task)
        await asyncio.gather(*ending, return_exceptions=True)
        await asyncio.sleep(0)  # their callbacks have run then, as in `close`

    def drain(self) -> None:
        """Take no new question, send away who waits for a provider, end what nobody reads."""
        self._stopping = True
        for provider in self._router.providers.values():
            provider.refuse(stopping)
        self.lifetime.drain()

    async def close(self) -> None:
        """End every answer with `ServerShutdown`, and wait for their producers."""
        self._stopping = True
        tasks = list(self._producers)
        for task in tasks:
            self._producers[task].why_cancelled = stopping()
            task.cancel()
        calls, self._calls = self._calls, set()
        for call in calls:
            call.cancel()  # `_call_alone` says why
        if tasks:
            await asyncio.wait(tasks)
            await asyncio.sleep(0)  # their callbacks have run then
        self.lifetime.close()

    def _check(self) -> None:
        if self._stopping:
            raise stopping()

    def _known(self, caller: Caller, request_id: str, digest: bytes) -> Stream | None:
        self._check()
        stream = self._streams.find(caller, request_id)
        if stream is None:
            return None
        if stream.digest != digest:
            raise RequestConflict("this request id is known, with another payload")
        if stream.end_status == ERROR and not stream.sent and not stream.readers:
            self._streams.drop(stream)  # nothing was asked of a provider: asking again is free
            return None
        return stream

    def _open(
        self,
        request_id: str,
        caller: Caller,
        window: float,
        digest: bytes = b"",
        *,
        private: bool = False,
    ) -> Stream:
        """A new stream, counted for its caller until `_settle`."""
        self._check()
        if (allowance := caller.allowance) is not None:
            allowance.take()
        try:
            return self._streams.open(
                request_id, caller, window=window, digest=digest, private=private
            )
        except AioserverError:
            if allowance is not None:
                allowance.give_back(unused=True)
            raise

    def _begin(self, stream: Stream, ask: Ask, route: Route, face: str, name: str) -> None:
        provider = route.provider
        stream.record = ask.record
        model = route.model or provider.settings.model
        ask.record.begin(face, name, provider.name, model, ask.caller.name)

    async def _call_alone(self, route: Route, ask: Ask, name: str) -> Answer:
        """The answer that no log keeps."""
        record, provider = ask.record, route.provider
        model = route.model or provider.settings.model
        record.begin("openai", name, provider.name, model, ask.caller.name)
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            answer = await self._router.call(route, ask)
        except asyncio.CancelledError:
            if task not in self._calls and not task.uncancel():  # by `close`, and by nobody else
                shutdown = stopping()
                self._records.finish(record, shutdown)
                raise shutdown from None
            record.left = True
            self._records.finish(record, None, cancelled=True)
            raise
        except Exception as exc:
            self._records.finish(record, exc)
            raise
        finally:
            self._calls.discard(task)
        record.usage = answer.usage
        self._records.finish(record, None)
        return answer

    def _start(self, stream: Stream, producing: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(producing)
        self._producers[task] = stream
        self._tasks[stream] = task
        task.add_done_callback(self._settle)

    async def _answer(self, route: Route, stream: Stream, question: Question) -> None:
        try:
            await self._router.fill(route, stream, question.ask)
        except asyncio.CancelledError:
            stream.seal()
            reading = question.ask.reading
            if reading is not None and reading.text:
                question.keep()
            raise
        if stream.end_status == COMPLETE:
            question.keep()

    async def _call(self, route: Route, stream: Stream, ask: Ask, *, stored: bool) -> None:
        def sending() -> None:
            stream.sent = True

        answer = await self._router.call(route, ask, sending)
        stream.whole = answer
        stream.usage = answer.usage
        if len(answer.body) > self._bounds.max_stream_bytes:
            stream.hold(len(answer.body))  # the entry goes, this stays
        stream.provider = answer.provider
        if stored and (name := final_response(answer.body)) is not None:
            stream.call_also(name)
        stream.append(CHUNK, data=answer.body)
        stream.end(COMPLETE, {"metadata": {"provider": answer.provider}})

    def _settle(self, task: asyncio.Task[None]) -> None:
        """End the log.

        A callback and not a `finally`: a task cancelled before its first step never enters its
        `try`, and its readers would wait for ever.
        """
        stream = self._producers.pop(task)
        del self._tasks[stream]
        owner: Any = stream.caller
        if owner.allowance is not None:
            owner.allowance.give_back()
        fault = None if task.cancelled() else task.exception()
        if stream.ended:
            pass
        elif task.cancelled():
            if stream.why_cancelled is None:
                stream.end(CANCELLED, {})
            else:
                stream.fail(stream.why_cancelled)
        else:
            stream.fail(public(fault or ProviderDisconnected("the answer has no end")))
        if fault is not None and not isinstance(fault, AioserverError):
            logger.error("bug in an answer", exc_info=fault)
            self._records.metrics.bugs.value += 1
        if stream.error is not None:  # else its frames keep the question for the whole window
            stream.error.__traceback__ = stream.error.__cause__ = stream.error.__context__ = None
        record = stream.record
        record.first, record.events, record.usage = (
            stream.answered_at,
            stream.last - 2 if stream.answered_at else 0,
            stream.usage,
        )
        record.left = stream.left
        self._records.finish(record, stream.error, cancelled=stream.end_status == CANCELLED)

    def _stop(self, stream: Stream) -> None:
        task = self._tasks.get(stream)
        if task is not None and not stream.ended:
            task.cancel()


def stopping() -> ServerShutdown:
    """What is told to who cannot be served any more: to each an error of its own."""
    return ServerShutdown("the server is stopping", retry_after=5.0)

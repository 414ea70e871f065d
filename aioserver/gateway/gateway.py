"""The one way from a face to a provider, and the owner of every answer under way.

    ask      a chat → its stream, known or new
    relay    a streamed request whose events are passed on as they come → its stream
    call     a request that is not streamed → the answer

A new stream gets one producer task (producers.py), which goes on whatever the client does.
streams/lifetime.py decides how long an answer without a reader lives.

This file is one concept: one place decides whether a request gets an answer under way or a new
one.
"""

from __future__ import annotations

import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from aioserver.auth.callers import CALLER
from aioserver.auth.guard import peer_of
from aioserver.errors import (
    InvalidApiKey,
    RequestConflict,
    ServerShutdown,
    StreamNotFound,
    TokensExceeded,
)
from aioserver.gateway.contracts.instances import (
    ASKED,
    CLAIMED,
    LOST,
    NOT_FOUND,
    Elsewhere,
)
from aioserver.gateway.producers import Producers, all_has_come
from aioserver.gateway.prompts import Prompts
from aioserver.gateway.request import Calls, Request, shutdown_error
from aioserver.gateway.stream_usage import UsageAttempt
from aioserver.limits.quota import REVOKED
from aioserver.protocol.whole_answer import final_response, text_pieces
from aioserver.providers.attempt import Attempt
from aioserver.streams.contracts import AT_KEY
from aioserver.streams.entries import COMPLETE, ERROR
from aioserver.streams.stream import Stream

if TYPE_CHECKING:
    from collections.abc import (
        Awaitable,
        Callable,
        Collection,
        Iterator,
    )

    from aiohttp import web

    from aioserver.auth.callers import Caller
    from aioserver.config import settings
    from aioserver.gateway.contracts.histories import Histories
    from aioserver.gateway.contracts.hooks import Hooks
    from aioserver.gateway.contracts.instances import Instances
    from aioserver.gateway.router import Router
    from aioserver.protocol.client_frames import Chat
    from aioserver.providers.request import Answer, Hold
    from aioserver.streams.lifetime import Lifetime
    from aioserver.streams.store import HeldBytes
    from aioserver.telemetry.request_log import RequestLog


class Gateway:
    """Answers requests: finds the stream of a known request, and starts a producer for a new one."""

    def __init__(
        self,
        router: Router,
        lifetime: Lifetime,
        histories: Histories,
        service: settings.Service,
        bounds: settings.Streams,
        request_log: RequestLog,
        instances: Instances | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self._hooks = hooks
        self._router = router
        self.lifetime = lifetime
        self._streams = lifetime.store
        self._prompts = Prompts(histories, service, bounds)
        self._request_log = request_log
        self._count_deadline = request_log.metrics.count_deadline
        # The streams of other instances; None if there are none.
        self.instances = instances
        self.producers = Producers(request_log, None if instances is None else instances.ended)
        # Answers without a log.
        self._calls = Calls(request_log)
        self._stopping = False
        self.apply(service, bounds)

    def apply(self, service: settings.Service, bounds: settings.Streams) -> None:
        """Apply new settings."""
        self._bounds = bounds
        self._prompts.apply(service, bounds)
        self.lifetime.apply(bounds)

    @property
    def running(self) -> int:
        """The number of answers that have not ended, streamed or not."""
        return len(self.producers) + self._calls.running

    def ask(
        self,
        caller: Caller,
        chat: Chat,
        conversation: str | None = None,
        *,
        face: str,
        hold: Hold | None = None,
        background: bool = False,
    ) -> Stream:
        """Return the stream that answers *chat*: that of its request id, or a new one.

        *conversation* is its own if the chat names none. A new stream is cancelled if it gets no
        reader before its window is over, unless it runs in the *background*. *hold* is released
        here, unless this raises.

        Raises:
            RequestConflict: the request id is known with another payload.
            ModelNotFound, NoProvider: no provider can answer.
            ConcurrencyExceeded, RateLimitExceeded: a limit of the key is reached.
            ServerAtCapacity: there is no room for another answer, or none in the background.
            ServerShutdown: the server is stopping.
        """
        key, digest = chat.request_id, chat.digest()
        if (existing := self._known(caller, key, digest)) is not None:
            if hold is not None:
                hold.release()
            return existing
        route = self._router.route(chat.model, chat.provider, caller=caller, body=chat.options)
        prompt = self._prompts.make(caller, chat, conversation, route, hold)
        try:
            request = Request(
                route,
                prompt.request,
                face,
                key,
                key,
                digest,
                background=background,
                keeper=prompt,
                make_attempt=Attempt if prompt.request.usage_options is None else UsageAttempt,
            )
            stream = self._begin(request, self._router.fill)
        except BaseException:
            # The caller still owns the hold.
            prompt.release()
            raise
        stream.conversation_id = prompt.conversation_id
        return stream

    def relay(self, request: Request) -> Stream:
        """Return the stream that answers a streamed *request*: that of its key, or a new one.

        Raises:
            AioserverError: as `ask`.
        """
        return self._existing(request) or self._begin(request, self._router.fill)

    def hold(self) -> HeldBytes:
        """Return a count of the bytes of an answer without a log, for `call`."""
        return self._streams.hold()

    async def call(
        self, request: Request, ask: Callable[[Request], Awaitable[Answer]] | None = None
    ) -> Answer:
        """Return the answer to a *request* that is neither streamed nor resumable.

        Cancelling ends it. *ask* asks the provider; None: `Router.call`.

        Raises:
            ProviderFault: no provider answered.
            AioserverError: as `Gateway.ask`.
        """
        if self._stopping:
            raise shutdown_error()
        request.provider_request.hold_by(self._bounds.hold)
        quota, ask = request.caller.quota, ask or self._router.call
        if quota is None:
            return await self._calls.answer(request, ask)
        self._begin_at_key(request)
        try:
            with quota.held():
                return await self._calls.answer(request, ask)
        finally:
            request.forget_grant()

    async def pass_on(self, request: Request) -> None:
        """Pass a `PassedRequest` on; its answer is handed over as it comes. Cancelling ends it.

        Raises:
            ProviderFault: there is no good answer, or not all of it.
            AioserverError: as `ask`.
        """
        await self.call(request, self._router.pass_on)

    def keep(self, request: Request) -> Stream:
        """Return the stream that keeps the answer to a resumable *request* that is not streamed,
        as `relay`.

        `calls.kept_answer` waits for the answer.

        Raises:
            AioserverError: as `ask`.
        """
        return self._existing(request) or self._begin(request, self._produce_whole)

    def find(self, caller: Caller, request_id: str, digest: bytes | None = None) -> Stream:
        """Return the caller's stream of *request_id*; with *digest*, only if it belongs to the
        same request.

        Raises:
            StreamNotFound: there was never such a stream, it is no longer kept, or it belongs to
                another caller.
            RequestConflict: the id is known with another payload.
        """
        stream = self._streams.find(caller, request_id)
        if stream is None:
            raise StreamNotFound(NOT_FOUND)
        if digest is not None and stream.digest != digest:
            raise RequestConflict("this request id is known, with another payload")
        return stream

    async def route(
        self,
        request: web.Request,
        request_id: str,
        digest: bytes | None = None,
        body: bytes = b"",
    ) -> Stream:
        """Return the stream of *request_id* of the caller of *request*, which is to be answered
        with it; *digest* is as for `find`. *body* is what the client has sent.

        Raises:
            Elsewhere: another instance has it.
            AioserverError: as `find`, and `Instances.route`.
        """
        caller, request[ASKED] = request[CALLER], request_id
        try:
            return self.find(caller, request_id, digest)
        except StreamNotFound:
            # An instance that has passed it on knows that it is here.
            if self.instances is None or peer_of(request) is not None:
                raise
        try:
            await self.instances.route(caller, request_id, request.get(LOST))
        except Elsewhere as elsewhere:
            elsewhere.body = body
            raise
        return self.find(caller, request_id, digest)

    async def claim(self, request: web.Request, key: str, body: bytes) -> None:
        """Let *request* be answered here, whose caller finds the answer again by *key*, before
        there is a stream. *body* is what the client has sent.

        Raises:
            Elsewhere: another instance answers it.
            StreamNotFound: another instance has passed it on, and this one is stopping.
            AioserverError: as `Instances.claim`.
        """
        caller, request[ASKED] = request[CALLER], key
        stream = self._kept(caller, key)
        if self._stopping and peer_of(request) is not None:
            if stream is None or isinstance(stream.error, ServerShutdown):
                raise StreamNotFound(NOT_FOUND)
        elif stream is None and self.instances is not None and not self._stopping:
            try:
                await self.instances.claim(caller, key, request.get(LOST))
                request[CLAIMED] = partial(self.instances.claiming, caller, key)
            except Elsewhere as elsewhere:
                elsewhere.body = body
                raise

    def undecided(self, caller: Caller, key: str) -> bool:
        """Return whether it is not known which instance answers the request of *caller* with *key*:
        then `Instances.claim` is asked first.
        """
        if self.instances is None or self._stopping:
            return False
        return self._kept(caller, key) is None

    async def cancel_anywhere(self, caller: Caller, request_id: str) -> None:
        """Cancel a stream for all its readers, as `cancel`, at whichever instance it is.

        Raises:
            StreamNotFound: as `find`.
            InstanceUnavailable: it is not known whether another instance has it.
        """
        try:
            self.cancel(caller, request_id)
        except StreamNotFound:
            if self.instances is None:
                raise
            await self.instances.cancel(caller, request_id)

    async def listing(self, caller: Caller) -> tuple[list[dict[str, Any]], bool]:
        """Return the `Stream.describe` of each of the caller's streams that are kept, at any
        instance, and whether some may be missing.
        """
        own = [stream.describe() for stream in self.streams_of(caller)]
        if self.instances is None:
            return own, False
        others, partial = await self.instances.listing(caller)
        return [*own, *others], partial

    def streams_of(self, caller: Caller) -> Iterator[Stream]:
        """Return the caller's streams that are kept here."""
        return self._streams.owned_by(caller)

    def cancel(self, caller: Caller, request_id: str) -> Stream:
        """Cancel a stream for all its readers, and return it.

        A stream that has ended stays as it is.

        Raises:
            StreamNotFound: as `find`.
        """
        stream = self.find(caller, request_id)
        self.lifetime.end(stream, abandoned=False)
        return stream

    def forget(self, caller: Caller, name: str) -> bool:
        """Remove an answer that is stored beside its log, and the log here; cancel the answer if
        it runs.

        Return whether there was one.
        """
        stream, known = self._streams.find(caller, name), False
        for evictable_store in self._streams.evictable_stores:
            if stream is not None and stream.api is evictable_store.api:
                self.lifetime.forget(stream)
                known = True
            known = evictable_store.drop(caller, name) or known
        return known

    async def revoke(self, callers: Collection[str]) -> None:
        """End every answer of *callers* with `invalid_api_key`, since their keys are no longer
        valid.
        """
        await self.producers.end(lambda: InvalidApiKey(REVOKED), callers)

    def drain(self) -> None:
        """Refuse new requests and those that wait for a provider, and end streams without a
        reader.
        """
        self._stopping = True
        for provider in self._router.providers.values():
            provider.refuse(shutdown_error)
        self.lifetime.drain(shutdown_error)

    async def finish_background(self, seconds: float) -> None:
        """Wait, for *seconds* at most, for the answers in the background: the other instances have
        them once they have ended. Without other instances no client could return for one.
        """
        if self.instances is not None:
            await self.lifetime.finish_background(seconds)

    async def close(self) -> None:
        """End every answer with `ServerShutdown`, and wait for their producers."""
        self._stopping = True
        self._calls.close()
        await self.producers.end(shutdown_error)
        self.lifetime.close()

    def _begin_at_key(self, request: Request) -> None:
        """Count *request* for its caller's key, or let it wait there.

        Raises:
            AioserverError: as `Request.begin`.
        """
        try:
            request.begin(self._count_deadline)
        except TokensExceeded as error:
            self._request_log.metrics.count_budget_refusal(request.caller.label, error)
            raise

    def _existing(self, request: Request) -> Stream | None:
        """Return the stream of the request's key; None if the request has no key, or is new."""
        if request.key is None:
            return None
        stream = self._known(request.caller, request.key, request.digest)
        if stream is not None:
            request.release()
        return stream

    def _known(self, caller: Caller, key: str, digest: bytes) -> Stream | None:
        stream = self._kept(caller, key)
        if stream is not None and stream.digest != digest:
            raise RequestConflict("this request id is already known, with another payload")
        if self._stopping and stream is None:
            raise shutdown_error()
        return stream

    def _kept(self, caller: Caller, key: str) -> Stream | None:
        """Return the stream of a request that may come again; None if it is to be answered anew."""
        stream = self._streams.find(caller, key)
        if stream is not None and (
            stream.end_status == ERROR and not stream.sent and not stream.readers
        ):
            # No provider has received the request, so a new try costs nothing.
            self._streams.drop(stream)
            return None
        return stream

    def _begin(
        self, request: Request, produce: Callable[[Request, Stream], Awaitable[None]]
    ) -> Stream:
        """Return the log of a new answer, which *produce* fills.

        It counts for its caller's quota until it has ended.

        A log to which no client can return is private, and its window is 0: see streams/store.py.
        """
        if self._stopping:
            raise shutdown_error()
        asked, resumable, window = request.provider_request, request.resumable, 0.0
        caller = asked.caller
        if request.background:
            self.lifetime.check_background(caller)
            window = self.lifetime.background_window
        elif resumable:
            window = self._bounds.resume_window
        name = (request.key or uuid.uuid4().hex) if resumable else request.name
        if caller.quota is not None:
            self._begin_at_key(request)
        stream = None
        try:
            stream = self._streams.open(
                name,
                caller,
                window=window,
                digest=request.digest,
                private=not resumable,
                outcome=asked.outcome,
                kind=Stream if self._hooks is None else self._hooks.log,
            )
            stream.api = api = asked.api
            asked.hold_by(self._bounds.hold)
            if asked.streamed:
                stream.events = api.events()
            stream.record = request.begin_record(self._request_log)
            if request.background:
                asked.background = True
                self.lifetime.run_in_background(stream)
            asked.outlive_handler()
            producer = self._produced(request, stream, produce)
            self.producers.start(stream, producer, request.release)
        except BaseException:
            # Otherwise the end of the producer's task would release all of it.
            request.forget_grant()
            request.release()
            if stream is not None:
                self.lifetime.leave_background(stream)
                self._streams.drop(stream)
            raise
        return stream

    async def _produced(
        self,
        request: Request,
        stream: Stream,
        produce: Callable[[Request, Stream], Awaitable[None]],
    ) -> None:
        """Let *produce* fill *stream* once *request* is within its caller's limits, and until its
        deadline.
        """
        with request.guard(self._count_deadline, partial(all_has_come, stream)):
            if request.waits:
                await request.granted(partial(stream.report_position, at=AT_KEY))
                stream.queued = None
            await produce(request, stream)

    async def _produce_whole(self, request: Request, stream: Stream) -> None:
        """Get an answer that is not streamed, and keep it in *stream*."""
        answer = await self._router.call(request, stream)
        body = answer.body
        if request.stored and (response_id := await final_response(body)) is not None:
            stream.add_alias(response_id)
        pieces = await text_pieces(body)
        if stream.held is not None:
            # From here on the stream counts the answer.
            stream.held.release()
        stream.append_whole(answer, body, pieces)
        stream.end(COMPLETE, {"metadata": {"provider": answer.outcome.provider}})

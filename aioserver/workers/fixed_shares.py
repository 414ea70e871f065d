"""Fixed shares: what one worker process may use of each limit that the configuration sets for all
of them.

The shares of all workers together are the limit, and never more, but for a limit that is lower
than the number of workers: a share is at least 1. While a worker is replaced, its successor has
the same share.

Not shared out is, where the workers belong to a cluster, what they share through its server
(wings/cluster/limits.py). Without one `max_connections` and its queue are shared out by
`FixedGate`, so that messages have the configured number.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aioserver.limits.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.config.settings import Auth, Chat, ClientKey, Llm, Provider, Settings
    from aioserver.limits.fixed_share import Scope

# Seconds until a worker without a server looks again how many connections its predecessor has.
LOOK = 0.1


class FixedGate(Gate):
    """The gate of the worker of *scope* without a server: its share of all places, but for those
    that its predecessor has still.

    *before* returns how many connections that has.
    """

    def __init__(self, scope: Scope, before: Callable[[], int], limit: int, **bounds: Any) -> None:
        self._scope, self._before = scope, before
        bounds["queue_size"] = scope.share(bounds["queue_size"])
        super().__init__(0, **bounds)
        self._whole = limit
        self._look()

    def apply(self, limit: int, *, queue_size: int, queue_timeout: float) -> None:
        """Use new bounds, those of all workers together."""
        self._whole = limit
        super().apply(
            self._places(), queue_size=self._scope.share(queue_size), queue_timeout=queue_timeout
        )

    def _places(self) -> int:
        return max(0, self._scope.share(self._whole) - self._before())

    def _look(self) -> None:
        super().apply(
            self._places(), queue_size=self._queue_size, queue_timeout=self._queue_timeout
        )
        if self._before() and self._closed is None:
            asyncio.get_running_loop().call_later(LOOK, self._look)


def share_out(settings: Settings, scope: Scope, *, clustered: bool = False) -> Settings:
    """Return *settings* with the share of the worker of *scope* in place of each limit that is for
    all of them.

    *clustered*: the workers share the limits of providers and keys through a server. A provider's
    `max_connections` stays as it is: its `concurrent_requests` bounds the connections in use.

    Each worker may keep one whole body, answer or log, however many workers there are: where that
    is more than its share, all together may keep more than is configured.
    """
    part = scope.share

    def memory(limit: int, least: int) -> int:
        return max(part(limit), min(limit, least))

    def chat(whole: Chat) -> Chat:
        websocket, streams = whole.websocket, whole.streams
        concurrency = replace(
            websocket.concurrency,
            max_body_bytes=memory(
                websocket.concurrency.max_body_bytes, websocket.max_message_size
            ),
            # Nothing is left to be shared out.
            uvicorn=replace(websocket.concurrency.uvicorn, workers=1),
        )
        kept = max(streams.max_stream_bytes, streams.max_response_bytes)
        streams = replace(
            streams,
            max_kept_bytes=memory(streams.max_kept_bytes, kept),
            max_detached=part(streams.max_detached),
        )
        return replace(
            whole, websocket=replace(websocket, concurrency=concurrency), streams=streams
        )

    def provider(whole: Provider) -> Provider:
        client = whole.http_client
        client = replace(
            client, max_keepalive=part(client.max_keepalive), queue_size=part(client.queue_size)
        )
        if not clustered:
            client = replace(
                client,
                concurrent_requests=part(client.concurrent_requests),
                requests_per_minute=part(client.requests_per_minute),
                tokens_per_minute=part(client.tokens_per_minute),
            )
        return replace(whole, http_client=client)

    def llm(whole: Llm) -> Llm:
        return replace(
            whole,
            providers={name: provider(settings) for name, settings in whole.providers.items()},
        )

    def key(whole: ClientKey) -> ClientKey:
        if clustered:
            return whole
        return replace(
            whole,
            max_concurrent=part(whole.max_concurrent),
            max_connections=part(whole.max_connections),
            requests_per_minute=part(whole.requests_per_minute),
        )

    def auth(whole: Auth) -> Auth:
        return replace(whole, keys=tuple(key(each) for each in whole.keys))

    return replace(
        settings,
        chat=chat(settings.chat),
        llm=llm(settings.llm),
        auth=None if settings.auth is None else auth(settings.auth),
    )

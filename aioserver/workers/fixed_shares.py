"""Fixed shares: what one worker process may use of each limit that the configuration sets for all
of them.

The shares of all workers together are the limit, and never more, but for a limit that is lower
than the number of workers: a share is at least 1. While a worker is replaced, its successor has
the same share.

Not shared out are `max_connections` and its queue, whose places move between the workers
(places.py), the `max_connections` of keys, which are counted over all workers (key_counts.py),
and, where the workers belong to a cluster, what they share through its server
(wings/cluster/limits.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioserver.config.settings import Auth, Chat, ClientKey, Llm, Provider, Settings


def share(limit: int, rank: int, workers: int) -> int:
    """Return the part of *limit* that the worker *rank* (from 0) of *workers* has: at least 1, but
    0 of 0.
    """
    if not limit:
        return 0
    return max(1, limit // workers + (rank < limit % workers))


def share_out(settings: Settings, rank: int, workers: int, *, clustered: bool = False) -> Settings:
    """Return *settings* with the share of the worker *rank* in place of each limit that is for all
    of them.

    *clustered*: the workers share the limits of providers and keys through a server. A provider's
    `max_connections` stays as it is: its `concurrent_requests` bounds the connections in use.

    Each worker may keep one whole body, answer or log, however many workers there are: where that
    is more than its share, all together may keep more than is configured.
    """

    def part(limit: int) -> int:
        return share(limit, rank, workers)

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

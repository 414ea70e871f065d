"""Fixed shares: what one worker process may use of each limit that the configuration sets for all of them.

The shares of all workers together are the limit, and never more, but for a limit that is lower than
the number of workers: a share is at least 1. While a worker is replaced, its successor has the same share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioserver.config.settings import Auth, Chat, Llm, Provider, Settings


def share(limit: int, rank: int, workers: int) -> int:
    """Return the part of *limit* that the worker *rank* (from 0) of *workers* has: at least 1, but 0 of 0."""
    if not limit:
        return 0
    return max(1, limit // workers + (rank < limit % workers))


def share_out(settings: Settings, rank: int, workers: int) -> Settings:
    """Return *settings* with the share of the worker *rank* in place of each limit that is for all of them.

    A provider's `max_connections` stays as it is: its `concurrent_requests` bounds the connections in use.
    """

    def part(limit: int) -> int:
        return share(limit, rank, workers)

    def chat(whole: Chat) -> Chat:
        concurrency = whole.websocket.concurrency
        concurrency = replace(
            concurrency,
            max_connections=part(concurrency.max_connections),
            connection_queue_size=part(concurrency.connection_queue_size),
            max_body_bytes=part(concurrency.max_body_bytes),
            # Nothing is left to be shared out.
            uvicorn=replace(concurrency.uvicorn, workers=1),
        )
        streams = replace(
            whole.streams,
            max_kept_bytes=part(whole.streams.max_kept_bytes),
            max_detached=part(whole.streams.max_detached),
        )
        return replace(
            whole, websocket=replace(whole.websocket, concurrency=concurrency), streams=streams
        )

    def provider(whole: Provider) -> Provider:
        client = whole.http_client
        client = replace(
            client,
            max_keepalive=part(client.max_keepalive),
            concurrent_requests=part(client.concurrent_requests),
            requests_per_minute=part(client.requests_per_minute),
            queue_size=part(client.queue_size),
            tokens_per_minute=part(client.tokens_per_minute),
        )
        return replace(whole, http_client=client)

    def llm(whole: Llm) -> Llm:
        return replace(
            whole,
            providers={name: provider(settings) for name, settings in whole.providers.items()},
        )

    def auth(whole: Auth) -> Auth:
        keys = tuple(
            replace(
                key,
                max_concurrent=part(key.max_concurrent),
                max_connections=part(key.max_connections),
                requests_per_minute=part(key.requests_per_minute),
            )
            for key in whole.keys
        )
        return replace(whole, keys=keys)

    return replace(
        settings,
        chat=chat(settings.chat),
        llm=llm(settings.llm),
        auth=None if settings.auth is None else auth(settings.auth),
    )

"""The fixed share of one worker among several, of the limits whose places do not move between them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioserver.config.settings import Settings


def share_of(total: int, rank: int, workers: int) -> int:
    """Return the share of the worker *rank*, counted from 0, of *total*; all shares together are *total*."""
    return total // workers + (rank < total % workers)


def shares_of(settings: Settings, rank: int, workers: int) -> Settings:
    """Return *settings* with the shares of the worker *rank* for what is kept in its memory.

    Each worker may keep one whole body, answer or log, however many workers there are: where that is more than its
    share, all together may keep more than is configured. `max_connections` and its queue stay as they are: the
    worker's gate shares them out itself.
    """
    chat = settings.chat
    streams, websocket = chat.streams, chat.websocket

    def share(total: int, least: int) -> int:
        return max(share_of(total, rank, workers), min(total, least))

    concurrency = replace(
        websocket.concurrency,
        max_body_bytes=share(websocket.concurrency.max_body_bytes, websocket.max_message_size),
    )
    streams = replace(
        streams,
        max_kept_bytes=share(
            streams.max_kept_bytes, max(streams.max_stream_bytes, streams.max_response_bytes)
        ),
        max_detached=share(streams.max_detached, 1),
    )
    websocket = replace(websocket, concurrency=concurrency)
    return replace(settings, chat=replace(chat, websocket=websocket, streams=streams))

"""The state of an answer, for a client of the SSE face that polls instead of following the stream
(`Accept: application/json`).

    {"request_id": "r1", "status": "running", "last_event_id": 17}

The status is `queued` before the answer has its place, and `running` after that. In the end it is
`complete`, `error` or `cancelled`. The text so far comes with it, unless the beginning of the log
is gone.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from aioserver.errors import ResumeGap
from aioserver.faces import whole
from aioserver.protocol import client_frames
from aioserver.protocol.steps import pause
from aioserver.streams.cursor import CollectingReader
from aioserver.streams.ending import run_all
from aioserver.streams.entries import CHUNK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.streams.entries import Entry
    from aioserver.streams.stream import Stream

# Entries that are read in one step.
STEP_ENTRIES = 512


def wanted(request: web.Request) -> bool:
    """Return whether a GET asks for the state of an answer, and not for its events."""
    accepted = request.headers.get("Accept", "")
    return "application/json" in accepted and "text/event-stream" not in accepted


async def prepare(context: Context, request: web.Request, _hold: BodyHold) -> Stream:
    """Find the stream of the answer."""
    name = client_frames.identifier(request.match_info["request_id"])
    return await context.gateway.route(request, name)


async def answer(context: Context, request: web.Request, stream: Stream) -> web.StreamResponse:
    """Answer with the state of *stream*, and write it, for as long as its client needs to read it.

    Raises:
        ServerAtCapacity: the kept bytes of all streams would exceed `max_kept_bytes`.
    """
    state: dict[str, Any] = {
        "request_id": stream.request_id,
        "status": stream.end_status.decode() or ("running" if stream.last else "queued"),
        "last_event_id": stream.last,
    }
    if stream.ended:
        with contextlib.suppress(ResumeGap):
            state["text"] = await _text(context, stream)
        if stream.error is not None:
            state["error"] = stream.error.as_chunk()
    body = orjson.dumps(state)
    response = web.Response(body=body, content_type="application/json", charset="utf-8")
    timeout, dropped = context.settings.chat.streams.send_timeout, context.admission.dropped
    with context.gateway.hold() as held:
        held.grow(len(body))
        await whole.write(request, response, timeout, dropped, "sse")
    return response


async def _text(context: Context, stream: Stream) -> str:
    """Return the text of *stream*, which has ended, in steps.

    Raises:
        ResumeGap: the beginning of the log is gone.
    """
    lifetime = context.gateway.lifetime
    stream.locate(0)
    reader = CollectingReader(stream)
    try:
        lifetime.reader_added(stream)
        await reader.reached
        return "".join([text async for text in _texts(stream, reader.entries)])
    finally:
        run_all((reader.leave, partial(lifetime.reader_removed, stream)))


async def _texts(stream: Stream, entries: Sequence[Entry]) -> AsyncIterator[str]:
    """Yield the texts in *entries* of *stream*, in steps."""
    for number, entry in enumerate(entries, 1):
        if entry.status == CHUNK:
            for frame in stream.frames(entry):
                chunk = orjson.loads(frame)["chunk"]
                if chunk.get("type") == "text":
                    yield chunk["data"]
        if not number % STEP_ENTRIES:
            await pause()

"""OpenAI's own way back into a response, from the log: SDKs resume by themselves.

A response that was asked with `store` or `background` is kept for its `resume_window`, and is found
by the id that the provider gave it; one that was not streamed only once it will not change. `starting_after` counts as the provider does, by the
`sequence_number` in its events; the log's own numbers have no part in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from aioserver.auth.callers import CALLER
from aioserver.errors import InvalidRequest, ResumeGap, StreamNotFound
from aioserver.faces import context, openai
from aioserver.protocol import eventstream
from aioserver.providers.request import Answer
from aioserver.streams.entries import COMPLETE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioserver.faces.admission import BodyHold
    from aioserver.streams.stream import Stream


async def prepare(request: web.Request, _hold: BodyHold) -> tuple[Stream, int | None]:
    """The first step of GET: which response, and behind which event; None: not as a stream."""
    stream = _find(request)
    if request.query.get("stream", "false") != "true":
        return stream, None
    if stream.details.whole is not None:
        raise InvalidRequest("this response was not streamed", param="stream")
    given = request.query.get("starting_after")
    if given is None:
        return stream, 0
    if not (given.isascii() and given.isdigit() and len(given) < 19):
        raise InvalidRequest("starting_after must be a sequence_number", param="starting_after")
    return stream, event_of(stream, int(given))


async def retrieve(request: web.Request, found: tuple[Stream, int | None]) -> web.StreamResponse:
    """The second step of GET: the events behind it, or the response as it is now."""
    stream, after = found
    if after is not None:
        return await openai.follow_stream(request, stream, after)
    return web.json_response(newest(stream), dumps=_text)


async def cancel(request: web.Request) -> web.Response:
    """`POST /v1/responses/{id}/cancel`; also when it has ended, which it then stays."""
    stream = request.app[context.GATEWAY].cancel(request[CALLER], request.match_info["id"])
    response = newest(stream)
    if stream.end_status != COMPLETE:
        response["status"] = "cancelled"
    return web.json_response(response, dumps=_text)


def event_of(stream: Stream, sequence: int) -> int:
    """The number in the log of the last event whose `sequence_number` is at most *sequence*.

    Raises:
        ResumeGap: events behind it are no longer kept, or it does not exist yet.
    """
    before: int | None = None
    for number, event in _events(stream):
        its = event.get("sequence_number")
        if not isinstance(its, int):
            continue
        if its > sequence:
            if before is None and its > sequence + 1 and stream.offset:
                raise ResumeGap(f"events behind {sequence} are no longer kept")
            return number - 1
        before = its
    if before is None or before < sequence:
        raise ResumeGap(f"event {sequence} does not exist yet")
    return stream.last


def newest(stream: Stream) -> dict[str, Any]:
    """The response object that the provider sent last.

    Raises:
        StreamNotFound: it is no longer kept, or this is no response.
    """
    found: dict[str, Any] | None = None
    if isinstance(stream.details.whole, Answer):
        found = orjson.loads(stream.details.whole.body)
    for _, event in _events(stream):
        if isinstance(event.get("response"), dict):
            found = event["response"]
    if found is None:
        raise StreamNotFound("no such response: never seen, or kept no longer")
    return found


def _find(request: web.Request) -> Stream:
    return request.app[context.GATEWAY].find(request[CALLER], request.match_info["id"])


def _events(stream: Stream) -> Iterator[tuple[int, dict[str, Any]]]:
    """The provider's events that are kept, with their numbers in the log."""
    for entry in stream.entries:
        for number, event in enumerate(eventstream.parse(entry.data), entry.first):
            try:
                said = orjson.loads(event.data)
            except orjson.JSONDecodeError:
                continue
            if isinstance(said, dict):
                yield number, said


def _text(value: object) -> str:
    return orjson.dumps(value).decode()

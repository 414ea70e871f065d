"""What one client does on each face: ask, hear the answer to its end, tell an `Attempt` of it.

On the WebSocket and SSE faces an answer is whole when its events were numbered without hole or
doubling and `complete` was the last of them; on the OpenAI face when it has a `finish_reason` and,
streamed, `[DONE]`.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import orjson
from aiohttp import WSMsgType

from aioserver.commands import remote
from aioserver.protocol.eventstream import Splitter, parse
from aioserver.protocol.openai import BadEvent, ErrorEvent, Reading

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.commands.bench.attempt import Attempt

CLOSE_TIMEOUT = 2.0  # seconds for the server to answer a close frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What every client asks. *model* and *max_tokens* None: the server's own."""

    prompt: str
    model: str | None = None
    max_tokens: int | None = None
    streamed: bool = True

    @property
    def _messages(self) -> list[dict[str, str]]:
        # not `text`: then a socket's turns would share their history, and each would be longer
        return [{"role": "user", "content": self.prompt}]

    def payload(self) -> dict[str, Any]:
        """For the WebSocket and SSE faces."""
        options = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        model = {} if self.model is None else {"model": self.model}
        return {"messages": self._messages, "streaming": True, "options": options, **model}

    def body(self) -> dict[str, Any]:
        """For the OpenAI face."""
        more = {"model": self.model, "max_tokens": self.max_tokens}
        given = {name: value for name, value in more.items() if value is not None}
        return {"messages": self._messages, "stream": self.streamed, **given}


class NotUnderstoodError(Exception):
    """The server said something that no server of ours says."""


class Client(Protocol):
    """One client. `close` it at the end, and after `ask` has raised."""

    async def ask(self, attempt: Attempt) -> None:
        """One request.

        Raises:
            aiohttp.ClientError, OSError: the connection failed.
            NotUnderstoodError, EventTooLong: the server is not understood.
        """

    async def close(self) -> None:
        """Leave."""


class WebSocketClient:
    """One socket for all requests, made with the first and after each loss."""

    def __init__(self, session: aiohttp.ClientSession, url: str, question: Question) -> None:
        self._session = session
        self._url = url
        self._payload = question.payload()
        self._ws: aiohttp.ClientWebSocketResponse | None = None

    async def ask(self, attempt: Attempt) -> None:
        """One request, on the socket that is there or on a new one."""
        if self._ws is None:
            self._ws = await self._session.ws_connect(
                self._url, max_msg_size=0, timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT)
            )
        name = uuid.uuid4().hex
        command = {"action": "chat", "request_id": name, "payload": self._payload}
        await self._ws.send_str(orjson.dumps(command).decode())
        while not attempt.ended:
            message = await self._ws.receive()
            if message.type is not WSMsgType.TEXT:
                attempt.lost("closed", f"close code {self._ws.close_code}")
                await self.close()
                return
            frame = frame_of(message.data)
            owner = frame.get("request_id")
            if owner not in {name, None}:
                attempt.spoil("foreign_frame")
                continue
            hear(attempt, frame, frame.get("event_id"))
            if attempt.ended and owner is None:
                await self.close()  # it was about the whole socket: a close frame follows

    async def close(self) -> None:
        """Close the socket."""
        ws, self._ws = self._ws, None
        if ws is not None:
            await ws.close()


class SseClient:
    """A POST for each request."""

    def __init__(self, session: aiohttp.ClientSession, url: str, question: Question) -> None:
        self._session = session
        self._url = url
        self._payload = question.payload()

    async def ask(self, attempt: Attempt) -> None:
        """One request."""
        body = {"request_id": uuid.uuid4().hex, **self._payload}
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                attempt.error(await remote.told(response))
                return
            splitter = Splitter()
            async for data in response.content.iter_any():
                for event in parse(splitter.feed(data)):
                    hear(attempt, frame_of(event.data), number_of(event.id))

    async def close(self) -> None:
        """Nothing is kept between two requests."""


class OpenAiClient:
    """A POST for each request, as the SDKs do it."""

    def __init__(self, session: aiohttp.ClientSession, url: str, question: Question) -> None:
        self._session = session
        self._url = f"{url}/chat/completions"
        self._body = question.body()

    async def ask(self, attempt: Attempt) -> None:
        """One request."""
        async with self._session.post(self._url, json=self._body) as response:
            if response.status != 200:
                attempt.error(await remote.told(response))
            elif self._body["stream"]:
                await self._follow(attempt, response)
            else:
                reading = Reading()
                _read(attempt, reading, await response.read())
                _finish(attempt, reading, done=True)

    async def _follow(self, attempt: Attempt, response: aiohttp.ClientResponse) -> None:
        splitter, reading = Splitter(), Reading()
        async for data in response.content.iter_any():
            for event in parse(splitter.feed(data)):
                if event.data == b"[DONE]":
                    _finish(attempt, reading, done=True)
                else:
                    attempt.event()
                    if _read(attempt, reading, event.data):
                        attempt.token()
        _finish(attempt, reading, done=False)

    async def close(self) -> None:
        """Nothing is kept between two requests."""


CLIENTS: dict[str, Callable[[aiohttp.ClientSession, str, Question], Client]] = {
    "websocket": WebSocketClient,
    "sse": SseClient,
    "openai": OpenAiClient,
}


def frame_of(data: bytes | str) -> dict[str, Any]:
    """A frame of the WebSocket and SSE faces.

    Raises:
        NotUnderstoodError: it is none.
    """
    try:
        frame = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise NotUnderstoodError("a frame that is not JSON") from None
    if (
        not isinstance(frame, dict)
        or not isinstance(frame.get("chunk"), dict)
        or not isinstance(frame.get("event_id", 0), int)
        or not isinstance(frame["chunk"].get("retry_after", 0.0), float | int)
    ):
        raise NotUnderstoodError("a frame that is not one of aioserver's")
    return frame


def number_of(given: bytes | None) -> int | None:
    """The number of an event from its `id`; None: it has none.

    Raises:
        NotUnderstoodError: an id that is no number.
    """
    if given is None:
        return None
    if not given.isdigit():
        raise NotUnderstoodError("an event whose id is no number")
    return int(given)


def hear(attempt: Attempt, frame: dict[str, Any], number: int | None) -> None:
    """One frame of the WebSocket or SSE face; *number*: the event's, None: it is no event."""
    if number is not None:
        attempt.event(number)
    chunk = frame["chunk"]
    match frame.get("status"):
        case "chunk":
            attempt.token()
        case "processing":
            attempt.served()
        case "queued":
            attempt.waits(at_the_door=frame.get("request_id") is None)
        case "complete":
            attempt.complete()
        case "error" | "busy":
            code = remote.plain(chunk.get("code") or "error")
            message = remote.plain(chunk.get("error") or "")
            attempt.error(remote.Told(code, message, chunk.get("retry_after")))
        case "cancelled":
            attempt.lost("cancelled")


def _read(attempt: Attempt, reading: Reading, data: bytes) -> bool:
    """Whether the model said something in *data*: one event, or a whole answer."""
    try:
        return bool(reading.read(data))
    except ErrorEvent:
        attempt.error(remote.told_in(orjson.loads(data), "provider_error"))
    except BadEvent as error:
        attempt.lost("not_understood", str(error))
    return False


def _finish(attempt: Attempt, reading: Reading, *, done: bool) -> None:
    if attempt.ended:
        return
    if reading.finish_reason is None:
        attempt.lost("no_finish_reason")
    elif not done:
        attempt.lost("no_done")
    else:
        attempt.complete()

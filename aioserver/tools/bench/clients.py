"""A client for each face: it sends requests, and reports their answers to an `Attempt`.

On the WebSocket and SSE faces an answer is complete when its events are numbered without a gap or
a repetition and the last of them is `complete`, and so on that of Responses over WebSocket, where the last is
`response.completed` or `response.incomplete`; on the OpenAI face when it has a `finish_reason`
and, if it is streamed, `[DONE]`; on Anthropic's when it has a `stop_reason` and, if it is streamed, `message_stop`.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import aiohttp
import orjson
from aiohttp import WSMsgType

from aioserver.client.faults import Fault, error_object
from aioserver.client.socket import fault_of
from aioserver.protocol import frames
from aioserver.protocol.eventstream import Splitter, parse
from aioserver.protocol.frames import BadFrame
from aioserver.protocol.openai import BadEvent, ErrorEvent, Reading
from aioserver.tools import remote

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.protocol.frames import Frame
    from aioserver.tools.bench.attempt import Attempt

# Seconds for the server to answer a close frame.
CLOSE_TIMEOUT = 2.0
# Tokens of an answer on Anthropic's face, where a request must say how many it takes.
DEFAULT_MAX_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The chat that every request sends. If *model* or *max_tokens* is None, the server chooses."""

    prompt: str
    model: str | None = None
    max_tokens: int | None = None
    streamed: bool = True

    @property
    def _messages(self) -> list[dict[str, str]]:
        # Not `text`: the server would keep the conversation, and each request on a socket would be
        # longer than the one before.
        return [{"role": "user", "content": self.prompt}]

    def payload(self) -> dict[str, Any]:
        """Return the payload of a request on the WebSocket and SSE faces."""
        options = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        model = {} if self.model is None else {"model": self.model}
        return {"messages": self._messages, "streaming": True, "options": options, **model}

    def body(self) -> dict[str, Any]:
        """Return the body of a request on the OpenAI face, or Anthropic's."""
        choices = {"model": self.model, "max_tokens": self.max_tokens}
        options = {name: value for name, value in choices.items() if value is not None}
        return {"messages": self._messages, "stream": self.streamed, **options}

    def creation(self) -> dict[str, Any]:
        """Return the frame of a request for a response of OpenAI's Responses API."""
        choices = {"model": self.model, "max_output_tokens": self.max_tokens}
        options = {name: value for name, value in choices.items() if value is not None}
        return {"type": "response.create", "input": self.prompt, "store": False, **options}


class Client(Protocol):
    """One client. `close` must be called at the end, and after `request` has raised."""

    async def request(self, attempt: Attempt) -> None:
        """Send one request and read its answer to the end.

        Raises:
            aiohttp.ClientError, OSError: the connection failed.
            BadFrame, EventTooLong: the answer does not follow the face's protocol.
        """

    async def close(self) -> None:
        """Close what is kept between two requests."""


class SocketClient:
    """Sends all requests on one socket, which is opened for the first one and after each loss."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._ws: aiohttp.ClientWebSocketResponse[bool] | None = None

    async def send(self, frame: dict[str, Any]) -> None:
        """Send *frame*, on the open socket or on a new one."""
        if self._ws is None:
            self._ws = await self._session.ws_connect(
                self._url,
                max_msg_size=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT),
                decode_text=False,
            )
        await self._ws.send_str(orjson.dumps(frame).decode())

    async def receive(self, attempt: Attempt) -> bytes | None:
        """Return the next message; None if there is none, so that *attempt* has failed."""
        assert self._ws is not None
        message = await self._ws.receive()
        if message.type is WSMsgType.TEXT:
            return cast("bytes", message.data)
        attempt.fail("closed", f"close code {self._ws.close_code}")
        await self.close()
        return None

    async def close(self) -> None:
        """Close the socket."""
        ws, self._ws = self._ws, None
        if ws is not None:
            await ws.close()


class WebSocketClient(SocketClient):
    """Sends chats."""

    def __init__(self, session: aiohttp.ClientSession, url: str, question: Question) -> None:
        super().__init__(session, url)
        self._payload = question.payload()

    async def request(self, attempt: Attempt) -> None:
        """Send one request and read its answer."""
        request_id = uuid.uuid4().hex
        await self.send({"action": "chat", "request_id": request_id, "payload": self._payload})
        while not attempt.ended and (data := await self.receive(attempt)) is not None:
            frame = frames.parse(data)
            if frame.request_id not in {request_id, None}:
                attempt.mark_faulty("foreign_frame")
                continue
            report_frame(attempt, frame)
            if attempt.ended and frame.request_id is None:
                # An error of the whole socket: a close frame follows.
                await self.close()


class ResponsesClient(SocketClient):
    """Sends requests of OpenAI's Responses API, as its SDKs do on a WebSocket."""

    def __init__(self, session: aiohttp.ClientSession, url: str, question: Question) -> None:
        super().__init__(session, url)
        self._creation = question.creation()

    async def request(self, attempt: Attempt) -> None:
        """Send one request and read its answer."""
        await self.send(self._creation)
        while not attempt.ended and (data := await self.receive(attempt)) is not None:
            event = parse_object(data)
            match event.get("type"):
                case "aioserver:queued":
                    attempt.queued(for_admission=False)
                case "error":
                    attempt.error(_reported(event))
                    if attempt.ended and event.get("status") == 503:
                        # The error may be one of the whole socket, and a close frame follow.
                        await self.close()
                case kind:
                    number = event.get("sequence_number")
                    attempt.event(number + 1 if isinstance(number, int) else None)
                    if kind == "response.failed":
                        attempt.error(_reported(event))
                    elif kind in {"response.completed", "response.incomplete"}:
                        attempt.complete()
                    elif isinstance(kind, str) and kind.endswith(".delta"):
                        attempt.token()


class SseClient:
    """Sends a POST for each request."""

    def __init__(self, session: aiohttp.ClientSession, url: str, question: Question) -> None:
        self._session = session
        self._url = url
        self._payload = question.payload()

    async def request(self, attempt: Attempt) -> None:
        """Send one request and read its answer."""
        body = {"request_id": uuid.uuid4().hex, **self._payload}
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                attempt.error(await remote.read_error(response))
                return
            splitter = Splitter()
            async for data in response.content.iter_any():
                for event in parse(splitter.feed(data)):
                    frame = frames.parse(event.data)
                    number = b"" if frame.event_id is None else b"%d" % frame.event_id
                    if (event.id or b"") != number:
                        raise BadFrame("an event whose id is not its number")
                    report_frame(attempt, frame)

    async def close(self) -> None:
        """Close nothing: no connection of its own is kept between two requests."""


class OpenAiClient:
    """Sends a POST for each request, as OpenAI's SDKs do."""

    def __init__(self, session: aiohttp.ClientSession, url: str, question: Question) -> None:
        self._session = session
        self._url = f"{url}/chat/completions"
        self._body = question.body()

    async def request(self, attempt: Attempt) -> None:
        """Send one request and read its answer."""
        async with self._session.post(self._url, json=self._body) as response:
            if response.status != 200:
                attempt.error(await remote.read_error(response))
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
        """Close nothing: no connection of its own is kept between two requests."""


class AnthropicClient:
    """Sends a POST for each request, as Anthropic's SDKs do."""

    def __init__(self, session: aiohttp.ClientSession, url: str, question: Question) -> None:
        self._session = session
        self._url = f"{url}/messages"
        self._body = {"max_tokens": DEFAULT_MAX_TOKENS, **question.body()}

    async def request(self, attempt: Attempt) -> None:
        """Send one request and read its answer."""
        async with self._session.post(self._url, json=self._body) as response:
            if response.status != 200:
                attempt.error(await remote.read_error(response))
            elif self._body["stream"]:
                await self._follow(attempt, response)
            else:
                answer = parse_object(await response.read())
                _stop(attempt, answer.get("stop_reason"))

    async def _follow(self, attempt: Attempt, response: aiohttp.ClientResponse) -> None:
        splitter, reason = Splitter(), None
        async for data in response.content.iter_any():
            for event in parse(splitter.feed(data)):
                content = parse_object(event.data)
                match content.get("type"):
                    case "ping":
                        continue
                    case "error":
                        attempt.error(_reported(content))
                    case "message_stop":
                        _stop(attempt, reason)
                    case kind:
                        attempt.event()
                        if kind == "content_block_delta":
                            attempt.token()
                        elif kind == "message_delta":
                            delta = content.get("delta")
                            reason = isinstance(delta, dict) and delta.get("stop_reason")
        if not attempt.ended:
            attempt.fail("no_message_stop")

    async def close(self) -> None:
        """Close nothing: no connection of its own is kept between two requests."""


CLIENTS: dict[str, Callable[[aiohttp.ClientSession, str, Question], Client]] = {
    "websocket": WebSocketClient,
    "sse": SseClient,
    "openai": OpenAiClient,
    "responses_ws": ResponsesClient,
    "anthropic": AnthropicClient,
}


def parse_object(data: bytes) -> dict[str, Any]:
    """Decode an event, or a whole answer, of Anthropic's face or the Responses API.

    Raises:
        BadFrame: *data* is not JSON, or no object.
    """
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise BadFrame("an event that is not JSON") from None
    if not isinstance(content, dict):
        raise BadFrame("an event that is no object")
    return content


def report_frame(attempt: Attempt, frame: Frame) -> None:
    """Report a frame of the WebSocket or SSE face."""
    if frame.event_id is not None:
        attempt.event(frame.event_id)
    match frame.status:
        case "chunk":
            attempt.token()
        case "processing":
            attempt.stop_waiting()
        case "queued":
            attempt.queued(for_admission=frame.request_id is None)
        case "complete":
            attempt.complete()
        case "error" | "busy":
            attempt.error(remote.shown(fault_of(frame)))
        case "cancelled":
            attempt.fail("cancelled")


def _read(attempt: Attempt, reading: Reading, data: bytes) -> bool:
    """Read an event or a whole answer; returns whether it has a part of the model's text."""
    try:
        return bool(reading.read(data))
    except ErrorEvent:
        code, message = error_object(data)
        attempt.error(remote.shown(Fault(code or "provider_error", message)))
    except BadEvent as error:
        attempt.fail("not_understood", str(error))
    return False


def _reported(content: dict[str, Any]) -> Fault:
    """Return the fault in an event of Anthropic's face or the Responses API that has an `error`."""
    error = content.get("error")
    fields = error if isinstance(error, dict) else {}
    code = str(fields.get("code") or fields.get("type") or "provider_error")
    headers = fields.get("headers")
    wait = headers.get("retry-after") if isinstance(headers, dict) else None
    seconds = float(wait) if isinstance(wait, str) and wait.isdigit() else None
    return remote.shown(Fault(code, str(fields.get("message") or ""), retry_after=seconds))


def _stop(attempt: Attempt, reason: object) -> None:
    """Report the end of an answer on Anthropic's face, which has this stop *reason*."""
    if attempt.ended:
        return
    if reason:
        attempt.complete()
    else:
        attempt.fail("no_stop_reason")


def _finish(attempt: Attempt, reading: Reading, *, done: bool) -> None:
    if attempt.ended:
        return
    if reading.finish_reason is None:
        attempt.fail("no_finish_reason")
    elif not done:
        attempt.fail("no_done")
    else:
        attempt.complete()

"""Clients of all faces: they send requests, and report their answers to an `Attempt`.

On the WebSocket and SSE faces an answer is complete when its events are numbered without a gap or
a repetition and the last of them is `complete`, and so on that of Responses over WebSocket, where
the last is `response.completed` or `response.incomplete`; on the OpenAI face when it has a
`finish_reason` and, if it is streamed, `[DONE]`; on Anthropic's when it has a `stop_reason` and,
if it is streamed, `message_stop`.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import aiohttp
import orjson
from aiohttp import WSMsgType

from aioserver.client.faults import Fault, error_object
from aioserver.client.socket import fault_of
from aioserver.protocol import frames
from aioserver.protocol.eventstream import ServerEvent
from aioserver.protocol.frames import BadFrame
from aioserver.protocol.openai import BadEvent, ErrorEvent, Reading
from aioserver.tools import remote

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aioserver.tools.bench.attempt import Attempt

# Seconds for the server to answer a close frame.
CLOSE_TIMEOUT = 2.0
# Tokens of an answer on Anthropic's face, where a request must say how many it takes.
DEFAULT_MAX_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The chat that every request sends.

    If *model* or *max_tokens* is None, the server chooses.
    """

    prompt: str
    model: str | None = None
    max_tokens: int | None = None
    streamed: bool = True

    @property
    def _messages(self) -> list[dict[str, str]]:
        # Not `text`: the server would keep the conversation, and each request on a socket would be
        # longer than the one before.
        return [{"role": "user", "content": self.prompt}]

    def command(self, request_id: str) -> dict[str, Any]:
        """Return what asks it on the WebSocket face."""
        return {"action": "chat", "request_id": request_id, "payload": self._payload()}

    def frame(self, request_id: str) -> dict[str, Any]:
        """Return what asks it on the SSE face."""
        return {"request_id": request_id, **self._payload()}

    def body(self, _request_id: str) -> dict[str, Any]:
        """Return what asks it on the OpenAI face."""
        options = self._options("max_tokens")
        return {"messages": self._messages, "stream": self.streamed, **options}

    def message(self, request_id: str) -> dict[str, Any]:
        """Return what asks it on Anthropic's face."""
        return {"max_tokens": DEFAULT_MAX_TOKENS, **self.body(request_id)}

    def creation(self, _request_id: str) -> dict[str, Any]:
        """Return what asks it of OpenAI's Responses API."""
        options = self._options("max_output_tokens")
        return {"type": "response.create", "input": self.prompt, "store": False, **options}

    def _payload(self) -> dict[str, Any]:
        options = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        model = {} if self.model is None else {"model": self.model}
        return {"messages": self._messages, "streaming": True, "options": options, **model}

    def _options(self, limit: str) -> dict[str, Any]:
        choices = {"model": self.model, limit: self.max_tokens}
        return {name: value for name, value in choices.items() if value is not None}


# The events of a response, or the messages of a socket.
Events = AsyncGenerator[ServerEvent]


async def read_frames(attempt: Attempt, events: Events, request_id: str | None) -> None:
    """Read an answer on the WebSocket face; on the SSE face, if there is no *request_id*."""
    async for event in events:
        frame = frames.parse(event.data)
        if request_id is None:
            if (event.id or b"") != (b"" if frame.event_id is None else b"%d" % frame.event_id):
                raise BadFrame("an event whose id is not its number")
        elif frame.request_id not in {request_id, None}:
            attempt.mark_faulty("foreign_frame")
            continue
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


async def read_response(attempt: Attempt, events: Events, _request_id: str | None) -> None:
    """Read an answer of OpenAI's Responses API."""
    async for message in events:
        event = parse_object(message.data)
        match event.get("type"):
            case "aioserver:queued":
                attempt.queued(for_admission=False)
            case "error":
                attempt.error(_reported(event))
            case kind:
                number = event.get("sequence_number")
                attempt.event(number + 1 if isinstance(number, int) else None)
                if kind == "response.failed":
                    attempt.error(_reported(event))
                elif kind in {"response.completed", "response.incomplete"}:
                    attempt.complete()
                elif isinstance(kind, str) and kind.endswith(".delta"):
                    attempt.token()


async def read_completion(attempt: Attempt, events: Events, _request_id: str | None) -> None:
    """Read an answer on the OpenAI face."""
    reading = Reading()
    async for event in events:
        if event.data == b"[DONE]":
            _finish(attempt, reading.finish_reason, "no_finish_reason")
            continue
        attempt.event()
        if _speaks(attempt, reading, event.data):
            attempt.token()
    _finish(attempt, None, "no_done" if reading.finish_reason else "no_finish_reason")


def read_whole_completion(attempt: Attempt, data: bytes) -> None:
    """Read a whole answer on the OpenAI face."""
    reading = Reading()
    _speaks(attempt, reading, data)
    _finish(attempt, reading.finish_reason, "no_finish_reason")


async def read_message(attempt: Attempt, events: Events, _request_id: str | None) -> None:
    """Read an answer on Anthropic's face."""
    reason: object = None
    async for data in events:
        event = parse_object(data.data)
        match event.get("type"):
            case "ping":
                continue
            case "error":
                attempt.error(_reported(event))
            case "message_stop":
                _finish(attempt, reason, "no_stop_reason")
            case kind:
                attempt.event()
                if kind == "content_block_delta":
                    attempt.token()
                elif kind == "message_delta":
                    delta = event.get("delta")
                    reason = isinstance(delta, dict) and delta.get("stop_reason")
    _finish(attempt, None, "no_message_stop")


def read_whole_message(attempt: Attempt, data: bytes) -> None:
    """Read a whole answer on Anthropic's face."""
    _finish(attempt, parse_object(data).get("stop_reason"), "no_stop_reason")


class Face(NamedTuple):
    """A face: what is asked below its path, under a request's id, and how its answers are read."""

    ask: Callable[[Question, str], dict[str, Any]]
    read: Callable[[Attempt, Events, str | None], Coroutine[Any, Any, None]]
    path: str = ""
    # None: its answers are streamed, always.
    read_whole: Callable[[Attempt, bytes], None] | None = None
    socket: bool = False


FACES = {
    "websocket": Face(Question.command, read_frames, socket=True),
    "sse": Face(Question.frame, read_frames),
    "openai": Face(Question.body, read_completion, "/chat/completions", read_whole_completion),
    "responses_ws": Face(Question.creation, read_response, socket=True),
    "anthropic": Face(Question.message, read_message, "/messages", read_whole_message),
}


class Client:
    """One client of *face*, whose path is at *url*; it sends all requests on one socket where the
    face has sockets.

    `close` must be called at the end, and after a request that did not succeed.
    """

    def __init__(
        self, session: aiohttp.ClientSession, face: str, url: str, question: Question
    ) -> None:
        self._session = session
        self._face = FACES[face]
        self._url = url + self._face.path
        self._question = question
        self._ws: aiohttp.ClientWebSocketResponse[bool] | None = None

    async def request(self, attempt: Attempt) -> None:
        """Send one request and read its answer to the end.

        Raises:
            aiohttp.ClientError, OSError: the connection failed.
            BadFrame, EventTooLong: the answer does not follow the face's protocol.
        """
        face, request_id = self._face, uuid.uuid4().hex
        body = face.ask(self._question, request_id)
        if face.socket:
            await face.read(attempt, self._messages(attempt, body), request_id)
            return
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                attempt.error(await remote.read_error(response))
            elif self._question.streamed or face.read_whole is None:
                await face.read(attempt, remote.events(response), None)
            else:
                face.read_whole(attempt, await response.read())

    async def _messages(self, attempt: Attempt, frame: dict[str, Any]) -> Events:
        """Send *frame* on a socket, and yield what comes until *attempt* has ended."""
        if self._ws is None:
            self._ws = await self._session.ws_connect(
                self._url,
                max_msg_size=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT),
                decode_text=False,
            )
        await self._ws.send_str(orjson.dumps(frame).decode())
        while not attempt.ended:
            message = await self._ws.receive()
            if message.type is WSMsgType.TEXT:
                yield ServerEvent(cast("bytes", message.data))
            else:
                attempt.fail("closed", f"close code {self._ws.close_code}")

    async def close(self) -> None:
        """Close the socket, if there is one."""
        ws, self._ws = self._ws, None
        if ws is not None:
            await ws.close()


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


def _reported(content: dict[str, Any]) -> Fault:
    """Return the fault in an event of Anthropic's face or the Responses API that has an
    `error`.
    """
    error = content.get("error")
    fields = error if isinstance(error, dict) else {}
    code = str(fields.get("code") or fields.get("type") or "provider_error")
    headers = fields.get("headers")
    wait = headers.get("retry-after") if isinstance(headers, dict) else None
    seconds = float(wait) if isinstance(wait, str) and wait.isdigit() else None
    return remote.shown(Fault(code, str(fields.get("message") or ""), retry_after=seconds))


def _speaks(attempt: Attempt, reading: Reading, data: bytes) -> bool:
    """Read a chunk, or a whole answer; returns whether it has a part of the model's text."""
    try:
        return bool(reading.read(data))
    except ErrorEvent:
        code, message = error_object(data)
        attempt.error(remote.shown(Fault(code or "provider_error", message)))
    except BadEvent as error:
        attempt.fail("not_understood", str(error))
    return False


def _finish(attempt: Attempt, reason: object, fault: str) -> None:
    """Report the end of an answer, once: it is complete with a *reason*, else has a *fault*."""
    if attempt.ended:
        return
    if reason:
        attempt.complete()
    else:
        attempt.fail(fault)

"""Clients of all faces: they send requests, and report all that they receive to an `Attempt`.

On the WebSocket and SSE faces they use the client library, which never asks again. An answer is
complete when its events are numbered without a gap or a repetition and the last of them is
`complete`. The answers of the other APIs are read here. An answer is complete

- on Responses over WebSocket, when its events are numbered likewise and end with
  `response.completed` or `response.incomplete`;
- on the OpenAI face, when it has a `finish_reason` and, if it is streamed, `[DONE]`;
- on Anthropic's, when it has a `stop_reason` and, if it is streamed, `message_stop`.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import aiohttp
import msgspec
import orjson

from aioserver.client import AnswerError, Client, Complete, Processing, Queued
from aioserver.client.faults import refusal
from aioserver.protocol.eventstream import EventTooLong
from aioserver.tools import remote

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioserver.client.faults import Fault
    from aioserver.tools.bench.results import Attempt


# For each other API: its path, the name of its limit of tokens, and the missing part of an answer
# that has no end, or no reason for it.
PATHS = {"openai": "/chat/completions", "responses_ws": "", "anthropic": "/messages"}
LIMITS = {"openai": "max_tokens", "responses_ws": "max_output_tokens", "anthropic": "max_tokens"}
NO_END = {"openai": "no_done", "anthropic": "no_message_stop"}
NO_REASON = {"openai": "no_finish_reason", "anthropic": "no_stop_reason"}
FACES = ("websocket", "sse", *PATHS)
ENDS = {"[DONE]", "message_stop", "response.completed", "response.incomplete"}
# The reason for which an answer ends. A text of a model has its quotation marks escaped.
REASON = re.compile(rb'"(?:finish|stop)_reason":\s*"[^"]')
# Seconds for the server to answer a close frame.
CLOSE_TIMEOUT = 2.0
# Tokens of an answer on Anthropic's face, where a request must name a limit.
DEFAULT_MAX_TOKENS = 4096


class _Error(msgspec.Struct):
    code: str | int | None = None
    type: str | None = None
    message: str | None = None
    headers: dict[str, Any] = {}


class _Choice(msgspec.Struct):
    delta: dict[str, Any] | None = None


class _Event(msgspec.Struct):
    """The parts of an event, or of a whole answer, that matter here."""

    type: str = ""
    sequence_number: int | None = None
    choices: list[_Choice] | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode


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
    def messages(self) -> list[dict[str, str]]:
        """The messages. A text alone would make the server keep the conversation."""
        return [{"role": "user", "content": self.prompt}]

    def body(self, face: str) -> dict[str, Any]:
        """Return the body that asks the question by the API of *face*."""
        limit = self.max_tokens or (DEFAULT_MAX_TOKENS if face == "anthropic" else None)
        choices = {"model": self.model, LIMITS[face]: limit}
        chosen = {name: value for name, value in choices.items() if value is not None}
        if face == "responses_ws":
            return {"type": "response.create", "input": self.prompt, "store": False, **chosen}
        return {"messages": self.messages, "stream": self.streamed, **chosen}


class FaceClient:
    """One client of *face*, whose path is *path* at *url*. It sends all requests on one socket if
    the face has sockets.

    `close` must be called at the end.
    """

    def __init__(
        self, session: aiohttp.ClientSession, face: str, url: str, path: str, question: Question
    ) -> None:
        self._session = session
        self._face = face
        self._url, self._path = url, path
        self._question = question
        self._client: Client | None = None
        self._ws: aiohttp.ClientWebSocketResponse[bool] | None = None

    async def request(self, attempt: Attempt, seconds: float) -> AnswerError | None:
        """Send one request, read its answer to the end within *seconds*, and count it. Return why
        it was not complete; None if it was.
        """
        try:
            async with asyncio.timeout(seconds):
                await (self._ask(attempt) if self._face in PATHS else self._chat(attempt))
        except AnswerError as error:
            failure = error
        except (aiohttp.ClientError, OSError) as error:
            failure = AnswerError("connect_error", remote.describe(error))
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
                failure = AnswerError("timeout", f"no end within {seconds:g} s")
        except (EventTooLong, msgspec.DecodeError) as error:
            failure = AnswerError("not_understood", str(error))
        else:
            attempt.complete()
            return None
        attempt.fail(failure)
        await self.close()
        return failure

    async def close(self) -> None:
        """Close the socket, if there is one."""
        client, self._client = self._client, None
        ws, self._ws = self._ws, None
        if client is not None:
            await client.close()
        if ws is not None:
            await ws.close()

    async def _chat(self, attempt: Attempt) -> None:
        """Ask by the client library."""
        question, limit = self._question, self._question.max_tokens
        if self._client is None:
            self._client = Client(
                self._url,
                transport=cast('Literal["websocket", "sse"]', self._face),
                endpoint=self._path,
                deadline=None,
                retry=False,
                session=self._session,
            )
        answer = self._client.chat(
            question.messages,
            model=question.model,
            options=None if limit is None else {"max_tokens": limit},
            streaming=True,
        )
        async with answer:
            async for event in answer.events():
                match event:
                    case Queued(admission=admission):
                        attempt.queued(admission=admission)
                    case Processing():
                        attempt.stop_waiting()
                        attempt.event()
                    case _:
                        attempt.event(token=not isinstance(event, Complete))

    async def _ask(self, attempt: Attempt) -> None:
        """Ask by the API of the face."""
        url = self._url + self._path + PATHS[self._face]
        body = self._question.body(self._face)
        if self._face == "responses_ws":
            await self._read(attempt, self._messages(url, body))
            return
        async with self._session.post(url, json=body) as response:
            if response.status != 200:
                raise _failure(await remote.read_error(response))
            if self._question.streamed:
                await self._read(attempt, (event.data async for event in remote.events(response)))
            else:
                _decode(data := await response.read())
                if not REASON.search(data):
                    raise AnswerError(NO_REASON[self._face], "")

    async def _messages(self, url: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """Send *body* on a socket, and yield the messages of the answer."""
        if self._ws is None:
            try:
                self._ws = await self._session.ws_connect(
                    url,
                    max_msg_size=0,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT),
                    decode_text=False,
                )
            except aiohttp.WSServerHandshakeError as error:
                raise _failure(refusal(error.status, error.headers or {}, b"")[0]) from None
        await self._ws.send_str(orjson.dumps(body).decode())
        while (message := await self._ws.receive()).type is aiohttp.WSMsgType.TEXT:
            yield cast("bytes", message.data)
        raise AnswerError("closed", f"close code {self._ws.close_code}")

    async def _read(self, attempt: Attempt, events: AsyncIterator[bytes]) -> None:
        """Read an answer; each of *events* is a JSON object, or `[DONE]`."""
        ended, reason, last = False, False, -1
        async for data in events:
            event = _Event("[DONE]") if data == b"[DONE]" else _decode(data)
            if event.type == "ping":
                continue
            if event.type == "aioserver:queued":
                attempt.queued()
                continue
            if event.error or event.type in {"error", "response.failed"}:
                raise _reported(event.error or _Error())
            if ended:
                raise AnswerError("events_after_the_end", "")
            number = last + 1 if event.sequence_number is None else event.sequence_number
            if number != last + 1:
                raise AnswerError("events_missing", f"event {number} came after event {last}")
            last = number
            attempt.event(token=_speaks(event))
            ended, reason = event.type in ENDS, reason or bool(REASON.search(data))
            if ended and self._face == "responses_ws":
                return
        if not (ended and reason):
            raise AnswerError((NO_REASON if ended else NO_END)[self._face], "")


def _speaks(event: _Event) -> bool:
    """Return whether an event has a part of the model's answer."""
    delta = event.choices[0].delta if event.choices else None
    content = any(value for name, value in (delta or {}).items() if name != "role")
    return content or event.type.endswith(("block_delta", ".delta"))


def _reported(error: _Error) -> AnswerError:
    code, wait = (
        error.code or error.type or "provider_error",
        str(error.headers.get("retry-after")),
    )
    retry_after = float(wait) if wait.isdecimal() else None
    return AnswerError(str(code), error.message or "", retry_after=retry_after)


def _failure(fault: Fault) -> AnswerError:
    return AnswerError(fault.code, fault.message, retry_after=fault.retry_after)

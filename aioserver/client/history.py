"""The conversations that the server keeps: listed, read and deleted.

Each call is one small HTTP request, which is safe to repeat, and is repeated until the deadline as
questions are.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from aioserver.client.credentials import UNAUTHORIZED
from aioserver.client.faults import (
    MAX_ERROR_BYTES,
    AnswerError,
    Fault,
    Reconnection,
    Retries,
    read_body,
    refusal,
    unreachable_fault,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aioserver.client.credentials import Credentials

T = TypeVar("T")

# The most conversations of one page.
PAGE = 200
# The most bytes of one answer: the server sends up to 4 MiB of text, and JSON may need six bytes
# for one.
MAX_BYTES = 1 << 26
# Seconds for one request.
REQUEST_TIMEOUT = 30.0

_Time = Annotated[float, msgspec.Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer, which ended at *time* (Unix seconds)."""

    question: str
    answer: str
    time: float


class Summary(msgspec.Struct, frozen=True):
    """A conversation in a list: *title* is the beginning of its oldest question, *updated* the end
    of its newest turn (Unix seconds).
    """

    id: str
    title: str = ""
    updated: _Time = 0.0
    messages: int = 0


class _Page(msgspec.Struct):
    conversations: list[Summary]
    next: str | None = None


class _Message(msgspec.Struct):
    role: str
    text: str = ""
    time: _Time = 0.0


class _Dialogue(msgspec.Struct):
    messages: list[_Message]


class History:
    """The conversations of a caller, at the server at *url*."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        credentials: Credentials,
        deadline: float | None,
    ) -> None:
        self._session = session
        self._url = f"{url}/conversations"
        self._credentials = credentials
        self._deadline = deadline

    async def listing(self, most: int) -> list[Summary]:
        """Return the *most* conversations that were used last, the newest first."""
        summaries: list[Summary] = []
        before: str | None = None
        while len(summaries) < most:
            query = {"limit": str(min(PAGE, most - len(summaries)))}
            if before is not None:
                query["before"] = before
            body = await self._request("GET", URL(self._url).with_query(query))
            page = _decode(body, _Page)
            summaries += page.conversations
            if page.next is None or not page.conversations:
                break
            before = page.next
        return summaries

    async def turns(self, conversation_id: str) -> list[Turn]:
        """Return the kept turns of a conversation, the oldest first."""
        body = await self._request("GET", self._address(conversation_id))
        return [*_turns(_decode(body, _Dialogue).messages)]

    async def delete(self, conversation_id: str) -> None:
        """Delete a conversation."""
        await self._request("DELETE", self._address(conversation_id))

    def _address(self, conversation_id: str) -> URL:
        return URL(f"{self._url}/{quote(conversation_id, safe='')}", encoded=True)

    async def _request(self, method: str, url: URL) -> bytes:
        """Return the body of the answer, after as many attempts as it takes.

        Raises:
            AnswerError: there is none.
        """
        loop = asyncio.get_running_loop()
        until = None if self._deadline is None else loop.time() + self._deadline
        retries, reconnection = Retries(random.random), Reconnection(random.random)
        while True:
            try:
                async with asyncio.timeout_at(until), asyncio.timeout(REQUEST_TIMEOUT):
                    status, body, headers = await self._once(method, url)
                    if status == UNAUTHORIZED and self._credentials.renewable:
                        status, body, headers = await self._once(method, url)
            except (OSError, aiohttp.ClientError) as error:
                fault = unreachable_fault(self._url, error)
                wait: float | None = reconnection.after_loss()
                if reconnection.hopeless:
                    wait = None
            else:
                if status in {200, 204}:
                    return body
                fault, final = refusal(status, headers, body)
                wait = None if final else retries.after_refusal(fault)
                if fault.code == "connect_error":
                    wait = reconnection.after_loss(None, fault.retry_after)
                reconnection.reached = True
            if wait is None or (until is not None and loop.time() + wait >= until):
                raise _error(fault)
            await asyncio.sleep(wait)

    async def _once(self, method: str, url: URL) -> tuple[int, bytes, Mapping[str, str]]:
        async with self._session.request(
            method,
            url,
            headers=await self._credentials.headers(),
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT),
        ) as response:
            limit = MAX_BYTES if response.status == 200 else MAX_ERROR_BYTES
            body = await read_body(response, limit)
            if len(body) > limit:
                raise _error(Fault("protocol_error", f"an answer of more than {limit} bytes"))
            return response.status, body, response.headers


def _turns(messages: list[_Message]) -> Iterator[Turn]:
    """Join each question with the answer that follows it."""
    question = ""
    for message in messages:
        if message.role == "user":
            question = message.text
        elif message.role == "assistant":
            yield Turn(question, message.text, message.time)
            question = ""


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _error(Fault("protocol_error", f"no answer of an aioserver: {error}")) from None


def _error(fault: Fault) -> AnswerError:
    return AnswerError(
        fault.code, fault.message, retryable=fault.retryable, retry_after=fault.retry_after
    )

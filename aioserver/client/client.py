"""The client: chat with an aioserver."""

from __future__ import annotations

import math
import uuid
from typing import TYPE_CHECKING, Any, Literal, Self

import aiohttp
from yarl import URL

from aioserver.client.answer import Answer
from aioserver.client.credentials import Credentials
from aioserver.client.event_source import NOT_CONNECTED, EventSourceTransport
from aioserver.client.faults import AnswerError, describe
from aioserver.client.history import PAGE, History, Summary, Turn
from aioserver.client.socket import SocketTransport
from aioserver.client.transport import MAX_ID_CHARACTERS, make_question

if TYPE_CHECKING:
    from aioserver.client.credentials import Key
    from aioserver.client.transport import Transport

# Seconds for DNS, TCP and TLS together.
CONNECT_TIMEOUT = 10.0
# The longest deadline that is sent to the server, in seconds: the server accepts no longer ones
# (protocol/request_headers.py).
MAX_TERM = 86_400.0
NOT_FOUND = "conversation_not_found"
SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}


class Client:
    """A client of one server, for any number of answers at once.

        async with Client("http://127.0.0.1:8000") as client:
            async for piece in client.chat("Hello"):
                print(piece, end="")

    *url* is the server's, with the path of a proxy that leads to it, if there is one. *key* is a
    client key, for a server that wants one, or a function, async or not, that returns a key or a
    token. The function is called at each connect, and again when the server refuses its result.
    *transport* is `websocket`, where answers share sockets, or `sse`, where each has an HTTP
    response. *endpoint* is the path of that face, if it is not the one of the shipped
    configuration. *deadline* is the seconds that an answer may take, waits and reconnections
    included; None: no deadline. *retry*: whether the library repeats or resumes an answer after
    temporary faults. *session* is an aiohttp session to use, for a proxy or a certificate
    authority of your own; it is not closed. A client is made and used in one event loop; a task
    that uses it must not outlive it.

    Raises:
        ValueError: *url* is not that of a server, or *transport* is unknown.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        key: Key = None,
        transport: Literal["websocket", "sse"] = "websocket",
        endpoint: str | None = None,
        deadline: float | None = 300.0,
        retry: bool = True,
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        if transport not in {"websocket", "sse"}:
            raise ValueError(f"transport must be websocket or sse, not {transport}")
        self.url = base_url(url)
        self._credentials = Credentials(key)
        self._transport_name = transport
        self._endpoint = endpoint or {"websocket": "/ws/chat", "sse": "/sse/chat"}[transport]
        self._deadline = _checked(deadline)
        self._retry = retry
        self._session = session
        self._owned = session is None
        self._transport: Transport | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel the answers that run, and close all connections. A second call does nothing."""
        self._closed = True
        transport, self._transport = self._transport, None
        try:
            if transport is not None:
                await transport.close()
        finally:
            if self._owned and self._session is not None:
                session, self._session = self._session, None
                await session.close()

    def chat(
        self,
        content: str | list[dict[str, Any]],
        *,
        conversation_id: str | None = None,
        provider: str | None = None,
        model: str | None = None,
        options: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        metadata: dict[str, Any] | None = None,
        streaming: bool | None = None,
        deadline: float | None = None,
        start_within: float | None = None,
        batch: bool = False,
        request_id: str | None = None,
        last_event_id: int | None = None,
    ) -> Answer:
        """Return the answer to a question, which is sent when the answer is read.

        *content* is the user's text, in front of which the server puts the earlier turns of
        *conversation_id* (absent: a new conversation), or OpenAI's list of messages, which is sent
        as it is. *options* are further fields of OpenAI's request, such as `temperature`.
        *deadline* replaces that of the client for this answer; the server knows it, too, and ends
        the answer then. *start_within*: seconds, counted by the server, after which it does not
        begin the answer any more. *batch*: the answer may wait for spare capacity. *request_id*:
        the same id is the same answer, paid for once (absent: a new one). *last_event_id*: resume
        the answer to *request_id* after this event, whose *number* an earlier program has kept;
        nothing is asked again.

        Raises:
            ValueError: an argument can be no part of a question.
            RuntimeError: the client is closed.
        """
        if last_event_id is not None and (request_id is None or last_event_id < 0):
            raise ValueError("last_event_id is the number of an event of the answer to request_id")
        if isinstance(content, str) and conversation_id is None:
            # Not the conversation of the socket, which other answers share and which ends with the
            # socket. The same question under the same id has the same bytes.
            conversation_id = (
                uuid.uuid4().hex
                if request_id is None
                else f"request:{request_id}"[-MAX_ID_CHARACTERS:]
            )
        question = make_question(
            content,
            request_id=request_id,
            options=options,
            tools=tools,
            conversation_id=conversation_id,
            provider=provider,
            model=model,
            metadata=metadata,
            streaming=streaming,
            start_within=_term(start_within),
            deadline=_term(deadline),
            **{"class": "batch" if batch else None},
        )
        limit = self._deadline if deadline is None else _checked(deadline)
        return Answer(self._opened(), question, limit, last_event_id, retry=self._retry)

    def conversation(self, conversation_id: str | None = None) -> Conversation:
        """Return the conversation with this id, which need not exist yet; by default a new one.

        Without a key all clients are one caller, so an id should be hard to guess: the default is
        a UUID.
        """
        return Conversation(self, conversation_id or uuid.uuid4().hex)

    async def conversations(self, most: int = PAGE) -> list[Summary]:
        """Return the *most* conversations of this key that were used last, the newest first.

        Without keys these are the conversations of this machine's address.

        Raises:
            AnswerError: they cannot be read.
        """
        return await self._history().listing(most)

    async def turns(self, conversation_id: str) -> list[Turn]:
        """Return the turns of a conversation that the server keeps, the oldest first.

        Raises:
            AnswerError: they cannot be read; `conversation_not_found`: there is no such
                conversation.
        """
        return await self._history().turns(conversation_id)

    async def delete_conversation(self, conversation_id: str) -> None:
        """Delete a conversation.

        Raises:
            AnswerError: it may not be deleted; `conversation_not_found`: there is no such
                conversation.
        """
        await self._history().delete(conversation_id)

    def _history(self) -> History:
        return History(self._opened_session(), self.url, self._credentials, self._deadline)

    def _opened_session(self) -> aiohttp.ClientSession:
        """Return the session; it is made at its first use, in the event loop."""
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                middlewares=(send_once,),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            )
        return self._session

    def _opened(self) -> Transport:
        """Return the transport; it is made with the first question."""
        session = self._opened_session()
        if self._transport is None:
            make = SocketTransport if self._transport_name == "websocket" else EventSourceTransport
            self._transport = make(session, self.url + self._endpoint, self._credentials)
        return self._transport


class Conversation:
    """Questions and answers that follow each other; the server keeps them.

        conversation = client.conversation()
        print(await conversation.chat("What is a gate?").text())
        print(await conversation.chat("And a queue?").text())

    *id*: names it at the server, also for another client of the same key.
    """

    def __init__(self, client: Client, conversation_id: str) -> None:
        self.id = conversation_id
        self._client = client

    def chat(self, content: str, **arguments: Any) -> Answer:
        """Return the answer to the next question; *arguments* are those of `Client.chat`.

        Raises:
            ValueError: an argument can be no part of a question.
        """
        return self._client.chat(content, conversation_id=self.id, **arguments)

    async def turns(self) -> list[Turn]:
        """Return the turns that the server keeps, the oldest first; none before the first turn has
        ended.

        Raises:
            AnswerError: they cannot be read.
        """
        try:
            return await self._client.turns(self.id)
        except AnswerError as error:
            if error.code == NOT_FOUND:
                return []
            raise

    async def delete(self) -> None:
        """Delete the conversation at the server; of no effect if nothing is kept.

        Raises:
            AnswerError: it may not be deleted.
        """
        try:
            await self._client.delete_conversation(self.id)
        except AnswerError as error:
            if error.code != NOT_FOUND:
                raise


async def send_once(
    request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Send *request* once. aiohttp must not repeat a GET whose connection the server has closed
    without an answer: the transport decides when to come back.

    Raises:
        aiohttp.ClientError: there is no response.
    """
    try:
        return await send(request)
    except NOT_CONNECTED:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        if request.method != "GET":
            raise
        # aiohttp repeats after an error of these two classes alone.
        raise aiohttp.ClientConnectionError(describe(error)) from error


def base_url(text: str) -> str:
    """Return the base URL in *text*, without a slash at its end; `http://` may be left out.

    Raises:
        ValueError: *text* is not the URL of a server, or has a key in it.
    """
    url = URL(text if "://" in text else f"http://{text}")
    if url.user is not None:
        raise ValueError("pass the key as an argument, not in the URL")
    labels = (url.raw_host or "").removesuffix(".").split(".")
    # A longer label is no host name (RFC 1035, 2.3.4), and an IPv6 address counts as one label.
    if url.scheme not in SCHEMES or not all(0 < len(label) < 64 for label in labels):
        raise ValueError(f"{text!r} is not the URL of a server, such as http://127.0.0.1:8000")
    url = url.with_scheme(SCHEMES[url.scheme]).with_query(None).with_fragment(None)
    return str(url).rstrip("/")


def _checked(deadline: float | None) -> float | None:
    if deadline is None or deadline == math.inf:
        return None
    if not deadline > 0:
        raise ValueError(f"a deadline of {deadline} s: a positive number is expected")
    return float(deadline)


def _term(seconds: float | None) -> float | None:
    """Return a deadline of *seconds* as it is sent to the server; None if it is not sent."""
    checked = _checked(seconds)
    if checked is None or checked > MAX_TERM:
        return None
    # The server accepts no exponent.
    return max(0.001, round(checked, 3))

"""The peer listener: where other instances ask this one, and pass requests on.

A connection without the secret of all instances gets no byte. A question with the secret may name
any caller, since the asking instance has authenticated that caller. No question leads to a
provider. A request that is passed on comes with its client's own credentials, and is checked as
any other one. An answer that exists is read for a WebSocket of another instance, too
(peer_reader.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from hmac import compare_digest
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.auth.callers import Caller, Peer
from aioserver.errors import StreamNotFound
from aioserver.gateway.contracts.timeouts import Timer
from aioserver.wings.cluster.answers.greeting import (
    GREETING_TIMEOUT,
    MAX_ANSWER,
    MAX_GREETING,
    Cancel,
    Follow,
    Forget,
    Forward,
    Listing,
    Look,
    decode,
    framed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.gateway.gateway import Gateway
    from aioserver.wings.cluster.answers.greeting import Greeting, Question
    from aioserver.wings.cluster.answers.peer_network import PeerNetwork

logger = logging.getLogger("aioserver.cluster")

# How many connections may be open beyond those that pass requests on; one more ends the oldest that
# has not greeted. Other instances may connect all at once, and greet a moment later.
MAX_OTHERS = 64
# Streams in one list.
MAX_LISTED = 1_000


class PeerListener:
    """Answers the questions of other instances, which come by *network*.

    Always: a connection that has not greeted is at most GREETING_TIMEOUT old, not counting the
    time by which our own event loop was late. While there are any, at most `most()` + MAX_OTHERS
    connections are open.

    *secret* returns what all instances know; nobody knows an empty one. *look* returns a page for
    another instance, and *refused* is called for each connection without the secret. *follow*
    returns the protocol that writes an answer. *most* returns how many connections may be open to
    pass a request on.
    """

    def __init__(
        self,
        gateway: Gateway,
        network: PeerNetwork,
        secret: Callable[[], bytes],
        look: Callable[[str], bytes],
        refused: Callable[[], object],
        follow: Callable[[Follow], asyncio.Protocol],
        most: Callable[[], int],
    ) -> None:
        self._follow, self._most = follow, most
        self._gateway, self._network, self._look = gateway, network, look
        self._secret, self._refused = secret, refused
        # Returns the protocol that serves a request.
        self.accept: Callable[[Peer], asyncio.Protocol] | None = None
        # The connections that have not greeted, the oldest first, each with the timer that ends it.
        self._unknown: dict[PeerConnection, Timer] = {}
        self._open: set[PeerConnection] = set()
        # Set once nothing is served any more, while that is awaited.
        self._finished: asyncio.Event | None = None

    @property
    def serving(self) -> int:
        """How many requests of other instances are served."""
        return sum(connection.serving for connection in self._open)

    async def open(self) -> None:
        """Listen."""
        await self._network.listen(lambda: PeerConnection(self))

    async def finish(self, seconds: float) -> None:
        """Wait until no request of another instance is served, *seconds* at most."""
        if self.serving:
            self._finished = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._finished.wait()

    def close(self) -> None:
        """Listen no more, and end what is open."""
        self._network.close()
        for connection in tuple(self._open):
            connection.abort()

    def connected(self, connection: PeerConnection) -> None:
        """Note a *connection* that has yet to greet."""
        self._open.add(connection)
        if self._unknown and len(self._open) > self._most() + MAX_OTHERS:
            self.refuse(next(iter(self._unknown)))
        self._unknown[connection] = Timer(GREETING_TIMEOUT, partial(self.refuse, connection))

    def lost(self, connection: PeerConnection) -> None:
        """Forget *connection*."""
        self._open.discard(connection)
        if (timer := self._unknown.pop(connection, None)) is not None:
            timer.cancel()
        if self._finished is not None and not self.serving:
            self._finished.set()

    def refuse(self, connection: PeerConnection) -> None:
        """End *connection*, which does not know the secret."""
        self.lost(connection)
        connection.abort()
        self._refused()

    def greeted(
        self, connection: PeerConnection, greeting: Greeting | None
    ) -> bytes | asyncio.Protocol | None:
        """Return the answer to *greeting*, which *connection* has brought, or the protocol of the
        bytes behind it; None: the connection was refused.
        """
        secret = self._secret()
        if greeting is None or not secret or not compare_digest(greeting.secret, secret):
            self.refuse(connection)
            return None
        self._unknown.pop(connection).cancel()
        if isinstance(word := greeting.word, Follow | Forward):
            if self.accept is None or len(self._open) - len(self._unknown) > self._most():
                connection.abort()
                return None
            if isinstance(word, Follow):
                return self._follow(word)
            return self.accept(Peer(word.address, word.secure))
        try:
            answer = self._answer(word)
        except Exception:
            logger.exception("bug in a question of another instance")
            answer = b""
        return answer if len(answer) <= MAX_ANSWER else b""

    def _answer(self, question: Question) -> bytes:
        answer: Any
        match question:
            case Look():
                return self._look(question.what)
            case Listing():
                caller = Caller(question.caller, question.subflow)
                streams = tuple(self._gateway.streams_of(caller))[-MAX_LISTED:]
                answer = [stream.describe() for stream in streams]
            case Cancel():
                try:
                    self._gateway.cancel(Caller(question.caller), question.request_id)
                    answer = True
                except StreamNotFound:
                    answer = False
            case Forget():
                answer = self._gateway.forget(Caller(question.caller), question.response_id)
        return msgspec.msgpack.encode(answer)


class PeerConnection(asyncio.Protocol):
    """A connection of another instance to *listener*. It ends behind the answer to its question,
    or with the protocol that follows the greeting.
    """

    def __init__(self, listener: PeerListener) -> None:
        self._listener = listener
        # The protocol that gets all bytes behind the greeting.
        self._serving: asyncio.Protocol | None = None
        self._line = b""
        self._transport: asyncio.Transport | None = None

    @property
    def serving(self) -> bool:
        """Whether a request is served."""
        return self._serving is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the greeting."""
        # uvloop's transports are no instances of it.
        self._transport = transport  # type: ignore[assignment]
        self._listener.connected(self)

    def data_received(self, data: bytes) -> None:
        """Take in the greeting, and answer it."""
        if self._serving is not None:
            self._serving.data_received(data)
            return
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        line, end, rest = (self._line + data).partition(b"\n")
        self._line = line
        if len(line) > MAX_GREETING:
            self._listener.refuse(self)
        elif end:
            answer = self._listener.greeted(self, decode(line))
            if isinstance(answer, bytes):
                transport.write(framed(answer))
                transport.close()
            elif answer is not None:
                self._serving = answer
                answer.connection_made(transport)
                if rest:
                    answer.data_received(rest)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self._listener.lost(self)
        self._transport = None
        if self._serving is not None:
            self._serving.connection_lost(exc)

    def eof_received(self) -> bool | None:
        """Let the connection close, unless what follows the greeting wants more."""
        return None if self._serving is None else self._serving.eof_received()

    def pause_writing(self) -> None:
        """Note that the other instance does not read."""
        if self._serving is not None:
            self._serving.pause_writing()

    def resume_writing(self) -> None:
        """Note that the other instance reads again."""
        if self._serving is not None:
            self._serving.resume_writing()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

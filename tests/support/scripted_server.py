"""A server that says what a test tells it to, for the client library: aioserver itself is not odd
enough.

It plays the next script for each WebSocket (*sockets*), for each HTTP request (*responses*), or
for each question and each `resume` on either (*answers*). The last script is played again and
again.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import orjson
from aiohttp import WSMsgType, web

from aioserver.protocol import eventstream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    SocketScript = Callable[["SocketPeer"], Awaitable[None]]
    ResponseScript = Callable[["ResponsePeer"], Awaitable[web.StreamResponse | None]]
    AnswerScript = Callable[["SocketPeer | ResponsePeer", dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Refusal:
    """A handshake that is refused, in place of a script for a socket."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)


def frame(
    request_id: str | None, status: str, number: int | None = None, /, **chunk: Any
) -> dict[str, Any]:
    """A frame; without a *number* it is no event."""
    numbered = {} if number is None else {"event_id": number}
    return {"request_id": request_id, **numbered, "status": status, "chunk": chunk}


def answer(request_id: str, *words: str, after: int = 0) -> list[dict[str, Any]]:
    """The events of a whole answer that says *words*, without the first *after*."""
    metadata = {"provider": "p", "model": "m", "conversation_id": "c"}
    frames = [
        frame(request_id, "processing", 1, metadata=metadata),
        *(
            frame(request_id, "chunk", number, type="text", data=word, metadata={})
            for number, word in enumerate(words, 2)
        ),
        frame(request_id, "complete", len(words) + 2, metadata={"finish_reason": "stop"}),
    ]
    return frames[after:]


def saying(*frames: dict[str, Any], cut: bool = False) -> AnswerScript:
    """A script for an answer: *frames*, under the id of the question; then the connection is cut,
    if *cut*.

    Of a `resume` only what is left is said.
    """

    async def play(peer: SocketPeer | ResponsePeer, command: dict[str, Any]) -> None:
        after = command.get("payload", {}).get("last_event_id", 0)
        for frame in frames:
            if frame.get("event_id", after + 1) > after:
                await peer.send({**frame, "request_id": command["request_id"]})
        if cut:
            peer.cut()

    return play


class SocketPeer:
    """One WebSocket as the server sees it."""

    def __init__(
        self, request: web.Request, ws: web.WebSocketResponse, seen: list[dict[str, Any]]
    ) -> None:
        self.ws = ws
        self._request = request
        self._seen = seen

    async def command(self, *, pong: bool = True) -> dict[str, Any]:
        """Read the next command; a ping is answered, and is none.

        Raises:
            ConnectionError: the client has closed the socket.
        """
        while True:
            message = await self.ws.receive()
            if message.type is not WSMsgType.TEXT:
                raise ConnectionError("closed")
            command: dict[str, Any] = orjson.loads(message.data)
            if command["action"] != "ping":
                self._seen.append(command)
                return command
            if pong:
                await self.send(frame(command.get("request_id"), "pong"))

    async def send(self, *frames: dict[str, Any]) -> None:
        for frame in frames:
            await self.ws.send_str(orjson.dumps(frame).decode())

    async def write(self, data: bytes) -> None:
        """Write bytes that are no frame of this protocol."""
        assert self._request.transport is not None
        self._request.transport.write(data)

    def cut(self) -> None:
        """Close the connection without a word."""
        assert self._request.transport is not None
        self._request.transport.close()


class ResponsePeer:
    """One HTTP request as the server sees it."""

    def __init__(self, request: web.Request) -> None:
        self.request = request
        self.response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})

    async def send(self, *frames: dict[str, Any]) -> None:
        for frame in frames:
            status, number = frame["status"], frame.get("event_id")
            head = b"" if number is None else b"id: %d\n" % number
            await self.write(head + eventstream.write(orjson.dumps(frame), event=status))

    async def write(self, data: bytes) -> None:
        """Write bytes of the body."""
        if not self.response.prepared:
            await self.response.prepare(self.request)
        await self.response.write(data)

    def cut(self) -> None:
        """Close the connection without a word."""
        assert self.request.transport is not None
        self.request.transport.close()


class ScriptedServer:
    """The server: `async with ScriptedServer(sockets=[script, …]) as server`.

    `seen` has what clients asked: the commands of WebSockets; of SSE an object with `action` and
    `request_id`, too. `url` is its address.
    """

    def __init__(
        self,
        *,
        sockets: Sequence[SocketScript | Refusal] | None = None,
        responses: Sequence[ResponseScript] | None = None,
        answers: Sequence[AnswerScript] | None = None,
    ) -> None:
        self.seen: list[dict[str, Any]] = []
        # WebSockets and HTTP requests, without those that cancel.
        self.connections = 0
        self.url = ""
        self._sockets = sockets or []
        self._responses = responses or []
        self._answers = answers or []
        self._answered = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/ws/chat", self._socket)
        app.router.add_post("/sse/chat", self._response)
        app.router.add_get("/sse/chat/{request_id}", self._response)
        app.router.add_delete("/sse/chat/{request_id}", self._delete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    @property
    def actions(self) -> list[str]:
        """What clients asked, in order."""
        return [command["action"] for command in self.seen]

    async def _play(self, peer: SocketPeer | ResponsePeer, command: dict[str, Any]) -> None:
        script = self._answers[min(self._answered, len(self._answers) - 1)]
        self._answered += 1
        await script(peer, command)

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        self.connections += 1
        script: Any = None
        if self._sockets:
            script = self._sockets[min(self.connections, len(self._sockets)) - 1]
        if isinstance(script, Refusal):
            return web.Response(status=script.status, headers=script.headers)
        ws = web.WebSocketResponse(max_msg_size=0)
        await ws.prepare(request)
        peer = SocketPeer(request, ws, self.seen)
        with contextlib.suppress(ConnectionError):
            if script is not None:
                await script(peer)
            while script is None:
                command = await peer.command()
                if command["action"] != "cancel":
                    await self._play(peer, command)
        return ws

    async def _response(self, request: web.Request) -> web.StreamResponse:
        self.connections += 1
        if request.method == "POST":
            body = orjson.loads(await request.read())
            command = {"action": "chat", "request_id": body.pop("request_id"), "payload": body}
        else:
            after = {"last_event_id": int(request.headers["Last-Event-ID"])}
            name = request.match_info["request_id"]
            command = {"action": "resume", "request_id": name, "payload": after}
        self.seen.append(command)
        peer = ResponsePeer(request)
        if self._responses:
            script = self._responses[min(self.connections, len(self._responses)) - 1]
            return await script(peer) or peer.response
        with contextlib.suppress(ConnectionError):
            await self._play(peer, command)
        return peer.response

    async def _delete(self, request: web.Request) -> web.Response:
        self.seen.append({"action": "cancel", "request_id": request.match_info["request_id"]})
        return web.Response(status=204)


async def idle() -> None:
    """Wait for ever: until the other side has left."""
    await asyncio.get_running_loop().create_future()


def refusing(
    status: int, code: str, headers: dict[str, str] | None = None
) -> Callable[[Any], Awaitable[web.StreamResponse | None]]:
    """A script that answers a request with an error."""

    async def play(_peer: Any) -> web.StreamResponse | None:
        error = {"message": f"{code} happened", "type": "t", "param": None, "code": code}
        return web.json_response({"error": error}, status=status, headers=headers)

    return play

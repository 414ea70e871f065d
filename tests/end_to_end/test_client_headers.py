"""Headers of a client at the provider: those that its settings name, and the client's trace."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import CHAT, STREAMED, chat, to_end
from tests.support.keys import bearer, key_of, keys_of
from tests.support.logs import fields_of
from tests.support.raw import Raw
from tests.support.scripted_provider import DONE, EVENT_STREAM, LAST_CHUNK, ScriptedProvider, chunk
from tests.support.server import provider_entry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.scripted_provider import Peer
    from tests.support.server import MakeServer, RunningServer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
FACES = ("websocket", "sse", "openai", "openai streamed", "anthropic", "anthropic streamed")
ANSWER = chunk(
    b'data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\n'
)
MESSAGE = chunk(
    b'event: message_start\ndata: {"type":"message_start"}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
WHOLE = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"Hi"}}]}'


class Listener:
    """A provider that keeps the requests it is sent."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []

    async def play(self, peer: Peer) -> None:
        while True:
            request = await peer.request()
            self.requests.append(request)
            if b'"stream":true' in request.replace(b" ", b""):
                messages = request.startswith(b"POST /v1/messages ")
                answer = MESSAGE if messages else ANSWER + chunk(DONE)
                await peer.send(EVENT_STREAM, answer + LAST_CHUNK)
            else:
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                await peer.send(head % len(WHOLE) + WHOLE)

    def headers(self, name: str) -> list[str]:
        """The values of the header *name* in the request that came last."""
        lines = self.requests[-1].partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        fields = [line.split(": ", 1) for line in lines]
        return [value for field, value in fields if field.lower() == name]


@asynccontextmanager
async def listening(*, failing: bool = False) -> AsyncIterator[tuple[Listener, str]]:
    """A provider at its base URL."""
    listener = Listener()

    async def fail(peer: Peer) -> None:
        listener.requests.append(await peer.request())
        await peer.send(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    async with ScriptedProvider(fail if failing else listener.play) as provider:
        yield listener, provider.url


def at(url: str, *pass_headers: str, **more: Any) -> dict[str, Any]:
    names = list(pass_headers)
    return {**provider_entry(url), "messages": True, "pass_headers": names, **more}


async def ask(server: RunningServer, face: str, headers: dict[str, str], name: str = "r") -> None:
    if face == "websocket":
        async with server.connect(headers=headers) as ws:
            await ws.send_json(chat(name))
            assert (await to_end(ws))[-1]["status"] == "complete"
        return
    path = "messages" if face.startswith("anthropic") else "chat/completions"
    url = server.sse if face == "sse" else f"{server.v1}/{path}"
    body = {"request_id": name, **CHAT} if face == "sse" else CHAT
    async with server.session.post(
        url, json=STREAMED if face.endswith("streamed") else body, headers=headers
    ) as response:
        assert response.status == 200, await response.text()
        await response.read()


@pytest.mark.parametrize("face", FACES)
async def test_a_provider_gets_the_headers_that_it_names_and_the_trace(
    make_server: MakeServer, face: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening() as (listener, url):
        server = await make_server(
            **{
                "llm.providers.own": at(url, "X-Tenant"),
                "llm.active": "own",
                "logging.level": "INFO",
            },
            **keys_of("web"),
        )
        caplog.set_level(logging.INFO)
        headers = {
            "x-tenant": "t1",
            "x-other": "o",
            "X-Forwarded-For": "9.9.9.9",
            "x-api-key": key_of("web"),
            "traceparent": PARENT,
            "tracestate": "a=b",
            "Cookie": "c=d",
            **bearer("web"),
        }
        await ask(server, face, headers)
        await server.nothing_held()

    assert listener.headers("x-tenant") == ["t1"]
    assert listener.headers("traceparent") == [PARENT]
    assert listener.headers("tracestate") == ["a=b"]
    for name in ("x-other", "x-forwarded-for", "cookie", "x-api-key", "authorization"):
        assert listener.headers(name) == [], name
    assert len(listener.headers("host")) == len(listener.headers("content-length")) == 1
    [fields] = fields_of(caplog)
    assert fields["trace_id"] == TRACE


@pytest.mark.parametrize("face", ["websocket", "openai"])
async def test_without_a_trace_none_is_made_up(
    make_server: MakeServer, face: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening() as (listener, url):
        server = await make_server(
            **{"llm.providers.own": at(url), "llm.active": "own", "logging.level": "INFO"}
        )
        caplog.set_level(logging.INFO)
        await ask(
            server, face, {"traceparent": f"{PARENT}0", "tracestate": "a=b", "x-tenant": "t"}
        )
        await server.nothing_held()

    for name in ("traceparent", "tracestate", "x-tenant"):
        assert listener.headers(name) == []
    [fields] = fields_of(caplog)
    assert "trace_id" not in fields


async def test_the_clients_user_agent_replaces_ours(make_server: MakeServer) -> None:
    async with listening() as (listener, url):
        server = await make_server(
            **{"llm.providers.own": at(url, "user-agent"), "llm.active": "own"}
        )
        await ask(server, "openai", {"User-Agent": "theirs"})
        assert listener.headers("user-agent") == ["theirs"]


async def test_each_provider_gets_its_own_headers(make_server: MakeServer) -> None:
    async with listening(failing=True) as (first, url), listening() as (second, other):
        server = await make_server(
            **{
                "llm.providers.own": at(url, "x-a"),
                "llm.providers.other": at(other, "x-b", headers={"TraceState": "ours=1"}),
                "llm.active": "own",
                "llm.fallbacks": ["other"],
            }
        )
        await ask(
            server,
            "openai",
            {"x-a": "1", "x-b": "2", "traceparent": PARENT, "tracestate": "theirs=1"},
        )

    assert (first.headers("x-a"), first.headers("x-b")) == (["1"], [])
    assert (second.headers("x-a"), second.headers("x-b")) == ([], ["2"])
    assert first.headers("tracestate") == ["theirs=1"]
    # What the settings add is never the client's.
    assert second.headers("tracestate") == ["ours=1"]
    assert second.headers("traceparent") == [PARENT]


async def test_a_reload_names_other_headers_and_keeps_the_pool(make_server: MakeServer) -> None:
    async with listening() as (listener, url):
        changes = {"llm.active": "own"}
        server = await make_server(**{"llm.providers.own": at(url, "x-a"), **changes})
        headers = {"x-a": "1", "x-b": "2"}
        await ask(server, "openai", headers)
        before = (listener.headers("x-a"), listener.headers("x-b"))
        pool = server.provider_of("own").pools.pool

        assert await server.change(**{"llm.providers.own": at(url, "x-b"), **changes})
        await ask(server, "openai", headers, "r2")

        assert server.provider_of("own").pools.pool is pool
    assert before == (["1"], [])
    assert (listener.headers("x-a"), listener.headers("x-b")) == ([], ["2"])


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (b"chat/completions", b"x-tenant", b"a\r\nX-Evil: 1"),
        (b"chat/completions", b"x-tenant", b"a\r\n\r\nGET /evil"),
        (b"chat/completions", b"x-tenant", "日".encode()),
        (b"messages", b"anthropic-beta", b"a\nX-Evil: 1"),
        (b"messages", b"anthropic-beta", b"\xe9"),
    ],
)
async def test_no_value_adds_a_header_or_a_request(
    make_server: MakeServer, path: bytes, name: bytes, value: bytes
) -> None:
    async with listening() as (listener, url):
        server = await make_server(
            **{"llm.providers.own": at(url, "x-tenant"), "llm.active": "own"}
        )
        body = b'{"messages": [{"role": "user", "content": "Hello"}]}'
        async with Raw(server) as raw:
            await raw.send(
                b"POST /v1/%b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n%b: %b\r\n\r\n%b"
                % (path, len(body), name, value, body)
            )
            await raw.to_the_end()
        await server.nothing_held()

    for request in listener.requests:
        assert b"evil" not in request.lower()
        assert request.count(b"HTTP/1.1") == 1
        if b"\n" not in value:
            assert b"\r\n%b: %b\r\n" % (name, value) in request
    assert len(listener.requests) <= 1
    assert listener.requests or b"\n" in value


async def test_headers_of_clients_at_once_are_never_mixed_up(make_server: MakeServer) -> None:
    async with listening() as (listener, url):
        server = await make_server(
            **{"llm.providers.own": at(url, "x-tenant"), "llm.active": "own"}
        )
        await asyncio.gather(
            *(
                ask(server, FACES[n % len(FACES)], {"x-tenant": f"t{n}"} if n % 3 else {}, f"r{n}")
                for n in range(24)
            )
        )

    seen = [
        line.removeprefix(b"x-tenant: ").decode()
        for request in listener.requests
        for line in request.split(b"\r\n")
        if line.startswith(b"x-tenant: ")
    ]
    assert sorted(seen) == sorted(f"t{n}" for n in range(24) if n % 3)
    assert len(listener.requests) == 24

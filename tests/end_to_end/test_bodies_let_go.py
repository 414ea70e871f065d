"""However a request ends, its body and what came of its answer are let go at once.

The collector of cycles does not run here: between two of its runs there may be gigabytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import chat
from tests.support.memory import holders, uncollected
from tests.support.raw import TEXT, Raw, masked
from tests.support.scripted_provider import (
    DONE,
    EVENT_STREAM,
    LAST_CHUNK,
    Peer,
    ScriptedProvider,
    chunk,
)
from tests.support.server import CONCURRENCY, NOWHERE, SIM_HTTP_CLIENT, provider_entry
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import MakeServer, RunningServer

SIZE = 5 << 18  # more than is read at once
QUESTION = "y" * SIZE
MESSAGES = [{"role": "user", "content": QUESTION}]
DELTA = chunk(b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n')


def answer(status: int, body: bytes, content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


LARGE = answer(200, b'{"a":"%b"}' % (b"z" * SIZE))
# The requests that fill a server stay as long as the test takes.
PATIENT = {f"{SIM_HTTP_CLIENT}.read_timeout": 120.0}
ONE = {
    **PATIENT,
    f"{SIM_HTTP_CLIENT}.concurrent_requests": 1,
    f"{SIM_HTTP_CLIENT}.queue_size": 1,
}


@dataclass(frozen=True)
class End:
    """How a request ends: by what its provider *sends* before it *closes*, or since its client
    *leaves*.

    *others*: how many requests came before, which hold places or wait for them. *unsent*: what the
    server counts once the request waits, if the provider does not see it.
    """

    sends: bytes = b""
    closes: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    leaves: bool = False
    others: int = 0
    unsent: str = ""


ENDS = {
    "answered": End(LARGE),
    "answered in events": End(EVENT_STREAM + DELTA + chunk(DONE) + LAST_CHUNK),
    "refused": End(answer(400, b'{"error":{"message":"no"}}')),
    "failed": End(answer(500, b"{}")),
    "retried": End(
        answer(500, b"{}"),
        changes={f"{SIM_HTTP_CLIENT}.max_retries": 2, f"{SIM_HTTP_CLIENT}.backoff_factor": 0.001},
    ),
    "failed over": End(
        answer(500, b"{}"),
        changes={
            "llm.fallbacks": ["other"],
            "llm.providers.other": provider_entry(NOWHERE),
        },
    ),
    "page": End(answer(200, b"<p/>", "text/html")),
    "broken off": End(LARGE[:-9], closes=True),
    "broken stream": End(EVENT_STREAM + DELTA, closes=True),
    "read timeout": End(changes={f"{SIM_HTTP_CLIENT}.read_timeout": 0.1}),
    "unreachable": End(changes={"llm.providers.sim.base_url": NOWHERE}),
    "too large": End(
        LARGE,
        changes={
            "chat.streams.max_response_bytes": SIZE // 2,
            "chat.streams.max_stream_bytes": SIZE // 2,
        },
    ),
    "no room": End(
        LARGE,
        changes={
            "chat.streams.max_kept_bytes": SIZE // 2,
            "chat.streams.max_stream_bytes": SIZE // 2,
        },
    ),
    "left": End(leaves=True),
    "left in events": End(EVENT_STREAM + DELTA, leaves=True),
    "left in the answer": End(LARGE[:-9], leaves=True),
    "left in the queue": End(changes=ONE, leaves=True, others=1, unsent="sim waiting"),
    "queue full": End(changes=ONE, others=2),
    "queue timeout": End(
        changes={**ONE, f"{SIM_HTTP_CLIENT}.queue_timeout": 0.1},
        others=1,
    ),
    "server full": End(
        changes={
            **PATIENT,
            f"{CONCURRENCY}.max_connections": 1,
            f"{CONCURRENCY}.queue_timeout": 0.1,
        },
        others=1,
    ),
}
# The path, the body and more headers of a question on each face; the WebSocket has none of them.
QUESTIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "whole": ("/v1/chat/completions", {"messages": MESSAGES}, ()),
    "last": ("/v1/chat/completions", {"messages": MESSAGES}, ("Connection: close",)),
    "streamed": ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}, ()),
    "keyed": ("/v1/chat/completions", {"messages": MESSAGES}, ("Idempotency-Key: k",)),
    "stored": ("/v1/responses", {"input": QUESTION, "store": True}, ()),
    "sse": ("/sse/chat", {"request_id": "r1", "messages": MESSAGES}, ()),
    "sse text": ("/sse/chat", {"request_id": "r2", "text": QUESTION, "streaming": False}, ()),
}


@contextlib.asynccontextmanager
async def provider(end: End, sent: asyncio.Event) -> AsyncIterator[ScriptedProvider]:
    """A provider that does as *end* says with large questions, and then sets *sent*."""

    async def play(peer: Peer) -> None:
        while True:
            if len(await peer.request()) < SIZE:
                await peer.left()
                return
            await peer.send(end.sends)
            sent.set()
            if end.closes:
                return

    async with ScriptedProvider(play) as scripted:
        yield scripted


async def ask(server: RunningServer, face: str, end: End, sent: asyncio.Event) -> None:
    """Ask, and see the end of the answer, or leave."""
    async with Raw(server) as raw:
        if face == "websocket":
            await raw.upgrade()
            await raw.send_json(chat("r3", messages=MESSAGES))
        else:
            path, body, lines = QUESTIONS[face]
            await raw.post(path, body, *lines)
        if end.unsent:
            await until(lambda: server.held()[end.unsent] == 1)
        elif end.leaves:
            await sent.wait()
        elif face == "websocket":
            while (await raw.json_frame())["status"] not in ("error", "complete"):
                pass
        else:
            await raw.answer()


@pytest.mark.parametrize("name", ENDS)
async def test_a_request_that_has_ended_leaves_nothing_large(
    make_server: MakeServer, name: str
) -> None:
    end, sent = ENDS[name], asyncio.Event()
    async with provider(end, sent) as scripted, contextlib.AsyncExitStack() as stack:
        server = await make_server(
            **{
                "llm.providers.sim.base_url": scripted.url,
                "chat.streams.resume_window": 0,
                **end.changes,
            }
        )
        for number in range(1, end.others + 1):
            raw = await stack.enter_async_context(Raw(server))
            await raw.post("/v1/chat/completions", {"messages": []})
            await until(lambda count=number: server.held()["places"] == count)  # type: ignore[misc]
        with uncollected():
            before = holders()
            for face in (*QUESTIONS, "websocket"):
                sent.clear()
                await ask(server, face, end, sent)
            await until(
                lambda: (holders() - before).total() < SIZE // 4, 3.0, lambda: holders() - before
            )


async def test_a_message_that_never_ended_is_let_go(make_server: MakeServer) -> None:
    server = await make_server()
    with uncollected():
        before = holders()
        async with Raw(server) as raw:
            await raw.upgrade()
            await raw.send(masked(TEXT, QUESTION.encode())[:-1])
            await until(lambda: server.held()["body_bytes"] == SIZE - 1)

        await until(
            lambda: (holders() - before).total() < SIZE // 4, 3.0, lambda: holders() - before
        )

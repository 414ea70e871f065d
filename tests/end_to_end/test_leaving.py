"""Leaving in every phase of a request, on every face: all is given back, and nothing is lost.

In this order: the provider's side is free, the provider's socket is closed, the client's side is
free, and then every place of the provider can be taken at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.streams.store import owner_of
from tests.support.chat import cancel, chat
from tests.support.keys import bearer, keys_of
from tests.support.raw import CLOSE, Raw
from tests.support.server import SILENT, MakeServer
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.support.server import RunningServer


PLACES = 2  # of the provider
HTTP, LIMITS = "llm.providers.sim.http_client", "chat.websocket.concurrency"
CHANGES: dict[str, Any] = {
    "chat.streams.resume_window": 0,
    f"{HTTP}.concurrent_requests": PLACES,
    **{f"{HTTP}.{name}_timeout": 60.0 for name in ("connect", "read", "write", "pool")},
}
STALLED = Behaviour(ttft=0, interval=0, tokens=10, stall_after=3)
# Bytes: more than the kernel takes for a provider that reads nothing, so that some are never sent.
BIG = 14 << 20


@dataclass(frozen=True)
class Phase:
    """The phase of a request in which its client leaves; it has come once *reached* returns
    true.
    """

    reached: Callable[[RunningServer], bool]
    behaviour: Behaviour = STALLED
    changes: dict[str, Any] = field(default_factory=dict)
    holders: int = 0  # who have what this one waits for
    pool: int = PLACES  # connections; no configuration allows fewer than there are places
    door: bool = False  # the provider is one that shakes no hands
    size: int = 1  # bytes of the question


PHASES = {
    "admission": Phase(
        lambda server: server.held()["waiting"] == 1,
        changes={f"{LIMITS}.max_connections": 1, f"{LIMITS}.queue_timeout": 60.0},
        holders=1,
    ),
    "queue": Phase(lambda server: server.held()["sim waiting"] == 1, holders=PLACES),
    "pool": Phase(lambda server: server.provider.stats().pool.waiting == 1, holders=1, pool=1),
    "connecting": Phase(lambda server: server.held()["sim busy"] == 1, door=True),
    "uploading": Phase(
        lambda server: server.simulator.stats().active == 1,
        behaviour=Behaviour(ignore_body=True),
        size=BIG,
    ),
    "first byte": Phase(lambda server: server.simulator.stats().active == 1, behaviour=SILENT),
    "mid-stream": Phase(lambda server: server.simulator.stats().tokens_sent == 3),
}


class Door:
    """A provider that accepts connections, reads, and says nothing: no TLS handshake ends."""

    def __init__(self) -> None:
        self.inside = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Door]:
        async with await asyncio.start_server(self._silence, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield self

    async def _silence(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.inside += 1
        with contextlib.suppress(ConnectionError):
            await reader.read()
        self.inside -= 1
        writer.close()


async def streamed(raw: Raw, messages: object) -> None:
    await raw.post("/v1/chat/completions", {"messages": messages, "stream": True})


async def whole(raw: Raw, messages: object) -> None:
    await raw.post("/v1/chat/completions", {"messages": messages})


async def anthropic(raw: Raw, messages: object) -> None:
    await raw.post("/v1/messages", {"messages": messages, "max_tokens": 9, "stream": True})


async def sse(raw: Raw, messages: object) -> None:
    await raw.ask_sse("r1", messages=messages)


async def websocket(raw: Raw, messages: object) -> None:
    await raw.upgrade()
    payload = {"messages": messages}
    await raw.send_json({"action": "chat", "request_id": "r1", "payload": payload})


async def goes(raw: Raw) -> None:
    raw.close()


async def closes(raw: Raw) -> None:
    await raw.send_frame(CLOSE, b"\x03\xe8")


async def cancels(raw: Raw) -> None:
    await raw.send_json(cancel("r1"))
    while (await raw.json_frame())["status"] != "cancelled":
        pass


WAYS: dict[str, tuple[Any, Any]] = {
    "openai streamed": (streamed, goes),
    "openai whole": (whole, goes),
    "messages": (anthropic, goes),
    "sse": (sse, goes),
    "websocket close": (websocket, closes),
    "websocket cancel": (websocket, cancels),
}


OTHERS = ("openai streamed", "messages", "sse", "websocket close")


def provider_side(server: RunningServer) -> dict[str, int]:
    held = server.held()
    names = ("running", "detached", "sim places", "sim waiting", "sim busy")
    return {name: held[name] for name in names}


def connected(port: int) -> int:
    """The sockets that are connected to *port* of this machine and not closed on that side."""
    # The remote address of a row, and its state; of sockets that are no more there are thousands.
    return Path("/proc/self/net/tcp").read_text().count(f":{port:04X} 01 ")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "openai whole") for name in PHASES),
        # A client that has no place is not heard: below.
        *((name, "websocket cancel") for name in PHASES if name != "admission"),
        *((name, way) for name in ("queue", "first byte", "mid-stream") for way in OTHERS),
        *(("admission", way) for way in ("openai streamed", "websocket close")),
    ],
)
async def test_leaving_gives_everything_back(make_server: MakeServer, name: str, way: str) -> None:
    phase, (ask, leave) = PHASES[name], WAYS[way]
    async with Door().listening() as door:
        base = {"llm.providers.sim.base_url": f"https://127.0.0.1:{door.port}/v1"}
        server = await make_server(
            phase.behaviour, **CHANGES, **phase.changes, **(base if phase.door else {})
        )
        port = door.port if phase.door else server.simulator.port
        pool = server.provider.pools.gate
        pool.queue_size, pool.queue_timeout = 10, 60.0
        server.provider.scheduler.resize(pool, phase.pool)
        async with contextlib.AsyncExitStack() as holders:
            for number in range(phase.holders):
                holder = await holders.enter_async_context(Raw(server))
                await holder.ask_sse(f"holder-{number}", text="x")
            tokens = 3 * phase.holders
            await server.simulator.until(lambda stats: stats.tokens_sent == tokens)
            others, theirs = server.held(), provider_side(server)

            async with Raw(server) as raw:
                await ask(raw, [{"role": "user", "content": "x" * phase.size}])
                await until(lambda: phase.reached(server), state=server.held)
                await until(lambda: connected(port) == (phase.holders or 1))
                await leave(raw)
                await until(lambda: provider_side(server) == theirs, state=server.held)
                await until(lambda: connected(port) == phase.holders)
            await until(lambda: server.held() == others, state=server.held)
            if phase.holders:  # this one was never asked
                stats = server.simulator.stats()
                assert (stats.requests, stats.active) == (phase.holders, phase.holders)

        await server.nothing_held()
        ends = await server.counted("requests", "outcome")
        assert set(ends) <= {("client_left",), ("cancelled",)}
        tries = await server.counted("provider_attempts", "outcome")
        assert set(tries) <= {("cancelled",)}
        if not phase.behaviour.ignore_body:  # else it does not notice
            stats = await server.simulator.until(lambda stats: stats.active == 0)
            assert stats.aborted == stats.requests
        server.provider.scheduler.resize(pool, PLACES)
        await every_place_at_once(server, door if phase.door else None)


async def every_place_at_once(server: RunningServer, door: Door | None) -> None:
    server.simulator.behaviour = SILENT
    before = server.simulator.stats().active
    count = min(PLACES, server.settings.chat.websocket.concurrency.max_connections)
    async with contextlib.AsyncExitStack() as stack:
        for number in range(count):
            raw = await stack.enter_async_context(Raw(server))
            await raw.ask_sse(f"next-{number}", text="x")
        await until(
            lambda: (door.inside if door else server.simulator.stats().active - before) == count
        )
        assert server.held()["sim places"] == count
    await server.nothing_held()
    if door:
        await until(lambda: door.inside == 0)


async def test_a_cancel_that_waits_for_admission_is_carried_out_before_anything_is_asked(
    make_server: MakeServer,
) -> None:
    server = await make_server(STALLED, **CHANGES, **PHASES["admission"].changes)
    async with Raw(server) as holder, Raw(server) as raw:
        await holder.ask_sse("holder", text="x")
        await server.simulator.until(lambda stats: stats.tokens_sent == 3)
        await websocket(raw, [{"role": "user", "content": "x"}])
        await raw.send_json(cancel("r1"))
        await until(lambda: server.held()["waiting"] == 1)
        holder.close()
        await cancels(raw)

    await server.nothing_held()
    assert server.simulator.stats().requests == 1


async def test_answers_that_one_key_leaves_end_none_of_another(make_server: MakeServer) -> None:
    server = await make_server(
        STALLED,
        **keys_of("few", "many"),
        **{"chat.streams.max_detached": 3, "chat.streams.resume_window": 1e6},
    )
    lifetime = server.context.gateway.lifetime

    async def leave(caller: str, name: str) -> None:
        before = lifetime.detached
        async with server.connect(headers=bearer(caller)) as ws:
            await ws.send_json(chat(name))
            while (await ws.receive_json())["status"] != "chunk":
                pass
        await until(lambda: lifetime.detached > before or server.simulator.stats().aborted > 0)

    await leave("few", "f")
    for number in range(6):
        await leave("many", f"m{number}")

    await until(lambda: server.simulator.stats().aborted == 4)
    left = Counter(owner_of(stream.caller) for stream in lifetime.store.running())
    assert left == {("few", "few"): 1, ("many", "many"): 2}

"""A crowd that asks and reads nothing, on every face: it costs a bounded memory, and nobody
else.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import struct
import termios
from typing import Any

import pytest

from aioserver.auth.callers import anonymous
from aioserver.server import listener
from aioserver.streams.writer import WRITE_BYTES
from tests.support.chat import big, chat, numbers, text_of, to_end
from tests.support.raw import SMALL, Raw
from tests.support.server import QUICK, MakeServer
from tests.support.waiting import until

# The kernel has clocks of its own for what nobody reads.
pytestmark = pytest.mark.real_time

SIZE, COUNT = 30_000, 14  # 420 KB an answer
MAX_STREAM_BYTES = 1 << 20
EVENT = SIZE + 1000  # bytes: a write goes out whole, and so may be that much over a bound
FIELDS = big(SIZE, COUNT)
HTTP, LIMITS = "llm.providers.sim.http_client", "chat.websocket.concurrency"


async def websocket(raw: Raw, name: str) -> None:
    await raw.upgrade()
    await raw.send_json(chat(name, **FIELDS))


async def sse(raw: Raw, name: str) -> None:
    await raw.ask_sse(name, **FIELDS)


async def openai(raw: Raw, name: str) -> None:
    messages = [{"role": "user", "content": FIELDS["text"]}]
    body: dict[str, Any] = {"messages": messages, "stream": True, **FIELDS["options"]}
    await raw.post("/v1/chat/completions", body)


def cost(transport: Any) -> tuple[int, int]:
    """The bytes that wait for a client that reads nothing: in our transport, and in the kernel."""
    queued = struct.pack("i", 0)
    fileno = transport.get_extra_info("socket").fileno()
    (kernels,) = struct.unpack("i", fcntl.ioctl(fileno, termios.TIOCOUTQ, queued))
    return transport.get_write_buffer_size(), kernels


@pytest.mark.timeout(300)
@pytest.mark.parametrize("clients", [50, pytest.param(1000, marks=pytest.mark.stress)])
async def test_clients_that_read_nothing_delay_nobody_and_are_dropped(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch, clients: int
) -> None:
    most = clients * MAX_STREAM_BYTES
    server = await make_server(
        QUICK,
        **{
            "chat.streams.send_timeout": max(3.0, 4.0 * clients / 200),
            "chat.streams.max_stream_bytes": MAX_STREAM_BYTES,
            "chat.streams.max_kept_bytes": most,
            f"{LIMITS}.max_connections": clients + 1,
            f"{LIMITS}.connection_queue_size": clients + 1,
            f"{LIMITS}.uvicorn.backlog": clients + 1,
            f"{HTTP}.queue_size": clients,
            f"{HTTP}.queue_timeout": 60.0,
        },
    )
    store = server.owners.streams
    largest = kept = 0
    # The most that was seen to wait for each of some clients, here and in the kernel. They are
    # looked at all the time: on a busy machine the first are dropped before the last have come.
    costs: dict[object, tuple[int, int]] = {}
    drops: list[str] = []
    monkeypatch.setattr(
        server.context.admission, "dropped", lambda face, why: drops.append(f"{face}: {why}")
    )

    def look() -> None:
        nonlocal largest, kept
        kept = max(kept, store.stats().bytes)
        logs = (*store.running(), *store.owned_by(anonymous(None)))
        largest = max((largest, *(stream.bytes for stream in logs)))
        for connection in itertools.islice(server.http_server.connections, 20):
            transport = connection.transport
            if transport is not None and not transport.is_closing():
                seen, now = costs.get(transport, (0, 0)), cost(transport)
                costs[transport] = max(seen[0], now[0]), max(seen[1], now[1])

    def done() -> bool:
        """Whether the provider has done all that it can: it is paused for the last that cannot
        come back, since nobody waits behind them.
        """
        look()
        stats, paused = server.simulator.stats(), server.provider.backpressure.paused
        ended: int = stats.completed + stats.aborted
        places: int = server.held()["sim places"]
        return (ended + paused, places) == (clients, paused)

    def gone() -> bool:
        look()
        return not server.held()["places"]

    async with contextlib.AsyncExitStack() as stack:
        for number in range(clients):
            raw = await stack.enter_async_context(Raw(server, receive_buffer=SMALL))
            await (websocket, sse, openai)[number % 3](raw, f"r{number}")
        await until(done, 100, server.held)
        waiting = server.held()["places"]  # of those who read nothing: the provider does not wait

        async with server.connect() as ws:
            await ws.send_json(chat("mine"))
            frames = await to_end(ws)
        assert numbers(frames) == list(range(1, len(frames) + 1))
        assert frames[-1]["status"] == "complete"
        assert text_of(frames)

        await until(gone, 100, server.held)
        await server.nothing_held()  # while not one of them has left
    assert len(drops) == clients
    assert {why.partition(": ")[2][:13] for why in drops} == {"nothing taken"}
    assert len(costs) >= 10
    assert waiting > 0
    assert max(ours for ours, _ in costs.values()) <= WRITE_BYTES + EVENT
    assert (
        max(kernels for _, kernels in costs.values())
        <= listener.MAX_NOT_SENT + WRITE_BYTES + EVENT
    )
    assert 0 < kept < most
    assert largest < MAX_STREAM_BYTES

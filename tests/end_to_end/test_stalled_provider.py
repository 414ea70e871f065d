"""What each display shows of answers under way, and of a provider that says nothing any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from aioserver.tools.top.feed import State
from aioserver.tools.top.screen import render
from tests.support.chat import STREAMED, chat, until_status
from tests.support.logs import fields_of
from tests.support.server import SILENT, SIM_HTTP_CLIENT
from tests.support.simulator import Behaviour
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.server import MakeServer, RunningServer

CLIENTS = 3
# Each face, with the events that it counts in what the provider says before it stalls: where its
# bytes pass unchanged, the one with the role is one of them.
FACES = {"websocket": 3, "sse": 3, "openai": 4}
# It says three tokens, and then nothing.
STALLS = Behaviour(ttft=0, interval=0.01, tokens=100, stall_after=3)
# Seconds by which a silence is made longer, so that no test waits for it.
LATER = 400.0
PATIENT = {f"{SIM_HTTP_CLIENT}.read_timeout": 2 * LATER, "chat.streams.resume_window": 0}


async def ask(server: RunningServer, face: str, name: str) -> None:
    """Ask for an answer, and read it until cancelled."""
    if face == "websocket":
        async with server.connect() as ws:
            await ws.send_json(chat(name))
            await until_status(ws, "complete")
        return
    url, body = {
        "sse": (server.sse, {"request_id": name, "text": "Hello"}),
        "openai": (f"{server.v1}/chat/completions", STREAMED),
    }[face]
    async with server.session.post(url, json=body) as response:
        await response.read()


def exchanges(server: RunningServer) -> list[Any]:
    """The exchanges under way at the provider."""
    under_way = [connection.protocol.exchange for connection in server.provider.pools.in_use]
    return [exchange for exchange in under_way if exchange is not None]


@contextlib.asynccontextmanager
async def asking(server: RunningServer, face: str) -> AsyncIterator[None]:
    """Clients that wait for the end of an answer until the block ends, and then leave."""
    clients = [asyncio.create_task(ask(server, face, f"r{number}")) for number in range(CLIENTS)]
    try:
        yield
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


def lengthen_silences(server: RunningServer, seconds: float = LATER) -> None:
    """Let every provider's last word be *seconds* older than it is."""
    for exchange in exchanges(server):
        exchange.spoke_at -= seconds
        if (fast := exchange.protocol.fast_path) is not None:
            fast.forwarded_at -= seconds


def shown(server: RunningServer) -> Any:
    """The snapshot of a tick that is made now."""
    monitor = server.context.monitor
    monitor.tick()
    return monitor.snapshot


async def stalled(server: RunningServer, events: int) -> None:
    """Wait until the provider has sent *events* to each client."""
    provider = server.provider
    await until(
        lambda: (
            provider.stats().silence.under_way == CLIENTS
            and provider.meter.events == CLIENTS * events
        )
    )


def drawn(stats: Any) -> str:
    """The screen of `top` for this snapshot."""
    state = State("")
    state.take(b"stats", stats)
    console = Console(width=300)
    with console.capture() as capture:
        console.print(render(state))
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


@pytest.mark.parametrize("face", FACES)
async def test_a_silence_that_goes_on_is_shown_everywhere(
    face: str, make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await make_server(STALLS, **PATIENT)
    async with asking(server, face):
        await stalled(server, FACES[face])
        before = shown(server)["providers"]["sim"]

        lengthen_silences(server)
        stats = shown(server)
        sim = stats["providers"]["sim"]
        silence = (await metric(server, "provider_silence_seconds"))["sim"]
        answers = (await metric(server, "provider_silent_answers"))["sim"]
        kind = (await metric(server, "provider_trouble"))["sim"]

    text = f"sim has said nothing for 6 min in {CLIENTS} answers"
    assert before["trouble"] is None
    assert before["silent"] | {"longest": 0} == {
        "longest": 0,
        "stalled": 0,
        "unanswered": 0,
        "under_way": CLIENTS,
    }
    assert sim["silent"]["longest"] >= LATER
    assert sim["silent"]["stalled"] == CLIENTS
    assert (sim["trouble"]["kind"], sim["trouble"]["text"]) == ("silent", text)
    assert sim["trouble"]["since"] <= stats["time"] - LATER
    assert (silence >= LATER, answers) == (True, CLIENTS)
    assert kind == 3  # silent
    assert (stats["verdict"]["level"], stats["verdict"]["word"]) == ("error", "Stalled")
    assert stats["verdict"]["text"] == text
    assert f"x Stalled: {text}\n" in drawn(stats)
    assert f"To do: {sim['trouble']['advice']}\n" in drawn(stats)
    incident = server.incidents()[-1]
    assert (incident["kind"], incident["severity"], incident["text"]) == ("silent", "error", text)
    logged = [line for line in caplog.records if line.getMessage() == text]
    assert [line.levelno for line in logged] == [logging.ERROR]
    (fields,) = fields_of(caplog, text)
    assert fields["advice"] == sim["trouble"]["advice"]


@pytest.mark.parametrize("face", FACES)
async def test_a_silence_counts_until_the_answer_ends(
    face: str, make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="aioserver.requests")
    server = await make_server(STALLS, **PATIENT)
    async with asking(server, face):
        await stalled(server, FACES[face])
        lengthen_silences(server)
    await until(lambda: len(fields_of(caplog)) == CLIENTS)

    finished = fields_of(caplog)
    assert all(fields["provider_gap_ms"] >= LATER * 1000 * 0.9 for fields in finished)
    assert all(fields.get("our_gap_ms", 0.0) < LATER * 1000 * 0.1 for fields in finished)
    assert shown(server)["providers"]["sim"]["silence"]["p50"] >= LATER * 0.9
    assert server.provider.meter.gap.sum >= CLIENTS * LATER * 0.9


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("fault", ["comments-endless", "thinking-100000"])
async def test_who_only_keeps_the_connection_alive_says_nothing(
    face: str, fault: str, make_server: MakeServer
) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0.01, fault=fault, fail_rate=1.0), **PATIENT
    )

    def heard() -> list[float]:
        return [exchange.last_byte_at for exchange in exchanges(server)]

    async with asking(server, face):
        await until(lambda: server.provider.stats().silence.under_way == CLIENTS)
        await until(lambda: len(heard()) == CLIENTS and all(heard()))
        begun = max(heard())
        await until(lambda: min(heard()) > begun)
        lengthen_silences(server)
        lengthened = max(heard())
        await until(lambda: min(heard()) > lengthened)
        sim = shown(server)["providers"]["sim"]

    assert sim["silent"]["longest"] >= LATER
    assert sim["silent"]["unanswered"] == CLIENTS
    assert sim["trouble"]["kind"] == "silent"


@pytest.mark.parametrize("face", FACES)
async def test_a_provider_that_never_begins_to_answer_is_silent_as_well(
    face: str, make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="aioserver.requests")
    server = await make_server(SILENT, **PATIENT)
    async with asking(server, face):
        await stalled(server, 0)
        lengthen_silences(server)
        trouble = shown(server)["providers"]["sim"]["trouble"]
    await until(lambda: len(fields_of(caplog)) == CLIENTS)

    assert trouble["text"] == f"sim has said nothing for 6 min to {CLIENTS} requests"
    finished = fields_of(caplog)
    assert all(fields["provider_gap_ms"] >= LATER * 1000 * 0.9 for fields in finished)
    assert not any({"our_gap_ms", "first_token_ms"} & fields.keys() for fields in finished)


@pytest.mark.parametrize("face", FACES)
async def test_first_tokens_count_when_they_come(face: str, make_server: MakeServer) -> None:
    server = await make_server(STALLS, **PATIENT)
    async with asking(server, face):
        await stalled(server, FACES[face])
        stats = shown(server)

    assert stats["first_token"]["count"] == CLIENTS
    assert stats["providers"]["sim"]["first_token"]["count"] == CLIENTS
    await server.nothing_held()
    assert shown(server)["first_token"]["count"] == CLIENTS


@pytest.mark.parametrize("face", FACES)
async def test_clients_that_cancel_are_no_fault_of_the_provider(
    face: str, make_server: MakeServer
) -> None:
    server = await make_server(STALLS, **PATIENT)
    async with asking(server, face):
        await stalled(server, FACES[face])
    await server.nothing_held()

    sim = shown(server)["providers"]["sim"]

    assert (sim["cancelled"], sum(sim["faults"].values())) == (CLIENTS, 0)
    assert (sim["trouble"], sim["state"], sim["next_try"]) == (None, "well", None)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("places", [1, CLIENTS])
async def test_answers_under_way_are_one_number_everywhere(
    face: str, places: int, make_server: MakeServer
) -> None:
    """Those that wait for a place at their provider are among them."""
    server = await make_server(
        SILENT, **PATIENT, **{f"{SIM_HTTP_CLIENT}.concurrent_requests": places}
    )
    async with asking(server, face):
        await server.simulator.until(lambda stats: stats.active == places)
        await until(lambda: server.held()["sim waiting"] == CLIENTS - places)
        stats = shown(server)
        async with server.session.get(f"{server.base}/metrics") as response:
            metrics = await response.text()

    assert stats["requests"]["running"] == CLIENTS
    assert "running" not in stats["streams"]
    assert (
        f"places are taken, {CLIENTS} answer{'s' * (CLIENTS > 1)} under way."
        in (stats["verdict"]["detail"])
    )
    assert f" {CLIENTS} running" in drawn(stats)
    assert f"aioserver_streams {CLIENTS}.0\n" in metrics


async def test_an_answer_that_comes_whole_is_not_silent_until_it_comes(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT, **PATIENT)
    body = {**STREAMED, "stream": False}
    url = f"{server.v1}/chat/completions"

    client = asyncio.create_task(_read(server, url, body))
    await server.simulator.until(lambda stats: stats.active == 1)
    lengthen_silences(server)
    sim = shown(server)["providers"]["sim"]
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)

    assert (sim["silent"]["under_way"], sim["trouble"]) == (0, None)


async def _read(server: RunningServer, url: str, body: dict[str, Any]) -> None:
    async with server.session.post(url, json=body) as response:
        await response.read()


async def metric(server: RunningServer, name: str) -> dict[str, float]:
    """The values of the gauge *name* in /metrics, by provider."""
    async with server.session.get(f"{server.base}/metrics") as response:
        lines = (await response.text()).splitlines()
    start = f'aioserver_{name}{{provider="'
    samples = [line.removeprefix(start) for line in lines if line.startswith(start)]
    return {line.partition('"')[0]: float(line.rpartition(" ")[2]) for line in samples}

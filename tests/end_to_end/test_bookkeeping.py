"""What is written down about an answer can never fail it."""

from __future__ import annotations

import logging
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.config.settings import Usage
from tests.support.chat import CHAT, STREAMED, chat, frames_of, text_of, to_end
from tests.support.collector import collecting
from tests.support.injected_bug import Function, bug_at, calls_into, calls_of
from tests.support.server import running
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from tests.support.server import RunningServer

# The border, behind which nothing can fail an answer; and what stands there unguarded, since it
# only stores and reads, or passes on to what is guarded.
BORDER = Function("telemetry.bookkeeping", "bookkeeping.decorate.kept")
BOOKS = ("telemetry.", "usage.", "monitoring.", "wings.tracing.")
PLAIN = {
    Function("telemetry.request_log", "RequestRecord.answered"),
    Function("wings.tracing.trace", "NotingSink.fast"),
    Function("wings.tracing.trace", "NotingSink.feed"),
    Function("wings.tracing.trace", "Trace.trace_id"),
}
# What else is called on the way only reads: a usage, within a method at the border, what was counted,
# and that by the monitor, whose second may be over meanwhile.
READING = {
    Function("monitoring.keys", "key_states"),
    Function("telemetry.counters", "Histogram.quantile"),
}
numbers = count()


async def whole(server: RunningServer) -> None:
    async with server.session.post(f"{server.v1}/chat/completions", json=CHAT) as response:
        answer = await response.json()
    assert response.status == 200, answer
    assert answer["choices"][0]["message"]["content"]


async def streamed(server: RunningServer) -> None:
    body = {**STREAMED, "model": "pair"}
    async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def response(server: RunningServer) -> None:
    body = {"input": "Hello", "stream": True, "model": "pair"}
    async with server.session.post(f"{server.v1}/responses", json=body) as response:
        assert b"event: response.completed\n" in await response.read()


async def sse(server: RunningServer) -> None:
    body = {"request_id": f"sse-{next(numbers)}", "text": "Hello"}
    for _ in ("asked", "visited"):
        async with server.session.post(server.sse, json=body) as response:
            frames = frames_of(await response.read())
        assert frames[-1]["status"] == "complete"
        assert text_of(frames)


async def websocket(server: RunningServer) -> None:
    async with server.connect() as ws:
        name = f"ws-{next(numbers)}"
        await ws.send_json(chat(name))
        frames = await to_end(ws, name)
    assert frames[-1]["status"] == "complete"
    assert text_of(frames)


WAYS = (whole, streamed, response, sse, websocket)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RunningServer]:
    """A server that writes down all that it can."""
    group = {"choose": "least_busy", "affinity": "prefix", "members": ["sim", "sim/other"]}
    async with collecting() as collector:
        changes = {
            "tracing.otlp_endpoint": collector.url,
            "usage.path": str(tmp_path / "usage"),
            "llm.models": {"pair": group},
        }
        async with running(tmp_path / "config.yaml", changes=changes) as server:
            yield server
            # An attempt of whose end the ledger was not told is forgotten with it.
            server.context.usage.prepare(Usage())()


async def settled(server: RunningServer) -> None:
    """Wait until nothing is held; the ledger may believe that an attempt goes on whose end it could
    not be told.
    """

    def held() -> dict[str, int]:
        return {name: number for name, number in server.held().items() if name != "attempts"}

    await until(lambda: not any(held().values()), 10.0, held)


async def test_each_way_into_the_books_is_guarded(server: RunningServer) -> None:
    with calls_into(BOOKS) as calls:
        for ask in WAYS:
            await ask(server)
        await settled(server)

    assert {call.callee for call in calls} - READING == PLAIN | {BORDER}


@pytest.mark.parametrize("ask", WAYS)
async def test_a_bug_in_the_books_is_logged_once_and_the_answer_arrives(
    server: RunningServer, ask: Callable[[RunningServer], Awaitable[None]], caplog: Any
) -> None:
    with calls_of({BORDER}) as calls:
        await ask(server)
        await settled(server)
    assert len(calls) > 5, "otherwise this test would show nothing"
    caplog.set_level(logging.ERROR)

    for number, call in enumerate(calls, 1):
        caplog.clear()
        with bug_at(call) as raised:
            await ask(server)
            await settled(server)

        assert raised == [call]
        lines = [line for line in caplog.records if line.name != "aioserver.monitoring"]
        assert [line.getMessage() for line in lines] == ["bug in the bookkeeping"]
        assert lines[0].exc_info is not None
        assert server.context.metrics.bugs.value == number


def bugs_of(server: RunningServer) -> float:
    return server.context.metrics.bugs.value


def labelled(server: RunningServer) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Each set of counters that has labels, with where it is; the labels of faces are those of
    the code, and no settings change them.
    """
    metrics = server.context.metrics
    meters = {"": metrics, **metrics.providers, **metrics.groups}
    for owner, meter in meters.items():
        names = [*getattr(meter, "__dict__", ()), *getattr(meter, "__slots__", ())]
        for name in names:
            children = getattr(meter, name)
            if isinstance(children, dict) and children and name != "faces":
                yield f"{owner}.{name}", children


async def test_a_counter_that_is_missing_fails_no_answer(server: RunningServer) -> None:
    counters = dict(labelled(server))
    needed = (".requests", ".outcomes", ".providers", ".groups", "sim.attempts", "pair.starts")

    # All of them at once, and those of which each answer needs one.
    for names in (counters, *([name] for name in needed)):
        kept, bugs = {name: dict(counters[name]) for name in names}, bugs_of(server)
        for name in names:
            counters[name].clear()
        try:
            for ask in WAYS:
                await ask(server)
            await settled(server)
        finally:
            for name in names:
                counters[name] |= kept[name]
        assert bugs_of(server) > bugs, names

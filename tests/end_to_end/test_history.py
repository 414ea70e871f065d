"""Conversations that outlive their process: a restart, a kill, several workers, and a file that
fails.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import sys
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import aiohttp
import pytest

from aioserver.wings.conversations import wing as conversations
from aioserver.wings.conversations.history import History
from tests.support.chat import cancel, chat, frames_of, text_of, to_end, until_status
from tests.support.history import query, sql
from tests.support.keys import bearer, cookie, keys_of, log_in
from tests.support.process import serving
from tests.support.redis_server import program_of_server
from tests.support.server import CONCURRENCY, PACED, QUICK, SIM_HTTP_CLIENT, UVICORN, MakeServer
from tests.support.simulator import Simulator
from tests.support.waiting import patience, until, until_result
from tests.support.worker_processes import alone, workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.support.server import RunningServer

# Threads and processes read and write the file.
pytestmark = pytest.mark.real_time
# Each request on a connection of its own, so that any worker may get it.
CLOSE = {"Connection": "close"}


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(QUICK) as made:
        yield made


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


async def ask(
    session: aiohttp.ClientSession, base: str, text: str, name: str | None = "c", **headers: str
) -> int:
    """Ask over SSE on a connection of its own; returns which of the conversation's questions it
    was.
    """
    question = {"request_id": uuid4().hex, "text": text, "conversation_id": name}
    headers = {**CLOSE, **headers}
    async with session.post(f"{base}/sse/chat", json=question, headers=headers) as response:
        body = await response.read()
        assert response.status == 200, body
    assert b"event: complete" in body
    # The simulated model says it.
    number = re.search(r"message number (\d+) of this conversation", text_of(frames_of(body)))
    return 1 if number is None else int(number[1])


async def stored(
    session: aiohttp.ClientSession, base: str, name: str = "c", **headers: str
) -> list[str]:
    """The questions of a conversation, as the server has them."""
    headers = {**CLOSE, **headers}
    async with session.get(f"{base}/conversations/{name}", headers=headers) as response:
        assert response.status == 200, await response.text()
        messages = (await response.json())["messages"]
    return [message["text"] for message in messages[::2]]


def turns_in(path: Path) -> int:
    """How many turns are in a file."""
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM turns").fetchone()[0])


async def trouble(server: RunningServer) -> Any:
    async with server.session.get(f"{server.base}/stats") as response:
        return (await response.json())["history"]["trouble"]


def waiting(server: RunningServer) -> int:
    """How many turns wait to be written."""
    (history,) = (wing.histories for wing in server.owners.wings if wing.name == "conversations")
    assert isinstance(history, History)
    return history.stats().waiting


async def test_a_restart_keeps_conversations(make_server: MakeServer, tmp_path: Path) -> None:
    changes = {**sql(tmp_path / "h.db"), **keys_of("web", "app")}
    server = await make_server(**changes)
    assert await ask(server.session, server.base, "Hello", **bearer("web")) == 1
    assert await ask(server.session, server.base, "Hello again", **bearer("web")) == 2

    other = await make_server(**changes)

    assert await ask(other.session, other.base, "Still there?", **bearer("web")) == 3
    assert await ask(other.session, other.base, "Mine?", **bearer("app")) == 1
    session = await log_in(other, "web")
    assert len(await stored(other.session, other.base, **cookie(session))) == 3


async def test_memory_and_switched_off_persistence_forget(
    make_server: MakeServer, tmp_path: Path
) -> None:
    for changes in ({}, sql(tmp_path / "h.db", enabled=False)):
        server = await make_server(**changes)
        assert await ask(server.session, server.base, "Hello") == 1
        assert await ask(server.session, server.base, "Hello") == 2
        other = await make_server(**changes)
        assert await ask(other.session, other.base, "Hello") == 1

    assert not (tmp_path / "h.db").exists()


async def test_the_retention_of_a_reload_holds_for_what_is_in_the_file(
    make_server: MakeServer, tmp_path: Path
) -> None:
    changes = sql(tmp_path / "h.db")
    server = await make_server(**changes)
    for number in range(5):
        await ask(server.session, server.base, f"{number}")
    await until(lambda: waiting(server) == 0)

    few = {"retention_policy": "message_count", "max_messages_per_conversation": 4}
    assert await server.change(**sql(tmp_path / "other.db", **few))

    await until(lambda: turns_in(tmp_path / "h.db") == 2)
    assert await stored(server.session, server.base) == ["3", "4"]
    assert not (tmp_path / "other.db").exists()


async def test_a_file_that_fails_is_reported_and_costs_no_answer(
    make_server: MakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "h.db"
    path.write_text("no database " * 1000)
    server = await make_server(**sql(path))

    assert await ask(server.session, server.base, "Hello") == 1
    assert await ask(server.session, server.base, "Hello again") == 2
    async with server.session.delete(f"{server.base}/conversations/c") as response:
        code = (await response.json())["error"]["code"]
        assert (response.status, code) == (503, "history_unavailable")
        assert response.headers["Retry-After"]
    async with server.session.get(f"{server.base}/conversations") as response:
        assert (await response.json())["partial"]
    trouble_found = await until_result(lambda: trouble(server), bool)
    assert trouble_found["kind"] == "corrupt"
    async with server.session.get(f"{server.base}/stats") as response:
        state = await response.json()
    assert state["verdict"]["word"] == "Not kept"
    assert state["verdict"]["advice"] == trouble_found["advice"]
    assert server.incidents()[0]["advice"] == trouble_found["advice"]
    assert path.read_text() == "no database " * 1000

    path.unlink()
    await until_result(lambda: trouble(server), lambda trouble_now: trouble_now is None)
    await until(
        lambda: (
            "conversations are kept again" in [incident["text"] for incident in server.incidents()]
        )
    )
    # What was asked meanwhile is in the new file.
    assert await stored(server.session, server.base) == ["Hello", "Hello again"]


async def test_without_sqlite_conversations_stay_in_memory(
    make_server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They are imported again, which fails.
    for name in ("sqlite", "sqlite_file"):
        monkeypatch.delitem(sys.modules, f"aioserver.wings.conversations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    server = await make_server(**sql(tmp_path / "h.db"))

    assert await ask(server.session, server.base, "Hello") == 1
    assert await ask(server.session, server.base, "Hello") == 2
    trouble_found = await until_result(lambda: trouble(server), bool)
    assert trouble_found["kind"] == "missing"
    assert trouble_found["advice"] == conversations.MISSING.advice
    assert "sqlite3" in trouble_found["text"]
    async with server.session.delete(f"{server.base}/conversations/c") as response:
        assert response.status == 204


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep all others from writing the file in the block."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


async def test_a_complete_answer_is_in_the_file_and_a_cancelled_one_as_far_as_it_came(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(PACED, **sql(tmp_path / "h.db"))
    async with server.session.ws_connect(server.ws) as ws:
        for number in range(5):
            await ws.send_json(chat(f"r{number}", conversation_id="c"))
            await to_end(ws)
            assert turns_in(tmp_path / "h.db") == number + 1
        await ws.send_json(chat("last", conversation_id="c"))
        frames = await until_status(ws, "chunk")
        await ws.send_json(cancel("last"))
        frames += await to_end(ws)

        assert turns_in(tmp_path / "h.db") == 6

    assert frames[-1]["status"] == "cancelled"
    answers = "SELECT answer FROM turns ORDER BY id DESC LIMIT 1"
    assert query(tmp_path / "h.db", answers) == [(text_of(frames),)]


async def test_an_answer_that_waits_for_its_turn_holds_no_place(
    make_server: MakeServer, tmp_path: Path
) -> None:
    names = ("concurrent_requests", "max_connections", "max_keepalive")
    few = {f"{SIM_HTTP_CLIENT}.{name}": 1 for name in names}
    server = await make_server(**sql(tmp_path / "h.db"), **few)
    async with server.session.ws_connect(server.ws) as ws:
        with locked(tmp_path / "h.db"):
            await ws.send_json(chat("one", conversation_id="c"))
            await until(lambda: waiting(server) == 1)
            await ws.send_json(chat("two", conversation_id="d"))
            await until(lambda: waiting(server) == 2)
            frames = [await ws.receive_json() for _ in range(4)]
        while len([frame for frame in frames if frame["status"] == "complete"]) < 2:
            frames.append(await ws.receive_json(timeout=patience(20)))

    # The other one got the place, and its first events have passed the end of the first one.
    order = [(frame["request_id"], frame["status"]) for frame in frames]
    assert order.index(("two", "chunk")) < order.index(("one", "complete"))
    assert turns_in(tmp_path / "h.db") == 2


async def test_a_server_that_is_killed_has_all_turns_that_were_written(
    simulator: Simulator, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    changes, path = sql(tmp_path / "h.db"), tmp_path / "h.db"
    file = tmp_path / "config.yaml"

    asked = 0
    for _ in range(2):
        async with serving(file, simulator.base_url, changes=changes) as process:
            await process.ready()
            for _ in range(5):
                asked += 1
                assert await ask(session, process.base, f"question {asked}") == asked
            # At once: the answer was complete, and the turn may not be written yet.
            process.signal(signal.SIGKILL)
            await process.ended()

    async with serving(file, simulator.base_url, changes=changes) as process:
        await process.ready()
        questions = await stored(session, process.base)
        assert questions == [f"question {number}" for number in range(1, asked + 1)]
        # In the middle of it all: each turn that is there is whole.
        asking = asyncio.gather(
            *(ask(session, process.base, "x", f"c{number}") for number in range(40)),
            return_exceptions=True,
        )
        await until(lambda: turns_in(path) > asked + 10)
        process.signal(signal.SIGKILL)
        await process.ended()
        await asking
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        broken = "SELECT count(*) FROM turns WHERE question = '' OR answer = ''"
        assert connection.execute(broken).fetchone() == (0,)


async def test_each_question_finds_the_turn_before_whichever_worker_it_comes_to(
    simulator: Simulator, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    program_of_server()  # or skip: without a server of their own they share nothing
    changes = {
        "chat.service.repository.persistence.retention_policy": "unlimited",
        "chat.service.context.max_tokens": 1_000_000,
        f"{UVICORN}.workers": 2,
        f"{CONCURRENCY}.max_connections": 40,
    }
    async with serving(tmp_path / "config.yaml", simulator.base_url, changes=changes) as process:
        await process.ready()
        await until(lambda: len(workers(process)) == 2)

        # Each is asked as soon as the answer before it is complete, of any worker.
        numbers = [await ask(session, process.base, f"{n}", "many") for n in range(1, 31)]
        deleted = []
        for number in range(10):
            await ask(session, process.base, "one", f"c{number}")
            url = f"{process.base}/conversations/c{number}"
            async with session.delete(url, headers=CLOSE) as response:
                deleted.append(response.status)
        # The provider keeps nothing: it is told the whole conversation.
        simulator.behaviour = replace(QUICK, forgets=(404, "Response with id 'x' not found."))
        inputs, previous = [], None
        for _ in range(20):
            asked = {"model": "sim", "input": "one", "store": True}
            asked |= {} if previous is None else {"previous_response_id": previous}
            url = f"{process.base}/v1/responses"
            async with session.post(url, json=asked, headers=CLOSE) as response:
                body = await response.json()
                assert response.status == 200, body
            previous = body["id"]
            sent = simulator.bodies[-1]["input"]
            inputs.append(1 if isinstance(sent, str) else len(sent))

        assert numbers == list(range(1, 31))
        assert deleted == [204] * 10
        assert inputs == list(range(1, 40, 2))


async def test_one_file_serves_all_workers(
    simulator: Simulator, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    # A private server is there or not: the file is the truth in any case.
    changes = {
        **sql(tmp_path / "h.db", retention_policy="unlimited"),
        "chat.service.context.max_tokens": 1_000_000,
        f"{UVICORN}.workers": 2,
        f"{CONCURRENCY}.max_connections": 40,
    }
    file = tmp_path / "config.yaml"
    async with serving(file, simulator.base_url, changes=changes) as process:
        await process.ready()
        await until(lambda: len(workers(process)) == 2)
        # Each question is asked as soon as the answer before it is complete, of any worker.
        numbers = [await ask(session, process.base, f"{n}", "many") for n in range(1, 21)]
        assert numbers == list(range(1, 21))
        # A process that is stopped writes nothing, and keeps the others from it if it has just
        # begun.
        await until(lambda: turns_in(tmp_path / "h.db") == 20)
        first, two = workers(process)
        async with alone(process, first):
            assert await ask(session, process.base, "1") == 1
            assert await ask(session, process.base, "2") == 2
            await until(lambda: turns_in(tmp_path / "h.db") == 22)
        async with alone(process, two):
            assert await ask(session, process.base, "3") == 3
            assert await stored(session, process.base) == ["1", "2", "3"]
            await until(lambda: turns_in(tmp_path / "h.db") == 23)
        async with (
            alone(process, first),
            session.delete(f"{process.base}/conversations/c", headers=CLOSE) as response,
        ):
            assert response.status == 204
        async with alone(process, two):
            assert await ask(session, process.base, "new") == 1
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(workers(process)) == 2 and first not in workers(process))
        assert await ask(session, process.base, "again") == 2
        process.signal()
        assert await process.ended() == 0
    changes |= sql(tmp_path / "h.db", retention_policy="unlimited", clear_on_startup=True)
    async with serving(file, simulator.base_url, changes=changes) as process:
        await process.ready()
        assert await ask(session, process.base, "first") == 1
        # What a killed process has not written yet is for the next one, which is not there at
        # once.
        await until(lambda: turns_in(tmp_path / "h.db") == 1)
        # A worker that is started in place of another clears nothing.
        first, _ = workers(process)
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(workers(process)) == 2 and first not in workers(process))
        assert await ask(session, process.base, "second") == 2

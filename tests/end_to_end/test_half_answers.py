"""What is kept of an answer that is cut: what its client has cancelled, and nothing else. The rest
is no turn, and never goes to a provider again.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.gateway.request import shutdown_error
from tests.support.chat import chat, to_end
from tests.support.hook_program import HookProgram, entry, hook_program, refuse
from tests.support.keys import bearer, keys_of
from tests.support.pairs import pair_in
from tests.support.responses import connect, create, next_event
from tests.support.responses import to_end as to_response_end
from tests.support.server import QUICK
from tests.support.simulator import Behaviour
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

QUESTION = "tell me all"
SLOW = Behaviour(ttft=0, interval=0.01, tokens=100_000)
BREAKS_OFF = Behaviour(ttft=0, interval=0, tokens=100, cut_after=5)
ENDS = [
    *("cancelled", "deleted"),
    *("refused by a hook", "a hook fails", "its deadline", "its key", "its client leaves"),
    *("its provider breaks off", "the server"),
]
# How an answer ends whose client has cancelled it.
KEPT = frozenset(ENDS[:2])
# Each with a conversation that has a name, and some with the socket's own.
CASES = [
    *((end, False) for end in ENDS),
    *((end, True) for end in ("cancelled", "refused by a hook", "its provider breaks off")),
]
# In memory; and in a file, to which the ends are the same.
STORED = {"chat.service.repository.type": "sql"}
CASES_IN_A_FILE = [(end, False) for end in ("cancelled", "its deadline")]


async def judge(line: dict[str, Any]) -> Any:
    return refuse("not that") if line.get("n", 0) > 4 else None


async def fail(line: dict[str, Any]) -> Any:
    return 500 if line.get("n", 0) > 4 else None


@asynccontextmanager
async def hook_for(end: str) -> AsyncIterator[HookProgram]:
    """A hook that reads along, and has a word about the first answer if that is how it ends."""
    read = {"refused by a hook": judge, "a hook fails": fail}.get(end)
    async with hook_program(read=read) as program:
        yield program


async def ask_in_half(
    server: RunningServer,
    ws: Any,
    end: str,
    changes: dict[str, Any],
    elsewhere: RunningServer | None = None,
    **payload: Any,
) -> None:
    """Ask, on *ws*, and let the answer come to its *end* after some text."""
    if end == "its deadline":
        # There is some text before, also on a busy machine.
        payload["deadline"] = 4
    await ws.send_json(chat("half", QUESTION, **payload))
    texts = 0
    while texts < 5:
        frame = await ws.receive_json(timeout=patience(20))
        texts += frame["status"] == "chunk"
        if frame["status"] in {"error", "cancelled", "complete"}:
            break
    assert texts
    gateway = server.context.gateway
    match end:
        case "cancelled":
            await ws.send_json({"action": "cancel", "request_id": "half"})
        case "deleted":
            where = elsewhere or server
            url = f"{where.sse}/half"
            async with where.session.delete(url, headers=bearer("web")) as response:
                assert response.status == 204
        case "its client leaves":
            await ws.close()
        case "its key":
            assert await server.change(**(changes | keys_of("root")))
            assert await server.change(**changes)
        case "the server":
            # As a stop does with what is left.
            await gateway.producers.end(shutdown_error)
        case _:
            pass
    await until(lambda: gateway.running == 0)


def settings(program: HookProgram, **changes: Any) -> dict[str, Any]:
    return {
        **keys_of("web"),
        "hooks": [entry(program, on=["answer"])],
        # Who leaves, leaves for good.
        "chat.streams.resume_window": 0,
        **changes,
    }


async def goes_on_with(server: RunningServer, ws: Any, **payload: Any) -> str:
    """What the provider gets before the next question."""
    server.simulator.behaviour = QUICK
    await ws.send_json(chat("next", "and now?", **payload))
    assert (await to_end(ws, "next"))[-1]["status"] == "complete"
    messages = server.simulator.bodies[-1]["messages"]
    assert messages[-1]["content"] == "and now?"
    return json.dumps(messages[:-1])


@pytest.mark.parametrize(
    ("stored", "end", "own"),
    [
        *(({}, end, own) for end, own in CASES),
        *((STORED, end, own) for end, own in CASES_IN_A_FILE),
    ],
)
async def test_only_what_a_client_has_cancelled_stays_of_half_an_answer(
    make_server: MakeServer, tmp_path: Path, stored: dict[str, Any], end: str, *, own: bool
) -> None:
    payload: dict[str, Any] = {} if own else {"conversation_id": "talk"}
    async with hook_for(end) as program:
        if stored:
            stored = {**stored, "chat.service.repository.path": str(tmp_path / "talk.db")}
        changes = settings(program, **stored)
        behaviour = BREAKS_OFF if end == "its provider breaks off" else SLOW
        server = await make_server(behaviour, **changes)
        async with (
            server.connect(headers=bearer("web")) as first,
            AsyncExitStack() as stack,
        ):
            await ask_in_half(server, first, end, changes, **payload)
            ws = first
            if not own:
                ws = await stack.enter_async_context(server.connect(headers=bearer("web")))

            program.read = None
            before = await goes_on_with(server, ws, **payload)

            assert (QUESTION in before) == (end in KEPT)
            assert ("assistant" in before) == (end in KEPT)
        await server.nothing_held()


@pytest.mark.real_time
@pytest.mark.parametrize("end", ["deleted", "its deadline"])
async def test_another_instance_knows_no_more_of_half_an_answer(tmp_path: Path, end: str) -> None:
    payload: dict[str, Any] = {"conversation_id": "talk"}
    async with hook_for(end) as program:
        changes = settings(program)
        del changes["chat.streams.resume_window"]
        async with pair_in(tmp_path, **changes) as pair:
            here, there = pair.servers
            here.simulator.behaviour = SLOW
            async with here.connect(headers=bearer("web")) as ws:
                await ask_in_half(here, ws, end, changes, there, **payload)
            program.read = None
            async with there.connect(headers=bearer("web")) as ws:
                before = await goes_on_with(there, ws, **payload)
            assert (QUESTION in before) == (end in KEPT)
            assert ("assistant" in before) == (end in KEPT)


@pytest.mark.parametrize(
    ("end", "bridged", "lane"),
    [
        *(("cancelled", bridged, lane) for bridged in (False, True) for lane in (False, True)),
        ("refused by a hook", True, True),
        ("a hook fails", True, False),
        ("its deadline", True, False),
        ("its deadline", False, True),
    ],
)
async def test_half_a_response_is_continued_by_nobody(
    make_server: MakeServer, end: str, *, bridged: bool, lane: bool
) -> None:
    request_options = {"x-aioserver-deadline": "1"} if end == "its deadline" else {}
    async with hook_for(end) as program:
        changes = settings(program, **{"llm.providers.sim.responses": not bridged})
        server = await make_server(SLOW, **changes)
        if lane:
            async with connect(server, headers={**bearer("web"), **request_options}) as ws:
                await ws.send_json(create(QUESTION, model="m"))
                name = (await next_event(ws))["response"]["id"]
                if end == "cancelled":
                    await ws.send_json({"type": "response.cancel", "response_id": name})
                last = (await to_response_end(ws))[-1]
                assert last["type"] != "response.completed"
        else:
            body = {"model": "m", "input": QUESTION, "stream": True}
            async with server.session.post(
                f"{server.v1}/responses", json=body, headers={**bearer("web"), **request_options}
            ) as response:
                await response.content.readuntil(b"event: ")
                data = await response.content.readuntil(b"\n\n")
                name = json.loads(data.partition(b"data: ")[2])["response"]["id"]
                if end == "cancelled":
                    response.close()
                else:
                    assert b"response.completed" not in await response.read()
        await until(lambda: server.context.gateway.running == 0)

        program.read = None
        server.simulator.behaviour = QUICK
        body = {"model": "m", "input": "and now?", "previous_response_id": name}
        async with server.session.post(
            f"{server.v1}/responses", json=body, headers=bearer("web")
        ) as response:
            # What the provider knows by that id is its own affair.
            assert response.status == (400 if bridged else 200)
        assert not any("assistant" in json.dumps(sent) for sent in server.simulator.bodies)
        items = f"{server.v1}/responses/{name}/input_items"
        async with server.session.get(items, headers=bearer("web")) as response:
            assert response.status == 404
        await server.nothing_held()

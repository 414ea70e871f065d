"""The longer roads of a request, with hooks on them: each is shown once, wherever it goes."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.chat import STREAMED, chat, resume, to_end
from tests.support.faces import over_openai
from tests.support.hook_program import entry, hook_program, refuse
from tests.support.instances import instances
from tests.support.server import PACED, QUICK
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer

BOTH = ["request", "answer"]


async def respond(ws: Any, **more: Any) -> dict[str, Any]:
    await ws.send_json({"type": "response.create", "model": "m", "input": "Hello", **more})
    event: dict[str, Any] = await ws.receive_json(timeout=patience(20))
    while event["type"] not in {"response.completed", "error", "response.failed"}:
        event = await ws.receive_json(timeout=patience(20))
    return event


async def test_lanes_of_responses_are_shown_and_refused_each(make_server: MakeServer) -> None:
    async def decide(asked: Any) -> Any:
        return refuse("not that") if "forbidden" in json.dumps(asked["body"]) else {}

    async with hook_program(decide=decide) as program:
        server = await make_server(QUICK, hooks=[entry(program, on=BOTH)])
        async with server.session.ws_connect(f"{server.v1}/responses") as ws:
            good = await respond(ws)
            bad = await respond(ws, input="forbidden")
            warm = await respond(ws, generate=False)
            again = await respond(ws, previous_response_id=good["response"]["id"])

        assert good["type"] == again["type"] == "response.completed"
        assert warm["type"] == "response.completed"
        assert bad["error"]["code"] == "request_refused"
        assert [asked["path"] for asked in program.requests] == ["/v1/responses"] * 3
        await until(lambda: program.ended == 2)
        kinds = [line["data"]["type"] for line in program.answers[0][1:-1]]
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        await server.nothing_held()


@pytest.mark.parametrize("native", [True, False])
async def test_a_response_in_the_background_is_shown_though_nobody_reads_it(
    make_server: MakeServer, native: bool
) -> None:
    async with hook_program() as program:
        server = await make_server(
            PACED,
            hooks=[entry(program, on=BOTH)],
            **{"llm.providers.sim.responses": native},
        )
        body = {"model": "m", "input": "Hello", "background": True}
        async with server.session.post(f"{server.v1}/responses", json=body) as response:
            made = await response.json()
            assert response.status == 200, made

        await until(lambda: program.ended == 1)
        assert len(program.requests) == 1
        assert made["id"] in json.dumps(program.answers[0])
        async with server.session.get(f"{server.v1}/responses/{made['id']}") as response:
            assert (await response.json())["id"] == made["id"]
        await server.nothing_held()


async def test_what_is_read_back_of_a_provider_is_no_way_around_a_closed_hook(
    make_server: MakeServer,
) -> None:
    async with hook_program() as program:
        server = await make_server(
            QUICK,
            hooks=[entry(program, on=["answer"])],
            **{"llm.providers.sim.account_paths": True},
        )
        for method, path in (
            ("GET", "responses/resp_elsewhere"),
            ("POST", "moderations"),
            ("POST", "images/generations"),
        ):
            body = {"model": "m", "input": "Hello"} if method == "POST" else None
            url = f"{server.v1}/{path}"
            async with server.session.request(method, url, json=body) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (403, "request_refused"), path

        assert await server.counted("provider_attempts", "provider") == {}
        counted = await server.counted("hook_calls", "event", "outcome")
        assert counted == {("answer", "unseen"): 3}


async def test_a_request_of_a_group_is_shown_once_and_not_for_each_member(
    make_server: MakeServer,
) -> None:
    async def decide(asked: Any) -> Any:
        body = {**asked["body"], "user": "by the hook"}
        return {"body": body} if asked["event"] == "request" else {}

    async with hook_program(decide=decide) as program:
        pair = {"members": ["sim/one", "sim/two"], "choose": "least_busy", "affinity": "prefix"}
        server = await make_server(
            QUICK, hooks=[entry(program, on=BOTH)], **{"llm.models": {"pair": pair}}
        )
        seen = await asyncio.gather(*(over_openai(server, "pair") for _ in range(6)))

        assert {answer.end for answer in seen} == {"complete"}
        assert len(program.requests) == 6
        await until(lambda: program.ended == 6)
        # Each member is asked for a model of its own, whatever the first one's was.
        assert {lines[0]["model"] for lines in program.answers} <= {"one", "two"}


async def test_an_id_is_shown_once_in_a_cluster(tmp_path: Path) -> None:
    async with hook_program() as program:
        hooks = [entry(program, on=BOTH)]
        async with instances(tmp_path, behaviour=PACED, hooks=hooks) as made:
            one, other = (each.server for each in made)
            async with one.connect() as ws, other.connect() as elsewhere:
                await ws.send_json(chat("r"))
                await ws.receive_json(timeout=patience(20))
                await elsewhere.send_json(resume("r"))
                first, second = await asyncio.gather(to_end(ws, "r"), to_end(elsewhere, "r"))
            assert first[-1]["status"] == second[-1]["status"] == "complete"
            async with other.connect() as ws:
                await ws.send_json(chat("r"))
                assert (await to_end(ws, "r"))[-1]["status"] == "complete"
            await until(lambda: program.ended == 1)

        assert len(program.requests) == 1
        assert len(program.answers) == 1


async def test_a_client_that_leaves_ends_what_a_hook_is_asked(make_server: MakeServer) -> None:
    asked, going = asyncio.Event(), asyncio.Event()

    async def decide(_asked: Any) -> Any:
        asked.set()
        await going.wait()

    async with hook_program(decide=decide) as program:
        server = await make_server(QUICK, hooks=[entry(program)])
        url = f"{server.v1}/chat/completions"
        request = asyncio.create_task(server.session.post(url, json={"model": "m", **STREAMED}))
        await asked.wait()
        request.cancel()
        await asyncio.wait((request,))
        await server.nothing_held()
        going.set()

        assert await server.counted("provider_attempts", "provider") == {}

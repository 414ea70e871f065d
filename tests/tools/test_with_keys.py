"""`bench` and `top` against a server that wants keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest

from aioserver.tools import remote
from aioserver.tools.bench.clients import Question
from aioserver.tools.bench.load import Plan, Run
from aioserver.tools.top.feed import Feed, State
from tests.support.keys import key_of, keys_of
from tests.support.process import run_command

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer


def plan(server: RunningServer, face: str, key: str | None) -> Plan:
    question = Question(prompt="Hello")
    return Plan(
        url=server.base, question=question, face=face, clients=2, requests=2, timeout=20.0, key=key
    )


@pytest.mark.parametrize("face", ["websocket", "sse", "openai"])
async def test_a_bench_meets_the_keys_own_limit(make_server: MakeServer, face: str) -> None:
    server = await make_server(**keys_of("web", requests_per_minute=3))
    run = Run(plan(server, face, key_of("web")))

    await run.execute()

    report = run.report()
    assert report["requests"]["ok"] == 3
    assert report["complete"]
    assert report["limit"]["code"] == "rate_limit_exceeded"
    assert "a client asked more often than it may" in report["limit"]["text"]


async def test_a_bench_that_is_not_let_in_says_so_and_asks_nothing(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("web"))
    run = Run(plan(server, "openai", "aio-nobody"))

    with pytest.raises(remote.KeyNeeded, match="does not know this key"):
        await run.execute()

    assert run.results.begun == 0


async def test_a_bench_without_a_key_is_exit_2_and_one_line(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web"))

    code, out, err = await run_command("bench", server.base, "--json")

    assert (code, out) == (2, "")
    assert err == f"{server.base} wants an API key: give it by --key or AIOSERVER_KEY\n"


async def test_top_wants_an_admins_key(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "root"))
    for key, remark in (
        (None, "wants an API key"),
        ("aio-nobody", "this API key is not known"),
        (key_of("web"), "it is not an admin key"),
    ):
        async with remote.session(key) as session:
            with pytest.raises(remote.Unreachable, match=remark):
                await Feed(session, State(server.base), 1.0, lambda: None).first()
    state = State(server.base)
    async with remote.session(key_of("root")) as session:
        await Feed(session, state, 1.0, lambda: None).first()
    assert isinstance(session, aiohttp.ClientSession)
    assert state.stats is not None
    assert state.stats["name"] == "aioserver"

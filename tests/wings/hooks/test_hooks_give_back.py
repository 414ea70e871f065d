"""What a call to a hook has taken is given back, whatever fails in it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.chat import STREAMED
from tests.support.faces import over_openai
from tests.support.hook_program import entry, hook_program, hooks_of
from tests.support.injected_bug import Function, bug_at, calls_of
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

SECTIONS = {
    Function("gateway.router", "Router.call"),
    Function("gateway.router", "Router.fill"),
    *(
        Function(f"wings.hooks.{module}", name)
        for module, name in (
            ("hook_set", "HookSet.ask"),
            ("hook_set", "HookSet.answered"),
            ("hook_set", "HookSet._decide"),
            ("hook_set", "HookSet._follow"),
            ("hook_set", "HookSet._followed"),
            ("http_hook", "HttpHook._ask"),
            ("http_hook", "HttpHook._post"),
            ("http_hook", "HttpHook.decide"),
            ("http_hook", "HttpHook.decide_answer"),
            ("http_hook", "HttpHook.follow"),
            ("http_hook", "Lines.read"),
            ("tap", "Tap.events"),
            ("tap", "Tap.take"),
        )
    ),
}
# What gives back: if this itself fails, nothing else can do it.
GIVES = {"leave", "close", "used", "enter", "_end", "_count", "_lost", "run"}


async def ask(server: RunningServer) -> None:
    with contextlib.suppress(
        aiohttp.ClientError, AssertionError, IndexError, TimeoutError, ValueError, KeyError
    ):
        async with asyncio.timeout(patience(20)):
            await asyncio.gather(over_openai(server, "m"), over_openai(server, "m", stream=False))
    await until(lambda: not any(hooks_of(server).stats()), 10, hooks_of(server).stats)
    await server.nothing_held(5)


# A bug between the making of a coroutine and its first step leaves it as it is.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.real_time
@pytest.mark.timeout(120)
async def test_whatever_a_call_to_a_hook_meets_nothing_is_held_afterwards(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with hook_program() as program:
        server = await make_server(hooks=[entry(program, on=["request", "answer"])])
        await ask(server)
        with calls_of(SECTIONS) as calls:
            await ask(server)
        faults = [call for call in calls if call.callee.name.rpartition(".")[2] not in GIVES]
        for call in faults:
            with bug_at(call):
                try:
                    await ask(server)
                except AssertionError as error:
                    raise AssertionError(f"{call}: {error}") from error
        async with server.session.post(f"{server.v1}/chat/completions", json=STREAMED) as response:
            assert response.status == 200
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        # What the bugs have left goes now, and not while another test begins.
        caplog.clear()
        gc.collect()

    assert len(faults) > 20

"""What a request has taken is given back, whatever fails after that: each call that a request makes
raises once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from aioserver.providers.breaker import TURN
from tests.support.chat import CHAT, STREAMED, chat, to_end
from tests.support.failing import sicken
from tests.support.injected_bug import Call, Function, bug_at, calls_of_taking
from tests.support.keys import bearer, keys_of
from tests.support.server import CONCURRENCY, SIM_HTTP_CLIENT, MakeServer, provider_entry
from tests.support.simulator import Behaviour

if TYPE_CHECKING:
    from tests.support.server import RunningServer

# The calls of an answer are traced, and each of its events costs the same.
BRIEF = Behaviour(ttft=0, interval=0, tokens=3)
# Calls of each face that raise, chosen by this seed; `stress` has all of them.
SAMPLE, SEED = 4, 1
# Whoever gives a place of a key back wakes the next one by these: if they fail, that one waits on,
# until its time is over.
WAKING = {
    Function("limits.quota", "Quota._make_resource.<lambda>"),
    Function("limits.scheduler", "Scheduler.serve"),
}
# The provider is in this process here; it is no part of the server.
PROVIDER = "wings.simulator"
FULL: dict[str, Any] = {
    **keys_of(
        *("ann", "bob"),
        max_connections=9,
        max_concurrent=1,
        queue_size=9,
        tokens_per_minute=10**8,
        tokens_per_day=10**9,
    ),
    f"{CONCURRENCY}.max_connections": 2,
    f"{CONCURRENCY}.connection_queue_size": 50,
    f"{SIM_HTTP_CLIENT}.concurrent_requests": 1,
    f"{SIM_HTTP_CLIENT}.max_connections": 1,
    f"{SIM_HTTP_CLIENT}.max_keepalive": 1,
    "llm.models": {
        "pair": {
            "members": ["sim/one", "sim/two"],
            "choose": "least_busy",
            "affinity": "prefix",
        }
    },
}
# How a request is asked, on each face. Two clients of two keys share one place everywhere. So many
# seconds they wait for their answers, and with a bug, which may have left them none.
PATIENCE, WITH_A_BUG = 20.0, 3.0


async def _post(server: RunningServer, url: str, headers: dict[str, str], body: Any) -> None:
    async with server.session.post(url, headers=headers, json=body) as response:
        await response.read()


async def embeddings(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    await _post(server, f"{server.v1}/embeddings", headers, {"input": "Hello"})


async def streamed(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    await _post(server, f"{server.v1}/chat/completions", headers, STREAMED)


async def grouped(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    body = {**CHAT, "model": "pair"}
    await _post(server, f"{server.v1}/chat/completions", headers, body)
    await _post(server, f"{server.v1}/moderations", headers, {"input": "Hello", "model": "pair"})


async def kept(server: RunningServer, headers: dict[str, str], name: str) -> None:
    await _post(server, f"{server.v1}/chat/completions", headers | {"Idempotency-Key": name}, CHAT)


async def response(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    url = f"{server.v1}/responses"
    async with server.session.post(url, headers=headers, json={"input": "Hello"}) as answer:
        kept_response = await answer.json()
    items = f"{url}/{kept_response['id']}/input_items"
    async with server.session.get(items, headers=headers) as answer:
        await answer.read()


async def messages(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    await _post(server, f"{server.v1}/messages", headers, {"max_tokens": 9, **CHAT})


async def passed(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    await _post(server, f"{server.v1}/moderations", headers, {"input": "Hello"})


async def sse(server: RunningServer, headers: dict[str, str], name: str) -> None:
    await _post(server, server.sse, headers, {"request_id": name, "text": "Hello"})


async def background(server: RunningServer, headers: dict[str, str], name: str) -> None:
    body: dict[str, Any] = {"request_id": name, "text": "Hello"}
    await _post(server, server.sse, {**headers, "Prefer": "respond-async"}, body)
    body = {"input": "Hello", "model": "pair", "background": True}
    await _post(server, f"{server.v1}/responses", headers, body)


async def websocket(server: RunningServer, headers: dict[str, str], name: str) -> None:
    async with server.connect(headers=headers) as ws:
        await ws.send_json(chat(name))
        await to_end(ws, name)


async def response_socket(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    url = server.v1.replace("http", "ws", 1) + "/responses"
    async with server.session.ws_connect(url, headers=headers) as ws:
        for generate in (False, True):
            frame = {"type": "response.create", "input": "Hello", "generate": generate}
            await ws.send_json(frame)
            event = await ws.receive_json(timeout=PATIENCE)
            while event["type"] not in {"response.completed", "error"}:
                event = await ws.receive_json(timeout=PATIENCE)


async def session(server: RunningServer, headers: dict[str, str], _name: str) -> None:
    await _post(server, f"{server.base}/session", {}, {"key": headers["Authorization"][7:]})
    server.session.cookie_jar.clear()


FACES = (
    embeddings,
    streamed,
    grouped,
    kept,
    response,
    messages,
    passed,
    sse,
    background,
    websocket,
    response_socket,
    session,
)


async def ask(
    server: RunningServer, face: Any, round_name: str, patience: float = PATIENCE
) -> None:
    """Let two clients of each of two keys ask at once, and leave, after *patience* seconds at the
    latest; what they are answered is no matter here.
    """

    async def ask_one(number: int) -> None:
        with contextlib.suppress(
            aiohttp.ClientError, TimeoutError, TypeError, KeyError, ValueError
        ):
            name = f"{round_name}-{number}"
            headers = bearer(("ann", "bob")[number % 2])
            await asyncio.wait_for(face(server, headers, name), patience)

    await asyncio.gather(*map(ask_one, range(4)))
    await server.nothing_held(5)


def faults_among(calls: set[Call], most: int | None) -> list[Call]:
    """The calls that are to raise: *most* of them, if it is not None."""
    faults = sorted(
        call
        for call in calls
        if call.section not in WAKING and not call.section.module.startswith(PROVIDER)
    )
    return faults if most is None else random.Random(SEED).sample(faults, min(most, len(faults)))


async def fail_once_each(server: RunningServer, face: Any, most: int | None) -> None:
    def held() -> int:
        return sum(server.held().values())

    await ask(server, face, "warm")
    # Of four requests the first one connects, and the others find its connection.
    server.provider.pools.pool.drop_idle()
    with calls_of_taking(held) as calls:
        await ask(server, face, "look")
    assert len(calls) > 24 or face is session, "otherwise this test would show nothing"

    for number, call in enumerate(faults_among(calls, most)):
        server.provider.pools.pool.drop_idle()
        with bug_at(call):
            try:
                await ask(server, face, str(number), WITH_A_BUG)
            except AssertionError as error:
                raise AssertionError(f"{call}: {error}") from error
    await ask(server, face, "well again")


# A bug between the making of a coroutine and its first step leaves it as it is.
lost_coroutines = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")


@lost_coroutines
@pytest.mark.virtual_time
@pytest.mark.timeout(900)
@pytest.mark.parametrize("most", [SAMPLE, pytest.param(None, marks=pytest.mark.stress)])
@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
async def test_whatever_a_request_calls_may_fail_and_nothing_is_held_afterwards(
    make_server: MakeServer, face: Any, most: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    await fail_once_each(await make_server(BRIEF, **FULL), face, most)

    # What the bugs have left goes now, and not while another test begins.
    caplog.clear()
    gc.collect()


# Where a trial is given back: the first provider of two is sick. So many seconds a client waits.
TRIAL_PATIENCE = 1.0
TRIED = {"chat": ("chat/completions", CHAT), "passed on": ("moderations", {"input": "Hello"})}


@lost_coroutines
@pytest.mark.real_time
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("model", "path"), [("pair", "chat"), ("pair", "passed on"), (None, "chat")]
)
async def test_a_trial_of_a_sick_provider_ends_whatever_fails(
    make_server: MakeServer, model: str | None, path: str
) -> None:
    server = await make_server()
    other = provider_entry(server.simulator.base_url, "other")
    pair = {"members": ["sim", "other"], "choose": "least_busy"}
    assert await server.change(
        **{"llm.providers.other": other, "llm.fallbacks": ["other"], "llm.models": {"pair": pair}}
    )
    breaker = server.provider.health.breaker
    url, body = TRIED[path]
    body = body | ({} if model is None else {"model": model})

    async def ask_as_a_trial() -> None:
        breaker.reset()
        sicken(breaker)
        # The next request is a trial.
        assert not any(breaker.start_spared(by_time=False) for _ in range(TURN - 1))
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await asyncio.wait_for(_post(server, f"{server.v1}/{url}", {}, body), TRIAL_PATIENCE)
        await server.nothing_held(5)

    await ask_as_a_trial()
    with calls_of_taking(lambda: breaker._trials) as calls:  # noqa: SLF001 - no snapshot has it
        await ask_as_a_trial()
    for call in faults_among(calls, SAMPLE):
        with bug_at(call):
            await ask_as_a_trial()

    assert any("start_spared" in call.callee.name for call in calls)

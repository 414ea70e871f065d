"""What clients and operators see of a lost cache, on each face, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol import prefix, regions
from aioserver.protocol.regions import MAX_ELEMENTS
from aioserver.providers.breaker import MIN_ATTEMPTS
from aioserver.wings.cache_loss import turns, verdict
from aioserver.wings.simulator.engine import EngineOptions
from tests.support.chat import to_end as frames_to_end
from tests.support.keys import bearer, keys_of
from tests.support.ledgers import written
from tests.support.responses import connect, create, to_end
from tests.support.server import SILENT, SIM_HTTP_CLIENT, provider_entry
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

ENGINE = Behaviour(tokens=3, engine=EngineOptions(prefill=1e7, decode=1e4))
LONG = "Say something about a gateway that serves many. " * 200
ON = {
    "llm.cache_losses": True,
    "llm.providers.sim.messages": True,
    "llm.providers.sim.responses": True,
}
CACHE = "x-aioserver-cache"


def turn(path: str, first: str, *more: str, streamed: bool = False) -> dict[str, Any]:
    """A turn whose prompt begins with *first*."""
    body: dict[str, Any] = {"model": "sim-model", "stream": streamed}
    roles = ("user", "assistant")
    talk = [{"role": roles[n % 2], "content": text} for n, text in enumerate((LONG, *more))]
    if path == "responses":
        return {**body, "instructions": first, "input": talk}
    if path == "messages":
        return {**body, "system": first, "messages": talk, "max_tokens": 3}
    if streamed:
        body["stream_options"] = {"include_usage": True}
    return {**body, "messages": [{"role": "system", "content": first}, *talk]}


async def ask(
    server: RunningServer, path: str, body: dict[str, Any], **headers: str
) -> tuple[str, str]:
    """The header about the cache, and the text of the answer."""
    async with server.session.post(f"{server.v1}/{path}", json=body, headers=headers) as response:
        text = await response.text()
        assert response.status == 200, text
        return response.headers.get(CACHE, ""), text


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [
        record.__dict__["fields"]
        for record in caplog.records
        if record.getMessage() == "request finished"
    ]


REGIONS = {
    "chat/completions": "messages[0]",
    "messages": "system[0]",
    "responses": "instructions[0]",
}


@pytest.mark.parametrize("path", REGIONS)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_changed_prompt_is_told_to_its_client_and_in_log_and_ledger(
    make_server: MakeServer,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    path: str,
    streamed: bool,
) -> None:
    caplog.set_level(logging.INFO, "aioserver.requests")
    server = await make_server(ENGINE, **ON, **{"usage.path": str(tmp_path / "usage")})

    for first in ("It is 9:00.", "It is 9:00."):
        header, text = await ask(server, path, turn(path, first, "Well", "On.", streamed=streamed))
        assert (header, ": cache" in text) == ("", False)
    header, text = await ask(server, path, turn(path, "It is 9:01.", "Well", streamed=streamed))

    await until(lambda: len(lines(caplog)) == 3)
    *others, line = lines(caplog)
    assert not any("cache_lost" in other for other in others)
    assert (line["cache_lost"], line["cache_lost_at"]) == ("changed", REGIONS[path])
    tokens = line["cache_lost_tokens"]
    assert 2000 < tokens < line["tokens_in"]
    told = f"lost at={REGIONS[path]} byte=0 tokens={tokens} by=changed"
    if streamed:
        assert f"\n\n: cache {told}\n\n" in text
        assert text.count(": cache") == 1
    else:
        assert header == told
        json.loads(text)
    *others, entry = written(server)
    assert not any("cache_lost" in other for other in others)
    assert (entry["cache_lost"], entry["cache_lost_tokens"]) == ("changed", tokens)
    async with server.session.get(f"{server.base}/metrics") as response:
        metrics = await response.text()
    assert (
        f'aioserver_cache_lost_tokens_total{{provider="sim",verdict="changed"}} {float(tokens)}'
        in metrics
    )
    state = server.context.monitor.fresh()["cache_losses"]  # type: ignore[typeddict-item]
    assert state == {
        "conversations": 1,
        "verdicts": {"changed": 1},
        "last_hour": {"changed": tokens},
        "regions": {REGIONS[path]: tokens},
    }


@pytest.mark.parametrize("path", ["responses", "chat/completions"])
async def test_a_bridged_answer_and_a_kept_one_are_told_as_well(
    make_server: MakeServer, path: str
) -> None:
    changes = {**ON, "llm.providers.sim.responses": False}
    server = await make_server(ENGINE, **changes)
    await ask(server, path, turn(path, "It is 9:00."))
    again = {"Idempotency-Key": "k1"}

    for _ in range(2):
        header, _ = await ask(server, path, turn(path, "It is 9:01."), **again)
        assert header.startswith(f"lost at={REGIONS[path]} byte=0 tokens=")
    _, text = await ask(server, path, turn(path, "It is 9:02.", streamed=True))

    assert f": cache lost at={REGIONS[path]} byte=0 tokens=" in text


async def test_a_websocket_gets_no_frame_of_it(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver.requests")
    server = await make_server(ENGINE, **ON)

    async with connect(server) as ws:
        for first in ("It is 9:00.", "It is 9:01.", "It is 9:02."):
            body = turn("responses", first)
            del body["stream"]
            await ws.send_json(create(**body))
            events = await to_end(ws)
            assert events[-1]["type"] == "response.completed"

    await until(lambda: len(lines(caplog)) == 3)
    assert [line.get("cache_lost") for line in lines(caplog)] == [None, "changed", "changed"]


async def test_a_chat_s_event_stream_ends_with_it_and_its_websocket_has_no_frame_of_it(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver.requests")
    server = await make_server(ENGINE, **ON)

    def payload(first: str) -> dict[str, Any]:
        body = turn("chat/completions", first)
        return {"messages": body["messages"], "model": "sim-model"}

    text = ""
    for number, first in enumerate(("It is 9:00.", "It is 9:01.")):
        body = {"request_id": f"r{number}", **payload(first)}
        async with server.session.post(server.sse, json=body) as response:
            text = await response.text()
    assert text.count("\n\n: cache lost at=messages[0] byte=0 tokens=") == 1
    async with server.connect() as ws:
        message = {"action": "chat", "request_id": "r2", "payload": payload("It is 9:02.")}
        await ws.send_json(message)
        frames = await frames_to_end(ws)

    assert frames[-1]["status"] == "complete"
    assert not any("lost" in json.dumps(frame) for frame in frames)
    await until(lambda: len(lines(caplog)) == 3)
    assert [line.get("cache_lost") for line in lines(caplog)] == [None, "changed", "changed"]


async def test_no_caller_sees_anything_of_another(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver.requests")
    server = await make_server(ENGINE, **ON, **keys_of("ana", "bo", "root"))
    session = {"x-claude-code-session-id": "one and the same"}
    path = "chat/completions"

    # The same session and the same texts, but each of them has asked once.
    for name in ("ana", "bo"):
        body = turn(path, f"I am {name}.")
        assert (await ask(server, path, body, **session, **bearer(name)))[0] == ""
    header, _ = await ask(server, path, turn(path, "I am bo."), **session, **bearer("ana"))
    again, _ = await ask(server, path, turn(path, "I am bo."), **session, **bearer("bo"))

    # It was compared with its own last turn, though the engine has read the other's prompt.
    assert header == ""
    assert again == ""
    async with server.session.get(f"{server.base}/stats", headers=bearer("bo")) as response:
        assert response.status == 403
    await until(lambda: len(lines(caplog)) == 4)
    assert not any("cache_lost" in line for line in lines(caplog))
    header, _ = await ask(server, path, turn(path, "I am nobody."), **session, **bearer("ana"))
    assert header.startswith("lost at=messages[0] ")


async def test_a_provider_that_says_it_has_written_nothing_is_known_by_what_it_has(
    make_server: MakeServer,
) -> None:
    # As engines do that keep all prompts, whose clients mark nothing.
    server = await make_server(ENGINE, **ON)

    async def lost(second: str) -> str:
        blocks = [{"type": "text", "text": text} for text in (LONG, second)]
        body = turn("messages", "", "Well", "On.") | {"system": blocks}
        return (await ask(server, "messages", body))[0]

    assert await lost("number 1") == ""
    # Its cache has more than it has written.
    assert (await lost("number 2")).startswith("lost at=system[1] byte=")
    assert await lost("number 2") == ""


async def test_an_agent_s_session_is_a_conversation_and_its_subagents_are_others(
    make_server: MakeServer,
) -> None:
    server = await make_server(ENGINE, **ON)
    session = {"x-claude-code-session-id": "s1"}
    below = {**session, "x-claude-code-parent-agent-id": "a1"}
    path = "chat/completions"

    async def lost(first: str, user: str, **headers: str) -> str:
        body = turn(path, first, "Well", "On.")
        body["messages"][1]["content"] = user
        return (await ask(server, path, body, **headers))[0]

    assert await lost("Be brief.", f"{LONG}!", **session) == ""
    # Its first message has changed, too, and yet it is the same session.
    body = f"{LONG}?"
    assert await lost("Be long." * 900, f"{LONG}!", **below) == ""
    assert await lost("Be brief.", f"{LONG}!", **session) == ""
    assert await lost("Be brief.", body, **session) == ""
    assert (await lost("Be kind.", body, **session)).startswith("lost at=messages[0]")


async def test_a_conversation_that_went_elsewhere_says_why(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver.requests")
    async with Simulator(ENGINE) as other:
        pair = {"members": ["sim", "other"], "choose": "ordered"}
        providers = {"llm.providers.other": provider_entry(other.base_url)}
        server = await make_server(ENGINE, **ON, **providers, **{"llm.models": {"pair": pair}})
        body = {**turn("chat/completions", "Be brief."), "model": "pair"}
        await ask(server, "chat/completions", body)
        server.simulator.behaviour = Behaviour(fail_rate=1.0, fail_status=503)

        header, _ = await ask(server, "chat/completions", body)

        assert header.startswith("lost at=sick tokens=")
        assert header.endswith(" by=moved")
    await until(lambda: len(lines(caplog)) == 2)


@pytest.mark.parametrize("why", ["full", "sick", "gone"])
async def test_a_turn_whose_home_is_full_sick_or_gone_has_moved_for_that_reason(
    make_server: MakeServer, why: str
) -> None:
    path = "chat/completions"
    async with Simulator(ENGINE) as other:
        entry = provider_entry(other.base_url, concurrent_requests=1)
        members = ["sim", "other"]
        pair = {"members": members, "choose": "least_busy", "affinity": "prefix"}
        changes: dict[str, Any] = {
            **ON,
            "llm.providers.other": entry,
            f"{SIM_HTTP_CLIENT}.concurrent_requests": 1,
            "llm.models": {"pair": pair},
        }
        server = await make_server(ENGINE, **changes)
        body = {**turn(path, "Be brief."), "model": "pair"}
        assert (await ask(server, path, body))[0] == ""
        simulators = {"sim": server.simulator, "other": other}
        names = sorted(simulators, key=lambda name: simulators[name].stats().requests)
        home = names[-1]
        pinned = {"model": home, "messages": [{"role": "user", "content": "hi"}]}
        asking = contextlib.AsyncExitStack()
        if why == "full":
            simulators[home].behaviour = SILENT
            task = asyncio.create_task(ask(server, path, pinned))
            asking.callback(task.cancel)
            await simulators[home].until(lambda stats: stats.active == 1)
        elif why == "sick":
            simulators[home].behaviour = Behaviour(fail_rate=1.0, fail_status=503)
            for _ in range(2 * MIN_ATTEMPTS):
                async with server.session.post(f"{server.v1}/{path}", json=pinned) as response:
                    assert response.status in {502, 503}
        else:
            members.remove(home)
            assert await server.change(**changes)

        async with asking:
            header, _ = await ask(server, path, body)

        assert header.startswith(f"lost at={why} tokens=")
        assert header.endswith(" by=moved")


@pytest.mark.parametrize(
    "more",
    [["data:image/png;base64,AAAA"], ["on"] * MAX_ELEMENTS],
    ids=["a picture", "more messages than are read"],
)
async def test_a_prompt_is_not_judged_whose_regions_do_not_say_its_tokens(
    make_server: MakeServer, more: list[str]
) -> None:
    server = await make_server(ENGINE, **ON)

    for first in ("It is 9:00.", "It is 9:01."):
        body = turn("chat/completions", first, "Well", *more)
        assert (await ask(server, "chat/completions", body))[0] == ""

    state = server.context.monitor.fresh()["cache_losses"]  # type: ignore[typeddict-item]
    assert state["conversations"] == 0


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that have hashed something of a prompt."""
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        return counting

    for module in (regions, prefix, turns, verdict):
        for name in ("hash", "blake2b", "crc32"):
            if (function := getattr(module, name, hash if name == "hash" else None)) is not None:
                monkeypatch.setattr(module, name, counted(name, function), raising=False)
    return calls


PAIR = {"members": ["sim", "other"], "choose": "least_busy"}


@pytest.mark.parametrize(
    ("cache_losses", "affinity", "functions"),
    [
        (False, {}, set()),
        (True, {}, {"hash", "crc32", "blake2b"}),
        (False, {"affinity": "prefix"}, {"hash", "crc32", "blake2b"}),
    ],
    ids=["off", "cache losses", "affinity"],
)
@pytest.mark.parametrize("path", REGIONS)
async def test_prompts_are_hashed_for_these_settings_alone(
    make_server: MakeServer,
    hashed: list[str],
    path: str,
    cache_losses: bool,
    affinity: dict[str, str],
    functions: set[str],
) -> None:
    async with Simulator(ENGINE) as other:
        settings = ON | {
            "llm.cache_losses": cache_losses,
            "llm.models": {"pair": PAIR | affinity},
            "llm.providers.other": provider_entry(other.base_url)
            | {"messages": True, "responses": True},
        }
        server = await make_server(ENGINE, **settings)
        hashed.clear()

        for streamed in (False, True):
            body = turn(path, "It is 9:00.", "Well", streamed=streamed) | {"model": "pair"}
            assert (await ask(server, path, body))[0] == ""

    assert set(hashed) == functions


async def test_nothing_is_read_while_the_setting_is_off(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver.requests")
    server = await make_server(ENGINE)

    for first in ("It is 9:00.", "It is 9:01."):
        header, _ = await ask(server, "chat/completions", turn("chat/completions", first))
        assert header == ""

    await until(lambda: len(lines(caplog)) == 2)
    assert not any("cache_lost" in line for line in lines(caplog))
    state = server.context.monitor.fresh()["cache_losses"]  # type: ignore[typeddict-item]
    assert state["conversations"] == 0

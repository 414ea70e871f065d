"""Groups as clients see them, on each face."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.providers.capacity import MAX_COOLING
from aioserver.wings.simulator.engine import EngineOptions
from tests.support.chat import CHAT, chat, read_frames, to_end
from tests.support.logs import fields_of
from tests.support.passing import Account, answer
from tests.support.server import QUICK, MakeServer, provider_entry
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import patience, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from tests.support.server import RunningServer

SLOW = Behaviour(ttft=0.3, interval=0)
HANGING = Behaviour(ttft=600, interval=0)
FAILING = Behaviour(fail_rate=1.0, fail_status=503)


def entries(simulators: list[Simulator], places: int = 1) -> dict[str, Any]:
    """The providers `e0`, `e1` …"""
    limits = {"concurrent_requests": places, "queue_size": 50, "max_retries": 0}
    return {
        f"llm.providers.e{number}": provider_entry(
            simulator.base_url, model=f"e{number}-model", **limits
        )
        for number, simulator in enumerate(simulators)
    }


@asynccontextmanager
async def engines(
    make_server: MakeServer,
    *behaviours: Behaviour,
    choose: str = "least_busy",
    places: int = 1,
    changes: dict[str, Any] | None = None,
) -> AsyncIterator[tuple[RunningServer, list[Simulator]]]:
    """A server with a group `pair` of providers `e0`, `e1` …, one for each of *behaviours*."""
    simulators = [Simulator(behaviour) for behaviour in behaviours]
    for simulator in simulators:
        await simulator.__aenter__()
    providers = entries(simulators, places)
    names = [name.rpartition(".")[2] for name in providers]
    models = {"pair": {"members": names, "choose": choose}, "other-name": names[1]}
    server = await make_server(QUICK, **{**providers, "llm.models": models, **(changes or {})})
    try:
        yield server, simulators
        await server.nothing_held()
    finally:
        for simulator in simulators:
            await simulator.__aexit__(None, None, None)


def base(server: RunningServer) -> str:
    return server.v1.removesuffix("/v1")


async def stats(server: RunningServer) -> dict[str, Any]:
    async with server.session.get(f"{base(server)}/stats") as response:
        state: dict[str, Any] = await response.json()
        return state


async def test_twenty_at_once_are_shared_by_both_engines(make_server: MakeServer) -> None:
    async with engines(make_server, SLOW, SLOW) as (server, _):

        async def ask() -> tuple[int, str]:
            body = {**CHAT, "model": "pair"}
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
                await response.read()
                return response.status, response.headers["x-aioserver-provider"]

        asked = [asyncio.create_task(ask()) for _ in range(8)]
        await until(lambda: server.context.router.groups["pair"].waiting == 6)
        pair = server.context.monitor.fresh()["groups"]["pair"]
        assert pair["waiting"] == 6
        assert [member["in_flight"] for member in pair["members"]] == [1, 1]
        answers = await asyncio.gather(*asked)

        assert {status for status, _ in answers} == {200}
        assert {provider for _, provider in answers} == {"e0", "e1"}
        pair = server.context.monitor.fresh()["groups"]["pair"]
        assert pair["waiting"] == 0
        assert (await stats(server))["groups"].keys() == {"pair", "other-name"}
        assert sum(member["starts"] for member in pair["members"]) == 8
        async with server.session.get(f"{base(server)}/metrics") as response:
            text = await response.text()
        assert 'aioserver_group_starts_total{group="pair",home="none",provider="e0"}' in text
        assert 'aioserver_group_waiting{group="pair"} 0.0' in text


@pytest.mark.parametrize("face", ["websocket", "sse", "openai", "responses"])
async def test_every_face_goes_on_at_another_member(make_server: MakeServer, face: str) -> None:
    async with engines(make_server, FAILING, QUICK, choose="ordered", places=2) as (
        server,
        simulators,
    ):
        if face == "websocket":
            async with server.connect() as ws:
                await ws.send_json(chat("r1", model="pair"))
                frames = await to_end(ws)
            answered = frames[-1]["chunk"]["metadata"]
            assert (answered["provider"], answered["model"]) == ("e1", "e1-model")
        elif face == "sse":
            body = {"request_id": "r1", "text": "Hello", "provider": "pair"}
            async with server.session.post(server.sse, json=body) as response:
                frames = await read_frames(response)
            assert frames[-1]["chunk"]["metadata"]["provider"] == "e1"
        else:
            asked: dict[str, Any] = {**CHAT, "model": "pair"}
            path = "chat/completions"
            if face == "responses":
                path, asked = "responses", {"input": "Hello", "model": "pair"}
            async with server.session.post(f"{server.v1}/{path}", json=asked) as response:
                text = await response.text()
                assert response.status == 200
            assert response.headers["x-aioserver-provider"] == "e1"
            assert response.headers["x-aioserver-attempts"] == "2"
            assert "e1-model" in text
        assert [simulator.stats().requests > 0 for simulator in simulators] == [True, True]


@pytest.mark.virtual_time
async def test_a_position_is_told_while_a_request_stands_in_both_lines(
    make_server: MakeServer,
) -> None:
    async with engines(make_server, SLOW, SLOW) as (server, _), server.connect() as ws:
        for number in range(3):
            await ws.send_json(chat(f"r{number}", model="pair"))
        queued: list[int] = []
        ended = 0
        while ended < 3:
            frame = await ws.receive_json(timeout=patience(10))
            if frame.get("status") == "queued":
                queued.append(frame["chunk"]["position"])
            ended += frame.get("status") in {"complete", "error"}
        assert queued[:1] == [1]


async def test_models_are_listed_by_all_the_names_that_lead_somewhere(
    make_server: MakeServer,
) -> None:
    async with engines(
        make_server, QUICK, QUICK, changes={"llm.providers.e1.models": ["listed"]}
    ) as (
        server,
        _,
    ):
        async with server.session.get(f"{server.v1}/models") as response:
            listed = {entry["id"]: entry["owned_by"] for entry in (await response.json())["data"]}
        assert listed["pair"] == listed["other-name"] == "aioserver"
        assert listed["listed"] == listed["e1/listed"] == listed["e1"] == "e1"
        assert {*[*listed][:2]} == {"pair", "other-name"}
        for name, owner in (("pair", "aioserver"), ("listed", "e1"), ("e0/anything", "e0")):
            async with server.session.get(f"{server.v1}/models/{name}") as response:
                assert (await response.json())["owned_by"] == owner
        async with server.session.get(f"{server.v1}/models/nobodys") as response:
            assert (await response.json())["owned_by"] == "sim"


@pytest.mark.parametrize("header", [{}, {"anthropic-version": "2023-06-01"}])
async def test_a_client_hears_how_long_a_prompt_may_be_where_it_is_known(
    make_server: MakeServer, header: dict[str, str]
) -> None:
    small, large = (
        {"provider": f"e{number}", "max_context": 8_000 * 4**number} for number in (0, 1)
    )
    groups = {"known": [small, large], "half": [{**small}, "e1"]}
    demo = provider_entry("") | {"simulated": True, "base_url": ""}
    changes = {"llm.models": groups, "llm.providers.demo": demo}
    field = "max_input_tokens" if header else "context_length"
    async with engines(make_server, QUICK, QUICK, changes=changes) as (server, _):
        async with server.session.get(f"{server.v1}/models", headers=header) as response:
            listed = {entry["id"]: entry.get(field) for entry in (await response.json())["data"]}
        url = f"{server.v1}/models/known"
        async with server.session.get(url, headers=header) as response:
            assert (await response.json())[field] == 32_000

    assert (listed["known"], listed["half"], listed["e0"]) == (32_000, None, None)
    assert listed["demo"] == 200_000


async def test_a_client_hears_what_a_prompt_and_an_answer_may_have_where_it_is_known(
    make_server: MakeServer,
) -> None:
    def seeing() -> dict[str, Any]:
        return {"provider": "e0", "input_modalities": ["text", "image", "audio"]}

    def hearing(provider: str) -> dict[str, Any]:
        ways = {"input_modalities": ["audio", "text"], "output_modalities": ["text"]}
        return {"provider": provider, **ways}

    groups = {
        "seeing": [seeing()],
        "both": [seeing(), hearing("e1")],
        "half": [seeing(), "e1"],
    }
    demo = provider_entry("") | {"simulated": True, "base_url": ""}
    changes = {"llm.models": groups, "llm.providers.demo": demo}
    async with engines(make_server, QUICK, QUICK, changes=changes) as (server, simulators):

        async def listed() -> dict[str, Any]:
            async with server.session.get(f"{server.v1}/models") as response:
                entries = (await response.json())["data"]
            return {entry["id"]: entry.get("architecture") for entry in entries}

        before = await listed()
        groups["seeing"] = [hearing("e0")]
        assert await server.change(**entries(simulators), **{"llm.models": groups})
        after = await listed()

    assert before["seeing"] == {"input_modalities": ["text", "image", "audio"]}
    # What each member takes; nothing is known of the answers of one.
    assert before["both"] == {"input_modalities": ["text", "audio"]}
    assert before["half"] is before["e0"] is None
    assert before["demo"] == {
        "input_modalities": ["text", "image"],
        "output_modalities": ["text"],
    }
    assert after["seeing"] == {
        "input_modalities": ["audio", "text"],
        "output_modalities": ["text"],
    }


async def test_what_is_passed_on_goes_to_one_member_and_account_paths_to_none(
    make_server: MakeServer,
) -> None:
    async with engines(
        make_server, QUICK, QUICK, changes={"llm.providers.e0.account_paths": True}
    ) as (
        server,
        _,
    ):
        body = {"model": "pair", "query": "q", "documents": ["a"]}
        async with server.session.post(f"{server.v1}/rerank", json=body) as response:
            assert response.headers["x-aioserver-provider"] in {"e0", "e1"}
        headers = {"x-aioserver-provider": "pair"}
        async with server.session.get(f"{server.v1}/files", headers=headers) as response:
            assert response.status == 400
            assert "may have several" in (await response.json())["error"]["message"]


async def test_a_reload_changes_the_members_without_a_dropped_request(
    make_server: MakeServer,
) -> None:
    async with engines(make_server, SLOW, SLOW, choose="ordered") as (server, simulators):
        body = {**CHAT, "model": "pair"}

        async def ask() -> int:
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
                await response.read()
                return response.status

        asked = [asyncio.create_task(ask()) for _ in range(6)]
        await until(lambda: sum(each.stats().active for each in simulators) == 2)
        assert await server.change(
            **entries(simulators), **{"llm.models": {"pair": ["e1"], "other-name": "e0"}}
        )

        assert set(await asyncio.gather(*asked)) == {200}
        before = simulators[0].stats().requests
        assert await ask() == 200
        assert simulators[0].stats().requests == before


@pytest.mark.parametrize("affine", [True, False])
async def test_an_answer_that_a_reload_has_led_to_other_members_is_counted_there(
    make_server: MakeServer, affine: bool
) -> None:
    ways = [{"affinity": "prefix"}, {"affinity": "none"}]
    before, after = ways if affine else reversed(ways)
    both = {"choose": "least_busy", "members": ["e0", "e1"], **before}
    async with engines(
        make_server, HANGING, HANGING, QUICK, changes={"llm.models": {"pair": both}}
    ) as (server, simulators):
        body = {**CHAT, "model": "pair"}
        url = f"{server.v1}/chat/completions"
        taken = [asyncio.create_task(server.session.post(url, json=body)) for _ in range(2)]
        group = server.context.router.groups["pair"]
        await until(lambda: sum(each.stats().active for each in simulators) == 2)
        waits = asyncio.create_task(server.session.post(url, json=body))
        await until(lambda: group.waiting == 1)

        other = {"choose": "least_busy", "members": ["e2"], **after}
        assert await server.change(**entries(simulators), **{"llm.models": {"pair": other}})

        async with await asyncio.wait_for(waits, 10) as response:
            assert response.status == 200, await response.text()
            assert response.headers["x-aioserver-provider"] == "e2"
            await response.read()
        assert server.context.metrics.bugs.value == 0
        starts = await metrics(server, "aioserver_group_starts_total")
        at_e2 = [number for labels, number in starts.items() if labels[-1] == "e2"]
        assert sum(at_e2) == 1.0
        for task in taken:
            task.cancel()
        await asyncio.wait(taken)


# What is seen of groups.

ENGINE = Behaviour(tokens=3, engine=EngineOptions(prefill=1e7, decode=1e4))
LONG = "Say something about a gateway that serves many. " * 200
AFFINE = {"members": ["e0", "e1"], "choose": "least_busy", "affinity": "prefix"}
CACHED = {
    "llm.models": {"pair": AFFINE},
    "llm.providers.e0.messages": True,
    "llm.providers.e1.messages": True,
}


async def metrics(server: RunningServer, *names: str) -> dict[tuple[str, ...], float]:
    """The numbers of a metric, by the values of its labels in their order there."""
    async with server.session.get(f"{base(server)}/metrics") as response:
        text = await response.text()
    numbers = {}
    for line in text.splitlines():
        name, _, number = line.rpartition(" ")
        if name.partition("{")[0] in names:
            numbers[tuple(re.findall('"([^"]*)"', name))] = float(number)
    return numbers


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("path", "bridged"),
    [
        *(("chat/completions", False), ("messages", False)),
        *(("responses", False), ("responses", True)),
    ],
)
async def test_what_came_from_a_cache_is_seen_in_the_form_of_each_api(
    make_server: MakeServer,
    caplog: pytest.LogCaptureFixture,
    path: str,
    streamed: bool,
    bridged: bool,
) -> None:
    caplog.set_level(logging.INFO, "aioserver")
    responses = {f"llm.providers.e{number}.responses": not bridged for number in range(2)}
    async with engines(make_server, ENGINE, ENGINE, changes=CACHED | responses) as (server, _):
        body: dict[str, Any] = {"model": "pair", "stream": streamed}
        if path == "responses":
            body["input"] = LONG
        else:
            body |= {"messages": [{"role": "user", "content": LONG}], "max_tokens": 3}
        if streamed and path == "chat/completions":
            body["stream_options"] = {"include_usage": True}
        for _ in range(2):
            async with server.session.post(f"{server.v1}/{path}", json=body) as response:
                await response.read()
                assert response.status == 200

        await until(lambda: len(fields_of(caplog)) == 2)
        first, again = fields_of(caplog)
        assert first["cached_tokens"] == 0
        assert 0.9 * again["tokens_in"] < again["cached_tokens"] <= again["tokens_in"]
        assert (again["group"], again["tokens_in"]) == ("pair", first["tokens_in"])
        # Of a text that is not in messages, the first KiB is the question.
        assert again["home"] == ("home" if path == "responses" else "new")
        pair = server.context.monitor.fresh()["groups"]["pair"]
        assert pair["cached_share"] == round(again["cached_tokens"] / (2 * again["tokens_in"]), 3)
        tokens = await metrics(server, "aioserver_tokens_total")
        counted = {
            kind: sum(number for labels, number in tokens.items() if labels[3] == kind)
            for kind in ("input", "cached")
        }
        assert counted == {"input": 2 * again["tokens_in"], "cached": again["cached_tokens"]}


@pytest.mark.parametrize("face", ["websocket", "sse"])
async def test_what_came_from_a_cache_is_seen_on_own_faces(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, face: str
) -> None:
    caplog.set_level(logging.INFO, "aioserver")
    async with engines(make_server, ENGINE, ENGINE, changes=CACHED) as (server, _):
        for number in range(2):
            if face == "websocket":
                async with server.connect() as ws:
                    payload = {"text": LONG, "model": "pair"}
                    message = {"action": "chat", "request_id": f"r{number}", "payload": payload}
                    await ws.send_json(message)
                    await to_end(ws)
            else:
                body = {"request_id": f"r{number}", "text": LONG, "model": "pair"}
                async with server.session.post(server.sse, json=body) as response:
                    await read_frames(response)

        await until(lambda: len(fields_of(caplog)) == 2)
        first, again = fields_of(caplog)
        assert first["cached_tokens"] == 0
        assert again["cached_tokens"] > 0.9 * again["tokens_in"]
        assert again["home"] == "new"


async def test_a_group_shows_where_its_requests_have_started_and_what_was_known(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver")
    async with engines(make_server, ENGINE, ENGINE, changes=CACHED) as (server, _):
        before = (await stats(server))["groups"]["pair"]
        assert before.keys() == {
            *("choose", "affinity", "members", "waiting", "oldest_wait", "held_back"),
            *("homes", "known_share", "cached_share"),
        }
        assert before["homes"] == {"home": 0, "other": 0, "new": 0}
        assert before["known_share"] is before["cached_share"] is None
        messages = [{"role": "user", "content": LONG}]
        for _ in range(3):
            body = {"model": "pair", "messages": messages, "max_tokens": 3}
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
                answer = (await response.json())["choices"][0]["message"]
            messages += [answer, {"role": "user", "content": "And then?"}]

        await until(lambda: len(fields_of(caplog)) == 3)
        lines = fields_of(caplog)
        assert [line["home"] for line in lines] == ["new", "home", "home"]
        pair = server.context.monitor.fresh()["groups"]["pair"]
        assert pair["homes"] == {"home": 2, "other": 0, "new": 1}
        assert sorted(member["starts"] for member in pair["members"]) == [0, 3]
        assert (pair["held_back"], pair["waiting"], pair["oldest_wait"]) == (0, 0, 0.0)
        cached = sum(line["cached_tokens"] for line in lines)
        assert pair["cached_share"] == round(cached / sum(line["tokens_in"] for line in lines), 3)
        assert pair["known_share"] is not None
        # Nothing was known of the first third of the bytes, and nearly all of the rest.
        assert 0.5 < pair["known_share"] < 0.67
        provider = lines[0]["provider"]
        starts = await metrics(server, "aioserver_group_starts_total")
        assert {labels: number for labels, number in starts.items() if number} == {
            ("pair", "new", provider): 1.0,
            ("pair", "home", provider): 2.0,
        }


async def test_a_request_counts_once_for_its_last_start(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver")
    async with engines(make_server, FAILING, QUICK, choose="ordered", places=2) as (server, _):
        for model in ("pair", "other-name", "e1"):
            body = {**CHAT, "model": model}
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
                assert response.status == 200
                await response.read()

        await until(lambda: len(fields_of(caplog)) == 3)
        shown = [(line.get("group"), line.get("home")) for line in fields_of(caplog)]
        assert shown == [("pair", "none"), ("other-name", "none"), (None, None)]
        starts = await metrics(server, "aioserver_group_starts_total")
        assert starts == {
            ("pair", "none", "e0"): 0.0,
            ("pair", "none", "e1"): 1.0,
            ("other-name", "none", "e1"): 1.0,
        }


async def test_what_is_passed_on_is_a_start_of_its_group(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver")
    async with engines(make_server, QUICK, QUICK, choose="ordered") as (server, _):
        for model in ("pair", "other-name"):
            body = {"model": model, "query": "q", "documents": ["a"]}
            async with server.session.post(f"{server.v1}/rerank", json=body) as response:
                await response.read()

        await until(lambda: len(fields_of(caplog)) == 2)
        shown = [(line["group"], line["home"]) for line in fields_of(caplog)]
        assert shown == [("pair", "none"), ("other-name", "none")]
        starts = await metrics(server, "aioserver_group_starts_total")
        assert sum(starts.values()) == 2.0


async def test_a_request_that_no_member_takes_has_a_group_and_no_start(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver")
    full = {"llm.providers.e1.http_client.queue_timeout": 0.05}
    async with engines(make_server, QUICK, HANGING, changes=full) as (server, simulators):
        body = {**CHAT, "model": "other-name"}
        url = f"{server.v1}/chat/completions"
        taken = asyncio.create_task(server.session.post(url, json=body))
        await until(lambda: simulators[1].stats().active == 1)
        async with server.session.post(url, json=body) as response:
            assert response.status == 503
        await until(lambda: len(fields_of(caplog)) == 1)
        (refused,) = fields_of(caplog)
        assert (refused["group"], refused.get("home")) == ("other-name", None)
        starts = await metrics(server, "aioserver_group_starts_total")
        assert sum(starts.values()) == 0.0
        taken.cancel()
        await asyncio.wait([taken])


async def test_a_member_that_cools_down_is_seen_and_its_group_goes_on(
    make_server: MakeServer,
) -> None:
    limited = Behaviour(fail_rate=1.0, fail_status=429)
    async with engines(make_server, limited, QUICK, choose="ordered", places=2) as (server, _):
        monitor = server.context.monitor
        monitor.tick()
        body = {**CHAT, "model": "pair"}
        async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
            await response.read()
            assert response.headers["x-aioserver-provider"] == "e1"
        monitor.tick()

        members = monitor.snapshot["groups"]["pair"]["members"]
        assert [member["state"] for member in members] == ["cooling", "well"]
        degraded = [
            incident
            for incident in monitor.newest_incidents()[1]
            if incident["kind"] == "group_degraded"
        ]
        assert [(each["text"], each["severity"]) for each in degraded] == [
            ("e0 cools down: pair goes on without it", "warning")
        ]
        assert monitor.snapshot["active_group"] is None


async def test_names_that_lead_to_others_are_logged_at_the_start_and_when_they_change(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioserver")
    changes = {"llm.providers.e1.models": ["listed", "pair"]}
    async with engines(make_server, QUICK, QUICK, changes=changes) as (server, simulators):

        def routes() -> list[str]:
            texts = [record.getMessage() for record in caplog.records]
            return [text for text in texts if text.startswith("by name alone")]

        assert routes() == ["by name alone go to e1: listed"]
        same = {**entries(simulators), **changes, "llm.models": {"pair": ["e0", "e1"]}}
        assert await server.change(**same)
        assert len(routes()) == 1
        assert await server.change(**same, **{"llm.providers.e0.models": ["listed"]})
        assert routes()[1:] == ["by name alone go to e0, e1: listed"]


async def test_vectors_are_of_the_first_members_model_alone(make_server: MakeServer) -> None:
    members = [{"provider": "e0", "model": "v"}, "e1", {"provider": "e2", "model": "v"}]
    changes = {"llm.models": {"vectors": {"members": members}}}
    async with engines(make_server, FAILING, QUICK, QUICK, changes=changes) as (
        server,
        simulators,
    ):
        body = {"model": "vectors", "input": "Hello"}
        async with server.session.post(f"{server.v1}/embeddings", json=body) as response:
            assert response.status == 200
            assert (await response.json())["model"] == "v"
        assert response.headers["x-aioserver-provider"] == "e2"

        simulators[2].behaviour = FAILING
        async with server.session.post(f"{server.v1}/embeddings", json=body) as response:
            assert response.status == 502
        assert simulators[1].stats().requests == 0


async def test_messages_go_to_members_that_speak_them(make_server: MakeServer) -> None:
    changes = {
        "llm.models": {"claude": {"members": ["e0", "e1", "e2"]}},
        "llm.providers.e0.messages": False,
        "llm.providers.e1.messages": True,
        "llm.providers.e2.messages": True,
    }
    async with engines(make_server, QUICK, FAILING, QUICK, changes=changes) as (
        server,
        simulators,
    ):
        body = {**CHAT, "model": "claude", "max_tokens": 9}
        async with server.session.post(f"{server.v1}/messages", json=body) as response:
            assert response.status == 200
        assert response.headers["x-aioserver-provider"] == "e2"

        simulators[2].behaviour = FAILING
        async with server.session.post(f"{server.v1}/messages", json=body) as response:
            assert response.status == 503
        assert simulators[0].stats().requests == 0
        # Chat completions go to the first.
        async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
            assert response.headers["x-aioserver-provider"] == "e0"


@pytest.mark.parametrize("by", ["model", "header"])
async def test_what_is_passed_on_is_tried_once_with_the_members_own_model(
    make_server: MakeServer, by: str
) -> None:
    async with (
        Account(lambda _passed: answer(status=503)) as failing,
        Account() as first,
        Account() as second,
    ):
        providers = {
            f"llm.providers.{name}": provider_entry(account.url, model=f"{name}-model")
            for name, account in (("e0", first), ("e1", second), ("e2", failing))
        }
        models = {"pair": ["e0", "e1"], "bad": ["e2", "e1"]}
        server = await make_server(QUICK, **providers, **{"llm.models": models})

        async def ask(group: str) -> aiohttp.ClientResponse:
            body = {"model": group if by == "model" else "any", "query": "q"}
            headers = {} if by == "model" else {"x-aioserver-provider": group}
            url = f"{server.v1}/rerank"
            async with server.session.post(url, json=body, headers=headers) as response:
                await response.read()
                return response

        response = await ask("pair")
        assert response.headers["x-aioserver-provider"] == "e0"
        assert json.loads(first.passed[-1].body) == {"model": "e0-model", "query": "q"}

        response = await ask("bad")
        assert response.status == 502
        assert response.headers["x-aioserver-provider"] == "e2"
        assert response.headers["x-aioserver-attempts"] == "1"
        assert len(failing.passed) == 1
        assert second.passed == []
        await server.nothing_held()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("retry-after-86400", "provider_rate_limited"),
        ("retry-after-604800", "provider_rate_limited"),
        ("quota", "provider_auth_error"),
    ],
)
async def test_a_member_whose_quota_is_spent_is_asked_once_and_the_next_one_answers(
    make_server: MakeServer, fault: str, code: str, *, stream: bool
) -> None:
    spent = Behaviour(fail_rate=1.0, fault=fault)
    async with engines(make_server, spent, QUICK, choose="ordered") as (server, simulators):

        async def ask(model: str) -> aiohttp.ClientResponse:
            body = {**CHAT, "model": model, "stream": stream}
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
                await response.read()
                return response

        for _ in range(3):
            response = await ask("pair")
            assert response.status == 200
            assert response.headers["x-aioserver-provider"] == "e1"
        assert [len(each.requests) for each in simulators] == [1, 3]

        # Nobody else may answer for this name. The time is bounded, so that a provider's mistake
        # is found out within minutes, and other requests ask no sooner.
        response = await ask("e0")
        error = (await response.json())["error"]
        assert error["code"] == code
        assert len(simulators[0].requests) == 1
        if code == "provider_rate_limited":
            assert response.status == 429
            assert MAX_COOLING - 5 < int(response.headers["Retry-After"]) <= 1.1 * MAX_COOLING + 1
            pace = server.context.monitor.fresh()["providers"]["e0"]["pace"]
            assert MAX_COOLING - 5 < pace["cooling"] <= 1.1 * MAX_COOLING

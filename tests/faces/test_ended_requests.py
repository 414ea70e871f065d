"""`GET /requests/{id}`: where the time of a request went, and who may see it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from yarl import URL

from aioserver.telemetry.ended_requests import MAX_KEPT
from aioserver.telemetry.request_log import RequestRecord
from tests.support.chat import CHAT, STREAMED, chat, to_end
from tests.support.keys import bearer, keys_of
from tests.support.pairs import pair_in
from tests.support.server import CONCURRENCY, QUICK, provider_entry
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

SECRET = "the words of a chat that nobody else sees"
STRANGE = ["a b", "a/b", "%2F", "ä€😀", "?x=1&y#z", "...", "x" * 256, 'q"\\', "}{", "{x}"]


async def ask(server: RunningServer, face: str, request_id: str, **headers: str) -> None:
    """Ask on *face*, and wait until the request has ended."""
    before = len(server.context.monitor.ended)
    if face == "websocket":
        async with server.session.ws_connect(f"{server.base}/ws/chat", headers=headers) as ws:
            await ws.send_json(chat(request_id, SECRET))
            await to_end(ws)
    elif face == "sse":
        body = {"request_id": request_id, "text": SECRET}
        async with server.session.post(server.sse, json=body, headers=headers) as response:
            await response.read()
    else:
        body = (STREAMED if face == "streamed" else CHAT) | {"model": "sim/m"}
        headers["X-Request-Id"] = request_id
        url = f"{server.v1}/chat/completions"
        async with server.session.post(url, json=body, headers=headers) as response:
            await response.read()
    await until(lambda: len(server.context.monitor.ended) > before)


async def look(server: RunningServer, request_id: str, **headers: str) -> tuple[int, Any]:
    url = URL(f"{server.base}/requests/{quote(request_id, safe='')}", encoded=True)
    async with server.session.get(url, headers=headers) as response:
        if response.status == 200:
            assert response.headers["Cache-Control"] == "no-store"
        assert SECRET not in await response.text()
        return response.status, await response.json()


@pytest.mark.parametrize("face", ["websocket", "sse", "whole", "streamed"])
async def test_a_request_is_shown_to_its_caller_and_to_admins_and_is_unknown_to_others(
    make_server: MakeServer, face: str
) -> None:
    server = await make_server(**keys_of("web", "app", "root"))
    await ask(server, face, "r1", **bearer("web"))

    status, own = await look(server, "r1", **bearer("web"))
    assert status == 200
    assert (own["request_id"], own["caller"], own["outcome"]) == ("r1", "web", "ok")
    assert own["duration_ms"] > 0
    assert own["parts"][0]["provider"] == "sim"
    assert ("prefill_ms" in own) == (face != "whole")
    assert await look(server, "r1", **bearer("root")) == (200, own)
    others = await look(server, "r1", **bearer("app"))
    assert (others[0], others[1]["error"]["code"]) == (404, "request_not_found")
    bodies = []
    for name in ("r1", "nobody-has-this"):
        url = f"{server.base}/requests/{name}"
        async with server.session.get(url, headers=bearer("app")) as response:
            bodies.append((response.status, await response.read()))
    assert bodies[0] == bodies[1]
    assert (await look(server, "r1"))[0] == 401


async def test_one_id_of_two_callers_shows_each_its_own(make_server: MakeServer) -> None:
    server = await make_server(**keys_of("web", "app"))
    for name in ("web", "app"):
        await ask(server, "sse", "r1", **bearer(name))

    shown = [(await look(server, "r1", **bearer(name)))[1]["caller"] for name in ("web", "app")]
    assert shown == ["web", "app"]


async def test_a_strange_id_is_found(server: RunningServer) -> None:
    for request_id in STRANGE:
        await ask(server, "websocket", request_id)

        status, fields = await look(server, request_id)
        assert (status, fields["request_id"]) == (200, request_id[:200])


async def test_a_request_that_newer_ones_have_pushed_out_is_unknown(
    server: RunningServer,
) -> None:
    await ask(server, "sse", "old")
    ended = server.context.monitor.ended
    for number in range(MAX_KEPT):
        ended.keep("", f"r{number}", (RequestRecord(), monotonic(), "", "ok", 200))

    assert (await look(server, "old"))[1]["error"]["code"] == "request_not_found"


async def test_failed_attempts_are_shown_with_their_faults(make_server: MakeServer) -> None:
    server = await make_server(
        Behaviour(ttft=0, interval=0, fail_rate=1.0, fail_status=503),
    )
    await ask(server, "sse", "r1")

    _, fields = await look(server, "r1")
    assert fields["outcome"] != "ok"
    faults = fields["faults"]
    assert len(faults) == fields["attempts"]
    assert {fault["provider"] for fault in faults} == {"sim"}
    assert all(fault["code"] and fault["ms"] >= 0 for fault in faults)
    assert [fault["at_ms"] for fault in faults] == sorted(fault["at_ms"] for fault in faults)


async def test_the_place_in_the_queue_of_a_key_is_shown(make_server: MakeServer) -> None:
    limits = {"max_concurrent": 1, "queue_size": 5}
    server = await make_server(Behaviour(ttft=0.1, interval=0), **keys_of("web", **limits))
    body = {"text": "hi"}

    async def one(number: int) -> None:
        question = {"request_id": f"r{number}", **body}
        async with server.session.post(
            server.sse, json=question, headers=bearer("web")
        ) as response:
            await response.read()

    await asyncio.gather(*map(one, range(3)))
    await until(lambda: len(server.context.monitor.ended) == 3)

    shown = [(await look(server, f"r{n}", **bearer("web")))[1] for n in range(3)]
    places = sorted((s["key_place"], s["key_waiting"]) for s in shown if "key_place" in s)
    assert places == [(1, 1), (2, 2)]
    assert all(s["key_wait_ms"] > 0 for s in shown if "key_place" in s)


async def test_the_wait_at_the_door_is_shown(make_server: MakeServer) -> None:
    changes = {f"{CONCURRENCY}.max_connections": 1}
    server = await make_server(Behaviour(ttft=0.1, interval=0), **changes)

    await asyncio.gather(*(ask(server, "sse", f"r{number}") for number in range(2)))
    await until(lambda: len(server.context.monitor.ended) == 2)

    shown = [(await look(server, f"r{number}"))[1] for number in range(2)]
    first, second = sorted(shown, key=lambda fields: fields.get("door_ms", 0.0))
    assert "door_ms" not in first
    assert second["door_ms"] > 0


async def test_a_new_connection_to_the_provider_is_shown(server: RunningServer) -> None:
    await ask(server, "sse", "new")
    await ask(server, "sse", "kept")

    shown = (await look(server, "new"))[1]
    assert 0 < shown["connect_ms"] < shown["duration_ms"]
    assert "connect_ms" not in (await look(server, "kept"))[1]


async def test_who_has_continued_an_answer_is_shown(make_server: MakeServer) -> None:
    async with Simulator(QUICK) as other:
        entry = {**provider_entry(other.base_url), "continuation": "prefill"}
        changes = {"llm.fallbacks": ["other"], "llm.providers.other": entry}
        server = await make_server(replace(QUICK, cut_after=9), **changes)
        await ask(server, "sse", "r1")

        shown = (await look(server, "r1"))[1]
        assert (shown["outcome"], shown["seams"]) == ("ok", 1)
        (seam,) = shown["continued"]
        assert seam == {
            "at": len(other.bodies[-1]["messages"][-1]["content"]),
            "from": "sim",
            "to": "other",
            "code": "provider_disconnected",
        }


async def test_a_typical_request_takes_less_than_a_kilobyte(server: RunningServer) -> None:
    await ask(server, "websocket", "0d8b1b5e-5f2c-4a2b-9a53-5c7b1f0a4b1e")

    kept = server.context.monitor.ended.find("", "0d8b1b5e-5f2c-4a2b-9a53-5c7b1f0a4b1e")
    assert kept is not None
    assert len(kept) < 1024


async def test_any_instance_shows_what_another_one_has_answered(tmp_path: Path) -> None:
    async with pair_in(tmp_path, **keys_of("web", "app", "root")) as pair:
        first, second = pair.servers
        await ask(first, "sse", "r1", **bearer("web"))

        own = await look(first, "r1", **bearer("web"))
        assert own[0] == 200
        for name in ("web", "root"):
            assert await look(second, "r1", **bearer(name)) == own
        code = (await look(second, "r1", **bearer("app")))[1]["error"]["code"]
        assert code == "request_not_found"

"""Deadlines that clients set, on every face: `start-within` bounds the waits, `deadline` the whole.

Each test waits for a fraction of a second, which is what its client asked for.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.protocol.request_headers import CLASS, DEADLINE, START_WITHIN
from tests.support.chat import CHAT, cancel, chat, to_end, until_status
from tests.support.faces import Seen, over_openai
from tests.support.keys import bearer, keys_of
from tests.support.passing import settings_for, silent
from tests.support.responses import connect, create
from tests.support.responses import to_end as to_response_end
from tests.support.server import CONCURRENCY, ENDLESS, PACED, SILENT, SIM_HTTP_CLIENT
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from tests.support.server import MakeServer, RunningServer

    Ask = Callable[[RunningServer, dict[str, str]], Awaitable[Seen]]

SOON = {DEADLINE: "0.2"}
START = {START_WITHIN: "0.2"}
ONE_PLACE = {
    f"{SIM_HTTP_CLIENT}.concurrent_requests": 1,
    f"{SIM_HTTP_CLIENT}.queue_size": 100,
}
# One start a minute.
PACE = {
    f"{SIM_HTTP_CLIENT}.requests_per_minute": 1,
    f"{SIM_HTTP_CLIENT}.queue_timeout": 100.0,
}
MESSAGES = {**CHAT, "max_tokens": 100}


async def _post(
    server: RunningServer, path: str, body: dict[str, Any], headers: dict[str, str]
) -> Seen:
    async with server.session.post(server.base + path, json=body, headers=headers) as response:
        raw = await response.read()
        fields = {name.lower(): value for name, value in response.headers.items()}
        seen = Seen(status=response.status, headers=fields, raw=raw)
    if response.status != 200:
        seen.error = json.loads(raw)["error"]
    return seen


def _payload(headers: dict[str, str]) -> dict[str, Any]:
    names = {START_WITHIN: "start_within", DEADLINE: "deadline", CLASS: "class"}
    return {
        names[name]: value if name == CLASS else float(value) for name, value in headers.items()
    }


async def over_websocket(server: RunningServer, headers: dict[str, str]) -> Seen:
    async with server.connect() as ws:
        await ws.send_json(chat("ws", **_payload(headers)))
        frames = await to_end(ws)
    return Seen(error=frames[-1]["chunk"], end=frames[-1]["status"])


async def over_handshake(server: RunningServer, headers: dict[str, str]) -> Seen:
    async with server.session.ws_connect(server.ws, headers=headers) as ws:
        await ws.send_json(chat("handshake"))
        frames = await to_end(ws)
    return Seen(error=frames[-1]["chunk"], end=frames[-1]["status"])


async def over_sse(server: RunningServer, headers: dict[str, str]) -> Seen:
    return await _sse(server, {}, headers)


async def over_sse_payload(server: RunningServer, headers: dict[str, str]) -> Seen:
    return await _sse(server, _payload(headers), {})


async def _sse(server: RunningServer, payload: dict[str, Any], headers: dict[str, str]) -> Seen:
    body = {"request_id": f"sse-{len(payload)}", "text": "Hello", **payload}
    async with server.session.post(server.sse, json=body, headers=headers) as response:
        raw = await response.read()
    if response.status != 200:
        return Seen(error=json.loads(raw)["error"], status=response.status)
    last = json.loads(raw.strip().rpartition(b"data: ")[2])
    return Seen(error=last["chunk"], end=last["status"])


async def over_completions(server: RunningServer, headers: dict[str, str]) -> Seen:
    body = {**CHAT, "stream": True}
    return await _post(server, "/v1/chat/completions", body, headers)


async def over_whole(server: RunningServer, headers: dict[str, str]) -> Seen:
    return await _post(server, "/v1/chat/completions", CHAT, headers)


async def over_kept(server: RunningServer, headers: dict[str, str]) -> Seen:
    return await _post(
        server, "/v1/chat/completions", CHAT, {**headers, "Idempotency-Key": "kept"}
    )


async def over_embeddings(server: RunningServer, headers: dict[str, str]) -> Seen:
    return await _post(server, "/v1/embeddings", {"model": "sim", "input": "Hello"}, headers)


async def over_messages(server: RunningServer, headers: dict[str, str]) -> Seen:
    return await _post(server, "/v1/messages", {**MESSAGES, "stream": True}, headers)


async def over_whole_messages(server: RunningServer, headers: dict[str, str]) -> Seen:
    return await _post(server, "/v1/messages", MESSAGES, headers)


async def over_responses(server: RunningServer, headers: dict[str, str]) -> Seen:
    return await _post(server, "/v1/responses", {"input": "Hello", "stream": True}, headers)


async def over_whole_responses(server: RunningServer, headers: dict[str, str]) -> Seen:
    return await _post(server, "/v1/responses", {"input": "Hello"}, headers)


async def over_responses_socket(server: RunningServer, headers: dict[str, str]) -> Seen:
    async with connect(server, headers=headers) as ws:
        await ws.send_json(create())
        last = (await to_response_end(ws))[-1]
    return Seen(error=last["error"], end=last["type"])


async def over_passthrough(server: RunningServer, headers: dict[str, str]) -> Seen:
    return await _post(server, "/v1/moderations", {"model": "sim", "input": "Hello"}, headers)


OWN = (over_websocket, over_handshake, over_sse, over_sse_payload, over_responses_socket)
HTTP = (
    *(over_completions, over_whole, over_kept, over_embeddings, over_messages),
    *(over_whole_messages, over_responses, over_whole_responses, over_passthrough),
)


async def _ask_all(
    server: RunningServer, faces: Sequence[Ask], headers: dict[str, str]
) -> list[tuple[Ask, Seen]]:
    seen = await asyncio.gather(*(ask(server, headers) for ask in faces))
    return list(zip(faces, seen, strict=True))


def _check_places(messages: Sequence[str], place: str) -> None:
    """Check that the *messages* say where a request has waited.

    On a busy machine some may not have come there before their deadline.
    """
    places = [re.fullmatch(r"could not start within 0\.2 s(: .*)?", each) for each in messages]
    assert all(places), messages
    assert any(each and f"position 1 at {place}" in each[0] for each in places), messages


def _told(seen: Seen) -> tuple[str, str]:
    """The code and the message of an error."""
    return seen.error["code"], seen.error.get("error") or seen.error["message"]


@asynccontextmanager
async def _taken(server: RunningServer) -> AsyncIterator[None]:
    """The one place at the provider is taken."""
    async with server.connect() as ws:
        await ws.send_json(chat("first"))
        await until_status(ws, "chunk")
        yield
        await ws.send_json(cancel("first"))
        await to_end(ws)


async def _ended(server: RunningServer, kind: str, count: int = 1) -> None:
    """Nothing of it is left, and it was counted."""
    await server.nothing_held()
    await server.simulator.until(lambda stats: stats.active == 0)
    assert await server.counted("deadlines", "kind") == {(kind,): count}


async def test_an_answer_ends_at_its_deadline_and_its_provider_is_left(
    make_server: MakeServer,
) -> None:
    server = await make_server(SILENT, **{f"{SIM_HTTP_CLIENT}.read_timeout": 600.0})
    # The simulator has no other paths: the one that passes is below.
    faces = (*OWN, *HTTP[:-1])

    for ask, seen in await _ask_all(server, faces, SOON):
        code, message = _told(seen)
        assert code == "deadline_exceeded", ask
        # A busy machine may not have sent it by then.
        sent = message == "the answer had not ended after 0.2 s: sim was answering"
        assert sent or message.startswith("could not start within 0.2 s"), ask
        if ask in HTTP:
            assert (seen.status, seen.headers["x-should-retry"]) == (504, "false")
            assert ("retry-after" in seen.headers) != sent, "it may have cost"
    await _ended(server, "whole", len(faces))


async def test_a_request_that_is_passed_on_ends_at_its_deadline(make_server: MakeServer) -> None:
    async with silent() as (provider, _):
        server = await make_server(**settings_for(provider))

        seen = await over_passthrough(server, SOON)

        assert (seen.status, seen.error["code"]) == (504, "deadline_exceeded")
        await until(lambda: not provider.open)
    await server.nothing_held()


async def test_a_request_that_cannot_start_in_time_is_told_where_it_has_waited(
    make_server: MakeServer,
) -> None:
    server = await make_server(ENDLESS, **ONE_PLACE)
    faces, messages = (*OWN, *HTTP), list[str]()
    async with _taken(server):
        for ask, seen in await _ask_all(server, faces, START):
            code, message = _told(seen)
            assert code == "deadline_exceeded", ask
            messages.append(message)
            if ask in HTTP:
                assert (seen.status, seen.headers["x-should-retry"]) == (504, "false")
                assert int(seen.headers["retry-after"]) >= 1
        assert server.simulator.stats().active == 1, "it was asked for nothing"
    _check_places(messages, "sim")
    await _ended(server, "start", len(faces))


async def test_errors_have_the_form_of_their_face(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS, **ONE_PLACE)
    async with _taken(server):
        faces = (over_messages, over_completions, over_websocket)
        (_, messages), (_, completions), (_, frame) = await _ask_all(server, faces, START)

    assert messages.error["type"] == "timeout_error"
    assert completions.error["type"] == "provider_error"
    assert frame.error["retryable"] is False


async def test_a_stream_that_has_begun_ends_with_the_error(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS)
    faces = (over_completions, over_sse, over_messages, over_responses_socket)

    for ask, seen in await _ask_all(server, faces, {DEADLINE: "0.3"}):
        text = seen.raw.decode() + json.dumps(seen.error)
        assert "deadline_exceeded" in text, ask
        assert "[DONE]" not in text, ask
    await _ended(server, "whole", len(faces))


async def test_the_ledger_says_that_an_answer_was_cut(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = await make_server(ENDLESS, **{"usage.path": str(tmp_path / "usage")})

    def lines() -> list[Any]:
        files = (tmp_path / "usage").glob("*.jsonl")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    # A busy machine may not have sent the first in time.
    for _ in range(20):
        await over_completions(server, {DEADLINE: "0.3", CLASS: "batch"})
        await server.nothing_held()
        if server.simulator.stats().requests:
            break
    await until(lambda: bool(lines()))
    assert [(line["outcome"], line["class"]) for line in lines()] == [("cut", "batch")]


async def test_all_readers_of_an_answer_see_its_deadline(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS)
    async with server.connect() as first, server.connect() as second:
        for ws in (first, second):
            await ws.send_json(chat("r", deadline=0.3))

        for ws in (first, second):
            assert (await to_end(ws))[-1]["chunk"]["code"] == "deadline_exceeded"
    await _ended(server, "whole")


async def test_the_wait_at_the_door_counts(make_server: MakeServer) -> None:
    server = await make_server(ENDLESS, **{f"{CONCURRENCY}.max_connections": 1})
    async with _taken(server):
        seen = await over_completions(server, START)

        assert seen.status == 504
        assert seen.error["message"].startswith("could not start within 0.2 s")
        assert seen.headers["x-should-retry"] == "false"
        assert seen.headers["retry-after"]
    await _ended(server, "start")


async def test_a_response_that_waits_for_another_on_its_lane_is_refused_in_its_turn(
    make_server: MakeServer,
) -> None:
    server = await make_server(PACED)
    async with connect(server, headers={START_WITHIN: "0.2"}) as ws:
        await ws.send_json(create())
        await ws.send_json(create())

        # A busy machine may not have sent the first one in time either.
        first, second = [(await to_response_end(ws))[-1] for _ in range(2)]
    assert (
        first["type"] == "response.completed" or first["error"]["code"] == second["error"]["code"]
    )
    assert second["error"]["code"] == "deadline_exceeded"
    await server.nothing_held()


async def test_a_pace_that_is_too_slow_is_known_at_once(make_server: MakeServer) -> None:
    server = await make_server(**PACE)
    await over_openai(server, "sim")
    faces = (over_completions, over_whole, over_passthrough)

    # Its own timer would have to run for half a minute.
    for ask, seen in await _ask_all(server, faces, {START_WITHIN: "30"}):
        assert seen.status == 504, ask
        assert "sim is at its requests_per_minute=1; it could start in" in seen.error["message"]
        assert int(seen.headers["retry-after"]) > 30
    await _ended(server, "start", len(faces))


async def test_a_pace_that_is_too_slow_leads_to_the_next_provider(make_server: MakeServer) -> None:
    server = await make_server(
        **{
            **PACE,
            "llm.providers.other": {"like": "sim", "http_client": {"requests_per_minute": 1000}},
            "llm.fallbacks": ["other"],
        }
    )
    await over_whole(server, {})

    seen = await over_whole(server, {START_WITHIN: "30"})

    assert (seen.status, seen.headers["x-aioserver-provider"]) == (200, "other")


async def test_a_limit_of_the_key_that_is_too_slow_is_known_at_once(
    make_server: MakeServer,
) -> None:
    server = await make_server(**keys_of("web", "root", requests_per_minute=1))
    headers = bearer("web")
    assert (await over_whole(server, headers)).status == 200

    for ask in (over_whole, over_completions):
        seen = await ask(server, {**headers, START_WITHIN: "30"})
        assert seen.error["code"] == "deadline_exceeded"
        assert "requests_per_minute=1 of this key reached" in seen.error["message"]
    assert (await over_whole(server, headers)).status == 429


async def test_the_wait_at_the_key_counts(make_server: MakeServer) -> None:
    keys = keys_of("web", "root", max_concurrent=1, queue_size=100)
    server = await make_server(ENDLESS, **keys)
    faces, messages = (*OWN, *HTTP), list[str]()
    # Of a WebSocket the headers of the handshake count.
    headers = bearer("web")
    server.session.headers.update(headers)
    async with _taken(server):
        for ask, seen in await _ask_all(server, faces, START):
            code, message = _told(seen)
            assert code == "deadline_exceeded", ask
            messages.append(message)
    _check_places(messages, "its key")
    server.session.headers.update(bearer("root"))
    await _ended(server, "start", len(faces))


async def test_a_backoff_that_is_longer_than_what_is_left_does_not_begin(
    make_server: MakeServer,
) -> None:
    server = await make_server(
        **{f"{SIM_HTTP_CLIENT}.max_retries": 3, f"{SIM_HTTP_CLIENT}.backoff_factor": 60.0}
    )
    body = {**CHAT, "model": "sim/fault-status-500"}

    seen = await _post(server, "/v1/chat/completions", body, {DEADLINE: "10"})

    assert seen.error["code"] == "deadline_exceeded"
    assert "; the next attempt in " in seen.error["message"]
    await _ended(server, "whole")


async def test_a_known_answer_has_its_own_deadline(make_server: MakeServer) -> None:
    server = await make_server(PACED)
    body = {"request_id": "r", "text": "Hello"}
    async with server.session.post(server.sse, json=body) as first:
        await first.content.readline()

        async with server.session.post(server.sse, json={**body, "deadline": 0.05}) as second:
            assert b"event: complete" in await second.read()
        assert b"event: complete" in await first.read()
    assert not await server.counted("deadlines", "kind")


async def test_the_smaller_of_two_bounds_holds(make_server: MakeServer) -> None:
    server = await make_server(SILENT)
    body = {"request_id": "r", "text": "Hello", "deadline": 0.2}

    async with server.session.post(server.sse, json=body, headers={DEADLINE: "60"}) as response:
        assert b" 0.2 s" in await response.read()


@pytest.mark.parametrize("name", [START_WITHIN, DEADLINE, CLASS])
async def test_a_term_that_is_none_is_refused(server: RunningServer, name: str) -> None:
    for value in ("0", "-1", "urgent", "", "1e3", "nan", "86400.1", "1" * 40, "1 2"):
        seen = await over_completions(server, {name: value})

        assert (seen.status, seen.error["code"]) == (400, "invalid_request"), value
        assert seen.error["param"] == name


async def test_a_handshake_with_a_bound_that_is_none_is_refused(server: RunningServer) -> None:
    async with server.session.get(
        server.base + "/v1/responses",
        headers={
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
            DEADLINE: "soon",
        },
    ) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == DEADLINE


async def test_a_term_in_a_payload_that_is_none_is_refused(server: RunningServer) -> None:
    for field, value in [
        ("start_within", "2"),
        ("deadline", 0),
        ("deadline", [1]),
        ("class", "urgent"),
        ("class", 1),
    ]:
        body = {"request_id": "r", "text": "Hello", field: value}
        async with server.session.post(server.sse, json=body) as response:
            assert response.status == 400, field
            assert (await response.json())["error"]["param"] == field, field


async def test_a_page_of_another_origin_may_send_the_headers(server: RunningServer) -> None:
    async with server.session.options(
        server.sse,
        headers={
            "Origin": "http://page.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": f"{START_WITHIN}, {DEADLINE}, {CLASS}",
        },
    ) as response:
        allowed = response.headers["Access-Control-Allow-Headers"]
    assert {START_WITHIN, DEADLINE, CLASS} <= set(allowed.split(", "))
    await until(lambda: not any(server.held().values()))

"""Every fault of a provider, as a client sees it on each face.

Afterwards nothing is held, and it was counted: what became of each try, and how each request
ended.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from tests.support.chat import CHAT
from tests.support.faces import Seen, expected_text, over_openai, over_sse, over_websocket
from tests.support.server import HTTP_CLIENT, MakeServer, RunningServer
from tests.support.simulator import Behaviour

IMPATIENT = {"llm.providers.sim.http_client": {**HTTP_CLIENT, "read_timeout": 0.3}}
# What the simulator says in its refusals; of those of our key nothing may be shown.
TEXTS_OF_THE_PROVIDER = (b"Incorrect API key", b"current quota", b"The simulator says", b"billing")


async def ask_and_count(
    server: RunningServer,
    model: str,
    outcome: str = "ok",
    *,
    code: str | None = None,
    kept: bool | None = None,
) -> tuple[Seen, Seen, Seen]:
    """The same question on three faces; then nothing is held, and all of it was counted.

    *outcome*: what became of each try. *code*: how each request ended, where that is not what the
    client of the OpenAI face sees. *kept*: whether the provider's connection went back to the
    pool.
    """
    tries, ends = await counts(server)
    asked = server.simulator.stats().requests
    seen = await asyncio.gather(
        over_websocket(server, model), over_sse(server, model), over_openai(server, model)
    )
    await server.nothing_held()
    asked = server.simulator.stats().requests - asked
    more, ended = await counts(server)
    more.subtract(tries)
    ended.subtract(ends)
    codes = [seen[0].code or "", seen[1].code or "", code or seen[2].code or ""]
    assert +ended == Counter(zip(("websocket", "sse", "openai"), codes, strict=True))
    del more["stale",]  # those were made again
    assert +more == Counter({(outcome,): asked})
    assert not await server.counted("retries", "reason")
    if kept is not None:
        idle = server.provider.stats().pool.idle
        assert (idle > 0) == kept, f"{idle} connections in the pool"
    return seen


async def counts(
    server: RunningServer,
) -> tuple[Counter[tuple[str, ...]], Counter[tuple[str, ...]]]:
    """The attempts by outcome, and the requests by face and the code with which they have
    ended.
    """
    return (
        await server.counted("provider_attempts", "outcome"),
        await server.counted("requests", "face", "code"),
    )


# Before the first event: the HTTP status says it.

AUTH, ERROR, LIMITED = "provider_auth_error", "provider_error", "provider_rate_limited"
BAD, CUT, SILENT = "provider_bad_response", "provider_disconnected", "read_timeout"


def patience(code: str) -> dict[str, Any]:
    """Changes by which silence soon ends, only where it must: on a busy machine anybody may be
    silent.
    """
    return IMPATIENT if code == SILENT else {}


# The status and the code that a client sees, what became of the try, and whether the provider's
# connection is good for another.
BEFORE = {
    "fault-status-401": (502, AUTH, "http_4xx", True),
    "fault-quota": (502, AUTH, "http_4xx", True),
    "fault-status-500": (502, ERROR, "http_5xx", True),
    "fault-status-429": (429, LIMITED, "http_429", True),
    "fault-retry-after-7": (429, LIMITED, "http_429", True),
    "fault-html": (502, BAD, "bad_response", True),
    "fault-not-http": (502, BAD, "bad_response", False),
    "fault-drop": (502, CUT, "disconnected", False),
    "fault-silent": (504, SILENT, "timeout", False),
}
BEFORE_STREAMED = {
    **BEFORE,
    "fault-head-only": (504, SILENT, "timeout", False),
    "fault-stall-0": (504, SILENT, "timeout", False),  # its opening event says nothing yet
    "fault-comments-stall-3": (200, SILENT, "timeout", False),  # they pass, but are no answer
    "fault-error-first": (502, ERROR, "http_5xx", False),
    "fault-error-first-402": (502, AUTH, "http_4xx", False),
    "fault-error-first-429": (429, LIMITED, "http_429", False),
    "fault-error-first-400": (400, ERROR, "http_4xx", False),
}
RETRYABLE_NOT = {AUTH}


@pytest.mark.parametrize("model", BEFORE_STREAMED)
async def test_a_fault_before_the_first_event_has_its_status_and_code(
    model: str, make_server: MakeServer
) -> None:
    status, code, outcome, kept = BEFORE_STREAMED[model]
    server = await make_server(**patience(code))

    ws, sse, v1 = await ask_and_count(server, model, outcome, code=code, kept=kept)

    assert [answer.end for answer in (ws, sse, v1)] == ["error"] * 3
    assert [answer.code for answer in (ws, sse)] == [code] * 2
    assert v1.code == (code if status != 400 else 400)
    assert [answer.text for answer in (ws, sse, v1)] == [""] * 3
    assert v1.status == status
    retryable = code not in RETRYABLE_NOT and status != 400
    assert ws.error["retryable"] == sse.error["retryable"] == retryable
    if code == AUTH:
        for answer in (ws, sse, v1):
            assert not any(text in answer.raw for text in TEXTS_OF_THE_PROVIDER)
        assert server.provider.stats().flagged
        assert server.provider.meter.key_refused.value >= 1
    if status == 429:
        assert 1 <= int(v1.headers["retry-after"]) <= 120
        assert ws.error["retry_after"] > 0
    elif status > 500:
        assert v1.headers["x-should-retry"] == "false"
    # One that limits us or refuses our key is left alone: who comes next waits, or is told at
    # once.
    left_alone = status == 429 or code == AUTH
    assert server.simulator.stats().requests in ((1, 2, 3) if left_alone else (3,))


@pytest.mark.parametrize(
    "model", ["fault-quota", "fault-status-500", "fault-drop", "fault-silent"]
)
async def test_a_fault_of_an_answer_in_one_piece_has_its_status_and_code(
    model: str, make_server: MakeServer
) -> None:
    status, code, outcome, kept = BEFORE[model]
    server = await make_server(**patience(code))

    seen = await over_openai(server, model, stream=False)

    assert (seen.status, seen.code) == (status, code)
    await server.nothing_held()
    tries, ends = await counts(server)
    assert (tries, ends) == (Counter({(outcome,): 1}), Counter({("openai", code): 1}))
    assert (server.provider.stats().pool.idle > 0) == kept


@pytest.mark.parametrize("status", [400, 404])
async def test_the_callers_own_fault_passes_with_status_and_body(
    status: int, server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    model = f"fault-status-{status}"
    async with server.session.post(
        f"{server.simulator.base_url}/chat/completions", json={"model": model, **CHAT}
    ) as response:
        assert response.status == status
        original = await response.read()

    ws, sse, v1 = await ask_and_count(server, model, "http_4xx", code=ERROR, kept=True)
    whole = await over_openai(server, model, stream=False)

    assert (v1.status, v1.raw) == (whole.status, whole.raw) == (status, original)
    reason = json.loads(original)["error"]["message"]
    for answer in (ws, sse, await over_sse(server, model, streaming=False)):
        assert (answer.code, answer.error["retryable"]) == ("provider_error", False)
        assert answer.error["error"] == f"sim answered {status}: {reason}"
    # It may repeat what the caller has written.
    assert reason not in caplog.text


# After the first event: one error event, then the end.

WITHIN = {
    "fault-stall-3": (SILENT, "timeout"),
    "fault-half-line-3": (SILENT, "timeout"),
    "fault-cut-mid-3": (CUT, "disconnected"),
    "fault-end-3": (CUT, "disconnected"),
    "fault-bad-chunk-3": (BAD, "bad_response"),
    "fault-bad-utf8-3": (BAD, "bad_response"),
    "fault-endless-line": (BAD, "bad_response"),
}


@pytest.mark.parametrize("model", WITHIN)
async def test_a_fault_within_the_answer_is_one_error_event_and_no_done(
    model: str, make_server: MakeServer
) -> None:
    code, outcome = WITHIN[model]
    server = await make_server(**patience(code))
    text = await expected_text(server)

    ws, sse, v1 = await ask_and_count(server, model, outcome, kept=False)

    assert v1.status == 200
    for answer in (ws, sse, v1):
        assert (answer.end, answer.code) == ("error", code)
        assert answer.text
        assert text.startswith(answer.text), "what was good before it, and never part of a line"
        assert b"xxxxxxxx" not in answer.raw
    assert ws.text == sse.text == v1.text


@pytest.mark.parametrize("model", ["fault-error-event-3", "fault-error-chunk-3"])
async def test_an_error_object_in_the_stream_is_its_end(model: str, server: RunningServer) -> None:
    text = await expected_text(server)

    ws, sse, v1 = await ask_and_count(server, model, "http_5xx", code=ERROR)

    assert ws.code == sse.code == "provider_error"
    assert (v1.status, v1.end) == (200, "error")
    assert v1.error["message"] in {
        "The server had an error processing your request.",
        "Provider disconnected unexpectedly",
    }, "the provider's own event passes"
    assert v1.raw.count(b'"error":{') == 1
    for answer in (ws, sse, v1):
        assert answer.text
        assert text.startswith(answer.text)


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("fault-head-only", 504, "read_timeout"),
        ("fault-cut-3", 502, "provider_disconnected"),
        ("fault-end-3", 502, "provider_bad_response"),
        ("fault-bad-utf8-3", 502, "provider_bad_response"),
    ],
)
async def test_half_an_answer_in_one_piece_is_no_answer(
    model: str, status: int, code: str, make_server: MakeServer
) -> None:
    server = await make_server(**patience(code))

    seen = await over_openai(server, model, stream=False)

    assert (seen.status, seen.code) == (status, code)
    await server.nothing_held()


async def test_a_fault_after_a_head_sent_for_silence_is_an_error_event(
    make_server: MakeServer,
) -> None:
    # Takes a second: the silence must be longer than a busy machine is late with the heartbeat.
    patient = {"llm.providers.sim.http_client": {**HTTP_CLIENT, "read_timeout": 1.0}}
    server = await make_server(**{**patient, "chat.websocket.ping_interval": 0.1})

    seen = await over_openai(server, "fault-silent")

    assert (seen.status, seen.end, seen.code) == (200, "error", "read_timeout")
    assert seen.raw.startswith(b": keep-alive\n\n")
    await server.nothing_held()


# Unusual, but good.

GOOD = {  # whether the connection is kept; None: that depends on how the bytes come
    "fault-no-done": True,
    "fault-after-done": None,
    "fault-open-done": False,
    "fault-wrong-length": False,
    "fault-early-done-4": True,
    "fault-crlf": True,
    "fault-cr": True,
    "fault-bom": True,
    "fault-multi-data": True,
    "fault-comments": True,
    "fault-thinking": True,
    "fault-cookie": True,
    "fault-1xx": True,
    "fault-http10": False,
    "fault-close-idle": False,
    "fault-slices": False,
    "fault-slow-1": True,
    "fault-no-usage": True,
    "fault-usage-x-groq": True,
    # The last ones: they change the pace.
    "fault-limits-nonsense": True,
    "fault-limits-day": True,
    "fault-limits-spent": True,
}
SHORT = {"fault-slices", "fault-early-done-4"}


async def test_unusual_but_good_answers_read_the_same_on_every_face(
    server: RunningServer,
) -> None:
    text = await expected_text(server)

    for model, kept in GOOD.items():
        server.provider.pools.pool.drop_idle()
        ws, sse, v1 = await ask_and_count(server, model, kept=kept)

        for answer in (ws, sse, v1):
            assert (answer.end, answer.error) == ("complete", {}), model
            assert answer.text == text if model not in SHORT else text.startswith(answer.text)
            assert answer.text, model
        assert ws.text == sse.text == v1.text
        assert "set-cookie" not in v1.headers
        assert b'"error"' not in v1.raw.replace(b'"error":null', b"")


@pytest.mark.parametrize(
    ("model", "source"),
    [("m", "provider"), ("fault-usage-x-groq", "provider"), ("fault-no-usage", "estimate")],
)
async def test_the_cost_of_an_answer_is_the_providers_usage_or_an_estimate(
    model: str, source: str, server: RunningServer
) -> None:
    seen = await over_websocket(server, model)

    usage = json.loads(seen.raw.splitlines()[-1][seen.raw.rindex(b'{"request_id"') :])
    assert (usage["chunk"]["metadata"]["usage"] is not None) == (source == "provider")
    tokens = await server.counted("tokens", "type", "source")
    assert tokens["output", source] > 20
    assert {where for _, where in tokens} == {source}


async def test_events_come_back_byte_for_byte(make_server: MakeServer) -> None:
    # Otherwise the provider is asked for its usage, which the client has not asked for.
    server = await make_server(**{"llm.providers.sim.stream_usage": False})
    server.simulator.behaviour = Behaviour(ttft=0, interval=0, tokens=5)
    body = {"model": "fault-comments", **CHAT, "stream": True}
    url = f"{server.simulator.base_url}/chat/completions"
    async with server.session.post(url, json=body) as response:
        original = await response.read()

    seen = await over_openai(server, "fault-comments")

    def alike(raw: bytes) -> list[bytes]:
        answers = [line.partition(b'"model"')[2] or line for line in raw.split(b"\n")]
        assert len(answers) > 20
        return answers

    assert alike(seen.raw) == alike(original), "but for the id and the time in each event"


# Leaving.


async def test_comments_for_ever_are_no_answer_and_end_with_their_reader(
    make_server: MakeServer,
) -> None:
    server = await make_server(**IMPATIENT)
    body = {"model": "fault-comments-endless", **CHAT, "stream": True}
    async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
        raw = b""
        while raw.count(b": OPENROUTER PROCESSING") < 100:  # half a second: no silence
            raw += await response.content.readany()
        assert b"data:" not in raw
        assert server.held()["running"] == 1
        response.close()

    await server.simulator.until(lambda stats: stats.aborted == 1)
    await server.nothing_held()
    assert await server.counted("provider_attempts", "outcome") == {("cancelled",): 1}
    # What was sent may have cost something.
    assert set(await server.counted("tokens", "source")) == {("estimate",)}


async def test_an_endless_answer_keeps_a_bounded_part_of_itself(make_server: MakeServer) -> None:
    most = 1 << 18
    server = await make_server(**{"chat.streams.max_stream_bytes": most})
    store, kept, size = server.owners.streams, 0, 0
    async with server.connect() as ws:
        # A question with `messages` has no history, for which the text would be kept as well.
        messages = [{"role": "user", "content": "Hello"}]
        payload = {"messages": messages, "model": "fault-endless"}
        await ws.send_json({"action": "chat", "request_id": "r1", "payload": payload})
        while size < 6 * most:
            size += len(await ws.receive_str())
            kept = max(kept, store.stats().bytes)
        await ws.send_json({"action": "cancel", "request_id": "r1"})
        while '"cancelled"' not in await ws.receive_str():
            pass

    assert kept <= 1.1 * most
    await server.simulator.until(lambda stats: stats.aborted == 1)
    await server.nothing_held()
    assert server.provider.stats().pool.open == 0

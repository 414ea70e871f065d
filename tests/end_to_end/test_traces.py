"""The spans of requests, as a collector gets them, and the parent that a provider gets."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.callers import Caller
from tests.support.chat import CHAT, STREAMED, chat, resume, to_end, until_status, whole
from tests.support.collector import collecting
from tests.support.keys import bearer, key_of, keys_of
from tests.support.logs import fields_of
from tests.support.passing import answer
from tests.support.raw import Raw
from tests.support.scripted_provider import DONE, EVENT_STREAM, LAST_CHUNK, ScriptedProvider, chunk
from tests.support.server import (
    CONCURRENCY,
    PACED,
    QUICK,
    SILENT,
    SIM_HTTP_CLIENT,
    provider_entry,
    running,
)
from tests.support.simulator import Behaviour, Simulator
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.collector import Collector, Span
    from tests.support.scripted_provider import Peer
    from tests.support.server import RunningServer

TRACE, CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{CLIENT}-01"
CANARY = "canary prompt"
ASK = {"messages": [{"role": "user", "content": CANARY}]}
# The name of the SERVER span, and what is asked, by face.
PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat/completions": ("POST /v1/chat/completions", {**ASK, "temperature": 0.5}),
    "chat/completions streamed": ("POST /v1/chat/completions", {**ASK, "stream": True}),
    "messages": ("POST /v1/messages", {**ASK, "max_tokens": 7}),
    "messages streamed": ("POST /v1/messages", {**ASK, "max_tokens": 7, "stream": True}),
    "responses": ("POST /v1/responses", {"input": CANARY}),
    "responses streamed": ("POST /v1/responses", {"input": CANARY, "stream": True}),
    "embeddings": ("POST /v1/embeddings", {"input": CANARY}),
    "websocket": ("chat", {}),
    "sse": ("chat", {}),
}


@asynccontextmanager
async def tracing(
    tmp_path: Path, behaviour: Behaviour = QUICK, /, **changes: Any
) -> AsyncIterator[tuple[RunningServer, Collector]]:
    """A server, and the collector that has all of its spans after the block."""
    async with collecting() as collector:
        endpoint = {"tracing.otlp_endpoint": collector.url}
        async with running(tmp_path / "config.yaml", behaviour, endpoint | changes) as server:
            yield server, collector


async def ask(server: RunningServer, face: str, headers: dict[str, str]) -> None:
    path, _, streamed = face.partition(" ")
    if face == "websocket":
        async with server.connect(headers=headers) as ws:
            await ws.send_json(chat("r1", CANARY))
            assert (await to_end(ws))[-1]["status"] == "complete"
        return
    body = {"request_id": "r1", "text": CANARY} if face == "sse" else PATHS[face][1]
    url = server.sse if face == "sse" else f"{server.v1}/{path}"
    async with server.session.post(url, json=body, headers=headers) as response:
        answer = await response.read()
        assert response.status == 200, answer
        assert (
            bool(streamed) == response.content_type.startswith("text/event-stream")
            or face == "sse"
        )


def only(spans: list[Span], kind: str) -> Span:
    [span] = [span for span in spans if span.kind == kind]
    return span


@pytest.mark.parametrize("face", PATHS)
async def test_a_request_of_each_face_has_its_span_and_that_of_its_attempt(
    tmp_path: Path, face: str
) -> None:
    headers = {"traceparent": PARENT, "tracestate": "a=b", **bearer("web")}
    async with tracing(tmp_path, **keys_of("web")) as (server, collector):
        await ask(server, face, headers)
        await server.nothing_held()
        port = int(server.simulator.base_url.rpartition(":")[2].partition("/")[0])

    request, attempt = only(collector.spans, "SERVER"), only(collector.spans, "CLIENT")
    assert len(collector.spans) == 2
    assert request.name == PATHS[face][0]
    assert (request.trace_id, request.parent_id, request.remote) == (TRACE, CLIENT, True)
    assert (attempt.trace_id, attempt.parent_id, attempt.remote) == (TRACE, request.span_id, False)
    assert request.state == attempt.state == "a=b"
    assert request.start <= attempt.start < attempt.end <= request.end
    assert not request.failed
    assert not attempt.failed
    shown = request.attributes
    assert shown["aioserver.outcome"] == "ok"
    assert shown["aioserver.attempts"] == 1
    assert shown["aioserver.caller"] == "web"
    assert shown.get("http.response.status_code") == (None if request.name == "chat" else 200)
    asked = attempt.attributes
    assert asked["gen_ai.provider.name"] == "sim"
    assert (asked["server.address"], asked["server.port"]) == ("127.0.0.1", port)
    operation = "embeddings" if face == "embeddings" else "chat"
    assert attempt.name == f"{operation} sim-model"
    assert asked["gen_ai.operation.name"] == operation
    assert asked["gen_ai.request.model"] == "sim-model"
    streamed = "streamed" in face or request.name == "chat"
    assert asked.get("gen_ai.request.stream") is (True if streamed else None)
    assert ("gen_ai.response.time_to_first_chunk" in asked) is streamed
    assert asked["gen_ai.response.model"] == "sim-model"
    # Neither the question, nor the key, nor the answer.
    sent = b"".join(collector.bodies)
    assert CANARY.encode() not in sent
    assert key_of("web").encode() not in sent


async def test_the_attempt_says_what_was_asked_and_how_it_was_answered(tmp_path: Path) -> None:
    options = {"temperature": 1, "max_completion_tokens": 5, "max_tokens": "many"}
    async with tracing(tmp_path) as (server, collector):
        for more in ({}, {"max_tokens": 5}, options):
            body = {
                **STREAMED,
                "temperature": 1,
                "stream_options": {"include_usage": True},
                **more,
            }
            async with server.session.post(f"{server.v1}/chat/completions", json=body) as response:
                await response.read()

    first, second, third = [span.attributes for span in collector.spans if span.kind == "CLIENT"]
    assert "gen_ai.request.max_tokens" not in first
    assert second["gen_ai.request.max_tokens"] == 5
    assert second["gen_ai.request.temperature"] == 1.0
    assert second["gen_ai.usage.output_tokens"] == 5
    assert second["gen_ai.usage.input_tokens"] > 0
    assert second["gen_ai.response.finish_reasons"] == ["length"]
    assert first["gen_ai.response.finish_reasons"] == ["stop"]
    assert second["gen_ai.response.id"].startswith("chatcmpl-")
    # A value of another type is the provider's to refuse.
    assert "gen_ai.request.temperature" not in third


async def test_the_parts_of_a_prompt_that_a_cache_had_are_those_of_the_attempt(
    tmp_path: Path,
) -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "total_tokens": 120,
        "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 30},
        "completion_tokens_details": {"reasoning_tokens": 7},
    }
    message = {"role": "assistant", "content": "yes"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    body = json.dumps({"id": "c", "model": "m", "choices": choices, "usage": usage})

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer(body.encode()))

    async with ScriptedProvider(play) as provider:
        entry = {"llm.providers.sim": provider_entry(provider.url)}
        async with tracing(tmp_path, **entry) as (server, collector):
            response = await server.session.post(f"{server.v1}/chat/completions", json=CHAT)
            assert response.status == 200, await response.text()
            await response.read()

    shown = only(collector.spans, "CLIENT").attributes
    counted = {key: value for key, value in shown.items() if key.startswith("gen_ai.usage.")}
    assert counted == {
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.cache_read.input_tokens": 60,
        "gen_ai.usage.cache_write.input_tokens": 30,
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.reasoning.output_tokens": 7,
    }


async def test_a_request_that_is_passed_on_is_named_without_the_id_of_an_object(
    tmp_path: Path,
) -> None:
    account = {"llm.providers.sim.account_paths": True}
    async with tracing(tmp_path, **account) as (server, collector):
        response = await server.session.get(f"{server.v1}/files/file-7/content")
        # The simulator has no files.
        assert response.status == 404
        await response.read()

    request, attempt = only(collector.spans, "SERVER"), only(collector.spans, "CLIENT")
    assert request.name == attempt.name == "GET /v1/files"
    assert b"file-7" not in b"".join(collector.bodies)
    assert request.attributes["http.request.method"] == "GET"
    assert request.attributes["http.response.status_code"] == 404
    # It is the caller's fault: an error of the client that we are, and none of this server.
    assert (request.failed, attempt.failed) == (False, True)
    assert request.attributes["error.type"] == attempt.attributes["error.type"] == "provider_error"
    assert "gen_ai.operation.name" not in attempt.attributes


class Listener:
    """A provider that keeps the heads of its requests, and fails those before the last of
    *answers*.
    """

    def __init__(self, answers: int = 1) -> None:
        self.heads: list[str] = []
        self._answers = answers

    async def play(self, peer: Peer) -> None:
        while True:
            head = (await peer.request()).partition(b"\r\n\r\n")[0]
            self.heads.append(head.decode("latin-1"))
            if len(self.heads) < self._answers:
                await peer.send(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
                continue
            event = b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\n'
            await peer.send(EVENT_STREAM, chunk(event) + chunk(DONE) + LAST_CHUNK)

    def sent(self, name: str) -> list[str]:
        """The values of the header *name*, of all requests."""
        lines = [line for head in self.heads for line in head.split("\r\n")]
        return [line.partition(": ")[2] for line in lines if line.lower().startswith(f"{name}:")]


async def test_the_provider_gets_the_attempt_as_its_parent_and_the_log_names_the_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    listener = Listener(answers=2)
    async with ScriptedProvider(listener.play) as provider:
        changes = {
            "llm.providers.own": provider_entry(provider.url, max_retries=1, backoff_factor=0.01),
            "llm.active": "own",
            "logging.level": "INFO",
        }
        async with tracing(tmp_path, **changes) as (server, collector):
            await ask(server, "chat/completions streamed", {"traceparent": f"cc-{'x' * 32}"})

    request = only(collector.spans, "SERVER")
    failed, good = [span for span in collector.spans if span.kind == "CLIENT"]
    assert listener.sent("traceparent") == [
        f"00-{request.trace_id}-{failed.span_id}-01",
        f"00-{request.trace_id}-{good.span_id}-01",
    ]
    assert request.parent_id == ""
    assert failed.failed
    assert failed.attributes["error.type"] == "provider_error"
    assert failed.attributes["http.response.status_code"] == 500
    assert not good.failed
    assert request.attributes["aioserver.attempts"] == 2
    [fields] = fields_of(caplog)
    assert fields["trace_id"] == request.trace_id


async def test_a_client_that_samples_no_trace_gets_none(tmp_path: Path) -> None:
    listener = Listener()
    parent = f"00-{TRACE}-{CLIENT}-00"
    async with ScriptedProvider(listener.play) as provider:
        changes = {"llm.providers.own": provider_entry(provider.url), "llm.active": "own"}
        async with tracing(tmp_path, **changes) as (server, collector):
            await ask(server, "chat/completions streamed", {"traceparent": parent})

    assert listener.sent("traceparent") == [parent]
    assert collector.spans == []


async def test_a_failover_has_an_attempt_at_each_provider(tmp_path: Path) -> None:
    async with Simulator(QUICK) as other:
        changes = {
            "llm.fallbacks": ["other"],
            "llm.providers.other": provider_entry(other.base_url),
        }
        failing = Behaviour(fail_rate=1.0, fail_status=503)
        async with tracing(tmp_path, failing, **changes) as (server, collector):
            await ask(server, "sse", {})

    request = only(collector.spans, "SERVER")
    first, second = [span for span in collector.spans if span.kind == "CLIENT"]
    assert [span.name for span in (first, second)] == ["chat sim-model", "chat other-model"]
    assert [span.failed for span in (first, second, request)] == [True, False, False]
    assert first.end <= second.start
    assert request.attributes["aioserver.provider"] == "other"


@pytest.mark.virtual_time
async def test_a_wait_for_a_provider_has_a_span_and_so_has_one_in_vain(tmp_path: Path) -> None:
    limits = {"concurrent_requests": 1, "queue_timeout": 0.3, "queue_size": 5}
    changes = {f"{SIM_HTTP_CLIENT}.{key}": value for key, value in limits.items()}
    async with tracing(tmp_path, PACED, **changes) as (server, collector), server.connect() as ws:
        await ws.send_json(chat("r1", options={"max_tokens": 10}))
        await until_status(ws, "processing")
        await ws.send_json(chat("r2"))
        await until_status(ws, "queued")
        await to_end(ws, "r1")
        # It has the place for longer than the others may wait.
        await ws.send_json(chat("r3"))
        assert (await to_end(ws, "r3"))[-1]["chunk"]["code"] == "provider_queue_timeout"
        await to_end(ws, "r2")

    requests = {
        span.attributes["aioserver.request_id"]: span
        for span in collector.spans
        if span.kind == "SERVER"
    }
    waits = {span.trace_id: span for span in collector.named("queue")}
    assert len(waits) == 2
    good, vain = waits[requests["r2"].trace_id], waits[requests["r3"].trace_id]
    for wait, request in ((good, requests["r2"]), (vain, requests["r3"])):
        assert (wait.kind, wait.parent_id) == ("INTERNAL", request.span_id)
        queue = {"aioserver.queue": "provider", "aioserver.provider": "sim"}
        assert queue.items() <= wait.attributes.items()
        assert request.attributes["aioserver.queue_wait"] > 0
    assert (good.failed, vain.failed) == (False, True)
    assert vain.attributes["error.type"] == "provider_queue_timeout"
    refused = requests["r3"]
    assert refused.failed
    assert refused.attributes["error.type"] == "provider_queue_timeout"
    assert not [
        span
        for span in collector.spans
        if (span.kind, span.parent_id) == ("CLIENT", refused.span_id)
    ]


@pytest.mark.parametrize("face", ["openai", "websocket"])
async def test_a_wait_for_a_place_of_the_server_belongs_to_the_request(
    tmp_path: Path, face: str
) -> None:
    changes = {f"{CONCURRENCY}.max_connections": 1}
    async with tracing(tmp_path, **changes) as (server, collector):
        name = "chat/completions" if face == "openai" else face
        async with server.connect():
            gate = server.context.admission.gate
            await until(lambda: gate.inside == 1)
            waiting = asyncio.create_task(ask(server, name, {}))
            await until(lambda: gate.waiting == 1)
            if face == "websocket":
                # Its question has come, and waits, too.
                await until(lambda: server.held()["body_bytes"] > 0)
        await waiting

    request, [wait] = only(collector.spans, "SERVER"), collector.named("queue")
    assert wait.attributes == {"aioserver.queue": "admission"}
    assert wait.parent_id == request.span_id
    assert request.start == wait.start < wait.end


async def test_an_answer_that_is_cut_has_an_error_in_both_spans(tmp_path: Path) -> None:
    cut = Behaviour(ttft=0, interval=0, tokens=20, cut_after=3)
    async with tracing(tmp_path, cut) as (server, collector):
        url = f"{server.v1}/chat/completions"
        async with server.session.post(url, json=STREAMED) as response:
            assert b"provider_disconnected" in await response.read()

    for span in collector.spans:
        assert span.failed
        assert span.attributes["error.type"] == "provider_disconnected"
        # Its head was sent before.
        assert span.attributes["http.response.status_code"] == 200
    shown = only(collector.spans, "CLIENT").attributes
    assert shown["gen_ai.response.id"]
    assert shown["gen_ai.response.finish_reasons"] == ["error"]


@pytest.mark.parametrize("body", [CHAT, STREAMED])
async def test_a_client_that_leaves_is_no_error(tmp_path: Path, body: dict[str, Any]) -> None:
    async with tracing(tmp_path, SILENT) as (server, collector):
        async with Raw(server) as raw:
            await raw.post("/v1/chat/completions", body)
            await until(lambda: server.simulator.stats().requests == 1)
        await server.nothing_held()

    assert [span.kind for span in collector.spans] == ["SERVER", "CLIENT"]
    for span in collector.spans:
        assert not span.failed
        assert "error.type" not in span.attributes
    assert only(collector.spans, "SERVER").attributes["aioserver.outcome"] == "client_left"


# Clients that come back.


def resumed(collector: Collector) -> tuple[Span, Span]:
    """The span of the request that asked, and that of the client that read its answer."""
    [visit] = collector.named("resume")
    [request] = [span for span in collector.spans if span.kind == "SERVER" and span is not visit]
    assert visit.links == ((request.trace_id, request.span_id),)
    assert visit.attributes["aioserver.resumed"] is True
    assert visit.attributes["aioserver.request_id"] == "r1"
    assert len([span for span in collector.spans if span.kind == "CLIENT"]) == 1
    return request, visit


async def test_a_client_that_resumes_by_sse_has_a_span_that_links_to_the_first(
    tmp_path: Path,
) -> None:
    async with tracing(tmp_path) as (server, collector):
        await ask(server, "sse", {})
        frames = await whole(server, "r1", after=2)

    request, visit = resumed(collector)
    assert len(frames) > 0
    assert visit.trace_id != request.trace_id
    assert visit.attributes["aioserver.last_event_id"] == 2
    assert visit.attributes["aioserver.outcome"] == "ok"


async def test_a_client_that_follows_an_answer_begun_by_another_request_links_to_it(
    tmp_path: Path,
) -> None:
    async with tracing(tmp_path) as (server, collector):
        headers = {"Prefer": "respond-async", "traceparent": PARENT}
        body = {"request_id": "r1", "text": "Hello"}
        async with server.session.post(server.sse, json=body, headers=headers) as response:
            assert response.status == 202
        await whole(server, "r1")

    request, visit = resumed(collector)
    assert request.trace_id == TRACE != visit.trace_id


async def test_a_socket_that_resumes_and_closes_has_a_span_to_its_end(tmp_path: Path) -> None:
    endless = Behaviour(ttft=0, interval=0.01, tokens=100_000)
    async with tracing(tmp_path, endless) as (server, collector), server.connect() as first:
        await first.send_json(chat("r1"))
        await until_status(first, "chunk")
        async with server.connect(headers={"traceparent": PARENT}) as second:
            await second.send_json(resume("r1", 1))
            await until_status(second, "chunk")
        await first.send_json({"action": "cancel", "request_id": "r1"})
        await to_end(first, "r1")

    request, visit = resumed(collector)
    assert (visit.trace_id, visit.parent_id) == (TRACE, CLIENT)
    assert visit.attributes["aioserver.outcome"] == "client_left"
    assert request.attributes["aioserver.outcome"] == "cancelled"
    assert request.start < visit.start < visit.end < request.end


@pytest.mark.parametrize("body", [CHAT, STREAMED])
async def test_a_repeated_request_with_its_key_links_to_the_first(
    tmp_path: Path, body: dict[str, Any]
) -> None:
    async with tracing(tmp_path) as (server, collector):
        for _ in range(2):
            async with server.session.post(
                f"{server.v1}/chat/completions", json=body, headers={"Idempotency-Key": "r1"}
            ) as response:
                assert response.status == 200
                await response.read()

    [visit] = collector.named("resume")
    [request] = collector.named("POST /v1/chat/completions")
    assert visit.links == ((request.trace_id, request.span_id),)


# Without traces, and without a collector.


async def test_without_an_endpoint_no_request_has_a_trace(tmp_path: Path) -> None:
    async with running(tmp_path / "config.yaml") as server:
        assert server.context.tracer is None
        await ask(server, "sse", {"traceparent": PARENT})
        stream = server.context.gateway.find(Caller(), "r1")
        assert stream.record.trace is None
        assert await server.counted("trace_spans", "outcome") == {}


async def test_requests_are_served_as_ever_while_the_collector_is_away(tmp_path: Path) -> None:
    away = {"tracing.otlp_endpoint": "http://127.0.0.1:9"}
    async with running(tmp_path / "config.yaml", QUICK, away) as server:
        for face in ("sse", "chat/completions", "messages streamed"):
            await ask(server, face, {})
        spans = server.context.metrics.spans
    assert spans["exported"].value == 0
    assert spans["dropped"].value == 6

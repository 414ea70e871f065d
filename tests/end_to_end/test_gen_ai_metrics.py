"""The metrics that OpenTelemetry's conventions for generative AI name, as `/metrics` has them."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.chat import CHAT, STREAMED, chat, to_end
from tests.support.collector import collecting
from tests.support.passing import answer
from tests.support.scripted_provider import ScriptedProvider
from tests.support.server import NOWHERE, QUICK, provider_entry, running
from tests.support.simulator import Behaviour
from tests.support.tools import installed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.scripted_provider import Peer
    from tests.support.server import RunningServer

ON = {"tracing.gen_ai_metrics": True}
INFERENCE, EMBEDDINGS = "gen_ai_client_inference_", "gen_ai_client_embeddings_"
USAGE = f"{INFERENCE}usage_"
UNSAMPLED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"

# In this order, those of a sample stand for it.
LABELS = (
    *("gen_ai_operation_name", "gen_ai_provider_name"),
    *("gen_ai_request_model", "gen_ai_response_model"),
    *("error_type", "gen_ai_token_modality"),
)
Samples = dict[str, dict[tuple[str, ...], float]]


async def text_of(server: RunningServer) -> str:
    await server.nothing_held()
    async with server.session.get(f"{server.base}/metrics") as response:
        return await response.text()


async def metrics_of(server: RunningServer) -> Samples:
    """The samples of the conventions' metrics but for buckets, by name and by the values of the
    labels, without those that are empty.
    """
    samples: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(await text_of(server)):
        if family.name.startswith("gen_ai_"):
            for sample in family.samples:
                if not sample.name.endswith("_bucket"):
                    assert {*sample.labels} <= {*LABELS}
                    shown = tuple(
                        sample.labels[each] for each in LABELS if sample.labels.get(each)
                    )
                    samples[sample.name][shown] = sample.value
    return dict(samples)


async def post(server: RunningServer, path: str, body: Any, **headers: str) -> int:
    async with server.session.post(f"{server.v1}/{path}", json=body, headers=headers) as response:
        await response.read()
        return response.status


async def test_without_the_setting_there_are_none_and_no_request_has_notes(tmp_path: Path) -> None:
    async with running(tmp_path / "config.yaml", QUICK) as server:
        await post(server, "chat/completions", CHAT)

        assert server.context.tracer is None
        assert "gen_ai_" not in await text_of(server)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("path", "operation", "body"),
    [
        ("chat/completions", "chat", CHAT),
        ("completions", "text_completion", {"prompt": "Hello"}),
        ("messages", "chat", {**CHAT, "max_tokens": 5}),
        ("responses", "chat", {"input": "Hello"}),
    ],
    ids=["chat", "completions", "messages", "responses"],
)
async def test_an_attempt_is_counted_with_its_models_and_tokens(
    tmp_path: Path, path: str, operation: str, body: dict[str, Any], streamed: bool
) -> None:
    async with running(tmp_path / "config.yaml", QUICK, ON) as server:
        assert await post(server, path, {**body, "stream": streamed}) == 200
        metrics = await metrics_of(server)

    labels = operation, "sim", "sim-model", "sim-model"
    assert metrics[f"{INFERENCE}duration_seconds_count"] == {labels: 1}
    assert metrics[f"{INFERENCE}duration_seconds_sum"][labels] > 0
    first = metrics.get(f"{INFERENCE}time_to_first_chunk_seconds_count", {})
    assert first == ({labels: 1} if streamed else {})
    between = metrics.get(f"{INFERENCE}time_per_output_chunk_seconds_count", {})
    assert between.keys() == ({labels} if streamed else set())
    for kind in ("input", "output"):
        used = metrics[f"{USAGE}{kind}_tokens_total"]
        assert used.keys() == {(*labels, "unknown")}
        assert metrics[f"{INFERENCE}operation_{kind}_tokens_count"] == {labels: 1}
        assert [*metrics[f"{INFERENCE}operation_{kind}_tokens_sum"].values()] == [*used.values()]
    assert f"{EMBEDDINGS}duration_seconds_count" not in metrics


async def test_a_question_on_a_socket_and_embeddings_are_counted(tmp_path: Path) -> None:
    async with running(tmp_path / "config.yaml", QUICK, ON) as server:
        async with server.connect() as ws:
            await ws.send_json(chat("r1"))
            assert (await to_end(ws))[-1]["status"] == "complete"
        assert await post(server, "embeddings", {"input": ["a", "b"]}) == 200
        # What is passed on has no operation of the conventions.
        await post(server, "rerank", {"query": "q", "documents": ["a"]})
        metrics = await metrics_of(server)

    chats, embeddings = [
        (operation, "sim", "sim-model", "sim-model") for operation in ("chat", "embeddings")
    ]
    assert metrics[f"{INFERENCE}duration_seconds_count"] == {chats: 1}
    assert metrics[f"{EMBEDDINGS}duration_seconds_count"] == {embeddings: 1}
    assert metrics[f"{EMBEDDINGS}operation_input_tokens_count"] == {embeddings: 1}
    assert metrics[f"{EMBEDDINGS}operation_input_tokens_sum"][embeddings] > 0


async def test_each_part_of_the_tokens_is_counted(tmp_path: Path) -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "total_tokens": 120,
        "prompt_tokens_details": {
            "cached_tokens": 60,
            "cache_write_tokens": 30,
            "audio_tokens": 10,
        },
        "completion_tokens_details": {"reasoning_tokens": 7, "audio_tokens": 5},
    }
    message = {"role": "assistant", "content": "yes"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    body = json.dumps({"id": "c", "model": "m-2026", "choices": choices, "usage": usage})

    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer(body.encode()))

    async with ScriptedProvider(play) as provider:
        changes = ON | {"llm.providers.sim": provider_entry(provider.url, "m")}
        async with running(tmp_path / "config.yaml", QUICK, changes) as server:
            assert await post(server, "chat/completions", CHAT) == 200
            metrics = await metrics_of(server)

    labels = "chat", "sim", "m", "m-2026"
    used = {
        name.removeprefix(USAGE).removesuffix("_tokens_total"): {
            of[-1]: number for of, number in samples.items() if of[:-1] == labels
        }
        for name, samples in metrics.items()
        if name.startswith(USAGE) and name.endswith("_total")
    }
    assert used == {
        "input": {"audio": 10, "unknown": 90},
        "output": {"audio": 5, "unknown": 15},
        "cache_read_input": {"unknown": 60},
        "cache_write_input": {"unknown": 30},
        "reasoning_output": {"unknown": 7},
    }


async def test_a_fault_is_named_and_has_no_tokens(tmp_path: Path) -> None:
    cut = Behaviour(ttft=0, interval=0, tokens=20, cut_after=3)
    changes = ON | {"llm.providers.dead": provider_entry(NOWHERE, "gone", max_retries=0)}
    async with running(tmp_path / "config.yaml", cut, changes) as server:
        await post(server, "chat/completions", STREAMED)
        assert await post(server, "chat/completions", {**CHAT, "model": "dead"}) == 502
        metrics = await metrics_of(server)

    assert metrics[f"{INFERENCE}duration_seconds_count"] == {
        ("chat", "sim", "sim-model", "sim-model", "provider_disconnected"): 1,
        ("chat", "dead", "gone", "connect_error"): 1,
    }
    assert f"{INFERENCE}operation_input_tokens_count" not in metrics


async def test_names_that_clients_invent_become_no_labels(tmp_path: Path) -> None:
    async with running(tmp_path / "config.yaml", QUICK, ON) as server:
        for number in range(40):
            body = {**CHAT, "model": f"sim/invented-{number}"}
            assert await post(server, "chat/completions", body) == 200
        metrics = await metrics_of(server)
        # The simulator says that the model it was asked for has answered.
        assert metrics[f"{INFERENCE}duration_seconds_count"] == {
            ("chat", "sim", "other", "other"): 40
        }

        assert await server.change(**{"llm.providers.sim.models": ["invented-7"]})
        await post(server, "chat/completions", {**CHAT, "model": "sim/invented-7"})
        metrics = await metrics_of(server)

    assert metrics[f"{INFERENCE}duration_seconds_count"] == {
        ("chat", "sim", "other", "other"): 40,
        ("chat", "sim", "invented-7", "invented-7"): 1,
    }


async def test_a_client_that_samples_no_trace_is_counted_and_has_no_span(tmp_path: Path) -> None:
    async with collecting() as collector:
        changes = ON | {"tracing.otlp_endpoint": collector.url}
        async with running(tmp_path / "config.yaml", QUICK, changes) as server:
            await post(server, "chat/completions", STREAMED, traceparent=UNSAMPLED)
            await post(server, "chat/completions", STREAMED)
            metrics = await metrics_of(server)

    assert [*metrics[f"{INFERENCE}duration_seconds_count"].values()] == [2]
    assert [span.kind for span in collector.spans] == ["SERVER", "CLIENT"]


async def test_a_trace_goes_on_as_it_came_where_attempts_are_only_counted(tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def play(peer: Peer) -> None:
        heads.append(await peer.request())
        await peer.send(answer(b'{"model": "m", "choices": [{"message": {"content": "yes"}}]}'))

    sampled = UNSAMPLED.removesuffix("00") + "01"
    async with ScriptedProvider(play) as provider:
        changes = ON | {"llm.providers.sim": provider_entry(provider.url, "m")}
        async with running(tmp_path / "config.yaml", QUICK, changes) as server:
            await post(server, "chat/completions", CHAT, traceparent=sampled)

    assert f"traceparent: {sampled}".encode() in heads[0]


async def test_promtool_accepts_the_text(tmp_path: Path) -> None:
    promtool = installed("promtool")
    async with running(tmp_path / "config.yaml", QUICK, ON) as server:
        await post(server, "chat/completions", STREAMED)
        text = await text_of(server)

    check = partial(subprocess.run, input=text, capture_output=True, text=True, check=False)
    done = await asyncio.to_thread(check, [promtool, "check", "metrics"])
    assert done.returncode == 0, done.stdout + done.stderr

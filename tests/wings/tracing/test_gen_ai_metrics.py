"""The bounds of the metrics that OpenTelemetry's conventions for generative AI name."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from aioserver.telemetry.counters import Histogram
from aioserver.usage.sums import MAX_CHILDREN, OTHER
from aioserver.wings.tracing.chunk_times import ChunkTimes
from aioserver.wings.tracing.gen_ai_metrics import MAX_ANSWERED, GenAiMeter
from aioserver.wings.tracing.trace import AttemptTrace, NotingSink
from tests.support.road import END, Road, choice, chunk_of, event, taking
from tests.support.scripted_provider import DONE, EVENT_STREAM, LAST_CHUNK, chunk

DURATION = "gen_ai_client_inference_duration_seconds"


def meter_of(*models: str) -> GenAiMeter:
    provider = SimpleNamespace(model="m", models=models)
    llm: Any = SimpleNamespace(providers={"p": provider}, models={})
    return GenAiMeter(llm)


def attempt(model: str = "m", answered: str = "m", **facts: Any) -> AttemptTrace:
    head = b'{"model": "%b"}' % answered.encode()
    return AttemptTrace(
        provider="p", model=model, status=200, head=head, began=1.0, ended=2.0, **facts
    )


def children(meter: GenAiMeter, name: str = DURATION) -> dict[tuple[str, ...], Any]:
    [family] = [family for family in meter.families() if family.name == name]
    return dict(family.children)


def test_the_models_that_answer_are_bounded() -> None:
    meter = meter_of()
    for number in range(2 * MAX_ANSWERED):
        meter.count("chat/completions", attempt(answered=f"m-{number}"))

    answered = [labels[3] for labels in children(meter)]
    assert len(answered) == MAX_ANSWERED + 1
    assert answered[-1] == OTHER


def test_the_children_are_bounded() -> None:
    models = [f"m-{number}" for number in range(MAX_CHILDREN)]
    meter = meter_of(*models)
    for model in models:
        meter.count("chat/completions", attempt(model, model))
    meter.count("chat/completions", attempt())
    meter.count("chat/completions", attempt())

    counted = children(meter)
    assert len(counted) == MAX_CHILDREN + 1
    assert sum(counted["chat", "p", OTHER, OTHER, ""].counts) == 2


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        (DURATION, 0.01, 81.92),
        ("gen_ai_client_inference_time_per_output_chunk_seconds", 0.01, 81.92),
        ("gen_ai_client_inference_operation_input_tokens", 1.0, 67108864.0),
    ],
)
def test_the_buckets_are_those_of_the_conventions(name: str, first: float, last: float) -> None:
    [family] = [family for family in meter_of().families() if family.name == name]
    assert family.grows is not None
    child = family.grows()

    assert isinstance(child, Histogram)
    assert (child.bounds[0], child.bounds[-1], len(child.bounds)) == (first, last, 14)


@pytest.mark.parametrize("face", ["openai", "sse"])
@pytest.mark.parametrize("fast", [False, True])
async def test_each_event_behind_the_first_content_is_timed_on_both_paths(
    face: str, fast: bool
) -> None:
    noted = AttemptTrace(chunks=ChunkTimes())
    with taking() as taken:
        async with Road(face) as road:
            road.sink = NotingSink(road.sink, noted)  # type: ignore[assignment]
            # The time until the first content is no time between two events.
            await road.say(
                EVENT_STREAM, chunk(event({"choices": [choice({"role": "assistant"})]}))
            )
            await asyncio.sleep(20.0)
            await road.say(chunk(chunk_of("a")))
            for seconds in (0.3, 0.3, 0.05, 3.0):
                await asyncio.sleep(seconds)
                read = chunk(chunk_of("b"))
                await road.say(*([read] if fast else [read[:20], read[20:]]))
            # Three events of one read have come at one time.
            await road.say(chunk(2 * chunk_of("c") + END), chunk(DONE), LAST_CHUNK)
            await road.over()

    assert bool(taken) is fast
    assert noted.chunks is not None
    counted = {
        bound: count
        for bound, count in zip(noted.chunks.bounds, noted.chunks.counts, strict=False)
        if count
    }
    # An end mark that passes is an event of the log, too.
    assert counted == {0.01: 3 + (face == "openai"), 0.08: 1, 0.32: 2, 5.12: 1}
    assert noted.chunks.sum == pytest.approx(3.65, abs=0.01)


def test_the_times_of_all_attempts_are_added() -> None:
    meter = meter_of()
    for times in (1, 3):
        chunks = ChunkTimes()
        for _ in range(times + 1):
            chunks.came(1)
        meter.count("chat/completions", attempt(chunks=chunks))
    # Without a second event there is nothing to count.
    meter.count("chat/completions", attempt(chunks=ChunkTimes()))

    [counted] = children(meter, "gen_ai_client_inference_time_per_output_chunk_seconds").values()
    assert sum(counted.counts) == 4

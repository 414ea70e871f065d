"""The bounds of the metrics that OpenTelemetry's conventions for generative AI name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aioserver.telemetry.counters import Histogram
from aioserver.usage.sums import MAX_CHILDREN, OTHER
from aioserver.wings.tracing.gen_ai_metrics import MAX_ANSWERED, GenAiMeter
from aioserver.wings.tracing.trace import AttemptTrace

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
        ("gen_ai_client_inference_operation_input_tokens", 1.0, 67108864.0),
    ],
)
def test_the_buckets_are_those_of_the_conventions(name: str, first: float, last: float) -> None:
    [family] = [family for family in meter_of().families() if family.name == name]
    assert family.grows is not None
    child = family.grows()

    assert isinstance(child, Histogram)
    assert (child.bounds[0], child.bounds[-1], len(child.bounds)) == (first, last, 14)

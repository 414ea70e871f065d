"""The tables of metrics: each row finds its children, and gives them all their labels."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.telemetry import logs
from aioserver.telemetry.counters import Counter
from aioserver.telemetry.metrics import FACES, Family, Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

PROVIDERS: Any = {name: SimpleNamespace(model="m", models=()) for name in ("groq", "openai")}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(PROVIDERS)


def family(metrics: Metrics, name: str) -> Family:
    (match,) = [family for family in metrics.families() if family.name == name]
    return match


def test_family_of_a_provider_has_its_name_before_the_other_labels(metrics: Metrics) -> None:
    metrics.providers["groq"].attempts["timeout"].value += 1

    attempts = family(metrics, "provider_attempts")

    assert attempts.labels == ("provider", "outcome")
    assert attempts.children["groq", "timeout"] is metrics.providers["groq"].attempts["timeout"]
    assert {provider for provider, _ in attempts.children} == {"groq", "openai"}


def test_family_of_a_face_has_a_child_for_each_face(metrics: Metrics) -> None:
    durations = family(metrics, "request_duration_seconds")

    assert durations.labels == ("face",)
    assert durations.children.keys() == {(face,) for face in FACES}


def test_family_without_labels_has_one_child(metrics: Metrics) -> None:
    assert family(metrics, "errors").children == {(): metrics.bugs}


def test_children_of_a_family_are_all_counters_or_all_histograms(metrics: Metrics) -> None:
    for each in metrics.families():
        # Groups are the router's, and there is none, nor is there a hook; nobody has spent
        # anything.
        kinds = 0 if each.grows or each.name in {"group_starts", "hook_seconds"} else 1
        assert len({type(child) for child in each.children.values()}) == kinds, each.name


@pytest.fixture
def handler() -> Iterator[logs.BackgroundHandler]:
    """A handler of the root logger whose stream is closed."""
    stream = io.StringIO()
    stream.close()
    handler = logs.BackgroundHandler(stream)
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)
    handler.close()


def test_lines_that_were_dropped_are_counted(
    metrics: Metrics, handler: logs.BackgroundHandler
) -> None:
    logging.getLogger("test").warning("lost")
    handler.close()

    (dropped,) = family(metrics, "log_lines_dropped").children.values()
    assert isinstance(dropped, Counter)
    assert dropped.value == 1

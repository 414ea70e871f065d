"""The gauges of `/metrics` are the numbers of a snapshot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from aioserver.monitoring.exposition import Metric
from aioserver.monitoring.prometheus import GAUGES, PREFIX, ShownMetrics
from aioserver.telemetry.metrics import Metrics

CONFIGURED: Any = {"groq": SimpleNamespace(model="m", models=())}


def snapshot(**process: int | None) -> Any:
    """The part of a snapshot that the gauges read."""
    groq = {
        "in_flight": 1,
        "limit": 2,
        "waiting": 3,
        "background": {"running": 2, "waiting": 21},
        "waiting_by_class": {"interactive": 1, "batch": 2},
        "state": "sick",
        "retry_budget": {"used": 7, "limit": 10, "refused": 0},
        "silent": {"longest": 2.5, "stalled": 3, "unanswered": 1, "under_way": 9},
        "pool": {"open": 4, "idle": 5},
        "trouble": None,
    }
    return {
        "ready": True,
        "connections": {
            "limit": 6,
            "active_by_face": {"sse": 7, "openai": 8},
            "waiting_by_face": {"sse": 9, "openai": 10},
        },
        "requests": {"running": 11},
        "streams": {
            "detached": 12,
            "background": 22,
            "responses": 20,
            "bytes": 13,
            "max_bytes": 14,
        },
        "history": {"waiting": 19, "trouble": {"kind": "full"}},
        "providers": {
            "groq": groq,
            "other": {**groq, "state": "dead", "trouble": {"kind": "dead"}},
        },
        "groups": {"smart": {"waiting": 21}},
        "keys": {
            "web": {
                "waiting": 23,
                "budgets": {"tokens_per_minute": {"limit": 100, "remaining": 25}},
            }
        },
        "process": {"open_fds": 15, "max_fds": 16, "tasks": 17, **process},
        "watchers": 18,
    }


def collected(**process: int | None) -> dict[str, Any]:
    """Each metric by its name, as a reader of the text has it."""
    shown = ShownMetrics(Metrics(CONFIGURED).families, lambda: snapshot(**process), ())
    metrics: list[Any] = [
        one for metric in shown.collect() for one in text_string_to_metric_families(metric.text())
    ]
    names = [metric.name for metric in metrics]
    assert len(names) == len(set(names))
    return {metric.name.removeprefix(PREFIX): metric for metric in metrics}


def gauges(**process: int | None) -> dict[str, Any]:
    """The values of each gauge of ours by its labels, or its only value."""
    shown: dict[str, Any] = {}
    for name, metric in collected(**process).items():
        if metric.type == "gauge" and not name.startswith("process_"):
            values = {tuple(sample.labels.items()): sample.value for sample in metric.samples}
            shown[name] = values.get((), values)
    return shown


def test_gauge_shows_the_number_of_the_snapshot() -> None:
    values = gauges()

    assert values["ready"] == 1
    assert values["connections_limit"] == 6
    assert values["queue_waiting"][("class", "batch"), ("provider", "groq")] == 2
    assert values["key_waiting"] == {(("caller", "web"),): 23}
    assert values["budget_used_ratio"] == {
        (("caller", "web"), ("period", "tokens_per_minute")): 0.75
    }
    assert values["group_waiting"] == {(("group", "smart"),): 21}
    assert values["connections"] == {(("face", "sse"),): 7, (("face", "openai"),): 8}
    assert values["pool_idle"] == {(("provider", "groq"),): 5, (("provider", "other"),): 5}
    assert values["provider_silence_seconds"][("provider", "groq"),] == 2.5
    assert values["provider_silent_answers"][("provider", "groq"),] == 4
    assert values["retry_budget_used"][("provider", "groq"),] == 7
    assert values["retry_budget_limit"][("provider", "groq"),] == 10
    assert values["provider_state"] == {(("provider", "groq"),): 1, (("provider", "other"),): 2}
    assert values["provider_trouble"] == {(("provider", "groq"),): 0, (("provider", "other"),): 4}
    assert (values["listen_queue"], values["listen_queue_limit"]) == (0, 0)
    assert values.keys() == {gauge.name for gauge in GAUGES} | {
        *("build_info", "listen_queue", "listen_queue_limit")
    }


def test_number_that_the_system_does_not_tell_is_left_out() -> None:
    assert "open_fds" not in gauges(open_fds=None)
    assert gauges(open_fds=0)["open_fds"] == 0


def test_every_metric_has_a_help_text() -> None:
    assert all(metric.documentation for metric in collected().values())


async def test_text_has_each_sample_with_its_labels_in_the_order_of_their_names() -> None:
    text = await ShownMetrics(Metrics(CONFIGURED).families, snapshot, ()).text()

    assert b'aioserver_connections{face="sse"} 7.0\n' in text
    assert b'aioserver_admission_wait_seconds_bucket{le="+Inf",outcome="entered"} 0.0\n' in text
    assert b'aioserver_retries_total{provider="groq",reason="connect_error"} 0.0\n' in text


@given(
    st.lists(st.tuples(st.text(), st.floats(allow_nan=False)), unique_by=lambda pair: pair[0]),
    st.text(),
)
def test_a_reader_finds_whatever_was_written(samples: list[tuple[str, float]], about: str) -> None:
    metric = Metric("shown", "gauge", about, ["what"])
    for label, number in samples:
        metric.add([label], number)

    text = metric.text()

    (read,) = text_string_to_metric_families(text)
    assert [(sample.labels["what"], sample.value) for sample in read.samples] == samples


def test_a_histogram_is_what_prometheus_client_writes() -> None:
    theirs = HistogramMetricFamily("waits_seconds", "Waits", labels=["way", "face"])
    theirs.add_metric(["in", 'a"b'], [("0.5", 1), ("+Inf", 3)], 4.5)
    ours = Metric("waits_seconds", "histogram", "Waits", ["way", "face"])
    ours.add_histogram(["in", 'a"b'], [("0.5", 1), ("+Inf", 3)], 4.5)
    registry: Any = SimpleNamespace(collect=lambda: [theirs])

    assert ours.text() == generate_latest(registry).decode()

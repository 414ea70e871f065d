"""The gauges of `/metrics` are the numbers of a snapshot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from aioserver.monitoring import prometheus
from aioserver.monitoring.prometheus import GAUGES, ServerCollector
from aioserver.telemetry.metrics import OURS, Metrics

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
            "held": {"answers": 1, "bytes": 23},
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
        "former": [{"answers": 26}, {"answers": 1}],
    }


def collector(**process: int | None) -> ServerCollector:
    sources: Any = SimpleNamespace(metrics=Metrics(CONFIGURED), listening=())
    return ServerCollector(
        sources.metrics.families, lambda: snapshot(**process), sources.listening
    )


def gauges(collected: ServerCollector) -> dict[str, Any]:
    """The values of each gauge by its labels, or its only value."""
    shown: dict[str, Any] = {}
    for metric in collected.collect():
        if metric.type == "gauge":
            values = {tuple(sample.labels.items()): sample.value for sample in metric.samples}
            shown[metric.name.removeprefix(OURS)] = values.get((), values)
    return shown


def test_gauge_shows_the_number_of_the_snapshot() -> None:
    values = gauges(collector())

    assert values["ready"] == 1
    assert values["connections_limit"] == 6
    assert values["queue_waiting"][("provider", "groq"), ("class", "batch")] == 2
    assert values["key_waiting"] == {(("caller", "web"),): 23}
    assert values["budget_used_ratio"] == {
        (("caller", "web"), ("period", "tokens_per_minute")): 0.75
    }
    assert (values["former_workers"], values["former_answers"]) == (2, 27)
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
    assert "open_fds" not in gauges(collector(open_fds=None))
    assert gauges(collector(open_fds=0))["open_fds"] == 0


def test_every_metric_has_one_row_and_a_help_text() -> None:
    metrics = [*collector().collect()]

    names = [metric.name for metric in metrics]
    assert len(names) == len(set(names))
    assert all(metric.documentation for metric in metrics)


async def test_text_is_that_of_prometheus_client() -> None:
    sources: Any = SimpleNamespace(metrics=Metrics(CONFIGURED), listening=())
    text = await prometheus.text(
        prometheus.registry(sources.metrics.families, snapshot, sources.listening)
    )

    assert b'aioserver_connections{face="sse"} 7.0\n' in text
    assert b'aioserver_admission_wait_seconds_bucket{le="+Inf",outcome="entered"} 0.0\n' in text
    assert b'aioserver_retries_total{provider="groq",reason="connect_error"} 0.0\n' in text

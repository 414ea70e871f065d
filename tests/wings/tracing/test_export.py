"""The export of spans: what a collector gets, and what one that is away, full or hostile costs."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from aioserver.telemetry.counters import Counter
from aioserver.wings.tracing import export as span_export
from aioserver.wings.tracing import otlp
from aioserver.wings.tracing.export import SpanExporter
from aioserver.wings.tracing.otlp import Context
from tests.support.collector import collecting
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.collector import Collector

NOWHERE = "http://127.0.0.1:9"
DESCRIBED = otlp.description("chat", otlp.SERVER, {}, failed=False)
KEY = "canary-key"


class Ended:
    """A request that has ended, with as many spans as it is told."""

    def __init__(self, number: int = 1) -> None:
        self.number = number

    def write(self, zero: int) -> bytes:
        return otlp.span(Context(b"t" * 16, b"s" * 8), (zero, zero), DESCRIBED) * self.number


class Broken(Ended):
    def write(self, _zero: int) -> bytes:
        raise RuntimeError("a bug")


@asynccontextmanager
async def exporting(url: str) -> AsyncIterator[tuple[SpanExporter, dict[str, Counter]]]:
    """An exporter, and what it counts; it is closed at the end, if it was not before."""
    counters = {"exported": Counter(), "dropped": Counter()}
    resource = [otlp.key_value("service.name", "tested")]
    target = f"{url}/v1/traces"
    headers = {"api-key": KEY}
    exporter = SpanExporter(target, headers, resource, "7", counters, interval=0.01, pause=0.01)
    exporter.start()
    try:
        yield exporter, counters
    finally:
        await exporter.close()


def counted(counters: dict[str, Counter]) -> tuple[float, float]:
    return counters["exported"].value, counters["dropped"].value


async def test_spans_go_out_together_within_the_interval() -> None:
    async with collecting() as collector, exporting(collector.url) as (exporter, counters):
        exporter.take(Ended(2))
        exporter.take(Ended())
        await collector.until(3)

        assert len(collector.bodies) == 1
        assert collector.resource == {"service.name": "tested"}
        assert collector.scope == ("aioserver", "7")
        assert collector.headers["api-key"] == KEY
        assert collector.headers["content-type"] == "application/x-protobuf"
        assert collector.headers["user-agent"] == "aioserver/7"
        await until(lambda: counted(counters) == (3, 0))


async def test_a_full_batch_goes_out_at_once_and_more_than_one_at_the_end() -> None:
    async with collecting() as collector, exporting(collector.url) as (exporter, counters):
        for _ in range(2 * span_export.BATCH_SPANS + 1):
            exporter.take(Ended())
        await exporter.close()

        assert counted(counters) == (2 * span_export.BATCH_SPANS + 1, 0)
        assert len(collector.bodies) == 3


async def test_spans_that_come_while_a_batch_is_sent_go_out_too() -> None:
    async with collecting() as collector, exporting(collector.url) as (exporter, counters):
        for round_ in range(1, 4):
            exporter.take(Ended(span_export.BATCH_SPANS))
            await until(lambda: len(collector.bodies) == round_)  # noqa: B023 - called at once
            exporter.take(Ended())
        await collector.until(3 * span_export.BATCH_SPANS + 3)
        await until(lambda: counted(counters) == (3 * span_export.BATCH_SPANS + 3, 0))


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_what_a_collector_cannot_take_now_is_sent_again(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with collecting() as collector, exporting(collector.url) as (exporter, counters):
        collector.status, collector.retry_after = status, "0"
        exporter.take(Ended())
        await until(lambda: len(collector.bodies) > 0)
        collector.status = 200
        await collector.until(1)

        assert collector.bodies[-1] == collector.bodies[0]
        await until(lambda: counted(counters) == (1, 0))
    messages = [record.getMessage() for record in caplog.records if "aioserver" in record.name]
    assert messages == ["the collector cannot be reached", "spans are exported again"]


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 500])
async def test_what_a_collector_refuses_is_dropped_and_counted(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with collecting() as collector, exporting(collector.url) as (exporter, counters):
        collector.status = status
        exporter.take(Ended(5))
        await until(lambda: counted(counters) == (0, 5))

    [line] = [record for record in caplog.records if record.name == "aioserver.tracing"]
    assert line.fields == {"reason": f"status {status}", "dropped": 5}  # type: ignore[attr-defined]


async def test_spans_that_a_collector_rejects_in_part_are_counted() -> None:
    async with collecting() as collector, exporting(collector.url) as (exporter, counters):
        collector.rejected = 2
        exporter.take(Ended(5))
        await until(lambda: counted(counters) == (3, 2))


async def test_a_collector_that_is_away_costs_a_bounded_queue_and_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with exporting(NOWHERE) as (exporter, counters):
        for _ in range(span_export.MAX_SPANS + 100):
            exporter.take(Ended())
        await until(lambda: len(caplog.records) > 0)

        assert counted(counters) == (0, 100)
    assert counted(counters) == (0, span_export.MAX_SPANS + 100)
    lines = [record for record in caplog.records if record.name == "aioserver.tracing"]
    assert [line.getMessage() for line in lines] == [
        "the collector cannot be reached",
        f"{span_export.MAX_SPANS} spans were not exported before the stop",
    ]
    assert KEY not in caplog.text


@pytest.mark.virtual_time
async def test_a_stop_waits_no_longer_than_its_bound_for_a_collector_that_hangs(
    hanging: Collector,
) -> None:
    async with exporting(hanging.url) as (exporter, counters):
        exporter.take(Ended(3))
        await exporter.close()

        assert counted(counters) == (0, 3)


@pytest.fixture
async def hanging() -> AsyncIterator[Collector]:
    """A collector that takes spans and never answers."""
    async with collecting() as collector:
        collector.status = 0
        yield collector


async def test_a_bug_in_a_span_is_logged_and_ends_the_export_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with collecting() as collector, exporting(collector.url) as (exporter, counters):
        exporter.take(Broken())
        await until(lambda: len(caplog.records) > 0)
        exporter.take(Ended())

    assert "a bug" in caplog.text
    assert counted(counters) == (0, 2)

"""The tracer, as the settings and the variables of OpenTelemetry ask for it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.config.faults import ConfigurationError
from aioserver.protocol.request_headers import NO_HEADERS
from aioserver.telemetry.metrics import Metrics
from aioserver.telemetry.tracer import RequestEnd
from aioserver.wings.tracing import wing as tracing
from aioserver.wings.tracing.wing import open_tracer, traces_url
from tests.support.collector import collecting
from tests.support.server import NOWHERE, configured

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "canary-secret"
END = RequestEnd("r1", "sse", "", "sim", "", False, 1.0, 0.0, 1.0, 0.0, 1, "", "ok", 200)


def settings_with(tmp_path: Path, **changes: Any) -> Any:
    return configured(NOWHERE, changes, tmp_path / "config.yaml").settings


@pytest.mark.parametrize(
    "endpoint", ["http://c:4318", "http://c:4318/", "http://c:4318/v1/traces"]
)
def test_an_endpoint_is_a_base_url_or_that_of_the_traces(endpoint: str) -> None:
    assert traces_url(endpoint) == "http://c:4318/v1/traces"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("OTEL_EXPORTER_OTLP_HEADERS", SECRET),
        ("OTEL_EXPORTER_OTLP_HEADERS", f"a=b,={SECRET}"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", f"api-key={SECRET}%0d%0aHost: x"),
        ("OTEL_EXPORTER_OTLP_HEADERS", f"a key={SECRET}"),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", __file__),
    ],
)
async def test_a_variable_that_is_wrong_is_named_and_its_value_is_not_shown(
    tmp_path: Path, name: str, text: str
) -> None:
    settings = settings_with(tmp_path, **{"tracing.otlp_endpoint": "http://127.0.0.1:9"})

    async with AsyncExitStack() as stack:
        with pytest.raises(ConfigurationError, match=name) as refused:
            open_tracer(stack, settings, Metrics(settings.llm.providers), {name: text})

    assert SECRET not in str(refused.value)


async def test_headers_and_resource_come_from_the_environment(tmp_path: Path) -> None:
    environ = {
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=other",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": f"api-key={SECRET}%3D, x-team = chat ,",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test,service.name=overridden",
    }
    async with collecting() as collector:
        changes = {"tracing.otlp_endpoint": collector.url, "tracing.service_name": "chat"}
        settings = settings_with(tmp_path, **changes)
        async with AsyncExitStack() as stack:
            tracer = open_tracer(stack, settings, Metrics(settings.llm.providers), environ)
            assert tracer is not None
            trace = tracer.begin(NO_HEADERS, "chat/completions", 1.0)
            assert trace is not None
            trace.ended(END)

    assert collector.headers["api-key"] == f"{SECRET}="
    assert collector.headers["x-team"] == "chat"
    assert collector.resource["service.name"] == "chat"
    assert collector.resource["deployment.environment.name"] == "test"
    assert collector.resource["service.instance.id"]
    assert [span.name for span in collector.spans] == ["chat"]


async def test_there_is_no_tracer_without_an_endpoint(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        broken = dict.fromkeys((*tracing.HEADERS, tracing.RESOURCE), "no pairs")
        assert open_tracer(stack, settings_with(tmp_path), Metrics({}), broken) is None

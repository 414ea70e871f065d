"""Tracing as a wing: a tracer by the settings and OpenTelemetry's variables.

`tracing.otlp_endpoint` is the destination of spans. Secrets, and settings of the machine, come
from the environment, by the names that OpenTelemetry defines
(https://opentelemetry.io/docs/specs/otel/protocol/exporter/).
"""

from __future__ import annotations

import os
import re
import ssl
import uuid
from functools import partial
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import unquote

from aioserver import __version__
from aioserver.config.faults import ConfigurationError
from aioserver.faces.wing import Wing
from aioserver.wings.tracing.gen_ai_metrics import GenAiMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AsyncExitStack

    from aioserver.config.settings import Settings
    from aioserver.faces.wing import Core
    from aioserver.telemetry.metrics import Metrics
    from aioserver.wings.tracing.tracer import Tracer

# Variables for the same; the one for traces alone comes first.
HEADERS = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
CERTIFICATE = ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE")
RESOURCE = "OTEL_RESOURCE_ATTRIBUTES"
# The path below a collector's base URL (OTLP/HTTP, "Request").
PATH = "/v1/traces"
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(r"[\t\x20-\x7e]*")


class TracingWing(Wing):
    """The traces of requests, if `tracing` names a destination of spans, and the metrics of their
    attempts, if it asks for these.
    """

    name: ClassVar = "tracing"
    _meter: GenAiMeter | None = None

    async def open(self, core: Core, stack: AsyncExitStack) -> None:
        """Make the tracer.

        Raises:
            ConfigurationError: a variable of the environment is invalid.
        """
        settings, metrics = core.settings, core.metrics
        if settings.tracing.gen_ai_metrics:
            self._meter = GenAiMeter(settings.llm)
            metrics.of_wings.append(self._meter.families)
        self.tracer = open_tracer(stack, settings, metrics, meter=self._meter)

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Return the function that takes the models of *settings*."""
        if self._meter is None:
            return super().prepare(settings)
        return partial(self._meter.apply, settings.llm)


def open_tracer(
    stack: AsyncExitStack,
    settings: Settings,
    metrics: Metrics,
    environ: Mapping[str, str] | None = None,
    meter: GenAiMeter | None = None,
) -> Tracer | None:
    """Return the tracer, whose exporter *stack* closes; None if `tracing` has no endpoint, and no
    *meter* counts attempts.

    Raises:
        ConfigurationError: a variable of the environment is invalid.
    """
    tracing = settings.tracing
    if tracing.otlp_endpoint is None and meter is None:
        return None
    # Few servers make spans.
    from aioserver.wings.tracing.export import SpanExporter  # noqa: PLC0415
    from aioserver.wings.tracing.otlp import key_value  # noqa: PLC0415
    from aioserver.wings.tracing.tracer import Tracer  # noqa: PLC0415

    if tracing.otlp_endpoint is None:
        return Tracer(None, metrics.bugs, meter)
    environ = os.environ if environ is None else environ
    attributes = {
        "service.version": settings.logging.service_version or __version__,
        "service.instance.id": str(uuid.uuid4()),
        **_pairs(RESOURCE, environ.get(RESOURCE, "")),
        "service.name": tracing.service_name,
    }
    exporter = SpanExporter(
        traces_url(tracing.otlp_endpoint),
        _headers(environ),
        [key_value(name, value) for name, value in attributes.items()],
        __version__,
        metrics.spans,
        _tls(environ),
    )
    exporter.start()
    stack.push_async_callback(exporter.close)
    return Tracer(exporter, metrics.bugs, meter)


def traces_url(endpoint: str) -> str:
    """Return the URL for traces of a collector whose base URL is *endpoint*.

    A URL that already has the path is not changed.
    """
    base = endpoint.rstrip("/")
    return base if base.endswith(PATH) else base + PATH


def _headers(environ: Mapping[str, str]) -> dict[str, str]:
    name, text = _first(HEADERS, environ)
    headers = _pairs(name, text)
    for header, value in headers.items():
        if not (_NAME.fullmatch(header) and _VALUE.fullmatch(value)):
            raise ConfigurationError([f"{name}: the header {header[:64]!r} is not one of HTTP"])
    return headers


def _pairs(name: str, text: str) -> dict[str, str]:
    """Return the pairs in *text*, `key=value,…`, whose values may have %XX.

    It is the value of the variable *name*.

    Raises:
        ConfigurationError: *text* has another form. It is not shown, since it may hold a key.
    """
    pairs = {}
    for number, part in enumerate(filter(str.strip, text.split(",")), 1):
        key, sign, value = part.partition("=")
        if not sign or not key.strip():
            raise ConfigurationError(
                [f"{name}: part {number} is not key=value (pairs are separated by commas)"]
            )
        pairs[unquote(key.strip())] = unquote(value.strip())
    return pairs


def _tls(environ: Mapping[str, str]) -> ssl.SSLContext | None:
    name, path = _first(CERTIFICATE, environ)
    if not path:
        return None
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as exc:
        raise ConfigurationError([f"{name}: {path} has no certificates that can be read"]) from exc


def _first(names: tuple[str, str], environ: Mapping[str, str]) -> tuple[str, str]:
    return next(((name, environ[name]) for name in names if environ.get(name)), (names[0], ""))

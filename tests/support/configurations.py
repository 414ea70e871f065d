"""Configurations to load, and what loading them gives."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import HealthCheck, settings

from aioserver.config import Configuration
from aioserver.config.faults import ConfigurationError
from aioserver.config.schema import fields, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# For tests with `given`: a busy machine is no fault, and every example may write over the same
# file.
ANY_MACHINE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

# The configuration of the system that aioserver replaces: it must load unchanged.
ORIGINAL = Path(__file__).with_name("original.yaml")
# The original's `llm.providers.openai.http_client`.
ORIGINAL_CLIENT = {
    "max_connections": 50,
    "max_keepalive": 20,
    "keepalive_expiry": 30.0,
    "connect_timeout": 10.0,
    "read_timeout": 60.0,
    "write_timeout": 10.0,
    "pool_timeout": 5.0,
    "requests_per_minute": 3500,
    "concurrent_requests": 25,
    "max_retries": 3,
    "backoff_factor": 0.5,
}
SMALL = """\
chat:
  websocket:
    concurrency:
      max_connections: 10
      connection_queue_size: 10
      queue_timeout: 5
      uvicorn: {backlog: 10, workers: 1, access_log: no, keepalive_timeout: 5, max_keepalive_requests: 10,
        h11_max_incomplete_event_size: 100, h11_max_request_line_size: 100, h11_max_header_size: 100}
llm:
  active: mine
  providers:
    mine: &&
      model: m
      http_client: {max_connections: 2, max_keepalive: 2, keepalive_expiry: 1, connect_timeout: 1,
        read_timeout: 7, write_timeout: 1, pool_timeout: 1, requests_per_minute: 60,
        concurrent_requests: 2, max_retries: 0, backoff_factor: 0}
"""


def small(*lines: str) -> str:
    """SMALL with *lines* in its provider."""
    inside = "".join(f"\n      {line}" for line in lines or ("base_url: http://h/v1",))
    return SMALL.replace(" &&", inside)


def load(text: str | bytes, path: Path, **environ: str) -> Configuration:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Configuration.load(path, environ=environ)


def refused(call: Callable[[], object], source: Path | None = None) -> list[str]:
    """The faults of the ConfigurationError that *call* raises, with F for *source*."""
    with pytest.raises(ConfigurationError) as caught:
        call()
    return [fault.replace(str(source), "F") for fault in caught.value.faults]


def outcome(call: Callable[[], Configuration]) -> list[str]:
    """The faults of *call*, or none if it succeeds; any other exception fails the test."""
    try:
        call()
    except ConfigurationError as error:
        return [*error.faults] or ["an error without a fault"]
    return []


@functools.cache
def _original() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(ORIGINAL.read_text())
    return data


def original() -> dict[str, Any]:
    return copy.deepcopy(_original())


def changed(**values: Any) -> dict[str, Any]:
    """The original configuration with *values*: `a__b=value` is put at `a.b`."""
    data = original()
    for path, value in values.items():
        *above, last = path.split("__")
        node = data
        for step in above:
            node = node.setdefault(step, {})
        node[last] = value
    return data


def paths(cls: type[Any], above: str = "") -> Iterator[str]:
    """The path of every setting of a settings class, as `llm.providers.<name>.model`."""
    for field in fields(cls):
        path, validator = f"{above}{key_of(field)}", field.metadata["validator"]
        if validator.inner is None:
            yield path
        else:
            yield from paths(validator.inner, f"{path}{validator.suffix}.")

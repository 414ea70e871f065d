from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from aioserver.config import Configuration
from aioserver.config.shipped import SHIPPED
from tests.support.configurations import ORIGINAL, changed

ROOT = Path(__file__).parents[2]


def test_the_original_loads_unchanged_without_a_key() -> None:
    configuration = Configuration.load(ORIGINAL, environ={})

    assert configuration.settings.chat.websocket.allow_origins == ("*",)
    assert [warning.split(" ", 1)[1].split(":")[0] for warning in configuration.warnings] == [
        "chat.websocket.allow_origins",
        "chat.websocket.concurrency.connection_queue_size",
        "chat.service.repository.connection_pool",
        "chat.service.context.conversation_limits",
        "chat.service.context.response_tokens",
        "chat.service.streaming.backoff",
        "chat.service.streaming.delta_batch_size",
        "chat.service.max_tool_hops",
        "chat.service.tool_notifications",
        "chat.service.logging",
        "logging.format",
        "mcp",
        "chat_store",
    ]


def test_every_value_of_the_original_is_kept() -> None:
    loaded = Configuration.load(ORIGINAL, environ={}).effective()

    def differences(written: Any, kept: Any, path: str) -> list[str]:
        if not isinstance(written, dict):
            return [] if written == kept else [path]
        return [
            line
            for key in written
            for line in (
                differences(written[key], kept[key], f"{path}.{key}") if key in kept else ()
            )
        ]

    assert differences(changed(), loaded, "") == [".logging.format"]


def test_the_packaged_copy_equals_the_shipped_file() -> None:
    assert (ROOT / "config.yaml").read_bytes() == SHIPPED.read_bytes()


def test_the_shipped_file_serves_without_a_key_and_without_a_warning() -> None:
    configuration = Configuration.load(SHIPPED, environ={})

    configuration.check_usable()
    assert configuration.warnings == ()
    assert configuration.settings.llm.active == "demo"
    assert [
        (p.name, p.usable, p.missing_key) for p in configuration.settings.llm.providers.values()
    ] == [
        ("openai", False, "OPENAI_API_KEY"),
        ("groq", False, "GROQ_API_KEY"),
        ("openrouter", False, "OPENROUTER_API_KEY"),
        ("local", True, None),
        ("demo", True, None),
    ]


def test_the_shipped_providers_have_the_values_of_the_original() -> None:
    shipped = Configuration.load(SHIPPED, environ={}).settings.llm.providers
    original = Configuration.load(ORIGINAL, environ={}).settings.llm.providers

    # Settings that the original does not know.
    expected = {
        name: dataclasses.replace(provider, messages="auto") for name, provider in original.items()
    }
    expected["openrouter"] = dataclasses.replace(expected["openrouter"], stream_usage=False)
    assert {name: shipped[name] for name in original} == expected
    assert shipped["local"].http_client == shipped["openai"].http_client
    assert shipped["demo"].http_client.concurrent_requests == 200
    assert shipped["demo"].http_client.requests_per_minute == 100000


def test_the_shipped_file_explains_every_setting() -> None:
    text = SHIPPED.read_text()
    names = {
        field.name
        for cls in map(type, _sections(Configuration.load(SHIPPED, environ={}).settings))
        for field in dataclasses.fields(cls)
    }

    unexplained = {
        line
        for line in text.split("# The keys of the others")[0].splitlines()
        if re.match(r" +[a-z_0-9]+: [^#]*$", line)
    }
    assert {name for name in names if f"{name}:" not in text} == {"name", "api_key"} - {"name"}
    assert unexplained == set()


def _sections(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [each for item in value.values() for each in _sections(item)]
    if not dataclasses.is_dataclass(value):
        return []
    inner = [_sections(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [value, *(each for sections in inner for each in sections)]


@pytest.mark.parametrize("name", ["openai", "groq", "openrouter"])
def test_one_word_and_a_key_make_it_real(name: str) -> None:
    environ = {"AIOSERVER__LLM__ACTIVE": name, f"{name.upper()}_API_KEY": "canary"}

    configuration = Configuration.load(SHIPPED, environ=environ)

    configuration.check_usable()
    key = configuration.settings.llm.providers[name].api_key
    assert key is not None
    assert key.reveal() == "canary"

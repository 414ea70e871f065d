"""Files in the shapes of LiteLLM's documentation, and of what its users have asked about."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from aioserver.commands.init import convert
from aioserver.commands.litellm import NotLiteLLM, converted
from aioserver.config import Configuration
from aioserver.config.faults import ConfigurationError
from tests.support.chat import CHAT

if TYPE_CHECKING:
    from tests.support.server import MakeServer

PAGE = (Path(__file__).parents[2] / "docs/from-litellm.md").read_text()
FILES = sorted((Path(__file__).parent / "litellm").iterdir())
KEYS = dict.fromkeys(
    [
        "OPENAI_API_KEY",
        "KEY_1",
        "KEY_2",
        "AZURE_API_KEY",
        "ANTHROPIC_API_KEY",
        "GROQ_API_KEY",
        "GROQ_KEY_2",
        "XAI_API_KEY",
        "OPENROUTER_API_KEY",
        "LITELLM_MASTER_KEY",
        "GATEWAY_KEY",
        "DEEPSEEK_API_KEY",
    ],
    "key",
)


LATENCY = "latency-based-routing"


def file(name: str) -> str:
    return (Path(__file__).parent / "litellm" / f"{name}.yaml").read_text()


def llm_of(name: str) -> dict[str, Any]:
    llm: dict[str, Any] = converted(file(name))[0]["llm"]
    return llm


def remarks_of(name: str) -> list[str]:
    return [str(remark) for remark in converted(file(name))[1]]


@pytest.mark.parametrize("origin", FILES, ids=lambda path: path.stem)
def test_what_comes_of_a_file_can_be_served(origin: Path, tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"

    assert convert(origin, target) == 0

    configuration = Configuration.load(target, environ=KEYS)
    configuration.check_usable()
    assert target.stat().st_mode & 0o077 == 0
    off = [warning for warning in configuration.warnings if "is off" in warning]
    assert off == []


def test_deployments_of_one_account_share_a_provider_and_others_do_not() -> None:
    llm = llm_of("two_keys")

    assert llm["models"] == {
        "gpt-4o": {"members": ["openai/gpt-4o", "openai-1/gpt-4o"], "choose": "least_busy"},
        "gpt-4o-mini": "openai/gpt-4o-mini",
    }
    assert llm["providers"]["openai"]["http_client"] == {
        "max_retries": 2,
        "read_timeout": 30,
        "requests_per_minute": 480,
        "tokens_per_minute": 200000,
    }
    assert llm["providers"]["openai-1"]["http_client"]["concurrent_requests"] == 8
    assert llm["providers"]["openai-1"]["http_client"]["max_connections"] == 8


def test_names_may_be_the_fallbacks_of_each_other() -> None:
    llm = llm_of("two_clouds")

    assert llm["models"] == {
        "gpt-4o": {"members": ["azure/my-deployment"], "fallbacks": ["claude"]},
        "claude": {"members": ["anthropic/claude-sonnet-5"], "fallbacks": ["gpt-4o-alone"]},
        "gpt-4o-alone": ["azure/my-deployment"],
    }
    assert llm["fallbacks"] == ["claude"]
    assert llm["providers"]["azure"]["base_url"] == (
        "https://my-resource.openai.azure.com/openai/v1"
    )


def test_a_pattern_leads_to_all_models_of_a_provider() -> None:
    llm = llm_of("patterns")

    assert (llm["active"], llm["unknown_models"]) == ("openai", "pass")
    assert llm["providers"]["groq"]["model"] == "llama"
    assert llm["models"] == {}
    assert remarks_of("patterns") == [
        "line 4: model_list.2: groq/*: another account has this pattern already",
        "line 6: model_list.4: claude-*: list the models; * stands for all of a provider only",
    ]


def test_weights_orders_and_contexts_are_those_of_members() -> None:
    assert llm_of("engines")["models"]["qwen"] == {
        "members": [
            {
                "provider": "hosted_vllm",
                "model": "Qwen/Qwen3-8B",
                "max_context": 32768,
                "input_modalities": ["text", "image"],
            },
            {"provider": "hosted_vllm-1", "model": "Qwen/Qwen3-8B", "weight": 3},
        ],
        "choose": "weighted",
    }
    ordered = llm_of("ordered")
    assert ordered["models"] == {
        "chat": ["groq/llama-3.3-70b-versatile", "openrouter/moonshotai/kimi-k2"],
        "gpt-4": "chat",
        "hidden": "chat",
    }
    assert ordered["active"] == "chat"


def test_each_line_without_a_counterpart_is_named_with_its_reason() -> None:
    assert [remark.split(": ")[:2] for remark in remarks_of("team")] == [
        ["line 5", "litellm_settings.success_callback"],
        ["line 6", "litellm_settings.cache"],
        ["line 7", "litellm_settings.cache_params"],
        ["line 8", "litellm_settings.max_budget"],
        ["line 9", "guardrails"],
        ["line 14", "general_settings.database_url"],
    ]
    assert [remark.partition(": ")[::2] for remark in remarks_of("shared")] == [
        ("line 4", "model_list.0.litellm_params.stream_timeout: expected a number, not str"),
        ("line 7", "model_list.1.litellm_params.stream_timeout: expected a number, not str"),
        ("line 8", "model_list.2: 'with a space': expected a name without spaces"),
        ("line 10", "model_list.3: it has no model_name, or no model"),
        ("line 11", "model_list.4: it has no model_name, or no model"),
        ("line 12", f"router_settings.routing_strategy: {LATENCY} is not there; it is least_busy"),
    ]
    assert "line 12: model_list.2: elsewhere: write its api_base, which is in ENGINE_URL" in (
        remarks_of("headers")
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model_list: [", "not YAML"),
        ("llm: {}", "it has no model_list"),
        ("[]", "it has no model_list"),
        ("model_list: [{model_name: a, litellm_params: {model: vertex_ai/b}}]", "counterpart"),
    ],
)
def test_what_is_no_such_file_is_one_clear_line_and_writes_nothing(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin, target = tmp_path / "litellm.yaml", tmp_path / "config.yaml"
    origin.write_text(text)

    assert convert(origin, target) == 2

    assert reason in capsys.readouterr().err
    assert not target.exists()
    with pytest.raises(NotLiteLLM):
        converted(text)


def test_a_file_that_is_not_there_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tmp_path / "gone.yaml", tmp_path / "config.yaml") == 2
    assert "gone.yaml cannot be read: No such file or directory" in capsys.readouterr().err


async def test_a_key_and_a_model_of_the_old_server_serve_on_the_new_one(
    make_server: MakeServer,
) -> None:
    text = file("team").replace("sk-1234", "sk-of-before")
    settings, _remarks = converted(text)
    server = await make_server(
        **{
            "auth.keys": settings["auth"]["keys"],
            "llm.models": {"house": "sim"},
        }
    )
    body = {**CHAT, "model": "house"}

    for key, status in (("sk-of-before", 200), ("sk-another", 401)):
        answer = await server.session.post(
            f"{server.v1}/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {key}"},
        )
        assert answer.status == status, await answer.text()
        await answer.read()


async def test_the_keys_of_its_database_are_admitted_by_what_the_page_prints(
    make_server: MakeServer, tmp_path: Path
) -> None:
    # Its `hash_token`; and of each key: whether it is blocked, and when it expires.
    kept = {"sk-forever": (None, None), "sk-later": (0, "2030-01-01"), "sk-of-before": (0, None)}
    gone = {"sk-blocked": (1, None), "sk-expired": (None, "2020-01-01")}
    rows = [(hashlib.sha256(key.encode()).hexdigest(), *row) for key, row in (kept | gone).items()]
    [query] = re.findall(r'psql "\$DATABASE_URL" -At -c "(.*?)" > keys\.yaml', PAGE, re.DOTALL)
    # SQLite reads PostgreSQL's words, but for the two functions.
    query = query.replace('\\"', '"').replace("left(token,", "substr(token, 1,")
    with closing(sqlite3.connect(":memory:")) as database:
        database.create_function("now", 0, lambda: "2026-12-03")
        database.execute('CREATE TABLE "LiteLLM_VerificationToken" (token, blocked, expires)')
        database.executemany('INSERT INTO "LiteLLM_VerificationToken" VALUES (?, ?, ?)', rows)
        printed = "\n".join(line for (line,) in database.execute(query))
    keys_file, target = tmp_path / "keys.yaml", tmp_path / "converted.yaml"
    keys_file.write_text(printed)
    settings, _remarks = converted(file("team").replace("sk-1234", "sk-of-before"))
    settings["auth"]["keys_file"] = str(keys_file)
    target.write_text(yaml.safe_dump(settings))
    # The table may have the master key, too: its line goes, says the page.
    with pytest.raises(ConfigurationError, match=r"keys.yaml:3:3 .*: the same key as master"):
        Configuration.load(target, environ=KEYS)
    keys_file.write_text("".join(printed.splitlines(keepends=True)[:2]))
    Configuration.load(target, environ=KEYS).check_usable()

    server = await make_server(auth=settings["auth"])

    for key in kept | gone:
        answer = await server.session.post(
            f"{server.v1}/chat/completions", json=CHAT, headers={"Authorization": f"Bearer {key}"}
        )
        assert answer.status == (200 if key in kept else 401), key
        await answer.read()


def test_no_alias_is_left_in_what_is_written(tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"

    assert convert(Path(__file__).parent / "litellm" / "shared.yaml", target) == 0

    events = yaml.parse(target.read_text(), Loader=yaml.SafeLoader)
    assert not any(isinstance(event, yaml.AliasEvent) for event in events)

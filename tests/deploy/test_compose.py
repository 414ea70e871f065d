"""`deploy/compose.yaml`: what its services say to each other fits together, and aioserver takes
its settings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from aioserver.config import Configuration
from aioserver.config.faults import ConfigurationError
from tests.support.tools import DEPLOY

ROOT = Path(__file__).parents[2]
TEXT = (DEPLOY / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
AIOSERVER = SERVICES["aioserver"]
KEY = "aio-0123456789abcdef0123456789abcdef"
# `${NAME}`, `${NAME:-default}`, `${NAME:?message}`.
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def interpolated(value: Any, environ: dict[str, str]) -> str:
    """The value of a variable in a service, as Compose makes it."""

    def fill(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        if name not in environ and operator != "-":
            raise KeyError(rest or name)
        return environ.get(name) or rest

    return VARIABLE.sub(fill, str(value))


def configured(variables: dict[str, str]) -> Configuration:
    """The configuration of the service, with the variables of the image."""
    recipe = (DEPLOY / "Dockerfile").read_text()
    environ = dict(re.findall(r"^(?:ENV|   ) (\w+)=(\S+)", recipe, re.MULTILINE))
    environ |= {
        name: interpolated(value, variables) for name, value in AIOSERVER["environment"].items()
    }
    (mounted,) = (volume for volume in AIOSERVER["volumes"] if volume.endswith(":ro"))
    source, target, _ = mounted.split(":")
    assert target == environ["AIOSERVER_CONFIG"]
    return Configuration.load(DEPLOY / source, environ=environ)


def test_aioserver_takes_its_settings_and_may_be_reached_from_other_containers() -> None:
    configuration = configured({"CHAT_KEY": KEY, "CHAT_MODEL": "qwen3:4b"})
    configuration.check_usable()
    settings = configuration.settings

    assert configuration.warnings == ()
    assert settings.chat.websocket.host == "0.0.0.0"
    local = settings.llm.providers[settings.llm.active]
    assert (local.base_url, local.model) == ("http://ollama:11434/v1", "qwen3:4b")
    assert local.when_down == "wait"
    parallel = SERVICES["ollama"]["environment"]["OLLAMA_NUM_PARALLEL"]
    assert local.http_client.concurrent_requests == int(parallel)
    assert settings.auth is not None
    assert [key.name for key in settings.auth.all_keys] == ["open-webui"]
    repository = settings.chat.service.repository
    assert repository.type == "sql"
    # The one folder that is a volume, on a file system that is read-only otherwise.
    folder = str(Path(str(repository.path)).parent)
    assert any(volume.endswith(f":{folder}") for volume in AIOSERVER["volumes"])
    assert f"-o 10001 -g 10001 {folder}\n" in (DEPLOY / "Dockerfile").read_text()


def test_a_key_that_was_forgotten_is_reported_by_compose_and_a_bad_one_by_aioserver() -> None:
    with pytest.raises(KeyError, match=r"write CHAT_KEY into deploy/\.env"):
        configured({})
    with pytest.raises(ConfigurationError):
        configured({"CHAT_KEY": " "})


def test_open_webui_asks_aioserver_with_its_key_and_nobody_else() -> None:
    environment = SERVICES["open-webui"]["environment"]
    settings = configured({"CHAT_KEY": KEY}).settings

    assert (
        environment["OPENAI_API_BASE_URL"] == f"http://aioserver:{settings.chat.websocket.port}/v1"
    )
    assert interpolated(environment["OPENAI_API_KEY"], {"CHAT_KEY": KEY}) == KEY
    assert environment["ENABLE_OLLAMA_API"] == "false"


def test_every_service_starts_after_what_it_needs_and_says_whether_it_is_well() -> None:
    needs = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in SERVICES.items()
    }

    assert needs == {
        "ollama": {},
        "model": {"ollama": "service_healthy"},
        "aioserver": {"model": "service_completed_successfully"},
        "open-webui": {"aioserver": "service_healthy"},
    }
    for name, service in SERVICES.items():
        # The one that ends is waited for, and not started again.
        assert ("healthcheck" in service) == ("restart" in service) == (name != "model")


def test_nothing_is_published_to_other_machines_and_volumes_are_declared() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    named = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
        if not volume.startswith(".")
    }

    assert ports == ["127.0.0.1:8000:8000", "127.0.0.1:3000:8080"]
    assert named == COMPOSE["volumes"].keys()


def test_aioserver_is_built_by_its_recipe_and_has_time_to_end() -> None:
    build = AIOSERVER["build"]
    settings = configured({"CHAT_KEY": KEY}).settings.chat
    kept = settings.streams.max_kept_bytes + settings.websocket.concurrency.max_body_bytes

    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).exists()
    assert AIOSERVER["read_only"] is True
    assert AIOSERVER["cap_drop"] == ["ALL"]
    websocket = settings.websocket
    assert int(AIOSERVER["stop_grace_period"].removesuffix("s")) > (
        websocket.drain_delay + websocket.shutdown_timeout + 5
    )
    assert int(AIOSERVER["mem_limit"].removesuffix("g")) * 2**30 > 2 * kept
    assert AIOSERVER["healthcheck"]["test"][1:] == [
        *("python", "-m", "aioserver.tools.health", "/ready"),
    ]


def test_the_words_of_its_head_are_what_there_is() -> None:
    head = TEXT.partition("name:")[0]

    assert '"CHAT_KEY=aio-' in head
    for name in re.findall(r"docker compose exec (\S+) aioserver doctor", head):
        assert name in SERVICES
    assert set(re.findall(r"http://localhost:(\d+)", head)) == {"3000", "8000"}
    assert "deploy/.env" in (ROOT / ".gitignore").read_text().splitlines()

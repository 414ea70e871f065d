"""The recipes of docs/recipes.md run as they stand, against the simulated model.

The model is silent at first, so that each program meets heartbeats. The large programs have tests
where they are installed: docs/testing.md says how.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from aioserver.config import Configuration
from tests.support.programs import CLIENTS, Ended, is_installed, program_path, run
from tests.support.simulator import Behaviour

if TYPE_CHECKING:
    from tests.support.server import MakeServer, RunningServer

pytestmark = [pytest.mark.clients]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/recipes.md").read_text()
SECTIONS = dict(
    section.split("\n", 1) for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
)
ADDRESS = "http://localhost:8000"
# Seconds until the first token, and between heartbeats.
THINKING = Behaviour(ttft=0.4, interval=0)
PING_INTERVAL = 0.1
FAILING = Behaviour(ttft=0, interval=0, fail_rate=1.0)

SPEECH = "I am a simulated model|simulated"
RESULT = "have called `get_weather` as you asked.*“sunny in Rome”"
LISTED = r"have called `\w+` as you asked.*notes\.txt"
# The section, and what its program must write.
PYTHON = {
    "openai: Python": SPEECH,
    "LangChain": r"'name': 'get_weather', 'args': {'city': 'Rome'}",
    "pydantic-ai": RESULT,
    "OpenAI Agents SDK": RESULT,
}
NODE = {"openai: Node.js": SPEECH, "AI SDK": RESULT, "Anthropic's SDK": SPEECH}
# The section, its configuration file below the home folder, and what its program must write.
PROGRAMS = {
    "Codex": (".codex/config.toml", LISTED),
    "Claude Code": (".claude/settings.json", LISTED),
    "opencode": ("opencode.json", LISTED),
    "Qwen Code": (".qwen/.env", LISTED),
    "pi": (".pi/agent/models.json", LISTED),
    "aider": (".aider.conf.yml", SPEECH),
}
# What keeps a program from asking a person, or the network.
QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "AIDER_YES_ALWAYS": "true",
    "AIDER_CHECK_UPDATE": "false",
    "AIDER_ANALYTICS": "false",
    "AIDER_GITIGNORE": "false",
}
HINT = f"run_tests.sh installs it into {CLIENTS}; see docs/testing.md"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty folder: that of the test has the server's configuration."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def blocks(section: str) -> list[tuple[str, str]]:
    """The language and the text of each block of code in *section*."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)


def code_of(section: str, language: str, server: RunningServer) -> str:
    (text,) = [text for kind, text in blocks(section) if kind == language]
    assert ADDRESS in text
    return text.replace(ADDRESS, server.base)


async def play_python(section: str, server: RunningServer, home: Path) -> Ended:
    python = CLIENTS / "bin/python"
    if not python.exists():
        pytest.skip(HINT)
    (home / "recipe.py").write_text(code_of(section, "python", server))
    return await run(python, "recipe.py", home=home)


async def play_node(section: str, server: RunningServer, home: Path) -> Ended:
    node = program_path("node", HINT)
    if not (CLIENTS / "node_modules/openai").exists():
        pytest.skip(HINT)
    (home / "node_modules").symlink_to(CLIENTS / "node_modules")
    (home / "recipe.mjs").write_text(code_of(section, "javascript", server))
    return await run(node, "recipe.mjs", home=home)


async def play_program(section: str, server: RunningServer, home: Path) -> Ended:
    (_, configuration), (_, line) = blocks(section)
    file = home / PROGRAMS[section][0]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(configuration.replace(ADDRESS, server.base))
    (home / "notes.txt").write_text("a note")
    await run("git", "init", "-q", ".", home=home)
    # opencode takes most of a minute to start on a busy machine.
    return await run("bash", "-c", line, home=home, environ=QUIET, within=150.0)


async def play(section: str, server: RunningServer, home: Path) -> Ended:
    if section in PYTHON:
        return await play_python(section, server, home)
    return await (play_node if section in NODE else play_program)(section, server, home)


def program_of(section: str) -> str:
    """The name of the program that the line of *section* starts."""
    _, (_, line) = blocks(section)
    return re.sub(r"\b[A-Z_]+=\S+ ", "", line).split()[0]


EXPECTED = {**PYTHON, **NODE, **{name: shown for name, (_, shown) in PROGRAMS.items()}}
INSTALLED = [*PYTHON, *NODE, *(name for name in PROGRAMS if is_installed(program_of(name)))]


@pytest.mark.parametrize("section", INSTALLED)
async def test_recipe_runs_as_it_stands(make_server: MakeServer, home: Path, section: str) -> None:
    server = await make_server(THINKING, **{"chat.websocket.ping_interval": PING_INTERVAL})

    done = await play(section, server, home)

    assert re.search(EXPECTED[section], done.out, re.DOTALL), done
    assert done.code == 0, done
    assert server.simulator.stats().requests == server.simulator.stats().completed > 0


@pytest.mark.parametrize(
    "section",
    [each for each in ("openai: Python", "Codex") if each in INSTALLED],
)
async def test_responses_are_translated_for_a_provider_that_has_none(
    make_server: MakeServer, home: Path, section: str
) -> None:
    server = await make_server(**{"llm.providers.sim.responses": False})

    done = await play(section, server, home)

    assert re.search(EXPECTED[section], done.out, re.DOTALL), done
    assert done.code == 0, done
    paths = {request.path for request in server.simulator.requests}
    assert paths == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    "section", [each for each in ("Anthropic's SDK", "Claude Code") if each in INSTALLED]
)
async def test_messages_are_translated_for_a_provider_that_has_none(
    make_server: MakeServer, home: Path, section: str
) -> None:
    server = await make_server(**{"llm.providers.sim.messages": "bridge"})

    done = await play(section, server, home)

    assert re.search(EXPECTED[section], done.out, re.DOTALL), done
    assert done.code == 0, done
    paths = {request.path for request in server.simulator.requests}
    assert paths == {"/v1/chat/completions"}


# One for each library that asks: others stand on openai-python, and Codex and opencode do not read
# `x-should-retry`.
@pytest.mark.parametrize("section", ["openai: Python", *NODE])
async def test_what_we_have_given_up_is_not_asked_again_and_again(
    make_server: MakeServer, home: Path, section: str
) -> None:
    server = await make_server(FAILING)

    done = await play(section, server, home)

    assert "503" in done.out + done.log
    # A provider's own refusal passes to Anthropic's SDK, with the time to come back: it does, twice.
    assert server.simulator.stats().requests == (3 if section == "Anthropic's SDK" else 1)


# The page itself.


def test_every_recipe_is_run_or_says_that_it_is_not() -> None:
    with_code = {name for name in SECTIONS if blocks(name)}

    not_run = {name for name in with_code if "\nNot run here: " in SECTIONS[name]}

    assert with_code - not_run == set(EXPECTED)


def test_configuration_files_are_those_that_the_page_names() -> None:
    for section, (file, _) in PROGRAMS.items():
        assert re.search(rf"^`(~/)?{re.escape(file)}`", SECTIONS[section].lstrip())


def test_configuration_of_every_recipe_can_be_read() -> None:
    readers: dict[str, Any] = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}
    texts = [block for name in SECTIONS for block in blocks(name) if block[0] in readers]

    assert len(texts) >= 9
    for language, text in texts:
        assert isinstance(readers[language](text), dict)


@pytest.mark.parametrize("number", range(3))
def test_model_server_is_configured_by_the_lines_for_it(tmp_path: Path, number: int) -> None:
    (_, text) = blocks("Behind llama.cpp, vLLM and Ollama")[number]
    configuration: dict[str, Any] = yaml.safe_load((ROOT / "config.yaml").read_text())
    changes = yaml.safe_load(text)["llm"]
    local = configuration["llm"]["providers"]["local"]
    configuration["llm"]["active"] = changes["active"]
    for name, value in changes["providers"]["local"].items():
        local[name] = {**local[name], **value} if isinstance(value, dict) else value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration))

    settings = Configuration.load(tmp_path / "config.yaml", environ={}).settings

    assert settings.llm.active == "local"
    assert settings.llm.providers["local"].model == "MODEL"
    assert settings.llm.providers["local"].messages

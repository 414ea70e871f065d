"""The pages in docs/ say what the code does: commands, log lines, metrics, state, settings'
names.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import pytest

from aioserver.__main__ import cli
from aioserver.telemetry.counters import Counter
from aioserver.wings.tracing.gen_ai_metrics import GenAiMeter
from tests.support.command import serving
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MONITORING = (DOCS / "monitoring.md").read_text()
LOGS = (DOCS / "logs.md").read_text()
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the packaged configuration."""
    folder = tmp_path_factory.mktemp("server")
    command = (sys.executable, "-m", "aioserver", "serve", "--port", "0")
    with serving(command, folder) as address:
        yield address


def get(url: str) -> str:
    with urlopen(Request(url), timeout=LATE) as response:
        text: str = response.read().decode()
        return text


def section(page: str, title: str) -> str:
    """The text below the heading *title*, up to the next heading."""
    return re.split(r"^#+ ", page.partition(f" {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def in_code(text: str) -> set[str]:
    """Every word that stands in backticks."""
    return {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code)}


def test_index_lists_every_page_once() -> None:
    index = (DOCS / "README.md").read_text()
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}

    listed = re.findall(r"\]\(([\w-]+\.md)\)", index)

    assert sorted(listed) == sorted(pages)


def test_every_command_has_its_row() -> None:
    rows = re.findall(
        r"^\| `aioserver(?:` or `aioserver)? (\w+)",
        (DOCS / "commands.md").read_text(),
        re.MULTILINE,
    )

    assert sorted(rows) == sorted(cli.commands)


def test_every_metric_has_its_row_and_no_other(server: str) -> None:
    text = get(f"{server}/metrics")
    exposed = set(re.findall(r"^# TYPE aioserver_(\w+) ", text, re.MULTILINE))

    cells = re.findall(r"^\| (`.+?) \| .*\|$", section(MONITORING, "Metrics"), re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}

    assert exposed
    assert named ^ exposed == set()


def test_every_attribute_of_a_span_has_its_row_and_no_other() -> None:
    code = (ROOT / "aioserver" / "wings" / "tracing" / "spans.py").read_text()
    page = (DOCS / "tracing.md").read_text()
    name = r"(?:gen_ai|aioserver|http|server|error)\.[a-z_.]+"

    written = set(re.findall(f'"({name})"', code))
    rows = re.findall(
        r"^\| (`.+?) \| .*\|$", section(page, "The spans of a request"), re.MULTILINE
    )
    described = {each for row in rows for each in re.findall(f"`({name})`", row)}

    assert written
    assert described ^ written == set()


def test_every_metric_of_the_conventions_has_its_row_and_no_other() -> None:
    llm: Any = SimpleNamespace(providers={}, models={})
    suffixes = {
        family.name: "_total" * (family.grows is Counter) for family in GenAiMeter(llm).families()
    }
    page = (DOCS / "tracing.md").read_text()

    rows = re.findall(
        r"^\| (`.+?) \| .*\|$", section(page, "Metrics by the same conventions"), re.MULTILINE
    )
    described = {each for row in rows for each in re.findall(r"`(\w+)`", row)}

    assert described == {name + suffix for name, suffix in suffixes.items()}


def fields(state: dict[str, Any], skip: frozenset[str]) -> Iterator[str]:
    """The names of all fields of *state*, but for what is below those in *skip*."""
    for name, value in state.items():
        yield name
        if isinstance(value, dict) and name not in skip:
            yield from fields(value, skip)


# Their fields are names: of error codes, faces, reasons, outcomes, or what another table
# describes.
NAMES = frozenset(
    {"rejections", "outcomes", "auth_failures", "active_by_face", "waiting_by_face", "endpoints"}
)


def test_every_field_of_the_state_is_described(server: str) -> None:
    state = json.loads(get(f"{server}/stats"))
    words = in_code(section(MONITORING, "The state: /stats"))

    described = {name for name in fields(state, NAMES | {"providers"}) if name not in words}

    assert described == set()


def test_every_field_of_a_provider_is_described(server: str) -> None:
    state = json.loads(get(f"{server}/stats"))["providers"]["demo"]
    words = in_code(section(MONITORING, "The state: /stats"))

    missing = {name for name in fields(state, frozenset({"faults"})) if name not in words}

    assert missing == set()


def logged() -> Iterator[tuple[str, str]]:
    """Every text that the package logs, and its file; but those made of nothing but other
    texts.
    """
    for path in sorted((ROOT / "aioserver").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, method = node.func.value, node.func.attr
            if method in LEVELS and "logger" in ast.dump(owner):
                text = node.args[1 if method == "log" else 0]
            elif method == "write" and isinstance(owner, ast.Name) and owner.id == "logs":
                text = node.args[2]
            else:
                continue
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            line = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "%s" for part in parts
            )
            if re.sub(r"%\w", "", line).strip():
                yield str(path.relative_to(ROOT)), line


@pytest.fixture(scope="module")
def patterns() -> dict[tuple[str, str], re.Pattern[str]]:
    """The files and texts of `logged`, and what matches such a line."""
    return {
        (file, text): re.compile(re.sub(r"%\w", "(.+)", re.escape(text)))
        for file, text in logged()
    }


EXPLAINED = [
    line
    for row in LOGS.splitlines()
    if re.search(r"\| (INFO|WARNING|ERROR) \|", row)
    for line in re.findall(r"`([^`]+)`", row.split("|")[1])
]


def test_every_log_line_is_explained(patterns: dict[tuple[str, str], re.Pattern[str]]) -> None:
    unexplained = [
        f"{file}: {text}"
        for (file, text), pattern in patterns.items()
        if not any(pattern.fullmatch(line) for line in EXPLAINED)
    ]

    assert len(patterns) > 20
    assert unexplained == []


def test_no_line_is_explained_that_nothing_logs(
    patterns: dict[tuple[str, str], re.Pattern[str]],
) -> None:
    assert [
        line
        for line in EXPLAINED
        if not any(pattern.fullmatch(line) for pattern in patterns.values())
    ] == []


def test_every_page_that_the_code_names_exists() -> None:
    missing = [
        f"{path.relative_to(ROOT)} names {name}"
        for folder in ("aioserver", "benchmarks", "deploy", "examples", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".yaml", ".sh", ".service", ".socket", ".conf", ".cfg"}
        for name in re.findall(r"\bdocs/[\w-]+\.md", path.read_text())
        if not (ROOT / name).exists()
    ]

    assert missing == []


def test_pictures_are_small_and_shown() -> None:
    text = "".join(path.read_text() for path in [ROOT / "README.md", *DOCS.glob("*.md")])

    for picture in (DOCS / "images").iterdir():
        assert f"images/{picture.name}" in text
        assert picture.stat().st_size < 200_000

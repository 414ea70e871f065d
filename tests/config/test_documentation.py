"""The page docs/configuration.md says of every key what the code says."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aioserver.config import chat, configuration, document, llm
from aioserver.config.settings import Settings
from aioserver.config.shipped import SHIPPED
from aioserver.files import reading
from aioserver.server.reload import ONLY_BY_RESTART
from tests.support.configurations import ORIGINAL, load, paths, refused

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/configuration.md").read_text()
SECTION = re.compile(r"^### `(\S+)`$(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| (`.*) \|$", re.MULTILINE)
CELLS = re.compile(r" (?<!\\)\| ")
COMPARISON = re.compile(r'compare\(self, "(\S+)", "(\S+)", "(\S+)"\)')

ROWS = [
    (title, CELLS.split(row)) for title, text in SECTION.findall(PAGE) for row in ROW.findall(text)
]
RULES = COMPARISON.findall(inspect.getsource(chat) + inspect.getsource(llm))


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_tables_are_those_of_the_code() -> None:
    tables = [sys.executable, str(ROOT / "docs/tables.py"), "--check"]

    done = subprocess.run(tables, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_every_setting_has_one_whole_row() -> None:
    expected = sorted(path.rpartition(".")[::2] for path in paths(Settings))

    assert sorted((title, row[0].strip("`")) for title, row in ROWS) == expected
    assert len(expected) > 80
    for _, row in ROWS:
        assert len(row) == 4
        assert all(row)


@pytest.mark.parametrize(("path", "sign", "limit"), RULES)
def test_every_comparison_of_two_keys_is_a_rule_on_the_page(
    path: str, sign: str, limit: str
) -> None:
    assert f"`{path} {sign} {limit}`" in section("Rules between keys")


def test_the_comparisons_were_found() -> None:
    assert len(RULES) == 5


@pytest.mark.parametrize("key", ONLY_BY_RESTART)
def test_settings_that_only_a_restart_changes_are_named(key: str) -> None:
    assert f"`{key}`" in section("Reload")


def test_every_key_without_an_effect_is_named_with_what_does_its_work_as_its_warning_says() -> (
    None
):
    table = section("Settings of the old system without effect")
    rows = {row[0].strip("`"): row[1] for row in map(CELLS.split, ROW.findall(table))}

    warned = [
        warning.split(" ", 1)[1].split(": ignored: ")
        for warning in configuration.Configuration.load(ORIGINAL, environ={}).warnings
        if ": ignored: " in warning
    ]
    # The original has all of them.
    assert dict(warned) == rows
    assert len(rows) == 10


def test_the_size_of_a_file_and_the_prefix_of_overrides_are_those_of_the_code() -> None:
    assert reading.MAX_FILE_BYTES == 2**20
    assert "at most 1 MiB" in section("The file")
    assert f"`{document.PREFIX}`" in section("Values from the environment")


def test_the_faults_that_the_page_shows_are_those_of_the_code(tmp_path: Path) -> None:
    _, command, shown = section("Check").partition(
        "$ AIOSERVER__LLM__ACTIVE=grok aioserver check\n"
    )
    text = SHIPPED.read_text().replace("port: 8000", "prot: 8000")
    text = text.replace("connection_queue_size: 500", "connection_queue_size: 99")
    file = tmp_path / "config.yaml"

    faults = refused(lambda: load(text, file, AIOSERVER__LLM__ACTIVE="grok"), file)

    assert command
    assert shown.partition("```")[0].replace("config.yaml:", "F:").splitlines() == faults

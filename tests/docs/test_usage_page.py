"""What docs/usage.md shows is what the command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from aioserver.tools.usage import KEYS, command
from aioserver.usage.ledger_reader import COLUMNS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "usage.md").read_text()
SHOWN = re.findall(r"^\$ aioserver usage (.+)\n((?:.+\n)+)", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("args", "output"), SHOWN)
def test_the_output_of_a_command_is_as_shown(
    args: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    result = CliRunner().invoke(command, args.split())

    assert result.stdout == output.removesuffix("```\n")
    assert result.stderr == ""


def test_it_describes_every_key_and_every_column() -> None:
    assert len(SHOWN) == 1
    assert {name for name in (*KEYS, *COLUMNS) if f"`{name}`" not in PAGE} == set()

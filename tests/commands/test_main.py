"""The command line as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from aioserver import __version__
from aioserver.__main__ import cli

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("command", [[], ["serve"]])
def test_the_options_of_serve_may_stand_alone(command: list[str], tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    result = CliRunner().invoke(cli, [*command, "--port", "0", "--config", str(missing)])
    assert result.exit_code == 2
    assert "missing.yaml" in result.stderr
    assert "No such option" not in result.stderr


@pytest.mark.parametrize("command", [[], ["serve"]])
def test_bad_usage_is_one_clear_error(command: list[str]) -> None:
    for wrong in (["--port", "x"], ["--nonsense"], ["--loop", "trio"]):
        result = CliRunner().invoke(cli, [*command, *wrong])
        assert result.exit_code == 2, wrong
        assert "Error: " in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_commands_are_listed(option: str) -> None:
    result = CliRunner().invoke(cli, [option])
    assert result.exit_code == 0
    for command in ("serve", "check", "init", "provider", "top", "bench"):
        assert f"  {command}" in result.stdout


def test_the_version() -> None:
    assert __version__ in CliRunner().invoke(cli, ["--version"]).stdout

"""The `key` command: a key, and a line that the configuration takes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
import yaml
from click.testing import CliRunner

from aioserver.__main__ import cli
from aioserver.auth.access import Access
from tests.support.configurations import load, small

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("options", "admin"), [([], False), (["--admin"], True)])
def test_the_line_lets_the_key_in(tmp_path: Path, options: list[str], admin: bool) -> None:
    result = CliRunner().invoke(cli, ["key", "web-1.b_c", *options])

    assert result.exit_code == 0
    made, line = result.stdout.splitlines()
    assert made.startswith("aio-")
    assert len(made) == 4 + 43
    assert made not in result.stderr
    assert made not in line
    text = f"{small()}auth:\n  keys:\n  {line}\n"
    auth = load(text, tmp_path / "config.yaml").settings.auth
    caller = Access(auth).keys.caller(made.encode())
    assert (caller.name, caller.admin) == ("web-1.b_c", admin)
    assert yaml.safe_load(line)[0]["sha256"] == hashlib.sha256(made.encode()).hexdigest()


def test_no_two_keys_are_alike() -> None:
    made = {CliRunner().invoke(cli, ["key", "web"]).stdout.splitlines()[0] for _ in range(50)}

    assert len(made) == 50


@pytest.mark.parametrize("name", ["", "a b", "-x", "é", "a\nb", "x" * 65, '"', "a:b", "../x"])
def test_a_name_that_no_caller_can_have_is_usage(name: str) -> None:
    result = CliRunner().invoke(cli, ["key", "--", name])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert "NAME" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--root", "a"]])
def test_anything_but_one_name_is_a_usage_error(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["key", *arguments]).exit_code == 2


def test_a_name_with_a_number_or_a_word_of_yaml_stays_a_name(tmp_path: Path) -> None:
    for name in ("7", "no", "1.5", "null"):
        line = CliRunner().invoke(cli, ["key", name]).stdout.splitlines()[1]
        auth = load(f"{small()}auth: {{keys: [{line[2:]}]}}\n", tmp_path / "c.yaml").settings.auth

        assert auth is not None
        assert auth.keys[0].name == name

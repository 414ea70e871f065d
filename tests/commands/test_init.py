from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.commands.init import init
from aioserver.config import Configuration, json_schema
from aioserver.config.shipped import SHIPPED

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_shipped_file_is_written_and_loads(tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"

    assert init(target) == 0
    assert target.read_bytes() == SHIPPED.read_bytes()
    Configuration.load(target, environ={}).check_usable()


def test_a_file_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "config.yaml"
    target.write_text("mine")

    code = init(target)

    assert code == 2
    assert target.read_text() == "mine"
    assert capsys.readouterr().err == f"{target} exists; nothing was written\n"


def test_the_schema_comes_beside_it_and_over_no_file(tmp_path: Path) -> None:
    schema = tmp_path / "config.schema.json"

    assert init(tmp_path / "config.yaml") == 0
    assert schema.read_text() == json_schema.text()
    schema.write_text("mine")
    assert init(tmp_path / "other.yaml") == 0
    assert schema.read_text() == "mine"


def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"
    target.symlink_to(tmp_path / "elsewhere")

    assert init(target) == 2
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_not_there_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "gone" / "config.yaml"

    assert init(target) == 2
    assert capsys.readouterr().err == f"{target} cannot be written: No such file or directory\n"

"""The README says what is true."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_map_names_every_module() -> None:
    a_map = README.partition("## Where things are")[2].partition("## Configuration")[0]
    modules = {
        path.parent.name if path.parent.name == "simulator" else path.stem
        for path in (ROOT / "aioserver").rglob("*.py")
        if not path.stem.startswith("__") and path.parent.name != "commands"
    }

    assert {name for name in modules if name not in a_map} == set()


def test_the_packaged_configuration_is_the_shipped_one() -> None:
    assert (ROOT / "config.yaml").read_bytes() == (ROOT / "aioserver/config.yaml").read_bytes()


def test_every_test_that_the_docs_name_exists() -> None:
    text = (ROOT / "docs/concurrency.md").read_text()
    file, missing, found = "", [], 0
    for match in re.finditer(r"`(?:(tests/[\w/]+\.py)|…)::(\w+)`", text):
        file, name = match[1] or file, match[2]
        found += 1
        if f"def {name}(" not in (ROOT / file).read_text():
            missing.append(f"{file}::{name}")

    assert found > 30
    assert missing == []

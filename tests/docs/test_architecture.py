"""The line of packages in docs/architecture.md is the one enforced, and the files that the page
names exist.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()


def test_line_of_packages_is_the_one_enforced_and_has_every_package() -> None:
    (line,) = re.findall(r"^    (errors provider_errors .+)$", PAGE, re.MULTILINE)
    enforced = (ROOT / "tests/test_imports.py").read_text()

    packages = {path.stem for path in (ROOT / "aioserver").iterdir() if is_module(path)}

    assert re.sub(r'"\s+"', "", enforced).count(line) == 1
    assert {name for name in line.split() if name != "|"} == packages - {"__init__"}


def is_module(path: Path) -> bool:
    """Whether *path* is a module or a package."""
    return path.suffix == ".py" or (path / "__init__.py").exists()


def test_every_file_that_the_page_names_exists() -> None:
    prose = re.findall(r"`((?:[\w.]+/)+(?:[\w.]+)?|[\w.]+\.(?:py|md|yaml|cfg|toml|sh))`", PAGE)
    folders = [ROOT, ROOT / "aioserver", ROOT / "aioserver/wings/simulator"]

    missing = [name for name in prose if not any((there / name).exists() for there in folders)]

    assert len(prose) > 30
    assert missing == []

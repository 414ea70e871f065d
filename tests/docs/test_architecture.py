"""The map in docs/architecture.md is that of the tree; its line of packages is the one
enforced.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
MAP = PAGE.partition("```\naioserver/\n")[2].partition("```")[0]
ENTRY = re.compile(r"(?P<indent> +)(?P<name>[\w.]+/?) {2,}(?P<meaning>\S.*)")
# Folders that stand in the map as one line: what is in them has no modules.
LEAVES = {"faces/assets"}


def mapped() -> dict[str, str]:
    """Path to meaning of every entry of the map."""
    entries: dict[str, str] = {}
    parents: list[str] = []
    for line in MAP.splitlines():
        match = ENTRY.fullmatch(line)
        assert match is not None, f"not an entry of the map: {line!r}"
        depth = len(match["indent"]) // 2 - 1
        name = match["name"].rstrip("/")
        parents = [*parents[:depth], name]
        entries["/".join(parents)] = match["meaning"]
    return entries


def in_the_tree() -> set[str]:
    """Every folder of the package and every file in them, but for what the map leaves out."""
    package = ROOT / "aioserver"
    paths = set()
    for path in package.rglob("*"):
        relative = path.relative_to(package)
        inside_leaf = any(str(parent) in LEAVES for parent in relative.parents)
        if "__pycache__" in relative.parts or inside_leaf:
            continue
        if path.name == "__init__.py" and relative.parent != Path():
            continue  # the glossary of its folder, which is in the map
        paths.add(str(relative))
    return paths


def test_map_is_that_of_the_tree() -> None:
    named, there = set(mapped()), in_the_tree()

    problems = [f"{path}: not in docs/architecture.md" for path in sorted(there - named)]
    problems += [f"{path}: in docs/architecture.md, but gone" for path in sorted(named - there)]

    assert not problems, "\n".join(problems)


def test_packages_stand_in_the_order_of_the_imports() -> None:
    (line,) = re.findall(r"^    (errors provider_errors .+)$", PAGE, re.MULTILINE)
    enforced = (ROOT / "tests/test_imports.py").read_text()

    order = [name for name in line.split() if name != "|"]
    top = [name.removesuffix(".py") for name in mapped() if "/" not in name]

    assert re.sub(r'"\s+"', "", enforced).count(line) == 1
    assert [name for name in top if name in order and name != "__main__"] == order[:-1]


def test_every_file_that_the_page_names_exists() -> None:
    text = PAGE.replace(MAP, "")
    prose = re.findall(r"`((?:[\w.]+/)+(?:[\w.]+)?|[\w.]+\.(?:py|md|yaml|cfg|toml|sh))`", text)
    folders = [ROOT, ROOT / "aioserver", ROOT / "aioserver/wings/simulator"]

    missing = [name for name in prose if not any((there / name).exists() for there in folders)]

    assert len(prose) > 30
    assert missing == []

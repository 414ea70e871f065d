"""The package's source as syntax trees, by the names of its modules without `aioserver.`."""

from __future__ import annotations

import ast
from pathlib import Path

import aioserver

PACKAGE = Path(aioserver.__file__).parent
TESTS = Path(__file__).parents[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
MODULES = {name: tree for name, tree in TREES.items() if FILES[name].name != "__init__.py"}
PACKAGES = TREES.keys() - MODULES.keys()

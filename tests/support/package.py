"""The package's source as syntax trees, by the names of its modules without `aioserver.`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import aioserver

PACKAGE = Path(aioserver.__file__).parent
TESTS = Path(__file__).parents[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


class Trees(Mapping[str, ast.Module]):
    """The trees of some modules. Each is parsed when it is looked at first: every process of the
    tests imports this, and few look. All together have a million objects.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._trees: dict[str, ast.Module | None] = dict.fromkeys(names)

    def __getitem__(self, name: str) -> ast.Module:
        tree = self._trees[name]
        if tree is None:
            tree = self._trees[name] = ast.parse(FILES[name].read_text())
        return tree

    def __contains__(self, name: object) -> bool:
        return name in self._trees  # a mapping's own looks at the tree

    def __iter__(self) -> Iterator[str]:
        return iter(self._trees)

    def __len__(self) -> int:
        return len(self._trees)


TREES = Trees(FILES)
MODULES = Trees(name for name, path in FILES.items() if path.name != "__init__.py")
PACKAGES = TREES.keys() - MODULES.keys()

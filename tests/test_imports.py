"""Imports point to the left, in this one line. What is only for the type checker does not count."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import aioserver

if TYPE_CHECKING:
    from collections.abc import Iterator

# fmt: off
ORDER = "errors faults hosts setting checks settings document config counting metrics logs lag records messages deltas eventstream entries turns gate kernel stall wheel fastpath streams store lifetime conversations allowance auth bodies providers.simulator.model providers.simulator.refusals providers.simulator.shapes providers.simulator.exchange providers.simulator.broken providers.simulator.unusual providers.simulator.faults providers.simulator.server providers.simulator providers.pace providers.line providers.breaker providers.health providers.budget providers.framing providers.wire providers.pool providers.requests providers.pools providers.verdict providers.ask providers.answers providers.provider providers.roster router questions gateway faces.admission keys monitor prometheus faces.http faces.door faces.ready faces.formats faces.follower faces.writer faces.streaming faces.openai faces.responses faces.sse faces.websocket faces.status faces.pages listener runner app startup reload systemd commands.init commands.check commands.key commands.provider commands.serve commands.remote commands.top.feed commands.top.verdict commands.top.screen commands.top.command commands.bench.results commands.bench.attempt commands.bench.clients commands.bench.limits commands.bench.load commands.bench.table commands.bench.command __main__"
# fmt: on

PACKAGE = Path(aioserver.__file__).parent
PLACES = {name: place for place, name in enumerate(ORDER.split())}
INSIDE_FUNCTIONS = {  # module: what it may import late, for start-up time or as an option
    "__main__": {
        "aioserver.commands.*",
        "aioserver.commands.bench.*",
        "aioserver.commands.top.*",
        "aioserver.providers.simulator",
    },
    "providers.roster": {"aioserver.providers.simulator"},
    "commands.serve": {"uvloop"},
    "commands.bench.command": {"aioserver.commands.bench.table"},
    "commands.top.command": {"aioserver.commands.top.screen"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
    or path.parent.name == "simulator"  # which names its public parts
}


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(node: ast.AST, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Every `module` that is imported while the program runs, and whether inside a function."""
    for child in ast.iter_child_nodes(node):
        if type_checking(child):
            assert isinstance(child, ast.If)
            for alternative in child.orelse:
                yield from imports(alternative, late)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, late
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "relative import"
            assert child.module is not None
            for alias in child.names:
                whole = f"{child.module}.{alias.name}".removeprefix("aioserver.")
                yield (f"aioserver.{whole}" if whole in MODULES else child.module), late
        else:
            inner = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, inner)


def test_the_line_names_every_module_once() -> None:
    assert len(PLACES) == len(ORDER.split())
    assert MODULES.keys() - PLACES.keys() == set(), "add it to ORDER, as far left as it can stand"
    assert PLACES.keys() - MODULES.keys() == set(), "gone: take it out of ORDER"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_is_left_of_it(module: str) -> None:
    for imported, _late in imports(MODULES[module]):
        name = imported.removeprefix("aioserver.")
        if imported == "aioserver" or not imported.startswith("aioserver."):
            continue
        assert PLACES[name] < PLACES[module], f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_only_what_is_optional_or_slow_is_imported_inside_a_function(module: str) -> None:
    allowed = INSIDE_FUNCTIONS.get(module, set())

    found = {imported for imported, late in imports(MODULES[module]) if late}

    assert not {
        one for one in found if one not in allowed and one.rpartition(".")[0] + ".*" not in allowed
    }


@pytest.mark.parametrize("package", ["", "providers", "faces", "commands"])
def test_a_package_imports_nothing_of_its_own(package: str) -> None:
    tree = ast.parse((PACKAGE / package / "__init__.py").read_text())

    assert not [one for one, late in imports(tree) if one.startswith("aioserver") and not late]

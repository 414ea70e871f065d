"""Imports point to the left, in one line of packages; those for the type checker count as well."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from tests.support.package import MODULES, PACKAGES, TESTS, TREES

if TYPE_CHECKING:
    from collections.abc import Iterator

# The root package holds the version, imports nothing, and stands left of all.
LINE = (
    "errors provider_errors protocol limits config client telemetry auth streams providers gateway"
    " monitoring cluster faces server commands __main__"
)
ORDER = LINE.split()
TO_COME = {"client", "cluster"}  # rooms that are kept free
INSIDE_FUNCTIONS = {  # module: what it may import late, for start-up time or as an option
    "providers.registry": {"aioserver.providers.simulator.server"},
    "commands.serve": {"uvloop"},
    "commands.bench.command": {"aioserver.commands.bench.table"},
    "commands.top.command": {"aioserver.commands.top.screen"},
}


def imports(node: ast.AST, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Every module that is imported, also for the type checker, and whether inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, late
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "relative import"
            assert child.module is not None
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                known = whole.removeprefix("aioserver.") in TREES
                yield (whole if known else child.module), late
        else:
            inner = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, inner)


def ours(tree: ast.AST) -> set[str]:
    """The modules of this package that *tree* imports, without the package's name."""
    found = {name for name, _late in imports(tree)}
    return {name.removeprefix("aioserver.") for name in found if name.startswith("aioserver.")}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_order_names_every_package_once() -> None:
    rooms = {room(name) for name in TREES if name}

    assert len(set(ORDER)) == len(ORDER)
    assert rooms | TO_COME == set(ORDER)


@pytest.mark.parametrize("module", TREES)
def test_module_imports_only_packages_on_its_left(module: str) -> None:
    for imported in ours(TREES[module]):
        if room(imported) != room(module):
            assert ORDER.index(room(imported)) < ORDER.index(room(module)), imported


@pytest.mark.parametrize("name", ORDER)
def test_package_has_no_circle(name: str) -> None:
    graph = {one: ours(TREES[one]) & TREES.keys() for one in TREES if room(one) == name}
    while ends := [one for one, wanted in graph.items() if not wanted & graph.keys()]:
        for one in ends:
            del graph[one]

    assert not graph


@pytest.mark.parametrize("module", MODULES)
def test_only_what_is_optional_or_slow_is_imported_inside_a_function(module: str) -> None:
    allowed = INSIDE_FUNCTIONS.get(module, set())

    found = {imported for imported, late in imports(MODULES[module]) if late}

    assert not {
        one for one in found if one not in allowed and one.rpartition(".")[0] + ".*" not in allowed
    }


@pytest.mark.parametrize("package", sorted(PACKAGES - {"config"}))
def test_package_imports_nothing_of_its_own(package: str) -> None:
    assert not ours(TREES[package])


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_package_opens_with_its_glossary(package: str) -> None:
    text = ast.get_docstring(TREES[package])

    assert text is not None
    assert text.count("\n") >= 3 or not package


def test_no_test_module_is_imported() -> None:
    importers = {
        f"{path.relative_to(TESTS)}: {module}"
        for path in TESTS.rglob("*.py")
        for module, _late in imports(ast.parse(path.read_text()))
        if module.startswith("tests.") and ".test_" in module
    }

    assert not importers, "what two test modules need is in tests/support"

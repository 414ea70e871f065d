"""The layout: a core whose imports point to the left, wings that stand on it, and tests that
mirror the package.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.package import FILES, MODULES, PACKAGES, TESTS, TREES

if TYPE_CHECKING:
    from collections.abc import Iterator

# A package imports what stands left of it; between the bars only from the core, which is left of
# the first one. The root package holds the version, imports nothing, and stands left of all.
LINE = (
    "errors provider_errors tracebacks hook protocol limits files config auth telemetry usage streams "
    "providers gateway monitoring faces | wings client | server workers commands tools __main__"
)
CORE, BESIDE, PROCESS = (part.split() for part in LINE.split("|"))
ORDER = [*CORE, *BESIDE, *PROCESS]
# Imports against this rule, as (importer, imported): rows may go, and none may come.
OWED: set[tuple[str, str]] = set()
# Folders of tests that are no package's: of pages, of deploy/ and docs/, of the whole server, and
# for all tests.
OTHER_TESTS = {
    "browser",
    "clients",
    "core",
    "deploy",
    "docs",
    "end_to_end",
    "fuzz",
    "simulation",
    "soak",
    "suites",
    "support",
}
# Modules, and what they may import inside a function, for start-up time or as an option.
INSIDE_FUNCTIONS = {
    "config.credentials": {"aioserver.files.certificates"},
    "config.hints": {"difflib"},
    "wings.simulator.wing": {"aioserver.wings.simulator.server"},
    "wings.cluster.wing": {
        "aioserver.wings.cluster.examination",
        "aioserver.wings.cluster.membership",
    },
    "commands.serve": {
        "uvloop",
        "aioserver.workers.fork_server",
        "aioserver.workers.parent",
        "aioserver.workers.worker",
    },
    "wings.jwt.wing": {"aioserver.wings.jwt.issuer", "importlib.metadata"},
    "wings.tracing.wing": {
        "aioserver.wings.tracing.export",
        "aioserver.wings.tracing.otlp",
        "aioserver.wings.tracing.tracer",
    },
    "wings.conversations.wing": {
        "aioserver.wings.conversations.redis",
        "aioserver.wings.conversations.sqlite",
        "aioserver.wings.conversations.sqlite_file",
    },
    "commands.serve_command": {"aioserver.commands.serve"},
    "tools.usage": {"aioserver.config", "aioserver.config.faults"},
    "tools.bench.command": {"aioserver.tools.bench.table"},
    "tools.doctor.command": {"aioserver.tools.doctor.checks"},
    "tools.chat.dialog": {"readline"},
    "tools.chat.asking": {"aioserver.tools.chat.markdown"},
    "tools.top.command": {"aioserver.tools.top.screen"},
}

# Lines of a file from which on its head says why all of it is one concept.
LONG = 400
# Codecs that need no import, and modules that use another one before they serve.
BUILT_IN_CODECS = {"ascii", "latin-1", "utf-8", "utf-16"}
OTHER_CODECS = {("config.document", "utf-8-sig"), ("config.keys_file", "utf-8-sig")}


def imports(node: ast.AST, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield each imported module, also those for the type checker, and whether inside a
    function.
    """
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
        elif not isinstance(child, ast.expr):
            inner = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(child, inner)


def ours(tree: ast.AST) -> set[str]:
    """The modules of aioserver that *tree* imports, without `aioserver.`."""
    names = {name for name, _late in imports(tree)}
    return {name.removeprefix("aioserver.") for name in names if name.startswith("aioserver.")}


def package_of(module: str) -> str:
    """The package of *module*; each wing is one of its own."""
    first, _, rest = module.partition(".")
    return f"wings.{rest.partition('.')[0]}" if first == "wings" and rest else first


def allowed(module: str, imported: str) -> bool:
    """Whether *module* may import *imported*, another module of aioserver."""
    package, wanted = package_of(module), package_of(imported)
    if package == wanted:
        return True
    if package == "client":
        return wanted in {"errors", "protocol"}
    if package.startswith("wings"):
        return wanted in CORE
    if wanted == "workers":
        return module == "commands.serve"
    if (package, wanted) == ("server", "client"):
        return False
    place = ORDER.index(package) if package else -1
    return ORDER.index(wanted.partition(".")[0]) < place


def test_order_names_every_package_once() -> None:
    packages = {name.partition(".")[0] for name in TREES if name}

    assert len(set(ORDER)) == len(ORDER)
    assert packages == set(ORDER)


def test_modules_import_only_what_the_line_allows() -> None:
    wrong = {
        (module, imported)
        for module in TREES
        for imported in ours(TREES[module])
        if not allowed(module, imported)
    }

    assert wrong <= OWED


def test_what_is_owed_is_still_imported() -> None:
    assert {pair for pair in OWED if pair[1] not in ours(TREES[pair[0]])} == set()
    assert not {pair for pair in OWED if allowed(*pair)}


@pytest.mark.parametrize("package", sorted({package_of(name) for name in TREES if name}))
def test_package_has_no_circle(package: str) -> None:
    graph = {
        module: ours(TREES[module]) & TREES.keys()
        for module in TREES
        if package_of(module) == package
    }
    while ends := [module for module, wanted in graph.items() if not wanted & graph.keys()]:
        for module in ends:
            del graph[module]

    assert not graph


def test_only_what_is_optional_or_slow_is_imported_inside_a_function() -> None:
    late_imports = {
        (module, imported)
        for module, tree in MODULES.items()
        for imported, late in imports(tree)
        if late
    }

    allowed_ones = {(module, name) for module, names in INSIDE_FUNCTIONS.items() for name in names}
    assert late_imports <= allowed_ones


def test_no_codec_is_imported_at_its_first_use() -> None:
    """Such an import needs a file descriptor, and a busy server may have none left."""
    used = {
        (module, str(call.args[0].value).lower())
        for module, tree in MODULES.items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in {"encode", "decode"}
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }

    late = {(module, codec) for module, codec in used if codec not in BUILT_IN_CODECS}

    assert late == OTHER_CODECS


def test_the_client_library_knows_errors_and_protocol_only() -> None:
    imported = {
        package_of(name)
        for module, tree in MODULES.items()
        if package_of(module) == "client"
        for name in ours(tree)
    }

    assert imported <= {"client", "errors", "protocol"}


def test_the_client_library_loads_nothing_of_the_server() -> None:
    script = "import sys, aioserver.client.sync; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[1] for name in done.stdout.split() if name.startswith("aioserver.")}

    assert loaded == {"client", "protocol"}
    assert not {"aiohttp.web_app", "voluptuous", "yaml", "prometheus_client", "click"} & {
        *done.stdout.split()
    }


@pytest.mark.parametrize("package", sorted(PACKAGES - {"config", "client"}))
def test_package_imports_nothing_of_its_own(package: str) -> None:
    assert not ours(TREES[package])


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_package_opens_with_its_glossary(package: str) -> None:
    text = ast.get_docstring(TREES[package])

    assert text is not None
    assert text.count("\n") >= 3 or not package


def test_a_long_file_says_why_it_is_one_concept() -> None:
    heads = {
        name: " ".join((ast.get_docstring(TREES[name]) or "").split())
        for name, path in FILES.items()
        if path.read_text().count("\n") > LONG
    }

    assert not {name for name, head in heads.items() if "one concept" not in head}


def test_every_folder_of_tests_is_of_a_package_or_known() -> None:
    folders = {path.parent.name for path in TESTS.glob("*/*.py")}
    wings = {f"wings.{path.parent.name}" for path in TESTS.glob("wings/*/*.py")}

    assert folders <= {*ORDER, *OTHER_TESTS}
    assert wings <= PACKAGES


def test_no_test_module_is_imported() -> None:
    importers = {
        f"{path.relative_to(TESTS)}: {module}"
        for path in TESTS.rglob("*.py")
        if ".test_" in (text := path.read_text())
        for module, _late in imports(ast.parse(text))
        if module.startswith("tests.") and ".test_" in module
    }

    assert not importers, "what two test modules need is in tests/support"

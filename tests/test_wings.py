"""Each wing can be deleted: a copy of the package without it serves, and its core does what it did
(tests/core).
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from aioserver.server.wings import WINGS
from tests.support.command import serving
from tests.support.package import PACKAGE, TESTS, TREES
from tests.support.without_wing import COMMANDS, copy_package_without

if TYPE_CHECKING:
    from pathlib import Path

NAMES = sorted(wing.name for wing in WINGS)
# What tests/core needs of the tests.
NEEDED = ("__init__.py", "core", "support")
# Seconds for a copy to be tested.
PATIENCE = 120.0
# Imports the modules that it is given, and serves.
IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from aioserver.__main__ import cli
cli(["serve", "--port", "0"])
"""
CONFIGURATION = """
llm: {active: local, providers: {local: {base_url: "http://127.0.0.1:9/v1", model: m}}}
"""


def copy_tests(into: Path) -> None:
    """Copy the tests of the core."""
    for name in NEEDED:
        source = TESTS / name
        if source.is_dir():
            shutil.copytree(source, into / "tests" / name)
        else:
            (into / "tests").mkdir(exist_ok=True)
            shutil.copy(source, into / "tests" / name)
    shutil.copy(TESTS.parent / "setup.cfg", into)


def run(into: Path, *command: str) -> None:
    environ = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [sys.executable, "-P", *command],
        cwd=into,
        env=environ | {"PYTHONPATH": str(into), "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_table_has_each_wing_once() -> None:
    folders = {path.parent.name for path in (PACKAGE / "wings").glob("*/__init__.py")}

    assert len(set(NAMES)) == len(NAMES)
    assert set(NAMES) == folders


def test_nothing_but_the_table_names_a_wing() -> None:
    """Beside the commands that go with their wings. Wings import the core alone: test_imports.py."""
    goes = {
        path.removesuffix(".py").replace("/", ".") for paths in COMMANDS.values() for path in paths
    }
    namers = {
        name
        for name, tree in TREES.items()
        if not name.startswith("wings")
        for node in ast.walk(tree)
        for module in names_in(node)
        if module.startswith("aioserver.wings.")
    }

    assert namers - goes == {"server.wings"}


def names_in(node: ast.AST) -> list[str]:
    """The modules that *node* imports from."""
    match node:
        case ast.ImportFrom(module=str(module), names=names):
            return [f"{module}.{alias.name}" for alias in names]
        case ast.Import(names=names):
            return [alias.name for alias in names]
    return []


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("wings", [*([name] for name in NAMES), NAMES], ids=[*NAMES, "all"])
def test_the_others_are_served_without_a_wing(wings: list[str], tmp_path: Path) -> None:
    copy_package_without(wings, tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIGURATION)
    # What is no wing is imported once, where none is there.
    left = [
        ".".join(path.relative_to(tmp_path).with_suffix("").parts)
        for path in sorted((tmp_path / "aioserver").rglob("*.py") if wings == NAMES else ())
        if path.stem not in {"__init__", "__main__"}
    ]

    command = (sys.executable, "-P", "-c", IMPORT, *left)
    with serving(command, tmp_path, {"PYTHONPATH": str(tmp_path)}) as address:
        assert address.startswith("http://")


@pytest.mark.timeout(2 * PATIENCE)
def test_the_core_works_without_wings(tmp_path: Path) -> None:
    copy_package_without(NAMES, tmp_path)
    copy_tests(tmp_path)
    command = ("-m", "pytest", "-m", "core", "--noconftest", "-p", "no:cacheprovider")

    run(tmp_path, *command, "tests/core")

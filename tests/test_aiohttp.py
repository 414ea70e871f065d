"""aiohttp is used by its public names: any version below the next major one will do."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.package import FILES, PACKAGE, TESTS, TREES

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(aiohttp.__file__).parent
# The half of the WebSocket that is compiled, and so keeps the names of what it reads of others.
COMPILED = Path("_websocket", "reader_py.py")
# Names that other packages read, or that are put together, or come from compiled modules.
FIXED = {"_cache", "_format_a", "_format_t", "_replace", "_serialize_headers"}
PRIVATE = re.compile(r"(?<!\bsys)(?<!\bos)(?<!\basyncio)\.(_[a-z]\w*)")
LISTED = re.compile(r"Private names of aiohttp used here[^:]*:([^.]*)\.")
# Seconds for the tests of the core.
PATIENCE = 120.0


def private_names() -> set[str]:
    """The private attributes of aiohttp's objects."""
    texts = [path.read_text() for path in SOURCE.rglob("*.py")]
    modules = {path.name.partition(".")[0] for path in SOURCE.rglob("_*")}
    compiled = re.findall(r"self\.\w+\.(_[a-z]\w*)", (SOURCE / COMPILED).read_text())
    names = {name for text in texts for name in PRIVATE.findall(text)}
    return names - FIXED - modules - set(compiled)


def copy_with_other_names(into: Path) -> None:
    """Copy aiohttp, with another name for whatever is private."""
    names = "|".join(sorted(private_names(), key=len, reverse=True))
    shutil.copytree(SOURCE, into, ignore=shutil.ignore_patterns("__pycache__"))
    for path in into.rglob("*.py"):
        if path != into / COMPILED:
            path.write_text(re.sub(rf"\b({names})\b", r"_other\1", path.read_text()))


@pytest.mark.timeout(2 * PATIENCE)
def test_the_core_works_with_an_aiohttp_whose_private_names_are_others(tmp_path: Path) -> None:
    copy_with_other_names(tmp_path / "aiohttp")
    (tmp_path / "aioserver").symlink_to(PACKAGE)
    (tmp_path / "tests").symlink_to(TESTS)
    (tmp_path / "setup.cfg").symlink_to(TESTS.parent / "setup.cfg")
    environ = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    options = ("-m", "core", "--noconftest", "-p", "no:cacheprovider", "tests/core")

    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *options],
        cwd=tmp_path,
        env=environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]


def used(tree: ast.Module, private: set[str]) -> Iterator[str]:
    """The private names that *tree* imports from aiohttp, reads of an object other than its own, or
    has as a text.
    """
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] == "aiohttp":
                names = {*module.split("."), *(alias.name for alias in node.names)}
                yield from (name for name in names if name.startswith("_"))
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) | ast.Constant(value=str(name)) if name in private:
                yield name


def inherited(module: str) -> Iterator[str]:
    """The private names of aiohttp's classes that heirs in *module* use, or define anew."""
    for found in vars(importlib.import_module(module)).values():
        if not inspect.isclass(found) or found.__module__ != module:
            continue
        theirs = [base for base in found.__mro__ if base.__module__.partition(".")[0] == "aiohttp"]
        names = {name for base in theirs for name in PRIVATE.findall(inspect.getsource(base))}
        names |= {name for base in theirs for name in vars(base) if re.match("_[a-z]", name)}
        if names:
            yield from names & set(re.findall(r"\b_[a-z]\w*", inspect.getsource(found)))


def slots_of(tree: ast.Module) -> set[str]:
    """The slots of the classes in *tree*."""
    return {
        name.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__"
        for name in ast.walk(node.value)
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
    }


def test_each_private_name_of_aiohttp_stands_in_the_head_of_the_file_that_uses_it() -> None:
    private = private_names()
    assert {"_parser", "_messages", "_buffer", "_match_info"} <= private

    for name, tree in TREES.items():
        # Of most modules the text alone says so, and is read in no time.
        if "aiohttp" not in FILES[name].read_text() or "aiohttp" not in ast.unparse(tree):
            continue
        if name == "__main__":
            continue
        (listed,) = LISTED.findall(ast.get_docstring(tree) or "") or [""]
        found = {*used(tree, private), *inherited(f"aioserver.{name}")} - slots_of(tree)

        assert found == set(re.findall("`(.*?)`", listed)), name

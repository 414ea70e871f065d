"""The name under which the package is installed, and what it brings."""

from __future__ import annotations

import ast
import configparser
import functools
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from aioserver import __version__

ROOT = Path(__file__).parents[2]
NAME = "aioserver-gateway"
# On the package index `aioserver` is a stranger's project: neither form may install it.
INSTALLS_A_STRANGER = re.compile(
    r"""pip3? \s+ install \b [^\n|]* [\s'"] aioserver (?![-\w/.])   # by name
      | (?<![-\w/.]) aioserver \[ (?: \w+ ,? )+ \]                  # as a requirement with extras
    """,
    re.VERBOSE,
)
IMPORTED_AS = {"pyyaml": "yaml"}

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def names(requirements: str) -> list[str]:
    """The names of the distributions in a list of requirements."""
    lines = [line for line in requirements.splitlines() if line.strip()]
    return [re.split(r"[<>=\[; ]", line, maxsplit=1)[0] for line in lines]


REQUIRED = names(SETUP["options"]["install_requires"])
EXTRAS = {extra: names(text) for extra, text in SETUP["options.extras_require"].items()}


@functools.cache
def imported() -> set[str]:
    """Every top-level package that the code imports."""
    names: set[str] = set()
    for path in (ROOT / "aioserver").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names.add(node.module.partition(".")[0])
    return names


def test_both_files_name_the_same_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert SETUP["metadata"]["name"] == project["name"] == NAME


def test_version_stands_in_one_place_and_others_are_compared_with_it() -> None:
    schema = json.loads((ROOT / "config.schema.json").read_text())
    recipe = (ROOT / "deploy/Dockerfile").read_text()
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert headings[:2] == ["Unreleased", __version__]
    assert SETUP["metadata"]["version"] == "attr: aioserver.__version__"
    assert schema["title"].endswith(f" {__version__}")
    assert f'image.version="{__version__}"' in recipe


def test_no_text_tells_anybody_to_install_the_stranger_s_project() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no clone: git names no files")
    problems = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or path == Path(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        for match in INSTALLS_A_STRANGER.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            problems.append(f"{name}:{line}: {match[0]}")

    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [
        ("pip install aioserver", True),
        ("pip install 'aioserver[cli]'", True),
        ('"pip install --upgrade aioserver"', True),
        ("    aioserver[speedups,cli]", True),
        ("pip install '.[speedups,cli]'", False),
        ("pip install aioserver-gateway", False),
        ("aioserver-gateway[speedups,cli]", False),
        ("/opt/aioserver/bin/pip install '.[speedups]'", False),
        ("pip install --force-reinstall aiohttp", False),
    ],
)
def test_forms_that_install_the_stranger_s_project_are_told_apart(
    text: str, forbidden: bool
) -> None:
    assert bool(INSTALLS_A_STRANGER.search(text)) == forbidden


@pytest.mark.parametrize("distribution", [*REQUIRED, *EXTRAS["speedups"], *EXTRAS["cli"]])
def test_code_imports_what_is_installed(distribution: str) -> None:
    package = IMPORTED_AS.get(distribution, distribution.replace("-", "_"))

    assert package in imported()


def test_every_extra_is_for_something() -> None:
    assert set(EXTRAS) == {
        "speedups",
        "cli",
        "cluster",
        "jwt",
        "test",
        "fuzz",
        "clients",
    }
    assert all(EXTRAS.values())


def test_what_only_the_tests_import_is_imported_there() -> None:
    command = (ROOT / "tests/fuzz/__main__.py").read_text()

    assert EXTRAS["fuzz"] == ["atheris"]
    assert "import atheris" in command


@pytest.mark.parametrize("distribution", REQUIRED)
def test_page_gives_the_reason_for_each_mandatory_dependency(distribution: str) -> None:
    page = (ROOT / "docs/install.md").read_text()
    table = page.partition("\n## What is installed, and why\n")[2].partition("\n## ")[0]

    assert re.search(rf"^\| {distribution} \| \w.+ \|", table, re.MULTILINE)


def test_page_gives_reasons_for_nothing_else() -> None:
    page = (ROOT / "docs/install.md").read_text()
    table = page.partition("| library | used for |")[2].partition("\n\n")[0]

    assert sorted(re.findall(r"^\| (\w[\w-]*) \|", table, re.MULTILINE)) == sorted(REQUIRED)


def test_the_packaged_configuration_is_the_shipped_one() -> None:
    assert (ROOT / "config.yaml").read_bytes() == (ROOT / "aioserver/config.yaml").read_bytes()

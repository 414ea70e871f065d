"""The package as it is built and installed: it brings its pages and their assets along.

The wheel is built from a copy of what the Dockerfile copies, and installed into an empty virtual
environment. Its dependencies are those of the environment of the tests, by a `.pth` file: such a
file makes packages importable, but not the editable installation, which has a `.pth` of its own.
Nothing here sees the tree, which PYTHONPATH may name: the interpreter is isolated (`-I`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit
from urllib.request import Request, urlopen

import pytest

from tests.support.command import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "aioserver")
REFERENCES = re.compile(
    r"""(?x)
      (?: src | href ) = ["'] ([^"'\#]+) ["']       # HTML
    | (?: from | import ) \s* \(? ["'] ([^"']+) ["']  # JavaScript
    | url\( ["']? ([^"')]+) ["']? \)                  # CSS
    """
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment into which the built package alone is installed."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index")
    run(*pip, "wheel", *offline, "--no-build-isolation", "-w", str(folder), str(source))
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    (wheel,) = folder.glob("*.whl")
    python = environment / "bin" / "python"
    run(*pip, "--python", str(python), "install", *offline, str(wheel))
    (purelib,) = environment.glob("lib/python*/site-packages")
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def run(*command: str) -> str:
    """Run *command*; its failure is the test's. Returns its stdout."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def address(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The installed command, serving the packaged configuration."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = (installed / "bin" / "python", "-I", installed / "bin" / "aioserver")
    with serving((*command, "serve", "--port", "0"), folder) as url:
        yield url


def test_installed_code_is_that_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    python = str(installed / "bin" / "python")
    where = "import aioserver; print(aioserver.__file__)"

    path = subprocess.run(
        [python, "-I", "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout

    assert Path(path.strip()).is_relative_to(installed)


def test_distribution_is_named_so_that_no_stranger_s_project_is_meant(installed: Path) -> None:
    (metadata,) = installed.glob("lib/python*/site-packages/aioserver*.dist-info")

    assert metadata.name.startswith("aioserver_gateway-")


@pytest.mark.parametrize("page", ["/", "/dashboard"])
def test_page_loads_with_all_its_assets(address: str, page: str) -> None:
    loaded: dict[str, str] = {}
    wanted = [address + page]

    while wanted:
        url = wanted.pop()
        text = load(url)
        loaded[url] = text
        for match in REFERENCES.finditer(text):
            asset = urljoin(url, next(filter(None, match.groups())))
            if asset.startswith(f"{address}/") and is_asset(asset) and asset not in loaded:
                wanted.append(asset)

    kinds = {PurePosixPath(urlsplit(url).path).suffix for url in loaded}
    assert {".js", ".css", ".svg"} <= kinds, sorted(loaded)


def load(url: str) -> str:
    """The text at *url*; anything but 200 raises."""
    with urlopen(Request(url, headers={"Accept": "text/html,*/*"}), timeout=10) as response:
        text: str = response.read().decode()
        return text


def is_asset(url: str) -> bool:
    """Return whether *url* names a file, and not a page or an API."""
    return PurePosixPath(urlsplit(url).path).suffix != ""

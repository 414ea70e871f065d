"""The package as it is built and installed: the sdist has all that the repository has, and the
wheel brings its pages and their assets along.

Both are built as a release is, from a copy of the repository's files: the wheel from the sdist.
With CI=true its dependencies are installed with it. Otherwise they are those of the tests'
environment, which has them by the same list, by a `.pth` file: such a file makes packages
importable, but not the editable installation, which has a `.pth` of its own. Nothing here sees the
tree, which PYTHONPATH may name: the interpreter is isolated (`-I`).
"""

from __future__ import annotations

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urljoin, urlsplit
from urllib.request import Request, urlopen

import pytest

from aioserver import __version__
from tests.support.command import serving
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
# What is beside the repository's files in a tree in which somebody works, if git cannot tell.
LOCAL = (".*", "*.egg-info", "__pycache__", "build", "dist", "loadgen", "mockllm", "node_modules")
HIDDEN = (".ci", ".dockerignore", ".gitignore", ".pre-commit-config.yaml")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
REFERENCES = re.compile(
    r"""(?x)
      (?: src | href ) = ["'] ([^"'\#$]+) ["']       # HTML
    | (?: from | import ) \s* \(? ["'] ([^"']+) ["']  # JavaScript
    | url\( ["']? ([^"')]+) ["']? \)                  # CSS
    """
)


class Built(NamedTuple):
    """What a release is made of."""

    files: list[str]
    sdist: Path
    wheel: Path
    log: str


def files() -> list[str]:
    """The files of the repository, as git names them; in an sdist, all that is no one's own."""
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    names: list[str] = []
    for entry in ROOT.iterdir():
        if entry.name in HIDDEN or not any(entry.match(pattern) for pattern in LOCAL):
            below = entry.rglob("*") if entry.is_dir() else [entry]
            names += [str(path.relative_to(ROOT)) for path in below if path.is_file()]
    return [name for name in names if "__pycache__" not in name and name != "PKG-INFO"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist and a wheel."""
    source = tmp_path_factory.mktemp("package") / "source"
    listed = files()
    for name in listed:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    log = run(sys.executable, "-m", "build", "--no-isolation", str(source))
    (sdist,), (wheel,) = source.glob("dist/*.tar.gz"), source.glob("dist/*.whl")
    return Built(listed, sdist, wheel, log)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment into which the built package is installed."""
    environment = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    install = (*PIP, "--python", str(environment / "bin" / "python"), "install", str(built.wheel))
    if os.environ.get("CI") == "true":
        run(*install, "--only-binary", ":all:")
    else:
        run(*install, "--no-deps", "--no-index", "--no-compile")
        (purelib,) = environment.glob("lib/python*/site-packages")
        (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def run(*command: str) -> str:
    """Run *command*; its failure is the test's. Returns what it wrote."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_nothing_is_ignored_while_building(built: Built) -> None:
    # A pattern of MANIFEST.in that keeps local files away finds none in a fresh clone.
    lines = [line for line in built.log.splitlines() if "no previously-included" not in line]
    suspicious = re.compile(r"\bwarning\b|\bdeprecat|would be ignored", re.IGNORECASE)

    # The environment of the tests may say that no bytecode is written.
    told = [line for line in lines if suspicious.search(line) and "byte-compiling" not in line]
    assert not told, "\n".join(told)


def test_sdist_has_all_that_the_repository_has(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}

    assert not set(built.files) - packed
    extra = {name for name in packed - set(built.files) if PurePosixPath(name).suffix}
    assert {name.partition("/")[0] for name in extra} <= {"aioserver_gateway.egg-info"}


def test_wheel_has_the_package_alone_and_every_file_of_it(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        packed = set(archive.namelist())

    package = {name for name in built.files if name.startswith("aioserver/")}
    described = {name for name in packed if ".dist-info/" in name}
    assert packed - described == package
    assert {name.partition("/licenses/")[2] for name in described} >= {
        "LICENSE",
        *(name for name in package if "LICENSE" in name),
    }


def test_index_page_is_the_readme_and_leads_nowhere_relative(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))

    page = str(metadata.get_payload())
    assert metadata["Version"] == __version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert page.startswith("# aioserver\n")
    assert not [target for target in targets(page) if not target.startswith(("http", "#"))]


def test_links_of_the_index_page_lead_to_the_tag_of_the_version() -> None:
    index_page = runpy.run_path(str(ROOT / "setup.py"))["index_page"]
    text = (
        "![A picture](docs/images/a.png) [page](docs/keys.md#part), [here](#start), <http://b/>,\n"
        "[over two\nlines](b.md), [there](https://example.org/x)\n"
    )

    assert index_page(text, "https://example.org/aio", "1.2") == (
        "![A picture](https://example.org/aio/raw/v1.2/docs/images/a.png) "
        "[page](https://example.org/aio/blob/v1.2/docs/keys.md#part), [here](#start), <http://b/>,\n"
        "[over two\nlines](https://example.org/aio/blob/v1.2/b.md), "
        "[there](https://example.org/x)\n"
    )
    assert index_page(text, "", "1.2") == (
        " page, [here](#start), <http://b/>,\nover two\nlines, [there](https://example.org/x)\n"
    )


def targets(page: str) -> list[str]:
    """Where the links and pictures of *page* lead, outside of code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)", prose)


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


def test_wheel_serves_and_answers(address: str, installed: Path) -> None:
    command = (str(installed / "bin" / "python"), "-I", str(installed / "bin" / "aioserver"))

    answer = run(*command, "chat", address, "Tell me about yourself")

    assert "simulated model" in answer


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
    with urlopen(Request(url, headers={"Accept": "text/html,*/*"}), timeout=LATE) as response:
        text: str = response.read().decode()
        return text


def is_asset(url: str) -> bool:
    """Return whether *url* names a file, and not a page or an API."""
    return PurePosixPath(urlsplit(url).path).suffix != ""

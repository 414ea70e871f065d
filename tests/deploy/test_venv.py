"""deploy/venv.sh chooses a Python for .venv: the newest for which every package has a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.waiting import LATE

ROOT = Path(__file__).parents[2]
# A Python that makes virtual environments with a pip of its own: it installs only as told below,
# and notes each try.
PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c "*) exit 0 ;;
  "--version "*) echo "{name}" ;;
  "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip") echo "{name} $*" >>tries; case "$*" in {installs}) exit 0 ;; *) exit 1 ;; esac ;;
esac
"""
WHEELS, ANYTHING, NOTHING = "*only-binary*", "*", "none"


def install(folder: Path, pythons: dict[str, str], **environ: str) -> tuple[int, str, list[str]]:
    """Return the exit code, what was said, and the Pythons whose pip was tried, in their order."""
    programs = folder / "some programs"
    programs.mkdir()
    for tool in ("sh", "bash", "cat", "cksum", "cp", "mkdir", "rm"):
        (programs / tool).symlink_to(shutil.which(tool) or tool)
    for name, installs in pythons.items():
        (programs / name).write_text(PYTHON.format(name=name, installs=installs))
        (programs / name).chmod(0o755)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "deploy/venv.sh"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    done = subprocess.run(
        ["bash", "-euc", ". deploy/venv.sh; ensure_installed stamp '[all]' '[some]'"],
        cwd=folder,
        env={"PATH": str(programs), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=LATE,
    )
    tries = folder / "tries"
    lines = tries.read_text().splitlines() if tries.exists() else []
    return done.returncode, done.stderr, [line.split()[0] for line in lines]


def test_newest_python_with_all_wheels_is_taken(tmp_path: Path) -> None:
    pythons = {"python3.15": NOTHING, "python3.14": WHEELS, "python3.13": WHEELS}

    code, _, tried = install(tmp_path, pythons)

    assert code == 0
    assert tried == ["python3.15", "python3.14"]
    assert (tmp_path / ".venv/stamp").exists()


def test_without_all_wheels_the_newest_python_installs_what_it_can(tmp_path: Path) -> None:
    pythons = {"python3.12": "*some*", "python3.11": NOTHING}

    code, _, tried = install(tmp_path, pythons)

    assert code == 0
    assert tried == ["python3.12", "python3.11", "python3.12", "python3.12"]


@pytest.mark.parametrize("pythons", [{}, {"python3.13": NOTHING}])
def test_what_cannot_be_installed_ends_with_a_message(
    tmp_path: Path, pythons: dict[str, str]
) -> None:
    code, output, _ = install(tmp_path, pythons)

    assert code == 1
    assert ("the installation failed" if pythons else "set PYTHON to the path of one") in output
    assert not (tmp_path / ".venv/stamp").exists()


def test_named_python_alone_is_tried(tmp_path: Path) -> None:
    path = tmp_path / "some programs" / "mine"

    code, _, tried = install(
        tmp_path, {"python3.14": ANYTHING, "mine": ANYTHING}, PYTHON=os.fspath(path)
    )

    assert code == 0
    assert tried == ["mine"]


def test_a_type_checker_sees_the_types_in_the_environment(tmp_path: Path) -> None:
    for entry in ("aioserver", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy/venv.sh", tmp_path / "deploy")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    (packages,) = tmp_path.glob(".venv/lib/*/site-packages")
    # pip and setuptools are those of the tests, so that nothing is fetched; with mypy, seconds.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    alone = "--no-index --no-build-isolation --no-deps"
    script = f". deploy/venv.sh; install '' {alone}"
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True, timeout=LATE)
    program = tmp_path / "elsewhere" / "program.py"
    program.parent.mkdir()
    program.write_text("import aioserver\n\nversion: int = aioserver.__version__\n")

    checked = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--python-executable", tmp_path / ".venv/bin/python"),
            *("--cache-dir", tmp_path / "cache", "program.py"),
        ],
        cwd=program.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=LATE,
    )

    assert '(expression has type "str", variable has type "int")' in checked.stdout, checked

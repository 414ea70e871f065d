"""`run_production.sh` chooses the allocator whose memory follows the load, where Python has it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A Python that says what it was started with, and does not start with some allocators.
ANY_PYTHON = """#!/bin/sh
case "$PYTHONMALLOC" in {refused}) echo "unknown allocator" >&2; exit 1 ;; esac
case "$1" in -m) echo "${{PYTHONMALLOC-not set}}: $*" ;; esac
"""


@pytest.mark.parametrize(
    ("refused", "environ", "chosen"),
    [
        ("none", {}, "mimalloc"),
        ("mimalloc", {}, "not set"),
        ("none", {"PYTHONMALLOC": "malloc"}, "malloc"),
        ("none", {"PYTHONMALLOC": ""}, ""),
    ],
    ids=["has it", "does not start with it", "told otherwise", "told the default"],
)
def test_mimalloc_is_chosen_where_python_has_it_and_nobody_has_chosen(
    tmp_path: Path, refused: str, environ: dict[str, str], chosen: str
) -> None:
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(ANY_PYTHON.format(refused=refused))
    python.chmod(0o755)
    shutil.copy(ROOT / "run_production.sh", tmp_path)
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy/venv.sh").write_text("ensure_installed() { :; }\n")

    done = subprocess.run(
        ["bash", str(tmp_path / "run_production.sh"), "--port", "0"],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        check=True,
    )

    assert (done.stdout, done.stderr) == (f"{chosen}: -m aioserver serve --port 0\n", "")

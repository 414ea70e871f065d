"""Servers that are measured from a virtual environment of their own, kept for the next time."""

import os
import subprocess
import sys
from pathlib import Path


def program(name: str) -> Path:
    """Where the program *name* of the environment of that name is, once it is installed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "aioserver-bench" / name / "bin" / name


def install(name: str, requirement: str) -> str:
    """Make the environment *name* with *requirement*; returns why that failed, or "".

    It may take minutes. One that is there already is used as it is.
    """
    path = program(name)
    if path.exists():
        return ""
    folder = path.parent.parent
    try:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(folder / "bin" / "pip"), "install", "--quiet", requirement],
        ):
            subprocess.run(command, check=True, timeout=600, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return str((error.stderr.strip().splitlines() or [error])[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if path.exists() else f"{requirement} has no {path}"

"""Programs of others, in a home folder of their own and without a network."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.waiting import LATE, patience

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Where run_tests.sh installs them, and where a person has installed others.
CLIENTS = Path(sys.prefix) / "clients"
MORE_CLIENTS = "AIOSERVER_CLIENTS"
# Nothing listens there: what a program has to say to its maker ends at once.
_NO_NETWORK = {
    **dict.fromkeys(
        ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9"
    ),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
}
# CSI sequences of ECMA-48, which some programs write to a pipe, too.
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True, slots=True)
class Ended:
    """A program that has ended: its exit code, and what it has written, without colours."""

    code: int
    out: str
    log: str


def folders() -> list[Path]:
    """The folders in which programs are looked for, before those of PATH."""
    installed = [CLIENTS, *(Path(name) for name in filter(None, [os.environ.get(MORE_CLIENTS)]))]
    return [folder / kind for folder in installed for kind in ("bin", "node_modules/.bin")]


def _path() -> str:
    return os.pathsep.join([*map(str, folders()), os.environ.get("PATH", "")])


def is_installed(name: str) -> bool:
    """Whether the program *name* is found."""
    return shutil.which(name, path=_path()) is not None


def program_path(name: str, hint: str) -> str:
    """Find the program *name*, or skip the test and give *hint*."""
    path = shutil.which(name, path=_path())
    if path is None:
        pytest.skip(f"{name} is not installed: {hint}")
    return path


async def run(
    *program: str | Path,
    home: Path,
    environ: Mapping[str, str] | None = None,
    within: float = LATE,
) -> Ended:
    """Run *program* in *home*, which is also its home folder, and wait for its end.

    Raises:
        TimeoutError: it runs for longer than *within* seconds; it and its children are killed.
    """
    kept = {name: os.environ[name] for name in ("LANG", "TERM", "TMPDIR") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        *map(str, program),
        cwd=home,
        env={**kept, "PATH": _path(), "HOME": str(home), **_NO_NETWORK, **(environ or {})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    with _killed_with_children(process.pid):
        async with asyncio.timeout(patience(within)):
            out, log = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, *(_COLOURS.sub("", text.decode()) for text in (out, log)))


@contextlib.contextmanager
def _killed_with_children(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

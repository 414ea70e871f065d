"""The protocols are bytes in, objects out: a client library shares them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import aioserver.protocol

FILES = sorted(Path(aioserver.protocol.__file__).parent.glob("*.py"))
# What the standard library has of sockets, clocks, threads and files.
IMPURE = {"asyncio", "datetime", "os", "pathlib", "random", "select", "socket", "ssl", "time"}
IMPURE |= {"aiohttp", "threading"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_protocol_knows_no_sockets_no_clock_and_nothing_of_ours_but_errors(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")

    assert not {name.partition(".")[0] for name in imported} & IMPURE
    ours = {name for name in imported if name.startswith("aioserver")}
    assert all(name.startswith(("aioserver.errors", "aioserver.protocol")) for name in ours)

"""The examples of docs/client.md and of the library's docstrings run as they stand."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aioserver import client
from aioserver.client import Client
from tests.support.package import FILES
from tests.support.waiting import LATE

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = (Path(__file__).parents[2] / "docs/client.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHOWN = ("model", "model", "Barbara", "length, 20 tokens", "its id:", "model_not_found")
# Runs each of its arguments as a program of its own, in one process.
EACH = r"""
import sys
for code in sys.argv[1:]:
    exec(code, {"__name__": "__main__"})
    print("", end="\0")
"""
MODULES = sorted(name for name in FILES if name.split(".")[0] == "client")


def test_examples_run_as_they_stand(quick_server: str) -> None:
    programs = [example.replace("http://localhost:8000", quick_server) for example in EXAMPLES]

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EACH, *programs],
        capture_output=True,
        text=True,
        timeout=LATE,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    for example, shown, output in zip(EXAMPLES, SHOWN, done.stdout.split("\0")[:-1], strict=True):
        assert shown in output, example


def docstrings() -> Iterator[tuple[str, str]]:
    """The module of each docstring of the library, and its text."""
    for module in MODULES:
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            if isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ):
                yield module, ast.get_docstring(node) or ""


def examples() -> Iterator[str]:
    """The code in the docstrings: what is indented, and uses a client."""
    for _module, text in docstrings():
        for block in re.findall(r"\n\n((?: {4}.*\n|\n)+)", text + "\n"):
            code = textwrap.dedent(block).strip("\n")
            if re.search(r"\b(client|conversation)\b.*[(]", code):
                yield code


CODE = list(dict.fromkeys(examples()))


def test_docstrings_have_examples() -> None:
    assert len(CODE) >= 5


@pytest.mark.parametrize("code", CODE)
async def test_code_of_a_docstring_runs(quick_server: str, code: str) -> None:
    code = code.replace("http://127.0.0.1:8000", quick_server)
    if not re.search(r"\b(async|await)\b", code):
        await asyncio.to_thread(exec, code, {})
        return
    async with Client(quick_server) as used:
        names = {**vars(client), "client": used}
        exec(f"async def example(client):\n{textwrap.indent(code, '    ')}", names)
        await names["example"](used)


def test_page_has_every_argument_of_the_client_and_of_a_question() -> None:
    for function in (Client.__init__, Client.chat):
        for name in list(inspect.signature(function).parameters)[1:]:
            assert f"`{name}`" in PAGE
    for name in ("code", "message", "retryable", "retry_after", "text", "request_id"):
        assert f"| `{name}` |" in PAGE

"""A forked `aioserver` is what an executed one is, but for what `zygote` names."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import zygote
from tests.support.process import run_command, serving
from tests.support.server import NOWHERE, write

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.real_time
# A hook beside the process writes what it finds when it is imported.
HOOK = """
import json, os, signal, sys

def leads_to(number):
    try:
        return os.readlink(f"/proc/self/fd/{number}").partition(":")[0]
    except OSError:
        return None

with open("found.json", "w") as file:
    json.dump(
        {
            "arguments": [sys.argv, sys.orig_argv],
            "path": sys.path[0],
            "folder": os.getcwd(),
            "environ": dict(os.environ),
            "umask": os.umask(0o22),
            "handlers": [str(signal.getsignal(number)).partition(" at ")[0]
                         for number in sorted(signal.valid_signals())],
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "inherited": leads_to(3),
        },
        file,
    )

class Hook:
    async def request(self, call):
        pass
"""


def execute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote, "can_fork", lambda *_: False)


async def found(folder: Path) -> dict[str, Any]:
    """What a server in *folder* has found, which was told to end, and has."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with serving(
            folder / "c.yaml",
            NOWHERE,
            changes={"hooks": [{"name": "x", "python": "finding:Hook", "on": ["request"]}]},
            sockets=[listening],
            environ={"GIVEN": "by the test"},
        ) as process:
            assert (await process.ready()).port == listening.getsockname()[1]
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert result["environ"].pop("WATCHDOG_PID", str(process.pid)) == str(process.pid)
    return result


async def test_it_has_what_an_executed_process_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "finding.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIVEN", "by the environment")
    assert zygote.can_fork(("-m", "aioserver"), os.environ)

    forked = await found(tmp_path)
    execute(monkeypatch)
    executed = await found(tmp_path)

    assert forked == executed
    assert forked["environ"]["GIVEN"] == "by the test"


@pytest.mark.parametrize("places", [5, 0])
async def test_a_command_says_the_same_and_ends_with_the_same_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: int
) -> None:
    write(NOWHERE, {"chat.websocket.concurrency.max_connections": places}, tmp_path / "c.yaml")
    monkeypatch.chdir(tmp_path)

    forked = await run_command("check", "--config", "c.yaml")
    execute(monkeypatch)
    executed = await run_command("check", "--config", "c.yaml")

    assert forked == executed
    assert forked[0] == (0 if places else 2)


async def test_a_signal_ends_it_and_is_its_exit_code(tmp_path: Path) -> None:
    async with serving(tmp_path / "c.yaml", NOWHERE) as process:
        await process.ready()
        process.signal(signal.SIGKILL)
        assert await process.ended() == -signal.SIGKILL


@pytest.mark.parametrize("name", ["PYTHONPATH", "LANG"])
def test_what_is_read_once_is_not_forked(name: str) -> None:
    assert not zygote.can_fork(("-m", "aioserver"), {**os.environ, name: "another"})

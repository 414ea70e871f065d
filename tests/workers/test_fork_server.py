"""Workers that are forked from their parent, and those that are executed instead: what they share,
and what they must not.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import aioserver
from tests.support.chat import CHAT
from tests.support.process import serving
from tests.support.raw import Raw
from tests.support.server import NOWHERE, QUICK, UVICORN
from tests.support.simulator import Simulator
from tests.support.waiting import until
from tests.support.worker_processes import alone, gone, workers

if TYPE_CHECKING:
    from tests.support.process import ServerProcess

# Real processes, which take a second or two to start.

TWO = {f"{UVICORN}.workers": 2}
EXECUTED = "workers share no more memory until a restart"
# KiB of pages that a worker shares: tens of thousands if it was forked, else next to none.
SHARED = 10_000
MIMALLOC = {"PYTHONMALLOC": "mimalloc"}
HAS_MIMALLOC = not subprocess.run(
    [sys.executable, "-S", "-c", ""], env=MIMALLOC, capture_output=True, check=False
).returncode
# Writes to its own file what the server does with it.
HOOK = """
import gc, os, sys, threading, atexit

log = open(os.environ["HOOK_LOG"], "a", buffering=1)

def tell(what):
    print(os.getpid(), what, file=log)

def last():
    threading.main_thread().join()
    tell("thread ends")

tell("imported")
atexit.register(tell, "exits")
threading.Thread(target=last).start()

class Hook:
    async def request(self, call):
        before = os.listdir("/proc/self/fd")
        gc.collect()
        tell("keeps" if os.listdir("/proc/self/fd") == before else "closes")
"""
# Says whether it could be forked now: at first, and after each of the changes.
DIFFERS = """
import os, sys, threading
from pathlib import Path
from aioserver.workers.fork_server import Image
for path in map(Path, sys.argv[1:]):
    image = Image()
    print(image.differs())
    os.utime(path, (1, 1))
    print(image.differs())
    path.unlink()
    print(image.differs())
image = Image()
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(image.differs())
"""


def copied(path: Path) -> dict[str, str]:
    """The environment in which a copy of aioserver in *path* is imported."""
    shutil.copytree(Path(aioserver.__file__).parent, path / "aioserver")
    return {"PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}


def shares(pid: int) -> bool:
    """Whether a process shares what its parent has imported."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(rollup.split("\nShared_Dirty:")[1].split()[0]) > SHARED


def inherited(pid: int, parent: int) -> Counter[str]:
    """What a process has open that its parent has as well, and how often."""
    own, of_parent = opened(pid), opened(parent)
    return Counter({name: count for name, count in own.items() if name in of_parent})


def opened(pid: int) -> Counter[str]:
    """What a process has open."""
    names: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        # It may be closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            names[str(entry.readlink())] += 1
    return names


def signals(pid: int) -> list[str]:
    """The signals that a process blocks, ignores and handles."""
    return re.findall(r"Sig(?:Blk|Ign|Cgt):\t\w+", Path(f"/proc/{pid}/status").read_text())


async def ids(process: ServerProcess) -> list[str]:
    """The id of a request to each worker, the older one first."""
    found = []
    for worker in workers(process):
        async with alone(process, worker), Raw(process) as raw:
            await raw.get("/health")
            found.append((await raw.answer()).headers["x-request-id"])
    return found


async def replaced(process: ServerProcess) -> list[int]:
    """Replace all workers, and return the new ones."""
    former, before = workers(process), process.log.count("all workers are replaced")
    process.signal(signal.SIGUSR2)
    await until(lambda: process.log.count("all workers are replaced") > before)
    await until(lambda: all(map(gone, former)), state=lambda: process.log)
    return workers(process)


async def followed(process: ServerProcess) -> int:
    """Kill the oldest worker, and return the one that takes its place, once it serves."""
    former = workers(process)
    os.kill(former[0], signal.SIGKILL)
    await until(lambda: {*workers(process)} - {*former} != set())
    (new,) = {*workers(process)} - {*former}
    await process.logs(f"serves (process {new})")
    return new


async def test_workers_are_forked_until_other_code_is_installed(tmp_path: Path) -> None:
    environ = copied(tmp_path)
    async with serving(tmp_path / "c.yaml", NOWHERE, changes=TWO, environ=environ) as process:
        await process.ready()
        pair = workers(process)
        assert [*map(shares, pair)] == [True, True]
        first = await ids(process)
        assert [text.partition("-")[2] for text in first] == ["1", "1"]

        assert shares(await followed(process))
        second = await ids(process)
        pair = await replaced(process)
        assert [*map(shares, pair)] == [True, True]
        third = await ids(process)
        # The worker that was not killed was asked twice.
        assert len({text.partition("-")[0] for text in (*first, *second, *third)}) == 5
        assert EXECUTED not in process.log

        with (tmp_path / "aioserver/__init__.py").open("a") as code:
            code.write('__version__ = "another"\n')
        executed = await followed(process)
        (forked,) = {*workers(process)} - {executed}
        assert [*map(shares, (forked, executed))] == [True, False]
        assert signals(forked) == signals(executed)
        assert os.getsid(forked) == forked
        await until(
            lambda: inherited(forked, process.pid) == inherited(executed, process.pid),
            state=lambda: (opened(forked), opened(executed), opened(process.pid)),
        )

        pair = await replaced(process)
        assert [*map(shares, pair)] == [False, False]
        async with Raw(process) as raw:
            await raw.get("/stats")
            assert (await raw.answer()).json()["version"] == "another"
        assert process.log.count(EXECUTED) == 1
        assert f"{EXECUTED}: {tmp_path / 'aioserver/__init__.py'} has changed" in process.log
        process.signal()
        assert await process.ended() == 0
    assert "Traceback" not in process.log


@pytest.mark.parametrize("environ", [{}, MIMALLOC] if HAS_MIMALLOC else [{}])
async def test_code_of_others_runs_in_workers_alone_and_sees_their_end(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    (tmp_path / "told_hook.py").write_text(HOOK)
    log = tmp_path / "log"
    path = os.pathsep.join((str(tmp_path), *filter(None, [os.getenv("PYTHONPATH")])))
    environ = {**environ, "PYTHONPATH": path, "HOOK_LOG": str(log)}
    entry: dict[str, Any] = {
        "name": "told",
        "python": "told_hook:Hook",
        "on": ["request"],
        "timeout": 30.0,
    }
    changes = {**TWO, "hooks": [entry]}
    async with (
        Simulator(QUICK) as simulator,
        serving(
            tmp_path / "c.yaml", simulator.base_url, changes=changes, environ=environ
        ) as process,
    ):
        await process.ready()
        pair = workers(process)
        assert [*map(shares, pair)] == [True, True]
        for worker in pair:
            async with alone(process, worker), Raw(process) as raw:
                await raw.post("/v1/chat/completions", CHAT)
                assert (await raw.answer()).status == 200
        process.signal()
        assert await process.ended() == 0
    assert "Traceback" not in process.log
    told: dict[int, list[str]] = {}
    for line in log.read_text().splitlines():
        number, _, what = line.partition(" ")
        told.setdefault(int(number), []).append(what)
    assert process.pid not in told
    for worker in pair:
        assert told[worker] == ["imported", "keeps", "thread ends", "exits"]


async def test_a_hook_that_cannot_be_imported_is_reported_once(tmp_path: Path) -> None:
    changes = {**TWO, "hooks": [{"name": "x", "python": "nowhere.at_all:Here"}]}
    async with serving(tmp_path / "c.yaml", NOWHERE, changes=changes) as process:
        assert await process.ended() == 2
    assert process.log.count("\n") == process.log.count("nowhere.at_all cannot be") == 1


def test_nothing_is_forked_from_other_code_or_beside_a_thread(tmp_path: Path) -> None:
    files = [tmp_path / "aioserver/wings/cluster/limits/renew.lua", tmp_path / "authorities.pem"]
    files[1].touch()
    environ = {**os.environ, **copied(tmp_path), "SSL_CERT_FILE": str(files[1])}
    done = subprocess.run(
        [sys.executable, "-c", DIFFERS, *map(str, files)],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )

    changes = [("None", changed := f"{file} has changed", changed) for file in files]
    assert done.stdout.splitlines() == [*changes[0], *changes[1], "the parent has 2 threads"]

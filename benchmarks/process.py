"""Processes of a benchmark: started on one core, watched through /proc, ended by their own pid."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

TICKS = os.sysconf("SC_CLK_TCK")  # CPU time in /proc counts in these, usually 10 ms
QUIET, PATIENCE = 0.05, 60.0  # a share of the cores, and seconds
PAGE = os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A port nobody listens on, below the range from which clients' own ports are taken.

    The mock provider is restarted on its port many times; a port of that range could meanwhile
    have become the near end of somebody's connection.
    """
    for port in random.sample(range(12000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SystemExit("no free port between 12000 and 32000")


@contextlib.contextmanager
def running(
    command: Sequence[str], *, core: int, folder: str, output: IO[bytes] | int
) -> Iterator[subprocess.Popen[bytes]]:
    """Run *command* in *folder* on *core* while the block lasts.

    At its end the process gets SIGTERM and, with its children, five seconds later SIGKILL.
    """
    # Users' machines keep compiled modules; without them a start would be that of a first start.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        ["taskset", "-c", str(core), *command],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output if output != subprocess.PIPE else None,
        start_new_session=True,  # a Ctrl-C reaches only us, and we end it
    )
    try:
        yield process
    finally:
        family = tree(process.pid) if process.poll() is None else []
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.terminate()
            process.wait(5)
        for pid in family[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()  # does nothing to one that has ended
        process.wait(5)


def tree(pid: int) -> list[int]:
    """A process and all its descendants, itself first."""
    family = [pid]
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as children:
                for child in children.read().split():
                    family += tree(int(child))
    return family


def usage(pid: int) -> tuple[float, float]:
    """CPU seconds used so far and resident MB of a process and its descendants."""
    seconds = megabytes = 0.0
    for member in tree(pid):
        with contextlib.suppress(OSError), open(f"/proc/{member}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()  # the name before it may hold blanks
            seconds += (int(fields[11]) + int(fields[12])) / TICKS  # utime, stime
            megabytes += int(fields[21]) * PAGE / 1e6  # rss
    return seconds, megabytes


def cpu_time(pid: int) -> int:
    """Nanoseconds that the threads of a process have run."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def busy(cores: Sequence[int]) -> float:
    """CPU seconds that anybody has used on *cores* since the machine started."""
    names, ticks = {f"cpu{core}" for core in cores}, 0
    with open("/proc/stat") as stat:
        for name, *fields in map(str.split, stat):
            if name in names:
                user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[:7])
                ticks += user + nice + system + irq + softirq
    return ticks / TICKS


def wait_for_quiet(cores: Sequence[int]) -> float:
    """Wait until nobody uses more than QUIET of *cores* for a second, at most PATIENCE seconds;
    return the share that was used in the last second.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        before = busy(cores)
        time.sleep(1.0)
        share = (busy(cores) - before) / len(cores)
        if share <= QUIET or time.monotonic() > deadline:
            return share


class Watch:
    """What *pids* and everybody else use of *cores*, from the making of a watch on."""

    def __init__(self, pids: Sequence[int], cores: Sequence[int]) -> None:
        self._pids, self._cores = pids, cores
        self._began, self._busy = time.monotonic(), busy(cores)
        self._used = [usage(pid)[0] for pid in pids]

    def read(self) -> tuple[list[float], float]:
        """CPU seconds of each pid, and the share of the cores (1.0: all) that others have used."""
        busy_now = busy(self._cores)
        used = [usage(pid)[0] - before for pid, before in zip(self._pids, self._used, strict=True)]
        wall = (time.monotonic() - self._began) * len(self._cores)
        return used, max(0.0, busy_now - self._busy - sum(used)) / wall

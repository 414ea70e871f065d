"""The whole server in virtual time: some seeds with all faults, and proof that a broken promise is noticed.

Each run is a process of its own, since it replaces the clock before anything is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# As many as take some seconds. More: `python -m tests.simulation --seeds 0-999 --jobs 2`.
SEEDS, CLIENTS = "0-11", "40"
BREAKAGES = {
    # Each loses one thing now and then.
    "an event": """
from aioserver.streams.stream import Stream
add, count = Stream._add, [0]
def lossy(self, entry):
    count[0] += 1
    if count[0] % 40 or entry.status != b"chunk":
        return add(self, entry)
    self.last += entry.count
Stream._add = lossy
""",
    "a place": """
from aioserver.limits.gate import Place
release, count = Place.release, [0]
def lossy(self):
    count[0] += 1
    if count[0] % 100:
        release(self)
Place.release = lossy
""",
    "a fault": """
from aioserver.streams.entries import COMPLETE
from aioserver.streams.stream import Stream
Stream.fail = lambda self, error: self.end(COMPLETE, {}, data=b"data: [DONE]\\n\\n")
""",
}
PROGRAM = """
from tests.simulation import clock
clock.install()
import logging
logging.disable(logging.CRITICAL)
{breakage}
from tests.simulation.plan import draw
from tests.simulation.world import play
for seed in range(12):
    if violations := play(draw(seed, 40)).violations:
        raise SystemExit(violations[0])
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )


def test_nothing_is_lost_whatever_goes_wrong() -> None:
    result = run("-m", "tests.simulation", "--seeds", SEEDS, "--clients", CLIENTS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 seeds failed" in result.stdout
    assert "complete" in result.stdout, "some answers are whole"


# Seeds that found a fault, with their clients.
FOUND = {
    "a timer that is due over and over": (4, 200),
    "an error in a response passes without its type": (216, 100),
}


@pytest.mark.parametrize("fault", FOUND)
def test_what_was_found_once_is_not_found_again(fault: str) -> None:
    seed, clients = FOUND[fault]
    result = run("-m", "tests.simulation", "--seeds", str(seed), "--clients", str(clients))
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_same_seed_gives_the_same_run() -> None:
    runs = {
        run("-m", "tests.simulation", "--seeds", "3-4", "--clients", CLIENTS, "--json").stdout
        for _ in range(2)
    }
    assert len(runs) == 1


@pytest.mark.parametrize("what", BREAKAGES)
def test_a_server_that_loses_something_is_noticed(what: str) -> None:
    result = run("-c", PROGRAM.format(breakage=BREAKAGES[what]))
    assert result.returncode == 1, result.stdout
    assert result.stderr.startswith("at "), result.stderr

"""Virtual time for a whole process: `install` comes before anything that reads a clock is
imported.

The seconds of `time.monotonic` are those of the loop, which jumps from timer to timer. What is
random is drawn from the seed of the run, ids included, so that the same seed gives the same run.
"""

from __future__ import annotations

import os
import random
import sys
import time
import uuid

# When a run begins; nobody looks at the clock of the machine.
START = 1000.0


class Clock:
    """The one clock of the process."""

    now = START


def _monotonic() -> float:
    return Clock.now


def _wall_clock() -> float:
    # A day in 2026, and as many seconds later as have passed.
    return 1_780_000_000.0 + Clock.now


# The seconds in which a processor was busy with this process: what a run really costs.
processor_time = time.process_time


def install() -> None:
    """Put the virtual clock in place of the machine's, for this process and for good."""
    time.monotonic = time.process_time = _monotonic
    time.time = _wall_clock


def fix_hashes(module: str) -> None:
    """Start *module* anew if the order of sets of texts, which is a part of a run, differs from
    process to process.
    """
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def seed(number: int) -> None:
    """Begin a run: the clock is at START, and everything random follows from *number*."""
    Clock.now = START
    random.seed(number)
    ids = random.Random(number)
    uuid.uuid4 = lambda: uuid.UUID(int=ids.getrandbits(128), version=4)

"""The seats of the workers that serve, and what their parent knows of each process.

A *seat* is a place for one worker that serves; there are as many as `workers`. Each seat has two *slots*,
so that a worker that ends and its successor are told apart. A process passes through

    STARTING → SERVING → ENDING → gone
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

# Seconds from the start of a process until it serves.
START_TIMEOUT = 60.0
# A worker that lived for less was short-lived.
SHORT_LIFE = 10.0
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0


class Processes(Protocol):
    """Starts processes, and sends them signals."""

    def start(self, slot: int, configuration: int) -> int:
        """Start a worker in *slot* with the configuration of that number. Return its process id.

        Raises:
            OSError: the system starts no process.
        """

    def send(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process that has not been reaped."""


class Phase(Enum):
    """How far a process is."""

    STARTING = auto()
    SERVING = auto()
    ENDING = auto()


@dataclass(eq=False, slots=True)
class Process:
    """One worker process. Times are of the supervisor's clock.

    *generation*: the replacement that started it. *configuration*: the number of the one it has, and
    *told* of the one it was told to read.
    """

    pid: int
    slot: int
    started: float
    generation: int
    configuration: int
    told: int
    heard: float
    phase: Phase = Phase.STARTING
    reading: bool = False
    # When it gets SIGKILL.
    kill_at: float | None = None
    aborted: bool = False
    # Whether it ends because its parent wants it to.
    asked: bool = False
    status: str = ""

    def deadline(self, period: float) -> float | None:
        """Return when something must have happened: its end, or else that it is heard of; None after SIGKILL.

        *period*: the seconds within which it is to be heard of while it serves.
        """
        if self.kill_at is not None or self.aborted:
            return self.kill_at
        if self.phase is Phase.STARTING:
            return self.started + START_TIMEOUT
        return self.heard + period

    def end_by(self, moment: float) -> None:
        """Take note that it is to end, and when it gets SIGKILL at the latest."""
        self.asked, self.phase = True, Phase.ENDING
        self.kill_at = moment if self.kill_at is None else min(self.kill_at, moment)


@dataclass(eq=False, slots=True)
class Seat:
    """The place of one worker that serves.

    Always: at most two processes: those of its two slots.
    """

    rank: int
    slots: tuple[int, int]
    current: Process | None = None
    # Takes the place of the current one once it serves.
    successor: Process | None = None
    processes: set[Process] = field(default_factory=set)
    # When a worker is started, if there is no current one.
    due: float | None = None
    # Workers in succession that did not live for long.
    short_lives: int = 0
    # How its worker ended before any worker served.
    boot_code: int | None = None

    def free_slot(self) -> int | None:
        """Return a slot without a process."""
        taken = {process.slot for process in self.processes}
        return next((slot for slot in self.slots if slot not in taken), None)

    def pause(self, lived: float) -> float:
        """Return the seconds until a worker that *lived* so long gets a follower."""
        if lived >= SHORT_LIFE:
            self.short_lives = 0
        self.short_lives += 1
        if self.short_lives == 1:
            return 0.0
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.short_lives - 2, 16))


def how_ended(code: int) -> str:
    """Return how a process has ended, in words. *code*: its exit code, negative for a signal."""
    if code >= 0:
        return f"has ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}"

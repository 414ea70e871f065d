"""The decisions of the parent, without its processes: which workers run, and the next step for
each.

This file is one concept: the seats of the workers, the state of each process, and each decision
that follows from it.

A *seat* is a place for one worker that serves; there are as many as `workers`. Each seat has four
*slots*, so that a worker, its successor and those that were replaced are told apart. A process
passes through

    STARTING → SERVING → FORMER → ENDING → gone

A *former* process has a successor and still has answers, which it keeps for `replace_timeout`. A
seat has at most two that were replaced; a replacement by which it would have more tells the oldest
to end, and waits until it is gone.

A seat whose worker ends unasked gets another one: at once if the former lived for long, else after
a pause that doubles. A replacement starts the successor first, and asks the worker to end once the
successor serves. A successor that never serves is given up, and its worker stays.

Every process has a deadline in every state: to get ready, to send its next message, to end. A
process that misses it gets SIGABRT, on which it writes the stacks of its threads, and then
SIGKILL.
"""

from __future__ import annotations

import logging
import signal
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, Protocol

from aioserver.telemetry.metrics import EXITED, HUNG, SIGNALLED
from aioserver.workers.loads import SLOTS_PER_WORKER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# Seconds from the start of a process until it serves.
START_TIMEOUT = 60.0
# A worker that lived for less counts as short-lived.
SHORT_LIFE = 10.0
# The most replaced processes of a seat that still run: with its worker there are three
# generations.
MOST_REPLACED = 2
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0


class Processes(Protocol):
    """Starts processes, and sends them signals."""

    def start(self, slot: int, configuration: int, deaths: tuple[str, ...] = ()) -> int:
        """Start a worker in *slot* with the configuration of that number, and return its process
        id. The worker counts these *deaths* of other workers in its metrics.

        Raises:
            OSError: the system starts no process.
        """

    def send(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process that has not been reaped."""


class Timeouts(NamedTuple):
    """The seconds that a configuration gives a worker: to *end*, and before that to keep its
    answers if it is replaced.
    """

    end: float
    replaced: float


class Phase(Enum):
    """How far a process is."""

    STARTING = auto()
    SERVING = auto()
    FORMER = auto()
    ENDING = auto()


@dataclass(eq=False, slots=True)
class Process:
    """One worker process. Times are of the supervisor's clock.

    *generation*: the replacement that started it. *configuration*: the number of its
    configuration; *asked_for*: the number of the configuration that it was asked to read.
    """

    pid: int
    slot: int
    started: float
    generation: int
    configuration: int
    asked_for: int
    heard: float
    phase: Phase = Phase.STARTING
    reading: bool = False
    # When it was replaced.
    replaced: float = 0.0
    # The deaths of others that it counts once it serves.
    deaths: tuple[str, ...] = ()
    # When it gets SIGKILL.
    kill_at: float | None = None
    aborted: bool = False
    # Whether the parent has asked it to end.
    asked: bool = False
    status: str = ""

    def deadline(self, period: float) -> float | None:
        """Return the time by which the process must end or send a message.

        None after SIGKILL.

        *period*: the seconds within which it must send a message while it serves.
        """
        if self.kill_at is not None or self.aborted:
            return self.kill_at
        if self.phase is Phase.STARTING:
            return self.started + START_TIMEOUT
        return self.heard + period

    def retire(self, now: float) -> None:
        """Take note that it is replaced, and keeps its answers."""
        self.asked, self.phase, self.replaced = True, Phase.FORMER, now

    def end_by(self, moment: float) -> None:
        """Note that it is to end, and when it gets SIGKILL at the latest."""
        self.asked, self.phase = True, Phase.ENDING
        self.kill_at = moment if self.kill_at is None else min(self.kill_at, moment)


@dataclass(eq=False, slots=True)
class Seat:
    """The place of one worker that serves.

    Always: at most one process in each of its slots.
    """

    rank: int
    slots: range
    current: Process | None = None
    # Takes the place of the current one once it serves.
    successor: Process | None = None
    processes: set[Process] = field(default_factory=set)
    # When a worker is started, if there is no current one.
    due: float | None = None
    # Workers in succession that did not live for long.
    short_lives: int = 0
    # The exit code of its worker, if it ended before any worker served.
    boot_code: int | None = None

    def free_slot(self) -> int | None:
        """Return a slot without a process."""
        taken = {process.slot for process in self.processes}
        return next((slot for slot in self.slots if slot not in taken), None)

    def replaced(self) -> list[Process]:
        """Return the processes that have a successor, the oldest first."""
        active = {self.current, self.successor}
        return sorted(self.processes - active, key=lambda each: (each.generation, each.started))

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


logger = logging.getLogger("aioserver.parent")

# Seconds until all workers have answered to a reload.
RELOAD_TIMEOUT = 30.0
# Seconds from SIGABRT to SIGKILL.
LAST_WORDS = 2.0
# If the parent wakes later than intended by more than this, it was itself stopped or had no
# processor.
OVERSLEPT = 1.0
# Seconds after its deadline that a killed worker may take to end; after them SIGKILL has failed.
UNKILLABLE = 2 * LAST_WORDS
# The signal for a worker to retire while its siblings go on; a second one lets it end.
HAND_OVER = signal.SIGUSR1


class Supervisor:
    """Decides about *workers* processes. Every event is reported to it; then `turn` is called.

    *period*: the seconds within which a worker must send a message. *timeouts*: those of the
    configuration that workers start with.
    """

    def __init__(
        self,
        processes: Processes,
        workers: int,
        clock: Callable[[], float],
        *,
        period: float,
        timeouts: Timeouts,
    ) -> None:
        self._processes = processes
        self._clock = clock
        self._period = period
        # By the number of the configuration.
        self._timeouts = {0: timeouts}
        slots = SLOTS_PER_WORKER * workers
        self._seats = [Seat(rank, range(rank, slots, workers)) for rank in range(workers)]
        self._by_pid: dict[int, tuple[Seat, Process]] = {}
        # The causes of the deaths of workers that were not asked to end. The next worker that
        # starts counts them in its metrics.
        self._deaths: tuple[str, ...] = ()
        # Whether there was a moment at which all workers served.
        self.started = False
        self._any_served = False
        # Whether the end has begun.
        self.stopping = False
        self._code = 0
        self._generation = 0
        # The configuration that processes start with, the one that all should have, and the one
        # before a replacement.
        self._configuration = 0
        self._wanted = 0
        self._former = 0
        self._reload_until: float | None = None
        # Seats whose worker is to be replaced, in order.
        self._queue: deque[Seat] = deque()
        self._again = False
        self._wake_at: float | None = None

    # The state for the owner.

    @property
    def code(self) -> int | None:
        """The exit code once all is over; None until then."""
        return self._code if self.stopping and not self._by_pid else None

    @property
    def replacing(self) -> bool:
        """Whether workers are being replaced."""
        return bool(self._queue)

    @property
    def reloading(self) -> bool:
        """Whether a worker has not yet answered to a reload."""
        return self._reload_until is not None

    @property
    def alive(self) -> bool:
        """Whether each worker has sent its message in time, or has been killed."""
        now, most = self._clock(), self._period + LAST_WORDS + UNKILLABLE
        return all(
            process.phase is Phase.STARTING or now - process.heard < most
            for process in self._each()
        )

    def statuses(self) -> list[str]:
        """Return the status texts of the workers that serve."""
        return [process.status for process in self._serving()]

    def former(self) -> list[tuple[str, float]]:
        """Return for each former process the last status text that it has sent, and the seconds
        after which its answers end at the latest.
        """
        now = self._clock()
        return [
            (each.status, each.replaced + self._timeouts_of(each).replaced - now)
            for each in self._each()
            if each.phase is Phase.FORMER
        ]

    def __len__(self) -> int:
        return len(self._seats)

    @property
    def configurations(self) -> set[int]:
        """The numbers of the configurations that a process may yet start with."""
        return {self._configuration, self._former, self._wanted}

    def start(self) -> None:
        """Start all workers."""
        for seat in self._seats:
            seat.due = self._clock()
        self.turn()

    def heard(self, pid: int, message: Mapping[str, str]) -> None:
        """Note a *message* that the process *pid* has sent by the protocol of systemd."""
        if pid not in self._by_pid:
            return
        seat, process = self._by_pid[pid]
        process.heard = self._clock()
        process.status = message.get("STATUS", process.status)
        if "STOPPING" in message:
            self._ends(seat, process)
        elif "RELOADING" in message:
            process.reading = True
        # A datagram may be lost, and a process that feeds the watchdog serves.
        elif process.phase is Phase.STARTING and ("READY" in message or "WATCHDOG" in message):
            self._serves(seat, process)
        elif "READY" in message and process.reading:
            process.reading = False
            process.configuration = process.asked_for

    def ended(self, pid: int, code: int) -> None:
        """Take note that the process *pid* is gone.

        *code*: its exit code, negative for a signal.
        """
        if pid not in self._by_pid:
            # A process with id 1 also gets other orphans.
            return
        seat, process = self._by_pid.pop(pid)
        seat.processes.discard(process)
        how = how_ended(code)
        self._deaths += process.deaths
        if process.phase in {Phase.SERVING, Phase.FORMER} and not self.stopping:
            cause = HUNG if process.aborted else SIGNALLED if code < 0 else EXITED
            self._deaths += (cause,)
        if not process.asked:
            logger.warning("worker %d %s (process %d)", process.slot, how, pid)
        elif code not in {0, -signal.SIGTERM} and not self.stopping:
            logger.warning("worker %d %s", process.slot, how)
        elif not self.stopping:
            logger.info("worker %d has ended", process.slot)
        if process is seat.successor:
            seat.successor = None
            self._give_up(f"worker {process.slot} {how} before it served")
        elif process is seat.current:
            seat.current = None
            if process.phase is Phase.STARTING and self._queue and self._queue[0] is seat:
                self._give_up(f"worker {process.slot} {how} before it served")
            self._follow(seat, process, code)

    def reload(self, configuration: int, timeouts: Timeouts) -> None:
        """Let every worker read its configuration again; processes start with that from now on."""
        self._configuration = self._wanted = configuration
        self._know(timeouts)
        self._reload_until = self._clock() + RELOAD_TIMEOUT
        for process in self._listening():
            self._tell(process)

    def replace(self, configuration: int, timeouts: Timeouts) -> None:
        """Replace every worker by a process that starts with *configuration*."""
        if self.stopping:
            return
        self._generation += 1
        if not self._queue:
            self._former = self._configuration
        self._configuration = configuration
        self._know(timeouts)
        if self._queue:
            self._again = True
            return
        logger.info("replacing %d workers, one after the other", len(self))
        self._queue.extend(self._seats)

    def stop(self) -> None:
        """Ask every worker to end; a second call lets each end at once, and a third one kills."""
        number = signal.SIGTERM
        if self.stopping:
            # Not SIGTERM again: the kernel keeps only one pending signal of a kind.
            number = signal.SIGKILL if self._code else signal.SIGINT
            self._code = 1
        self.stopping = True
        self._queue.clear()
        self._reload_until = None
        now = self._clock()
        for seat in self._seats:
            seat.due = None
        for process in self._each():
            process.end_by(now + self._timeouts_of(process).end)
            self._processes.send(process.pid, number)

    def turn(self) -> None:
        """Do what is due now."""
        now = self._clock()
        if self._wake_at is not None and now - self._wake_at > OVERSLEPT:
            for process in self._each():
                process.heard = now
        for process in self._each():
            self._watch(process, now)
        for seat in self._seats:
            if seat.due is not None and now >= seat.due and seat.free_slot() is not None:
                seat.current = self._start(seat)
                seat.due = None if seat.current is not None else now + seat.pause(0.0)
        self._replace_next()
        if self._reload_until is not None and (
            now >= self._reload_until or not any(self._unread())
        ):
            for process in self._unread():
                logger.warning("worker %d has not answered to the reload", process.slot)
                process.configuration = process.asked_for
            self._reload_until = None
        self._wake_at = self.wake_at()

    def wake_at(self) -> float | None:
        """Return when `turn` has something to do at the latest; None if nothing is due."""
        times = [
            seat.due
            for seat in self._seats
            if seat.due is not None and seat.free_slot() is not None
        ]
        if self._reload_until is not None:
            times.append(self._reload_until)
        deadlines = [self._deadline(process) for process in self._each()]
        return min((*times, *filter(None, deadlines)), default=None)

    # Steps.

    def _each(self) -> Iterator[Process]:
        return iter([process for _, process in self._by_pid.values()])

    def _serving(self) -> list[Process]:
        return [
            seat.current
            for seat in self._seats
            if seat.current is not None and seat.current.phase is Phase.SERVING
        ]

    def _listening(self) -> list[Process]:
        """Return the processes that apply a reload."""
        former = [process for process in self._each() if process.phase is Phase.FORMER]
        return [*self._serving(), *former]

    def _unread(self) -> Iterator[Process]:
        return (
            process for process in self._listening() if process.configuration < process.asked_for
        )

    def _know(self, timeouts: Timeouts) -> None:
        """Take note of the *timeouts* of the newest configuration, and forget those of others that
        no process has.
        """
        numbers = [(each.configuration, each.asked_for) for each in self._each()]
        used = self.configurations.union(*numbers)
        kept = {number: each for number, each in self._timeouts.items() if number in used}
        self._timeouts = {**kept, self._configuration: timeouts}

    def _timeouts_of(self, process: Process) -> Timeouts:
        return self._timeouts[process.configuration]

    def _deadline(self, process: Process) -> float | None:
        """Return when something must have happened, as `Process.deadline`: a former process must
        have ended by then, too.
        """
        deadline = process.deadline(self._period)
        if process.phase is not Phase.FORMER or process.aborted or deadline is None:
            return deadline
        return min(deadline, process.replaced + sum(self._timeouts_of(process)))

    def _watch(self, process: Process, now: float) -> None:
        """End *process* by force if it has missed its deadline."""
        deadline = self._deadline(process)
        if deadline is None or now < deadline:
            return
        if process.kill_at is None and now >= (process.deadline(self._period) or now):
            if process.phase is Phase.STARTING:
                logger.error("worker %d does not get ready: killed", process.slot)
            else:
                logger.error(
                    "worker %d hangs: silent for %s s, killed", process.slot, self._period
                )
            process.aborted = True
            process.kill_at = now + LAST_WORDS
            self._processes.send(process.pid, signal.SIGABRT)
            return
        if not process.aborted:
            logger.warning("worker %d has not ended in time: killed", process.slot)
        if self.stopping:
            self._code = 1
        process.kill_at, process.aborted = None, True
        self._processes.send(process.pid, signal.SIGKILL)

    def _start(self, seat: Seat) -> Process | None:
        slot = seat.free_slot()
        assert slot is not None, "the caller has looked"
        now = self._clock()
        try:
            pid = self._processes.start(slot, self._configuration, self._deaths)
        except OSError as exc:
            logger.error("no process can be started for worker %d: %s", slot, exc.strerror)  # noqa: TRY400
            return None
        process = Process(
            pid, slot, now, self._generation, self._configuration, self._configuration, now
        )
        process.deaths, self._deaths = self._deaths, ()
        seat.processes.add(process)
        self._by_pid[pid] = seat, process
        return process

    def _serves(self, seat: Seat, process: Process) -> None:
        process.phase, process.deaths = Phase.SERVING, ()
        self._any_served = True
        if process.configuration < self._wanted:
            self._tell(process)
        if process is seat.successor:
            former, seat.current, seat.successor = seat.current, process, None
            logger.info("worker %d serves (process %d)", process.slot, process.pid)
            if former is not None:
                self._hand_over(former)
        elif self.started:
            logger.info("worker %d serves (process %d)", process.slot, process.pid)
        if len(self._serving()) == len(self):
            self.started = True

    def _tell(self, process: Process) -> None:
        process.asked_for = self._wanted
        self._processes.send(process.pid, signal.SIGHUP)

    def _hand_over(self, process: Process) -> None:
        process.retire(self._clock())
        self._processes.send(process.pid, HAND_OVER)

    def _ends(self, seat: Seat, process: Process) -> None:
        """Note that *process* has begun to end; it was not asked to if a signal was sent to it
        alone.
        """
        if process.phase is Phase.ENDING:
            return
        process.end_by(self._clock() + self._timeouts_of(process).end)
        if process is seat.current and not self.stopping:
            logger.info("worker %d was told to end by a signal of its own", process.slot)
            seat.current = seat.successor
            seat.successor = None
            if seat.current is None:
                seat.due = self._clock()

    def _follow(self, seat: Seat, process: Process, code: int) -> None:
        """Let another worker take the seat of *process*, which is gone."""
        if self.stopping:
            return
        if seat.successor is not None:
            seat.current, seat.successor = seat.successor, None
            return
        if not self._any_served:
            seat.boot_code = code
            codes = {other.boot_code for other in self._seats}
            if len(codes) == 1:
                self._fail(code)
                return
            # At least one pause, so that a fault which kills all first workers is found before one
            # is retried.
            seat.short_lives = max(1, seat.short_lives)
        now = self._clock()
        seat.due = now + (pause := seat.pause(now - process.started))
        if pause:
            logger.info("worker %d is started again in %s s", process.slot, pause)

    def _fail(self, code: int) -> None:
        """End, since no worker can start."""
        logger.error("no worker can start")
        self.stopping = True
        self._code = code if code > 0 else 1
        for seat in self._seats:
            seat.due = None
        for process in self._each():
            process.asked = True
            self._processes.send(process.pid, signal.SIGKILL)

    def _make_room(self) -> None:
        """Let the oldest former process end of each seat that is to be replaced and has as many
        as it may have.
        """
        for seat in self._queue:
            if seat.current is None or seat.current.generation == self._generation:
                continue
            replaced = seat.replaced()
            former = [each for each in replaced if each.phase is Phase.FORMER]
            if len(former) >= max(MOST_REPLACED, len(replaced)):
                oldest = former[0]
                logger.warning("worker %d has to end: two replacements followed it", oldest.slot)
                oldest.end_by(self._clock() + self._timeouts_of(oldest).end)
                self._processes.send(oldest.pid, HAND_OVER)

    def _replace_next(self) -> None:
        self._make_room()
        while self._queue:
            seat = self._queue[0]
            current = seat.current
            # A seat without a worker gets one of this generation anyway.
            if current is not None:
                if current.generation != self._generation:
                    self._replace_one(seat)
                    return
                if current.phase is Phase.STARTING:
                    # The former one has died meanwhile.
                    return
            self._queue.popleft()
            if not self._queue:
                self._replaced()

    def _replace_one(self, seat: Seat) -> None:
        # The worker becomes one more replaced process.
        if seat.successor is None and len(seat.replaced()) < MOST_REPLACED:
            seat.successor = self._start(seat)
            if seat.successor is None:
                self._give_up("no process can be started")

    def _replaced(self) -> None:
        if self._again:
            self._again = False
            self._queue.extend(self._seats)
        else:
            logger.info("all workers are replaced")

    def _give_up(self, reason: str) -> None:
        if not self._queue:
            return
        left = len(self._queue)
        self._queue.clear()
        self._again = False
        if not any(process.generation == self._generation for process in self._serving()):
            self._configuration = max(self._former, self._wanted)
        logger.error(
            "the replacement is given up, and %d workers stay as they were: %s", left, reason
        )

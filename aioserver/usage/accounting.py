"""Accounting: the cost of each attempt at a provider, from its sending to its end.

The costs in an `Outcome` are the only source. Each is added to the sums of its caller at once, and
becomes a line of the ledger, if there is one:

    sent ──▶ (running, once a second at first, then each 30) ──▶ ended: one line
      └──────────────────────────────────────────────────────▶ refused: no line

An attempt that is refused by a status has cost nothing. Another line then withdraws its `running`
line, if there was one.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from aioserver.config.faults import ConfigurationError
from aioserver.telemetry.bookkeeping import bookkeeping, nothing
from aioserver.telemetry.bugs import Bugs
from aioserver.telemetry.counters import Counter
from aioserver.telemetry.metrics import Row, family_of
from aioserver.telemetry.outcome import NOBODY, AttemptCost
from aioserver.usage.ledger import Ledger, Line
from aioserver.usage.ledger_reader import REFUSED, RUNNING
from aioserver.usage.sums import CallerSums

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from aioserver.config import settings
    from aioserver.telemetry.metrics import Family
    from aioserver.telemetry.request_log import RequestRecord

# How an attempt has ended: well; it broke off; its client has left, or cancelled it; no answer
# began.
OK, CUT, CANCELLED, FAILED = "ok", "cut", "cancelled", "failed"
# The most lines that one sweep writes, and the seconds until it goes on: a sweep must not block
# the loop.
MAX_SWEPT, SWEEP_ON = 200, 0.02
# Seconds from one sweep to the next, from the sending of an attempt to its first `running` line,
# and from each of these to the next.
SWEEP, FIRST_LINE, NEXT_LINE = 1.0, 1.0, 30.0
# Bytes of the random part with which the ids of a process begin.
PROCESS_BYTES = 4


@dataclass(eq=False, slots=True)
class _Sent:
    """An attempt that was sent; *so_far* returns its present cost, *due* is the time of its next
    `running` line.
    """

    record: RequestRecord
    number: int
    attempt: int
    so_far: Callable[[], AttemptCost]
    due: float = 0.0
    told: bool = False


class Usage:
    """Counts the costs of attempts, and passes their lines to the ledger.

    Always: an attempt that was `sent` is known until it has `ended` or was `refused`; it has one
    last line, and each pair of a request's number and an attempt's is used once. Without a ledger,
    running attempts are not recorded.

    *worker*: the number of this process among those that share the directory. *bugs* counts bugs
    in this code.
    """

    def __init__(self, *, worker: int | None = None, bugs: Bugs | None = None) -> None:
        self.bugs = Bugs() if bugs is None else bugs
        self.sums = CallerSums()
        self.ledger: Ledger | None = None
        self.path: str | None = None
        # The lines of all ledgers that were written and lost, as of the last sweep.
        self.counts = {outcome: Counter() for outcome in ("written", "lost")}
        self._process = secrets.token_hex(PROCESS_BYTES)
        self.worker = worker
        self._numbers = 0
        # The attempts that were sent, in two lists by the time of their next sweep.
        self._new: dict[RequestRecord, _Sent] = {}
        self._running: dict[RequestRecord, _Sent] = {}
        # The ledger that was opened last and is not used yet, and those of former directories.
        self._spare: Ledger | None = None
        self._former: list[Ledger] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def prepare(self, settings: settings.Usage) -> Callable[[], None]:
        """Return the function that puts *settings* into effect. It may block for a moment.

        Raises:
            ConfigurationError: the ledger cannot be written there; nothing has changed.
        """
        path = settings.path
        if self._spare is not None:
            # It was opened for settings that were not put into effect.
            self._spare.end()
            self._spare = None
        if path == self.path:
            return _nothing
        ledger: Ledger | None = None
        if path is not None:
            try:
                ledger = Ledger(Path(path), self._process, self.worker)
            except OSError as error:
                raise ConfigurationError(
                    [f"usage.path: {path} cannot be written: {error.strerror or error}"]
                ) from None
        self._spare = ledger
        return partial(self._use, path, ledger)

    def _use(self, path: str | None, ledger: Ledger | None) -> None:
        if self.ledger is not None:
            self.ledger.end()
            self._former.append(self.ledger)
        self.path, self.ledger, self._spare = path, ledger, None
        if ledger is None:
            self._new.clear()
            self._running.clear()

    def sweep_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sweep the running attempts once a second, until `close`."""
        self._loop = loop
        self._timer = loop.call_later(SWEEP, self._sweep)

    def close(self) -> None:
        """Write the waiting lines, within a second, and stop the sweeps. It blocks."""
        if self._timer is not None:
            self._timer.cancel()
        for ledger in (self._spare, self.ledger, *self._former):
            if ledger is not None:
                ledger.close()

    @property
    def lines(self) -> tuple[int, int, int]:
        """The numbers of lines that were written, were lost, and wait."""
        ledgers = [*self._former, *(() if self.ledger is None else (self.ledger,))]
        return (
            sum(ledger.written for ledger in ledgers),
            sum(ledger.lost for ledger in ledgers),
            sum(ledger.waiting for ledger in ledgers),
        )

    def families(self) -> Iterator[Family]:
        """Yield every metric of the callers' spending, with its present value."""
        yield from (family_of(row, {"": self}) for row in FAMILIES)

    @property
    def running(self) -> int:
        """The number of attempts that were sent and have not ended; 0 without a ledger."""
        return len(self._new) + len(self._running)

    @bookkeeping(nothing)
    def sent(self, record: RequestRecord, so_far: Callable[[], AttemptCost]) -> None:
        """Note that an attempt of the request of *record* was sent, perhaps not for the first
        time.
        """
        if self.ledger is not None and record not in self._new and record not in self._running:
            sent = self._new[record] = self._number(record, so_far)
            sent.due = time.monotonic() + FIRST_LINE

    @bookkeeping(nothing)
    def ended(self, record: RequestRecord, cost: AttemptCost) -> None:
        """Count *cost*, the last of the request of *record*."""
        caller, costs = record.caller, record.outcome.costs
        # Even if a later step fails, the attempt runs no longer. Without a ledger there are no
        # running ones.
        sent = None if self.ledger is None else self._taken(record)
        self.sums.add(caller.name, cost, caller.label, anew=len(costs) < 2 or _is_anew(costs))
        if self.ledger is not None:
            self._put(sent or self._number(record, _nobody_knows), cost, cost.outcome)

    @bookkeeping(nothing)
    def refused(self, record: RequestRecord) -> None:
        """Note that the attempt of the request of *record* has cost nothing."""
        if self.ledger is not None and (sent := self._taken(record)) is not None and sent.told:
            self._put(sent, replace(sent.so_far(), source=NOBODY), REFUSED)

    def _taken(self, record: RequestRecord) -> _Sent | None:
        return self._new.pop(record, None) or self._running.pop(record, None)

    def _number(self, record: RequestRecord, so_far: Callable[[], AttemptCost]) -> _Sent:
        number, attempts = record.outcome.entry
        if not number:
            self._numbers = number = self._numbers + 1
        record.outcome.entry = number, attempts + 1
        return _Sent(record, number, attempts + 1, so_far)

    def _put(self, sent: _Sent, cost: AttemptCost, outcome: str) -> None:
        record = sent.record
        assert self.ledger is not None
        self.ledger.put(
            Line(
                time.time(),
                sent.number,
                sent.attempt,
                record.request_id,
                record.caller.name,
                record.face,
                record.path,
                record.batch,
                outcome,
                cost,
                # Another attempt may still end well.
                record.outcome.find_loss() if outcome == OK else None,
            )
        )

    def _sweep(self) -> None:
        assert self._loop is not None
        # A bug must not end the sweeps.
        self._timer = self._loop.call_later(SWEEP, self._sweep)
        if not self._swept():
            self._timer.cancel()
            self._timer = self._loop.call_later(SWEEP_ON, self._sweep)

    def _swept(self) -> bool:
        """Write a line for each attempt for which one is due; return whether those were all."""
        written, lost, _waiting = self.lines
        for outcome, count in (("written", written), ("lost", lost)):
            self.counts[outcome].value = count
        left = 0 if self.ledger is None else MAX_SWEPT
        now = time.monotonic()
        for line in (self._new, self._running):
            due: list[_Sent] = []
            # The attempts behind the first that is not due are not due either.
            for sent in line.values():
                if sent.due > now or len(due) >= left:
                    break
                due.append(sent)
            left -= len(due)
            for sent in due:
                del line[sent.record]
                sent.due, sent.told = now + NEXT_LINE, True
                self._running[sent.record] = sent
                self._put(sent, sent.so_far(), RUNNING)
        return left > 0 or self.ledger is None


def _is_anew(costs: tuple[AttemptCost, ...]) -> bool:
    """Return whether the last of *costs* is the first of its provider and model."""
    *earlier, cost = costs
    return not any(
        other.provider == cost.provider and other.model == cost.model for other in earlier
    )


def _nothing() -> None:
    """Change nothing."""


def _nobody_knows() -> AttemptCost:
    return AttemptCost("", "", "", 0, 0, NOBODY)


# Unlike other metrics, these do not have every set of labels from the start: those of callers
# would be many.
FAMILIES: tuple[Row[Usage], ...] = (
    Row(
        "tokens",
        lambda usage: usage.sums.of_providers,
        "Tokens as reported by the provider, or estimated as one for each event",
        ("provider", "model", "type", "source"),
    ),
    Row(
        "usage_tokens",
        lambda usage: usage.sums.tokens,
        "Tokens of all attempts by caller, reported or estimated; of input and output",
        ("caller", "provider", "model", "kind"),
        grows=Counter,
    ),
    Row(
        "usage_estimated_tokens",
        lambda usage: usage.sums.estimated,
        "The part of these tokens that is estimated",
        ("caller",),
        grows=Counter,
    ),
    Row(
        "usage_lines",
        lambda usage: usage.counts,
        "Lines of the ledger written, or lost since it failed",
        ("outcome",),
    ),
)

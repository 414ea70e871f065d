"""The silence of a provider is found in time, without a look at each exchange."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from aioserver.providers.silence import FEW, HEARD, IN_ANSWER, Silence, SilenceMeter
from aioserver.telemetry.counters import Histogram

if TYPE_CHECKING:
    from aioserver.providers.connections import Receiver

FIRST_TOKENS = Histogram()


@dataclass(eq=False)
class Record:
    streamed: bool = True
    first_event_at: float = 1.0


@dataclass(eq=False)
class Connection:
    """A connection with an exchange, whose provider was *heard* last; None: nothing is awaited."""

    heard: float | None
    record: Record = field(default_factory=Record)
    forwarded: float = 0.0
    stalls: bool = False
    looks: int = 0

    def heard_at(self) -> float:
        self.looks += 1
        return self.forwarded

    def silence(self, now: float) -> float | None:
        return None if self.heard is None else now - self.heard


def silences() -> SilenceMeter[Connection]:
    return SilenceMeter(lambda connection: cast("Receiver", connection), Connection.heard_at)


def whole(in_use: set[Connection], now: float) -> Silence:
    """What is found where all are looked at."""
    found: SilenceMeter[Connection] = silences()
    parts = [found.measure({connection}, now, FIRST_TOKENS) for connection in in_use]
    return Silence(max(part.longest for part in parts), *map(sum, [*zip(*parts, strict=True)][1:]))


@pytest.mark.parametrize("seed", range(20))
def test_each_answer_that_stalls_is_found_at_once(seed: int) -> None:
    dice = random.Random(seed)
    now = 100.0
    found = silences()
    lineup = [Connection(now, stalls=number % 7 == 0) for number in range(2 * FEW)]

    for _ in range(60):
        now += dice.choice([0.0, 0.2, 0.9, 1.0, 1.1, 1.7])
        # In an order that the seed decides, and not the addresses of objects.
        for connection in [*lineup]:
            fate = dice.random()
            if fate < 0.9:
                if not connection.stalls and connection.heard is not None:
                    connection.heard = now - dice.uniform(0.0, 0.5)
                    # Some go by the fast path.
                    connection.forwarded = dice.choice([0.0, connection.heard])
            elif fate < 0.93:
                connection.heard = None if connection.heard else now
                connection.forwarded = 0.0
            elif fate < 0.96:
                # Another exchange on the same connection.
                connection.heard, connection.record = now, Record(dice.random() < 0.8)
                connection.forwarded = 0.0
                connection.record.first_event_at = dice.choice([0.0, now])
            elif fate < 0.98:
                lineup.remove(connection)
                lineup.append(Connection(now))

        in_use = set(lineup)
        measured, all_of_them = found.measure(in_use, now, FIRST_TOKENS), whole(in_use, now)

        assert measured.stalled == all_of_them.stalled
        assert measured.unanswered == all_of_them.unanswered
        assert measured.longest <= all_of_them.longest
        if all_of_them.longest >= IN_ANSWER:
            assert measured.longest == all_of_them.longest


def test_of_many_lively_answers_some_are_looked_at_each_time() -> None:
    found = silences()
    in_use = {Connection(0.0) for _ in range(10 * FEW)}
    seconds = range(1, 41)

    for now in seconds:
        for connection in in_use:
            connection.heard = now - HEARD / 2
        silence = found.measure(in_use, now, FIRST_TOKENS)
        assert silence.under_way == len(in_use)

    assert sum(connection.looks for connection in in_use) <= len(seconds) * len(in_use) / 3


def test_few_answers_are_all_looked_at() -> None:
    found = silences()
    in_use = {Connection(0.1 * number) for number in range(FEW)}

    for now in (10.0, 10.5, 11.0):
        assert found.measure(in_use, now, FIRST_TOKENS) == whole(in_use, now)


def test_a_connection_that_is_not_in_use_any_more_is_let_go() -> None:
    found = silences()
    in_use = {Connection(0.0) for _ in range(2 * FEW)}
    found.measure(in_use, 0.5, FIRST_TOKENS)
    left = weakref.ref(in_use.pop())

    found.measure(in_use, 0.6, FIRST_TOKENS)
    gc.collect()

    assert left() is None

"""The script of budgets answers in the Lua of the tests as in the server's, and decides as one
budget would.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec
import pytest

from aioserver.limits.budget import DAY, Budget
from aioserver.wings.cluster.connection import BUDGET
from aioserver.wings.cluster.limits.lease_messages import SECOND
from aioserver.wings.cluster.limits.shared_budget import (
    SETTINGS,
    Answer,
    Charge,
    decode_answer,
)
from tests.support.redis_server import RedisServer
from tests.support.renew_script import PREFIX, Script

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioserver.limits.budget import Reservation

CLOCK = "redis.call('TIME')"
WORLD = {"last": 0, "offset": 0, "blind": 0, "lost": 0, "life": 1, "run": "run", "pause": 1e18}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


class Twins:
    """A real server and that of the tests, which are asked the same."""

    def __init__(self, server: RedisServer) -> None:
        assert BUDGET.text.count(CLOCK) == 1
        self._server, self.script = server, Script()
        self._sha = server.call("SCRIPT", "LOAD", BUDGET.text.replace(CLOCK, "{ 0, ARGV[2] }"))
        server.call("FLUSHALL")
        world = msgspec.msgpack.encode(WORLD)
        server.call("SET", f"{PREFIX}world", world)
        self.script.keys[f"{PREFIX}world".encode()] = world
        self.now = 1_700_000_000 * SECOND

    def ask(
        self,
        limits: tuple[int, int, int, int],
        tokens: int,
        *corrections: Charge,
        name: str = "a",
    ) -> Answer:
        minute, *of_periods = limits
        values = (name, "web", "run", 1, minute, of_periods, tokens, 0, 0.0, corrections)
        question = msgspec.msgpack.encode((*values, 0, (0, 0, 0), 0, (0, 0, 0)))
        reply = self._server.call("EVALSHA", self._sha, "1", PREFIX, question, str(self.now))
        assert isinstance(reply, bytes), reply
        answer = decode_answer(reply)
        assert answer == decode_answer(self.script.call(BUDGET.name, question, self.now))
        return answer


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "limits",
    [
        (6000, 60_000, 0, 0),
        (6000, 0, 0, 0),
        (0, 150_000, 0, 0),
        (6000, 10_000, 15_000, 0),
        (0, 10_000, 20_000, 45_000),
        (6000, 0, 0, 20_000),
    ],
)
def test_script_decides_as_one_budget_would(
    server: RedisServer, limits: tuple[int, int, int, int], seed: int
) -> None:
    dice, twins = random.Random(seed), Twins(server)
    budget = Budget(clock=lambda: twins.now / SECOND, wall_clock=lambda: twins.now / SECOND)
    budget.apply(*limits)
    smallest = min(filter(None, limits[1:]), default=0)
    begun: list[tuple[Charge, Reservation]] = []
    decided = {True: 0, False: 0}
    for _ in range(400):
        twins.now += dice.choice((0, 1000, 70_000, 300_000, 2 * SECOND))
        if any(limits[2:]) and dice.random() < 0.05:
            twins.now += dice.choice((1, 5, 12, 30)) * DAY * SECOND
        if begun and dice.random() < 0.45:
            taken, reservation = begun.pop(dice.randrange(len(begun)))
            spent = dice.choice((0, reservation.tokens // 2, 2 * reservation.tokens))
            minute = spent - taken.minute if limits[0] else 0
            counted = spent - taken.counted if smallest else 0
            twins.ask(limits, 0, taken._replace(minute=minute, counted=counted))
            reservation.settle(spent)
            continue
        tokens = dice.choice((1, 50, 400, 3000, 7000))
        shortage, answer = (
            budget.shortage(tokens),
            twins.ask(limits, tokens, name=dice.choice("abc")),
        )
        decided[answer.granted] += 1
        if shortage is None:
            assert answer.granted
            minute, counted = min(tokens, limits[0]), min(tokens, smallest)
            stood = answer.level + answer.gone
            begun.append(
                (Charge(minute, counted, stood, 1, answer.number), budget.reserve(tokens))
            )
        else:
            assert not answer.granted
            assert SETTINGS[answer.by] == shortage.period
            assert answer.wait / SECOND == pytest.approx(shortage.delay, abs=0.002)
    assert min(decided.values()) > 5


@pytest.mark.parametrize("of_periods", [(0, 0, 5000), (1000, 0, 5000), (0, 2000, 0)])
def test_a_count_is_kept_until_its_period_has_ended(
    server: RedisServer, of_periods: tuple[int, int, int]
) -> None:
    twins = Twins(server)

    assert twins.ask((0, *of_periods), 100).granted

    least = 31 if of_periods[2] else 7
    kept = server.call("TTL", f"{PREFIX}tokens:web")
    assert isinstance(kept, int)
    assert kept > (least - 1) * DAY


def test_a_state_of_an_earlier_version_goes_on(server: RedisServer) -> None:
    twins = Twins(server)
    twins.ask((0, 1000, 2000, 3000), 700)
    key = f"{PREFIX}tokens:web"
    stored = server.call("GET", key)
    assert isinstance(stored, bytes)
    # It has no counts of longer periods.
    earlier = msgspec.msgpack.encode(msgspec.msgpack.decode(stored)[:8])
    server.call("SET", key, earlier)
    twins.script.keys[key.encode()] = earlier

    answer = twins.ask((0, 1000, 2000, 3000), 400)

    assert not answer.granted
    assert SETTINGS[answer.by] == "tokens_per_day"
    assert answer.used == (700, 0, 0)

"""The script answers any calls in the Lua of the tests as it does in the server's."""

from __future__ import annotations

import math
import random
from importlib.resources import files
from typing import TYPE_CHECKING

import hiredis
import pytest

from aioserver.wings.cluster.limits.lease_messages import (
    SECOND,
    TIMES,
    UNKNOWN_PACE,
    Answer,
    Op,
    PaceOp,
    Request,
    Tell,
    decode_answer,
    encode,
)
from tests.support.redis_server import RedisServer
from tests.support.renew_script import PREFIX, Script, Stale

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = (files("aioserver") / "wings/cluster/limits/renew.lua").read_text()
LIMITS = {"p:one": 20, "p:two": 3, "k:key": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def timed(script: str) -> str:
    """The *script*, which takes the time from its arguments."""
    clock = "redis.call('TIME')"
    assert script.count(clock) == 1
    return script.replace(clock, "{ 0, ARGV[2] }")


class Caller:
    """An instance that says anything: much of it is what a real one would never say."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.epoch = ""
        self.seq = 0
        self.heard = self.version = 0
        self.members: list[str] = []

    def request(self, chance: random.Random) -> Request:
        self.seq += 1
        ops = [
            Op(
                name,
                have=chance.randrange(limit + 1),
                give=chance.choice((0, 0, 1, 2, limit)),
                want=chance.choice((0, 0, 1, 3, limit)),
                weight=chance.choice((1, 1, 3, 10)),
                limit=chance.choice((limit, limit, limit, limit + 2, 1)),
                spare=chance.choice((0, 0, 1, 2)),
            )
            for name, limit in LIMITS.items()
            if chance.random() < 0.6
        ]
        paces = [
            PaceOp(
                "P:one",
                chance.choice((1, 2, 5, 0, -1)),
                100_000.5,
                250_000.0,
                100_000.0,
                chance.choice((UNKNOWN_PACE, UNKNOWN_PACE, -50_000.5, 70_000.25)),
            )
            for _ in range(chance.choice((0, 0, 1)))
        ]
        tells = [
            Tell(chance.choice("ab"), chance.choice(("dead", "cooling")), length * SECOND)
            for length in chance.choice(((), (), (), (0,), (1, 5)))
        ]
        return Request(
            self.name,
            chance.choice((self.epoch, self.epoch, self.epoch, "")),
            chance.choices(("run1", "run2", ""), (20, 1, 1))[0],
            self.seq - chance.choice((0, 0, 0, 0, 0, 1)),
            self.heard,
            self.version,
            TIMES.for_server(),
            self.members,
            chance.choice(([], [], [], [], ["d"])),
            chance.random() < 0.05,
            ops,
            paces,
            tells,
        )


def run(server: RedisServer, seed: int, steps: int) -> None:
    chance = random.Random(seed)
    server.call("FLUSHALL")
    sha = server.call("SCRIPT", "LOAD", timed(SCRIPT))
    script = Script()
    callers = [Caller(name) for name in "abcd"]
    now = 1_700_000_000 * SECOND
    for step in range(steps):
        now += chance.choice((0, 0, 1000, 7001, 60_000, 110_000, SECOND, 2 * SECOND))
        now += chance.choices(
            (0, 4 * SECOND, 9 * SECOND, 40 * SECOND, -SECOND, 30_000 * SECOND),
            (80, 4, 2, 1, 4, 1),
        )[0]
        if chance.random() < 0.01:
            server.call("FLUSHALL")
            script = Script()
        caller = chance.choice(callers)
        request = encode(caller.request(chance))
        reply = server.call("EVALSHA", sha, "1", PREFIX, request, str(now))
        try:
            expected = decode_answer(script.renew(request, now)[0])
        except Stale:
            assert isinstance(reply, hiredis.ReplyError)
            assert str(reply).startswith("STALE")
        else:
            assert isinstance(reply, bytes), reply
            answer = decode_answer(reply)
            caller.epoch, caller.heard, caller.version = (
                answer.epoch,
                answer.number,
                answer.version,
            )
            caller.members = answer.members or caller.members
            answer.told.sort()
            expected.told.sort()
            assert answer == expected, (seed, step)


@pytest.mark.parametrize("seed", range(6))
def test_script_answers_here_as_in_the_server(server: RedisServer, seed: int) -> None:
    run(server, seed, 150)


def asked(
    script: Script, name: str, seq: int, epoch: str, now: int, want: int = 3, run: str = "run1"
) -> Answer:
    """Return the answer of the server's process *run* to *name*, which holds nothing and wants so
    many places.
    """
    op = Op("p:one", have=0, give=0, want=want, weight=1, limit=20, spare=0)
    times = TIMES.for_server()
    request = Request(name, epoch, run, seq, 0, 0, times, [], [], False, [op], [], [])
    return decode_answer(script.renew(encode(request), now)[0])


def given_from(
    script: Script, answer: Answer, now: int, run: str = "run1"
) -> list[tuple[bool, int]]:
    """Return for *answer*, the first one to `a`, and for those of the next beats whether nothing is
    granted yet, and how many places `a` has.
    """
    given = []
    for beat in range(1, 30):
        given.append((answer.grace > 0, answer.results[0].recorded))
        later = now + beat * round(TIMES.beat * SECOND)
        answer = asked(script, "a", 100 + beat, answer.epoch, later, run=run)
    return given


def test_server_that_has_just_begun_gives_nothing_before_all_have_said_what_they_have() -> None:
    script, now = Script(), 1_700_000_000 * SECOND

    given = given_from(script, asked(script, "a", 1, "", now), now)

    assert given[0] == (True, 0)
    assert given[-1] == (False, 3)
    assert set(given) == {given[0], given[-1]}


@pytest.mark.parametrize(
    ("run", "seconds"),
    [
        pytest.param("run1", TIMES.grace, id="it was away"),
        # It may have forgotten what it granted last, to instances whose leases it has renewed.
        pytest.param("run2", TIMES.lease, id="it is another process"),
    ],
)
def test_server_that_comes_back_gives_nothing_before_all_may_have_said_what_they_have(
    run: str, seconds: float
) -> None:
    script, now, epoch = Script(), 1_700_000_000 * SECOND, ""
    for seq in range(1, 4):
        # The others hold nothing, but may serve alone with their fixed shares by now.
        for name in "abc":
            epoch = asked(script, name, seq, "", now, want=0).epoch
        now += round(TIMES.beat * SECOND)
    now += round(TIMES.pause * SECOND)

    given = given_from(script, asked(script, "a", 4, epoch, now, run=run), now, run)

    blind = math.ceil(seconds / TIMES.beat)
    assert given[:blind] == [(True, 0)] * blind
    assert set(given[blind:]) == {(False, 3)}


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_script_answers_here_as_in_the_server_for_many_calls(server: RedisServer) -> None:
    for _ in range(300):
        seed = random.randrange(10**9)
        print("seed", seed)
        run(server, seed, 300)

"""The script answers any calls in the Lua of the tests as it does in the server's."""

from __future__ import annotations

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


def test_server_that_has_just_begun_gives_nothing_before_all_have_said_what_they_have() -> None:
    script, now = Script(), 1_700_000_000 * SECOND

    def ask(seq: int, epoch: str, now: int) -> Answer:
        op = Op("p:one", have=0, give=0, want=3, weight=1, limit=20, spare=0)
        request = Request(
            "a", epoch, "run1", seq, 0, 0, TIMES.for_server(), [], [], False, [op], [], []
        )
        return decode_answer(script.renew(encode(request), now)[0])

    answer, given = ask(1, "", now), []
    for beat in range(2, 30):
        given.append((answer.grace > 0, answer.results[0].recorded))
        answer = ask(beat, answer.epoch, now + beat * round(TIMES.beat * SECOND))

    assert given[0] == (True, 0)
    assert given[-1] == (False, 3)
    assert set(given) == {given[0], given[-1]}


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_script_answers_here_as_in_the_server_for_many_calls(server: RedisServer) -> None:
    for _ in range(300):
        seed = random.randrange(10**9)
        print("seed", seed)
        run(server, seed, 300)

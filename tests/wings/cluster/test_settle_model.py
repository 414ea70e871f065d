"""The script in Lua and its reference model in Python are one: the same answers and the same state
for any calls.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import hiredis
import msgspec
import pytest

from aioserver.wings.cluster.lease_messages import (
    SECOND,
    TIMES,
    UNKNOWN_PACE,
    BudgetOp,
    Op,
    PaceOp,
    Request,
    Tell,
    decode_answer,
    encode,
)
from tests.support.redis_server import RedisServer
from tests.support.settle_model import Model, Stale

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = (files("aioserver") / "wings/cluster/renew.lua").read_text()
PREFIX = "aio:{test}:"
LIMITS = {"p:one": 20, "p:two": 3, "k:key": 1}
BUDGETS = (("both", 1000, 9000), ("minute", 600, 0), ("day", 0, 9000), ("both", 700, 0))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def timed(script: str) -> str:
    """The *script*, which takes the time from its arguments."""
    clock = "redis.call('TIME')"
    assert script.count(clock) == 1
    return script.replace(clock, "{ 0, ARGV[2] }")


def state_of(server: RedisServer) -> dict[str, Any]:
    """All that the server keeps, by key."""
    state: dict[str, Any] = {}
    for key in server.call("KEYS", "*"):
        name = key.decode().removeprefix(PREFIX)
        if name == "names":
            state[name] = sorted(server.call("SMEMBERS", key))
        elif name == "m":
            state[name] = server.call("ZRANGE", key, 0, -1)
        elif name.startswith("pace:"):
            state[name] = float(server.call("GET", key))
        else:
            state[name] = msgspec.msgpack.decode(server.call("GET", key))
    return {key: value for key, value in plain(state).items() if value}


def state_of_model(model: Model) -> dict[str, Any]:
    """The same of the reference model."""
    world = model.world
    assert world is not None
    limits = {
        f"limit:{name}": {
            "limit": limit.limit,
            "virtual": limit.virtual,
            "orders": limit.orders,
            "turns": limit.turns,
            "unheard": limit.unheard,
            "holds": {who: [hold.recorded, hold.knows] for who, hold in limit.holds.items()},
            "wants": {
                who: [want.tag, want.order, want.need, want.weight]
                for who, want in limit.wants.items()
            },
        }
        for name, limit in world.limits.items()
    }
    members, gone = (
        {
            name: [each.ends, each.seq, each.number, each.heard, *[1] * each.silent]
            for name, each in group.items()
        }
        for group in (world.members, world.gone)
    )
    numbers = {
        name: getattr(world, name)
        for name in (
            *("epoch", "run", "last", "offset", "number", "version", "awaited", "lost"),
            *("silent", "before"),
        )
    }
    # As the script calls it, whose state outlives an update.
    numbers["blind"] = world.grace
    state: dict[str, Any] = {"world": {**numbers, "members": members, "gone": gone}, **limits}
    state |= {f"pace:{name}": due for name, due in world.paces.items()}
    state |= {f"budget:{name}": asdict(tally) for name, tally in world.tallies.items()}
    if limits:
        state["names"] = sorted(name.encode() for name in world.limits)
    state["told"] = world.told
    state["m"] = sorted(
        (name.encode() for name in world.members),
        key=lambda name: world.members[name.decode()].number,
    )
    return {key: value for key, value in plain(state).items() if value}


def plain(value: Any) -> Any:
    """*value* without what Lua cannot tell apart: an empty table is a list, a whole number an
    integer.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()} or []
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Caller:
    """An instance that says anything: much of it is what a real one would never say."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.epoch = ""
        self.seq = 0
        self.heard = self.version = 0
        self.members: list[str] = []

    def request(self, chance: random.Random, today: int) -> Request:
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
                chance.choice((0.0, 250_000.0)),
                chance.choice((UNKNOWN_PACE, UNKNOWN_PACE, -50_000.5, 70_000.25)),
            )
            for _ in range(chance.choice((0, 0, 1)))
        ]
        budgets = [
            BudgetOp(
                name,
                minute,
                day,
                chance.choice((0, 0, 30)),
                chance.choice(([], [], [7], [200, 1, 90], [5000])),
                chance.choice((0.0, 0.0, 20_000_000.5)),
                chance.choice((0, 10, 2000)),
                chance.choice(([], [], [(10, 400.0)], [(30, 1000.25), (5, 90.0)])),
                chance.choice((0, 0, 20)),
                today + chance.choice((0, 0, 0, -1)),
                chance.randrange(3000),
                chance.randrange(3000),
                chance.choice((0, 0, 500, 4000)),
                chance.random() < 0.5,
                chance.random() < 0.5,
            )
            for name, minute, day in BUDGETS
            if chance.random() < 0.3
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
            budgets,
        )


def run(server: RedisServer, seed: int, steps: int) -> None:
    chance = random.Random(seed)
    server.call("FLUSHALL")
    sha = server.call("SCRIPT", "LOAD", timed(SCRIPT))
    model = Model()
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
            model = Model()
        caller = chance.choice(callers)
        request = encode(caller.request(chance, now // (86_400 * SECOND)))
        reply = server.call("EVALSHA", sha, "1", PREFIX, request, str(now))
        try:
            expected = decode_answer(model.renew(request, now)[0])
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
        assert state_of(server) == state_of_model(model), (seed, step)


@pytest.mark.parametrize("seed", range(6))
def test_script_and_model_answer_alike(server: RedisServer, seed: int) -> None:
    run(server, seed, 150)


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_script_and_model_answer_alike_for_many_calls(server: RedisServer) -> None:
    for _ in range(300):
        seed = random.randrange(10**9)
        print("seed", seed)
        run(server, seed, 300)

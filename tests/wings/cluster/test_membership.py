"""Being an instance of a cluster: its name, and what all of them have to agree on."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest

from aioserver.auth.sessions import BOUND_BYTES, Sessions
from aioserver.config.faults import ConfigurationError
from aioserver.config.settings import Cluster
from aioserver.wings.cluster import membership
from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import Times
from aioserver.wings.cluster.membership import instance_name, join
from tests.support.server import running
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from aioserver.wings.cluster.membership import Membership
    from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.real_time
BOUND = bytes(BOUND_BYTES)
# A tenth of the real times, but for the bound of a call: the machine may be busy.
TIMES = Times(lease=0.9, margin=0.1, beat=0.15, bound=0.2, pause=0.4, grace=0.4, gone=3.0)
# Where each call must have its answer, however busy the machine is.
PATIENT = Times(lease=60.0, margin=0.1, beat=0.15, bound=30.0, pause=0.4, grace=0.4, gone=90.0)


async def test_instances_agree_on_the_first_secret(redis: RedisServer) -> None:
    all_of_them = [Sessions() for _ in range(4)]
    first, second, later, stranger = all_of_them
    async with (
        join(redis.url, "house", times=PATIENT) as one,
        join(redis.url, "house", times=PATIENT) as other,
    ):
        await asyncio.gather(one.agree_on_sessions(first), other.agree_on_sessions(second))
        assert first.secret == second.secret
        session, _ = first.make("web", BOUND)
        assert second.seconds(session, BOUND) > 0
    async with (
        join(redis.url, "house", times=PATIENT) as member,
        join(redis.url, "other", times=PATIENT) as elsewhere,
    ):
        await member.agree_on_sessions(later)
        await elsewhere.agree_on_sessions(stranger)
    assert later.secret == first.secret
    assert stranger.seconds(session, BOUND) == 0


async def test_an_instance_that_had_no_answer_agrees_once_there_is_one(
    redis: RedisServer,
) -> None:
    early, late = Sessions(), Sessions()
    async with join(redis.url, "house", times=TIMES) as first:
        await first.agree_on_sessions(early)
    agreed = early.secret
    redis.kill()
    own = late.secret
    async with join(redis.url, "house", times=TIMES) as second:
        await second.agree_on_sessions(late)
        assert late.secret == own
        redis.start()
        # What was there has gone with the server: whoever comes first says what it is.
        async with join(redis.url, "house", times=PATIENT) as first:
            await first.agree_on_sessions(early)
            await until(lambda: late.secret == early.secret, 30.0)
    assert early.secret in {agreed, own}


async def test_a_server_that_has_lost_its_memory_is_told_the_secret_again(
    redis: RedisServer,
) -> None:
    old, new = Sessions(), Sessions()
    async with join(redis.url, "house", times=TIMES) as first:
        await first.agree_on_sessions(old)
        secret, states = old.secret, first.leases
        redis.kill()
        await until(lambda: states.state is not State.JOINED, 30.0)
        redis.start()
        await until(lambda: states.state is State.JOINED, 30.0)

        def known() -> bool:
            return redis.call("GET", "aio:{house}:session_secret") is not None

        await until(known, 30.0)
        async with join(redis.url, "house", times=PATIENT) as second:
            await second.agree_on_sessions(new)
    assert new.secret == old.secret == secret


async def test_the_workers_of_one_parent_keep_its_secret(redis: RedisServer) -> None:
    sessions = Sessions()
    own = sessions.secret

    async with join(redis.url, "house", fixed=(0, 2), times=PATIENT) as member:
        await member.agree_on_sessions(sessions)

    assert sessions.secret == own


def test_a_name_says_where_its_instance_runs_and_listens() -> None:
    name = instance_name("0123abcd", "10.0.0.5:41234")

    assert name.endswith(f"-{os.getpid()}-0123abcd@10.0.0.5:41234")
    assert name.isascii()
    assert " " not in name


@pytest.mark.parametrize("url", ["nowhere", "redis://host:port/0", "redis://h/0?unknown=1"])
async def test_an_url_that_cannot_be_used_is_a_fault_of_the_configuration(url: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        async with join(url, "house"):
            raise AssertionError("it was joined")

    assert str(error.value.faults[0]).startswith("cluster.redis_url: ")


async def test_an_end_in_good_order_is_no_trouble(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with join(redis.url, "house", times=PATIENT) as member:
        assert member.leases.state is State.JOINED, "it waits for that, having no fixed share"

    assert [record for record in caplog.records if record.levelname != "INFO"] == []


async def test_a_new_instance_that_cannot_be_reached_is_told_and_no_other_one(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "MEETING_PAUSES", (0.1, 0.5))
    nowhere = Cluster(advertise="127.0.0.1:9")
    async with (
        join(redis.url, "house", times=TIMES) as one,
        running(tmp_path / "one.yaml", cluster=one) as server,
        join(redis.url, "house", times=TIMES) as other,
        running(tmp_path / "other.yaml", cluster=other),
        join(redis.url, "house", times=TIMES, cluster=nowhere) as unreachable,
    ):

        def told(of: Membership) -> list[dict[str, Any]]:
            return [each for each in server.incidents() if of.instance in each["text"]]

        await until(lambda: bool(told(unreachable)))

        assert told(unreachable)[0]["kind"] == "cluster"
        assert "cluster.advertise" in told(unreachable)[0]["text"]
        assert told(other) == []

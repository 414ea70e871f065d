"""Being an instance of a cluster: its name, and what all of them have to agree on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aioserver.auth.sessions import BOUND_BYTES, Sessions
from aioserver.config.faults import ConfigurationError
from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.lease_messages import Times
from aioserver.wings.cluster.membership import instance_name, join
from tests.support.redis_server import RedisServer
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_time
BOUND = bytes(BOUND_BYTES)
# A tenth of the real times, but for the bound of a call: the machine may be busy.
TIMES = Times(lease=0.9, margin=0.1, beat=0.15, bound=0.2, pause=0.4, grace=0.4, gone=3.0)
# Where each call must have its answer, however busy the machine is.
PATIENT = Times(lease=60.0, margin=0.1, beat=0.15, bound=30.0, pause=0.4, grace=0.4, gone=90.0)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


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
        join(redis.url, "house", times=PATIENT) as membership,
        join(redis.url, "other", times=PATIENT) as elsewhere,
    ):
        await membership.agree_on_sessions(later)
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

    async with join(redis.url, "house", fixed=(0, 2), times=PATIENT) as membership:
        await membership.agree_on_sessions(sessions)

    assert sessions.secret == own


def test_no_two_instances_have_one_name() -> None:
    names = {instance_name() for _ in range(100)}

    assert len(names) == 100
    assert all(name.isascii() and ":" not in name and " " not in name for name in names)


@pytest.mark.parametrize("url", ["nowhere", "redis://host:port/0", "redis://h/0?unknown=1"])
async def test_an_url_that_cannot_be_used_is_a_fault_of_the_configuration(url: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        async with join(url, "house"):
            raise AssertionError("it was joined")

    assert str(error.value.faults[0]).startswith("cluster.redis_url: ")


async def test_an_end_in_good_order_is_no_trouble(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with join(redis.url, "house", times=PATIENT) as membership:
        assert membership.leases.state is State.JOINED, "it waits for that, having no fixed share"

    assert [record for record in caplog.records if record.levelname != "INFO"] == []

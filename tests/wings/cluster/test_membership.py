"""Being an instance of a cluster: its name, and what all of them have to agree on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aioserver.config.faults import ConfigurationError
from aioserver.wings.cluster.grants import State
from aioserver.wings.cluster.lease_messages import Times
from aioserver.wings.cluster.membership import instance_name, join
from tests.support.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_time
# A tenth of the real times, but for the bound of a call: the machine may be busy.
TIMES = Times(lease=0.9, margin=0.1, beat=0.15, bound=0.2, pause=0.4, grace=0.4, gone=3.0)
# Where each call must have its answer, however busy the machine is.
PATIENT = Times(lease=60.0, margin=0.1, beat=0.15, bound=30.0, pause=0.4, grace=0.4, gone=90.0)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


async def test_instances_agree_on_the_first_secret(redis: RedisServer) -> None:
    async with (
        join(redis.url, "house", times=PATIENT) as first,
        join(redis.url, "house", times=PATIENT) as second,
    ):
        secrets = await asyncio.gather(
            first.agree_on_pepper(b"one"), second.agree_on_pepper(b"another")
        )
        assert secrets[0] == secrets[1]
        assert await second.agree_on_pepper(b"a third") == secrets[0]
    async with (
        join(redis.url, "house", times=PATIENT) as later,
        join(redis.url, "other", times=PATIENT) as stranger,
    ):
        assert await later.agree_on_pepper(b"late") == secrets[0]
        assert await stranger.agree_on_pepper(b"strange") == b"strange"


async def test_without_an_answer_an_instance_keeps_its_own_secret(
    redis: RedisServer, tmp_path: Path
) -> None:
    async with join(redis.url, "house", times=TIMES) as membership:
        redis.kill()
        assert await membership.agree_on_pepper(b"own") == b"own"
    async with join(f"unix://{tmp_path / 'absent.sock'}", "house", times=TIMES) as alone:
        assert await alone.agree_on_pepper(b"mine") == b"mine"


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

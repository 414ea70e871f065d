"""What the doctor says of a cluster: its server, and which instances can be reached."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from tests.support.doctor import examined
from tests.support.redis_server import RedisServer, full
from tests.support.server import running, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.doctor import Examined

pytestmark = pytest.mark.real_time
MEMBERS = "aio:{aioserver}:m"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    options = ("--maxmemory", "67108864", "--maxmemory-policy", "noeviction")
    with RedisServer(tmp_path, *options) as server:
        yield server


async def cluster(url: str, tmp_path: Path) -> Examined:
    """Ask the doctor about a server that shares at *url*, and asks no provider."""
    file = tmp_path / "c.yaml"
    write("http://127.0.0.1:9", {"cluster.redis_url": url}, file)
    return await examined(config=file, ask=False)


async def test_the_doctor_says_which_instances_can_be_reached(
    redis: RedisServer, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf, socket.socket() as ended:
        ended.bind(("127.0.0.1", 0))
        async with running(tmp_path / "s.yaml", changes={"cluster.redis_url": redis.url}):
            (name,) = redis.call("ZRANGE", MEMBERS, 0, -1)
            gone, silent = (
                f"host-1-{number}@127.0.0.1:{sock.getsockname()[1]}"
                for number, sock in enumerate((ended, deaf))
            )
            for number, each in enumerate((gone, silent)):
                redis.call("ZADD", MEMBERS, 2**53 - number, each)

            found = await cluster(redis.url, tmp_path)

    ok, warned = found.of("ok", "cluster"), found.of("warn", "cluster")
    assert f"cluster: the instance {name.decode()} can be reached" in ok
    assert sorted(warned) == [
        f"cluster: the instance {gone} cannot be reached: the connection is refused",
        f"cluster: the instance {silent} cannot be reached: no answer in 1 s",
    ]
    assert "cluster.advertise" in found.hint(silent)


async def test_the_doctor_says_whether_the_server_has_room(
    redis: RedisServer, tmp_path: Path
) -> None:
    found = await cluster(redis.url, tmp_path)
    (said,) = found.of("ok", "cluster")
    assert said.endswith("MiB of memory of 64")

    restore = full(redis)
    found = await cluster(redis.url, tmp_path)
    (said,) = found.of("warn", "cluster")
    assert "there is no room" in said
    restore()

    found = await cluster(redis.url, tmp_path)
    (said,) = found.of("warn", "cluster")
    assert said.endswith("has no maxmemory")

    redis.call("CONFIG", "SET", "maxmemory", "67108864")
    redis.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    found = await cluster(redis.url, tmp_path)
    (said,) = found.of("warn", "cluster")
    assert "evicts leases" in said


async def test_the_doctor_says_that_the_server_is_away(redis: RedisServer, tmp_path: Path) -> None:
    redis.kill()

    found = await cluster(redis.url, tmp_path)

    (said,) = found.of("fail", "cluster")
    assert "the server does not serve" in said
    assert found.code == 1

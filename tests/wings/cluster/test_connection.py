"""The connection to the server: replies in order, one death for all calls, errors by their
kind.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest

from aioserver.wings.cluster.connection import (
    BOUND,
    RENEW,
    AccessDenied,
    CallFailed,
    Connection,
    ScriptConnection,
)
from aioserver.wings.cluster.limits.lease_messages import TIMES, Request, decode_answer, encode
from aioserver.wings.cluster.limits.renewer import Subscription
from tests.support.redis_server import RedisServer
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.both_loops, pytest.mark.real_time]
PREFIX = "aio:{test}:"
SECRET = "never-shown"


def request(seq: int = 1) -> bytes:
    return encode(Request("one", "", "", seq, 0, 0, TIMES.for_server()))


async def test_replies_come_in_the_order_of_calls(redis: RedisServer) -> None:
    connection = Connection(redis.url)
    await connection.open()

    replies = await asyncio.gather(*[connection.execute("ECHO", str(n)) for n in range(50)])

    assert replies == [str(n).encode() for n in range(50)]
    await connection.close()


async def test_script_that_the_server_does_not_have_is_loaded(redis: RedisServer) -> None:
    connection = ScriptConnection(redis.url)
    await connection.open()

    for seq in (1, 2):
        answer = decode_answer(await connection.call(RENEW, PREFIX, request(seq), connection.run))
        assert answer.members == ["one"]
        redis.call("SCRIPT", "FLUSH")

    await connection.close()


async def test_call_without_an_answer_fails_all_calls_and_its_answer_is_never_seen(
    redis: RedisServer,
) -> None:
    connection = Connection(redis.url, bound=0.1)
    await connection.open()
    redis.pause()

    first, second = await asyncio.gather(
        connection.execute("ECHO", "first"),
        connection.execute("ECHO", "second", bound=5.0),
        return_exceptions=True,
    )
    redis.go_on()

    assert isinstance(first, CallFailed)
    assert isinstance(second, CallFailed)
    assert await connection.execute("ECHO", "third", bound=5.0) == b"third"
    await connection.close()


async def test_cancelled_call_leaves_no_reply_for_the_next(redis: RedisServer) -> None:
    connection = Connection(redis.url, bound=5.0)
    await connection.open()
    call = asyncio.create_task(connection.execute("ECHO", "cancelled"))
    await asyncio.sleep(0)
    call.cancel()

    assert await connection.execute("ECHO", "next") == b"next"
    assert call.cancelled()
    await connection.close()


async def test_server_that_comes_back_is_found_again(redis: RedisServer) -> None:
    opened: list[str] = []
    losses: list[CallFailed] = []
    connection = Connection(
        redis.url, on_open=lambda: opened.append(connection.run), on_loss=losses.append
    )
    await connection.open()
    redis.kill()
    await until(lambda: not connection.connected)
    with pytest.raises(CallFailed):
        await connection.execute("PING", bound=0.05)

    redis.start()
    await until(lambda: connection.connected)

    assert await connection.execute("PING") == b"PONG"
    assert len(losses) == 1
    assert len(set(opened)) == 2
    await connection.close()


async def test_server_that_is_away_at_first_is_looked_for(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    connection = Connection(redis.url)
    with pytest.raises(CallFailed, match=r"redis\.sock"):
        await connection.open()

    with redis:
        await until(lambda: connection.connected)

    await connection.close()


async def test_wrong_password_is_reported_at_once_and_never_shown(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    redis.call("CONFIG", "SET", "requirepass", "right")
    connection = Connection(f"unix://:{SECRET}@{redis.path}")

    with pytest.raises(AccessDenied) as caught:
        await connection.open()

    assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text
    assert SECRET not in repr(connection)
    await connection.close()


async def test_password_and_database_of_the_url_are_used(redis: RedisServer) -> None:
    redis.call("CONFIG", "SET", "requirepass", "right%2F")
    connection = Connection(f"unix://:right%252F@{redis.path}?db=3")
    await connection.open()

    await connection.execute("SET", "key", "value")

    assert b"db=3" in await connection.execute("CLIENT", "LIST")
    await connection.close()


async def test_server_that_is_too_old_is_refused(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"server\r\n")
        info = b"# Server\r\nredis_version:6.2.14\r\nrun_id:1\r\n"
        writer.write(b"$%d\r\n%s\r\n" % (len(info), info))
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / "old.sock"):
        connection = Connection(f"unix://{tmp_path}/old.sock")

        with pytest.raises(AccessDenied, match=r"Redis 6\.2\.14"):
            await connection.open()

        await connection.close()


async def test_missing_permission_is_denied_access(redis: RedisServer) -> None:
    redis.call("ACL", "SETUSER", "little", "on", f">{SECRET}", "~*", "&*", "+info", "+echo")
    connection = ScriptConnection(f"unix://little:{SECRET}@{redis.path}")
    await connection.open()

    with pytest.raises(AccessDenied):
        await connection.call(RENEW, PREFIX, request(), connection.run)

    await connection.close()


async def test_command_that_the_script_may_not_use_is_denied_access(redis: RedisServer) -> None:
    redis.call(
        "ACL", "SETUSER", "little", "on", f">{SECRET}", "~*", "&*", "+@all", "-publish", "-set"
    )
    connection = ScriptConnection(f"unix://little:{SECRET}@{redis.path}")
    await connection.open()

    with pytest.raises(AccessDenied):
        await connection.call(RENEW, PREFIX, request(), connection.run)

    await connection.close()


async def test_full_server_fails_the_call_and_changes_nothing(redis: RedisServer) -> None:
    redis.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
    redis.call("CONFIG", "SET", "maxmemory", "1")
    connection = ScriptConnection(redis.url)
    await connection.open()

    with pytest.raises(CallFailed, match="OOM"):
        await connection.call(RENEW, PREFIX, request(), connection.run)

    assert redis.call("DBSIZE") == 0
    assert connection.connected
    await connection.close()


async def test_server_that_has_become_a_replica_is_left(redis: RedisServer) -> None:
    connection = ScriptConnection(redis.url)
    await connection.open()
    redis.call("REPLICAOF", "127.0.0.1", "1")

    with pytest.raises(CallFailed, match="READONLY"):
        await connection.call(RENEW, PREFIX, request(), connection.run)

    assert not connection.connected
    await connection.close()


async def test_call_that_is_given_up_and_arrives_late_is_refused(redis: RedisServer) -> None:
    connection = ScriptConnection(redis.url)
    await connection.open()
    await connection.call(RENEW, PREFIX, request(2), connection.run)

    with pytest.raises(CallFailed, match="STALE"):
        await connection.call(RENEW, PREFIX, request(1), connection.run)

    assert connection.connected
    await connection.close()


async def test_messages_reach_their_handler_also_after_a_loss(redis: RedisServer) -> None:
    heard: list[bytes] = []
    opened: list[None] = []
    subscription = Subscription(
        redis.url,
        "one",
        heard.append,
        bound=BOUND,
        on_open=lambda: opened.append(None),
    )
    await subscription.open()
    redis.call("PUBLISH", "two", "not for it")
    redis.call("PUBLISH", "one", "1")
    await until(lambda: heard == [b"1"])

    redis.call("CLIENT", "KILL", "TYPE", "pubsub")
    await until(lambda: len(opened) == 2)
    redis.call("PUBLISH", "one", "2")
    await until(lambda: heard == [b"1", b"2"])
    await subscription.close()


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{SECRET}@localhost",
        f"redis://:p{SECRET}#x@localhost",
        f"redis://user:{SECRET}@localhost:port",
        f"redis://:{SECRET}@localhost?max_connections=many",
        f"redis://:{SECRET}@localhost?no_such_option=1",
    ],
)
def test_url_that_cannot_be_used_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        Connection(url)

    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None

"""Claims: which instance answers a request id, so that the same request is never asked of a provider twice.

A claim is a hash in Redis. Its key has a digest of the caller and the id, since an id is a name within a caller;
neither stands in a key. It holds the owner's name, the digest of the request, and whether the answer
has ended. A claim lives for LEASE and the window of the stream, and is renewed while the answer runs; after
the end it lives for the window.

    none, or the owner is no member any more   → ours
    ours                                       → ours
    another's, with the same request           → theirs: a mirror is made here
    another's, with another request            → a conflict
    ended, and the log was handed over         → the log is read from Redis

The decision is made in Redis, by a script, so that of two instances which claim an id at once one is the
owner. Each answer of Redis is awaited for TIMEOUT at most: beyond, an instance goes on with its own store
alone, and an id may then be answered twice.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from aioserver.wings.conversations.turns import FULL
from aioserver.wings.responses.chains import ChainStore, RedisChains

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from aioserver.wings.cluster.bus import Commands

# Seconds for which Redis' answer to a claim is awaited.
TIMEOUT = 0.05
# Seconds for which a claim lives that is not renewed, beyond the stream's window, and between two renewals.
LEASE, RENEWAL = 60.0, 20.0
# Seconds by which a timer is late where the event loop is, and for which an answer is awaited at most then.
LATE, MAX_TIMEOUT = 0.01, 1.0
OURS, THEIRS, CONFLICT, KEPT, NONE = 1, 2, 3, 4, 5

# KEYS: the claim, the handed-over log, the members. ARGV: my name, the request's digest, milliseconds to live,
# an owner that no longer has the stream ("" if none).
_TAKE = """
local owner, digest, done = unpack(redis.call('HMGET', KEYS[1], 'owner', 'digest', 'done'))
if owner and owner ~= ARGV[1] then
  if done and redis.call('EXISTS', KEYS[2]) == 1 then
    if digest ~= ARGV[2] then return {3, owner} end
    return {4, owner}
  end
  if owner ~= ARGV[4] and redis.call('ZSCORE', KEYS[3], owner) then
    if digest ~= ARGV[2] then return {3, owner} end
    return {2, owner}
  end
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'digest', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {1, ARGV[1]}
"""
# KEYS: the claim, the handed-over log, the members.
_FIND = """
local owner, digest, done = unpack(redis.call('HMGET', KEYS[1], 'owner', 'digest', 'done'))
if not owner then return {5, '', ''} end
if done and redis.call('EXISTS', KEYS[2]) == 1 then return {4, owner, digest} end
if redis.call('ZSCORE', KEYS[3], owner) then return {2, owner, digest} end
return {5, '', ''}
"""
# KEYS: claims. ARGV: my name, then for each the digest, milliseconds to live, and "1" if the answer has ended.
# A claim that is another's by now stays so. One that has no time left to live is given up.
_RENEW = """
for number, key in ipairs(KEYS) do
  local digest, ttl, done = ARGV[3 * number - 1], ARGV[3 * number], ARGV[3 * number + 1]
  local owner = redis.call('HGET', key, 'owner')
  if not owner or owner == ARGV[1] then
    if tonumber(ttl) <= 0 then redis.call('DEL', key)
    else
      redis.call('HSET', key, 'owner', ARGV[1], 'digest', digest)
      if done == '1' then redis.call('HSET', key, 'done', '1') end
      redis.call('PEXPIRE', key, ttl)
    end
  end
end
return 1
"""
# KEYS: the log. ARGV: the log, milliseconds to live.
_PUT_LOG = (
    FULL
    + """
if full(#ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
)


class Verdict(NamedTuple):
    """The state of an id: OURS, THEIRS, CONFLICT, KEPT, or NONE; the owner's name, and the request's digest, if it is known."""

    state: int
    owner: str
    digest: bytes = b""


@dataclass(slots=True)
class Renewal:
    """A claim that is renewed: the id's *name*, the request's *digest*, how long it lives, in seconds."""

    name: str
    digest: bytes
    seconds: float
    done: bool = False


class ClaimStore(ChainStore, Protocol):
    """Where claims, handed-over logs, conversations and responses are kept. Each method raises what its connection raises."""

    async def take(self, name: str, digest: bytes, seconds: float, lost: str = "") -> Verdict:
        """Claim *name* for *seconds*, unless it is another's, other than *lost*, which no longer has the stream."""

    async def find(self, name: str) -> Verdict:
        """Return whose *name* is: THEIRS, KEPT or NONE."""

    async def renew(self, claims: Sequence[Renewal]) -> None:
        """Renew our claims; those that live no longer are given up."""

    async def members(self) -> list[str]:
        """Return the names of all instances."""

    async def put_log(self, name: str, log: bytes, seconds: float) -> None:
        """Keep a log that has ended for *seconds*, if there is room."""

    async def get_log(self, name: str) -> bytes | None:
        """Return a log that was kept."""


T = TypeVar("T")


async def answer_of(call: Coroutine[Any, Any, T], seconds: float = TIMEOUT) -> T:
    """Return the result of *call*, a question to Redis, which has *seconds* to answer.

    Time for which our own event loop was late does not count: a busy instance would otherwise take Redis for
    away when its answer is there already. Cancelling is safe.

    Raises:
        TimeoutError: there is no answer in time.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(call)
    end = loop.time() + max(seconds, MAX_TIMEOUT)
    try:
        while True:
            due = loop.time() + seconds
            done, _ = await asyncio.wait((task,), timeout=seconds)
            if done:
                return task.result()
            now = loop.time()
            if now - due < LATE or now >= end:
                raise TimeoutError(f"no answer within {seconds} s")
    finally:
        task.cancel()


def name_of(caller: str, request_id: str) -> str:
    """Return the name under which all instances know an id of *caller*: a digest of both."""
    both = b"%d:%b%b" % (len(caller), caller.encode(), request_id.encode())
    return hashlib.sha256(both).hexdigest()[:40]


class RedisClaims(RedisChains):
    """Claims in Redis, for the instance *me*; *prefix* is that of the cluster's keys."""

    def __init__(self, commands: Commands, prefix: str, me: str) -> None:
        super().__init__(commands, prefix)
        self._me = me

    async def take(self, name: str, digest: bytes, seconds: float, lost: str = "") -> Verdict:
        """Claim *name*: see `ClaimStore`."""
        keys, milliseconds = self._keys(name), int(1000 * seconds)
        return _verdict(await self._eval(_TAKE, keys, self._me, digest.hex(), milliseconds, lost))

    async def find(self, name: str) -> Verdict:
        """Return whose *name* is."""
        return _verdict(await self._eval(_FIND, self._keys(name)))

    async def renew(self, claims: Sequence[Renewal]) -> None:
        """Renew our claims."""
        keys = [f"{self._prefix}s:{claim.name}" for claim in claims]
        values: list[bytes | str | int] = []
        for claim in claims:
            values += (claim.digest.hex(), int(1000 * claim.seconds), "1" if claim.done else "")
        await self._eval(_RENEW, keys, self._me, *values)

    async def members(self) -> list[str]:
        """Return the names of all instances."""
        members = await self._commands.execute("ZRANGE", f"{self._prefix}m", 0, -1)
        return [member.decode() for member in members]

    async def put_log(self, name: str, log: bytes, seconds: float) -> None:
        """Keep a log that has ended, if there is room."""
        await self._eval(_PUT_LOG, [self._keys(name)[1]], log, int(1000 * seconds))

    async def get_log(self, name: str) -> bytes | None:
        """Return a log that was kept."""
        log = await self._commands.execute("GET", self._keys(name)[1])
        return log if isinstance(log, bytes) else None

    def _keys(self, name: str) -> list[str]:
        prefix = self._prefix
        return [f"{prefix}s:{name}", f"{prefix}log:{name}", f"{prefix}m"]


def _verdict(reply: Any) -> Verdict:
    state, owner, *digest = reply
    return Verdict(
        int(state), owner.decode(), bytes.fromhex(digest[0].decode()) if digest else b""
    )

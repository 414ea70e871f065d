"""Claims: each decides which instance answers a request id, so that no request is sent to a
provider twice.

A claim is a hash in Redis. Its key has a digest of the caller and the id, since ids are unique only
within a caller, and neither may stand in a key. A claim has the owner's name, the digest of the
request, and a mark if the answer has ended. It lives for LEASE and the window of the stream, and is
renewed while the answer runs; after the end it lives for the window.

    none, or the owner is no member any more   → ours
    ours                                       → ours
    another's, with the same request           → theirs: a mirror is made here
    another's, with another request            → a conflict
    ended, and the log was handed over         → the log is read from Redis

A script in Redis makes the decision, so that only one of two instances that claim an id at once
becomes the owner. An instance waits for Redis for `commands.TIMEOUT` at most. After that it goes on
with its own store alone, and the id may be answered twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from aioserver.gateway.contracts.commands import FULL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.gateway.contracts.commands import Commands

# Seconds for which a claim lives without a renewal, in addition to the stream's window; and seconds
# between two renewals.
LEASE, RENEWAL = 60.0, 20.0
OURS, THEIRS, CONFLICT, KEPT, NONE = 1, 2, 3, 4, 5

# KEYS: the claim, the handed-over log, the members. ARGV: my name, the request's digest,
# milliseconds to live, an owner that no longer has the stream ("" if none). If Redis has no room,
# this instance gets the id, but other instances do not know it.
TAKE = (
    FULL
    + """
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
if full(0) then return {1, ARGV[1]} end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'digest', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {1, ARGV[1]}
"""
)
# KEYS: the claim, the handed-over log, the members.
FIND = """
local owner, digest, done = unpack(redis.call('HMGET', KEYS[1], 'owner', 'digest', 'done'))
if not owner then return {5, '', ''} end
if done and redis.call('EXISTS', KEYS[2]) == 1 then return {4, owner, digest} end
if redis.call('ZSCORE', KEYS[3], owner) then return {2, owner, digest} end
return {5, '', ''}
"""
# KEYS: claims. ARGV: my name, then for each the digest, milliseconds to live, and "1" if the
# answer has ended. A claim that another instance has by now is left to it. A claim without time left
# to live is deleted.
RENEW = (
    FULL
    + """
local no_room = full(0)
for number, key in ipairs(KEYS) do
  local digest, ttl, done = ARGV[3 * number - 1], ARGV[3 * number], ARGV[3 * number + 1]
  local owner = redis.call('HGET', key, 'owner')
  if not owner or owner == ARGV[1] then
    if tonumber(ttl) <= 0 then redis.call('DEL', key)
    elseif owner or not no_room then
      redis.call('HSET', key, 'owner', ARGV[1], 'digest', digest)
      if done == '1' then redis.call('HSET', key, 'done', '1') end
      redis.call('PEXPIRE', key, ttl)
    end
  end
end
return 1
"""
)
# KEYS: the log. ARGV: the log, milliseconds to live.
PUT_LOG = (
    FULL
    + """
if full(#ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
)


class Verdict(NamedTuple):
    """The *state* of an id (OURS, THEIRS, CONFLICT, KEPT, or NONE), the name of its *owner*, and the
    *digest* of its request, if known.
    """

    state: int
    owner: str
    digest: bytes = b""


class Renewal(msgspec.Struct):
    """A claim to renew: the *name* of its id, the *digest* of its request, and the *seconds* for
    which it lives.
    """

    name: str
    digest: bytes
    seconds: float
    done: bool = False


class Claims:
    """Claims of the instance *me*, and logs that were handed over.

    Each method raises what its connection raises.
    """

    def __init__(self, commands: Commands, me: str) -> None:
        self._commands = commands
        self._prefix = commands.prefix
        self._me = me

    async def take(self, name: str, digest: bytes, seconds: float, lost: str = "") -> Verdict:
        """Claim *name* for *seconds*, unless another instance has it. The instance *lost* no longer
        has the stream, so its claim does not count.
        """
        keys, milliseconds = self._keys(name), int(1000 * seconds)
        return _verdict(
            await self._commands.evaluate(TAKE, keys, self._me, digest.hex(), milliseconds, lost)
        )

    async def find(self, name: str) -> Verdict:
        """Return the state of *name*: THEIRS, KEPT or NONE."""
        return _verdict(await self._commands.evaluate(FIND, self._keys(name)))

    async def renew(self, claims: Sequence[Renewal]) -> None:
        """Renew our claims; claims with 0 seconds are deleted."""
        keys = [f"{self._prefix}s:{claim.name}" for claim in claims]
        values: list[bytes | str | int] = []
        for claim in claims:
            values += (claim.digest.hex(), int(1000 * claim.seconds), "1" if claim.done else "")
        await self._commands.evaluate(RENEW, keys, self._me, *values)

    async def members(self) -> list[str]:
        """Return the names of all instances."""
        members = await self._commands.execute("ZRANGE", f"{self._prefix}m", 0, -1)
        return [member.decode() for member in members]

    async def put_log(self, name: str, log: bytes, seconds: float) -> None:
        """Keep a log that has ended for *seconds*, if there is room.

        Redis does not accept a lifetime of 0 ms, so it is at least 1 ms.
        """
        milliseconds = max(1, int(1000 * seconds))
        await self._commands.evaluate(PUT_LOG, [self._keys(name)[1]], log, milliseconds)

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

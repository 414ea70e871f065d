"""Claims: each says which instance answers a request id. So no request is sent to a provider
twice, and a client that asks for the answer is led to its owner.

A claim is the name of the id's owner, in Redis. Its key has a digest of the caller and the id,
since ids are unique only within a caller, and neither may stand in a key. A claim is taken before
an answer is begun, and renewed while the answer runs; after the end it lives for the window of the
stream.

    none, mine, or the owner is no member any more   → mine, with the log that was handed over
    another's                                        → theirs: the request is passed on to them

A script in Redis makes the decision, so that only one of two instances that claim an id at once
becomes the owner. An instance waits for Redis for `commands.TIMEOUT` at most. After that it goes on
with its own store alone, and the id may be answered twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from aioserver.gateway.contracts.commands import FULL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.gateway.contracts.commands import Commands

# Seconds for which a claim lives without a renewal, in addition to the stream's window; and seconds
# between two renewals. A claim whose answer has not begun lives for as long as any until then.
LEASE, RENEWAL = 60.0, 20.0
UNBEGUN = 2 * LEASE

# KEYS: the claim, the handed-over log, the members. ARGV: my name, milliseconds to live, an owner
# that no longer has the stream ("" if none). The result is the owner, and the milliseconds for
# which its log is kept. If Redis has no room, this instance gets the id, but other instances do not
# know it.
TAKE = (
    FULL
    + """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] and owner ~= ARGV[3] and redis.call('ZSCORE', KEYS[3], owner) then
  return {owner, -2}
end
if not full(0) then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return {ARGV[1], redis.call('PTTL', KEYS[2])}
"""
)
# KEYS: as TAKE. ARGV: my name, an owner that no longer has the stream. The result is as that of
# TAKE; there is no owner if no other member is one. The one that has lost the stream is named only
# if there is no log either.
FIND = """
local owner = redis.call('GET', KEYS[1])
if not owner or owner == ARGV[1] or not redis.call('ZSCORE', KEYS[3], owner) then owner = '' end
if owner ~= '' and owner ~= ARGV[2] then return {owner, -2} end
local left = redis.call('PTTL', KEYS[2])
return {left > 0 and '' or owner, left}
"""
# KEYS: claims. ARGV: my name, then for each the milliseconds to live. A claim that another instance
# has by now is left to it. A claim without time left to live is deleted.
RENEW = (
    FULL
    + """
local no_room = full(0)
for number, key in ipairs(KEYS) do
  local owner, left = redis.call('GET', key), ARGV[number + 1]
  if not owner or owner == ARGV[1] then
    if tonumber(left) <= 0 then redis.call('DEL', key)
    elseif owner then redis.call('PEXPIRE', key, left)
    elseif not no_room then redis.call('SET', key, ARGV[1], 'PX', left) end
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


class Claim(NamedTuple):
    """The *owner* of an id, "" if there is none; and the *seconds* for which the log of an owner
    that has ended is still kept, 0 if there is no log.
    """

    owner: str
    seconds: float


class Claims:
    """Claims of the instance *me*, and logs that were handed over.

    Each method raises what its connection raises.
    """

    def __init__(self, commands: Commands, me: str) -> None:
        self._commands = commands
        self._prefix = commands.prefix
        self._me = me

    async def take(self, name: str, lost: str = "", seconds: float = UNBEGUN) -> Claim:
        """Claim *name* for *seconds*, unless another instance has it. The instance *lost* no longer
        has the stream, so its claim does not count.
        """
        milliseconds = int(1000 * seconds)
        return _claim(
            await self._commands.evaluate(TAKE, self._keys(name), self._me, milliseconds, lost)
        )

    async def find(self, name: str, lost: str = "") -> Claim:
        """Return the claim of another instance to *name*; *lost* is as for `take`."""
        return _claim(await self._commands.evaluate(FIND, self._keys(name), self._me, lost))

    async def renew(self, claims: Mapping[str, float]) -> None:
        """Renew our claims for the seconds of each; claims with 0 seconds are deleted."""
        keys = [f"{self._prefix}o:{name}" for name in claims]
        milliseconds = [int(1000 * seconds) for seconds in claims.values()]
        await self._commands.evaluate(RENEW, keys, self._me, *milliseconds)

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

    async def drop_log(self, name: str) -> None:
        """Delete a log that was kept."""
        await self._commands.execute("DEL", self._keys(name)[1])

    def _keys(self, name: str) -> list[str]:
        prefix = self._prefix
        return [f"{prefix}o:{name}", f"{prefix}log:{name}", f"{prefix}m"]


def _claim(reply: Any) -> Claim:
    owner, milliseconds = reply
    return Claim(owner.decode(), max(0, milliseconds) / 1000)

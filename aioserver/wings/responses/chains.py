"""Stored responses in Redis, each with the name of the one that it continued: for `responses.py`.

A response is a hash with its `data`, its own input and output, and the name of the `previous` one; a conversation is read
along these names. A response lives for its window, and those before it at least as long: they are given twice the
window, so that a new turn seldom has to look further back than to the one before it. All of them are in one sorted set, by the time
at which they are over, so that where there is no room the ones that nothing has continued for longest go first.

One that is deleted is found no longer. It is kept for those that have continued it, if there are any.

A response whose `previous` one is not there, since it was never written or had to go, is not kept either: nobody could read
its conversation. Its instance is told so, and writes it with all that came before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aioserver.wings.conversations.turns import FULL, RedisTurns, TurnStore

if TYPE_CHECKING:
    from collections.abc import Sequence

# What becomes of a response: there is no room, it is kept, or the one that it continued is missing.
NO_ROOM, WRITTEN, MISSING = range(3)
# Turns of a conversation that is read.
MAX_TURNS = 10_000
# KEYS: the response, the set of all, the bytes of all; the one before it, if there is any. ARGV: the data, milliseconds to live,
# bytes of all at most, and how keys begin, then the name of the one before. A member of the set is a key and its bytes.
_PUT = (
    FULL
    + """
local prefix, most = ARGV[4], tonumber(ARGV[3])
local now, window = tonumber(redis.call('TIME')[1]), tonumber(ARGV[2]) / 1000
local limit = tonumber(redis.call('INFO', 'memory'):match('maxmemory:(%d+)'))
if limit > 0 then most = math.min(most, limit / 4) end
local function drop(member)
  local key, size = member:match('^(.*) (%d+)$')
  redis.call('ZREM', KEYS[2], member)
  redis.call('DECRBY', KEYS[3], size)
  redis.call('DEL', key)
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 100)) do
  drop(member)
end
if KEYS[4] and redis.call('EXISTS', KEYS[4]) == 0 then return 2 end
local size = #ARGV[1] + 256
for _ = 1, 100 do
  if tonumber(redis.call('GET', KEYS[3]) or '0') + size <= most and not full(size) then break end
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not oldest then break end
  drop(oldest)
end
if tonumber(redis.call('GET', KEYS[3]) or '0') + size > most or full(size) then return 0 end
local function member_of(key) return key .. ' ' .. (redis.call('HSTRLEN', key, 'data') + 256) end
if redis.call('EXISTS', KEYS[1]) == 1 then drop(member_of(KEYS[1])) end
redis.call('HSET', KEYS[1], 'data', ARGV[1], 'previous', ARGV[5] or '')
redis.call('EXPIRE', KEYS[1], math.ceil(window))
redis.call('ZADD', KEYS[2], now + window, member_of(KEYS[1]))
redis.call('INCRBY', KEYS[3], size)
redis.call('EXPIRE', KEYS[2], math.ceil(2 * window))
redis.call('EXPIRE', KEYS[3], math.ceil(2 * window))
local key, next = KEYS[4], true
if key and redis.call('EXISTS', key) == 1 then redis.call('HSET', key, 'continued', 1) end
for _ = 1, 10000 do
  if not key or redis.call('PTTL', key) > 1000 * window then break end
  if redis.call('EXPIRE', key, math.ceil(2 * window)) == 0 then break end
  redis.call('ZADD', KEYS[2], 'XX', now + 2 * window, member_of(key))
  next = redis.call('HGET', key, 'previous')
  key = next ~= '' and prefix .. next or nil
end
return 1
"""
)
# KEYS: the response. ARGV: how keys begin, bytes and turns at most.
_CHAIN = """
local found, size, key = {}, 0, KEYS[1]
if redis.call('HEXISTS', key, 'deleted') == 1 then return {} end
while key do
  local data, previous = unpack(redis.call('HMGET', key, 'data', 'previous'))
  if not data then return {} end
  size = size + #data
  found[#found + 1] = data
  if size > tonumber(ARGV[2]) or #found > tonumber(ARGV[3]) then return {} end
  key = previous ~= '' and ARGV[1] .. previous or nil
end
return found
"""
# KEYS: the response, the set of all, the bytes of all.
_DELETE = """
local size = redis.call('HSTRLEN', KEYS[1], 'data')
if size == 0 or redis.call('HEXISTS', KEYS[1], 'deleted') == 1 then return 0 end
if redis.call('HEXISTS', KEYS[1], 'continued') == 1 then
  redis.call('HSET', KEYS[1], 'deleted', 1)
else
  redis.call('ZREM', KEYS[2], KEYS[1] .. ' ' .. (size + 256))
  redis.call('DECRBY', KEYS[3], size + 256)
  redis.call('DEL', KEYS[1])
end
return 1
"""


class ChainStore(TurnStore, Protocol):
    """Where stored responses are kept. Each method raises what its connection raises."""

    async def put_response(
        self, name: str, data: bytes, previous: str, seconds: float, most: int
    ) -> int:
        """Keep a response for *seconds*, if there is room; *previous* is "" or the name of the one that it continued.

        *most* are the bytes that all of them may have. Return NO_ROOM, WRITTEN or MISSING.
        """

    async def has_response(self, name: str) -> bool:
        """Return whether there is such a response, perhaps one that was deleted."""

    async def response_chain(self, name: str, most: int) -> Sequence[bytes]:
        """Return a response and those before it, the newest first; nothing if one is missing, or beyond *most* bytes."""

    async def delete_response(self, name: str) -> bool:
        """Let a response be found no longer; return whether there was one."""


class RedisChains(RedisTurns):
    """Stored responses in Redis."""

    async def put_response(
        self, name: str, data: bytes, previous: str, seconds: float, most: int
    ) -> int:
        """Keep a response: see `ChainStore`."""
        prefix = f"{self._prefix}r:"
        values: list[bytes | str | int] = [data, int(1000 * seconds), most, prefix]
        keys = self._chain_keys(name)
        if previous:
            keys.append(prefix + previous)
            values.append(previous)
        result = await self._eval(_PUT, keys, *values)
        return result if isinstance(result, int) else NO_ROOM

    async def has_response(self, name: str) -> bool:
        """Return whether there is such a response."""
        return bool(await self._commands.execute("EXISTS", f"{self._prefix}r:{name}"))

    async def response_chain(self, name: str, most: int) -> Sequence[bytes]:
        """Return a response and those before it: see `ChainStore`."""
        prefix = f"{self._prefix}r:"
        found = await self._eval(_CHAIN, [prefix + name], prefix, most, MAX_TURNS)
        return [data for data in found if isinstance(data, bytes)]

    async def delete_response(self, name: str) -> bool:
        """Let a response be found no longer."""
        return bool(await self._eval(_DELETE, self._chain_keys(name)))

    def _chain_keys(self, name: str) -> list[str]:
        prefix = self._prefix
        return [f"{prefix}r:{name}", f"{prefix}responses", f"{prefix}responses:bytes"]

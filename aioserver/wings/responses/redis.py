"""Stored responses for all instances, in Redis or Valkey, each with the name of the one that it
continued: see `storage`.

A response is written when it is stored, without those before it, and read with all of them when an
instance that does not hold it gets a request that continues it. What an instance stores it holds
itself, too: while the server is away, it goes on with these. A key in Redis is made of a digest:
neither the caller nor the id stands in it.

A response is a hash with its `data`, its own input and output, and the name of the `previous` one;
a conversation is read along these names. A response lives for its window, and those before it at
least as long: they are given twice the window, so that a new turn seldom has to look further back
than to the one before it. All of them are in one sorted set, by the time at which they are over,
so that where there is no room the ones that nothing has continued for longest go first.

One that is deleted is found no longer. It is kept for those that have continued it, if there are
any.

A response whose `previous` one is not there, since it was never written or had to go, is not kept
either: nobody could read its conversation. Its instance is told so, and writes it with all that
came before.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec

from aioserver.errors import ServerAtCapacity
from aioserver.gateway.commands import FULL, name_of
from aioserver.limits.gate import Gate
from aioserver.wings.responses.storage import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.gateway.commands import Commands

# Seconds for which a whole conversation is awaited, and what nobody waits for.
LOAD_TIMEOUT, CALL_TIMEOUT = 1.0, 1.0
# Conversations that are read at once, each of tens of megabytes at most, and that wait, fairly
# between callers; Redis has other things to do, and what comes of it is not counted. One beyond
# that is not found.
MAX_LOADS, MAX_LOADS_WAITING = 4, 1000
# Bytes that are on their way to Redis, which may be slow: those of some large responses.
MAX_PENDING = 1 << 26
# Bytes of all responses in Redis; a quarter of its `maxmemory` is the bound, too.
MAX_BYTES = 1 << 28
# What becomes of a response: there is no room, it is kept, or the one that it continued is
# missing.
NO_ROOM, WRITTEN, MISSING = range(3)
# Turns of a conversation that is read.
MAX_TURNS = 10_000
# KEYS: the response, the set of all, the bytes of all; the one before it, if there is any. ARGV:
# the data, milliseconds to live, bytes of all at most, and how keys begin, then the name of the
# one before. A member of the set is a key and its bytes.
PUT = (
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
CHAIN = """
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
DELETE = """
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


class RedisChains:
    """Stored responses as bytes. Each method raises what its connection raises."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._prefix = commands.prefix

    async def put_response(
        self, name: str, data: bytes, previous: str, seconds: float, most: int
    ) -> int:
        """Keep a response for *seconds*, if there is room.

        *previous* is "" or the name of the one that it continued.

        *most* are the bytes that all of them may have. Return NO_ROOM, WRITTEN or MISSING.
        """
        prefix = f"{self._prefix}r:"
        values: list[bytes | str | int] = [data, int(1000 * seconds), most, prefix]
        keys = self._chain_keys(name)
        if previous:
            keys.append(prefix + previous)
            values.append(previous)
        result = await self._commands.evaluate(PUT, keys, *values)
        return result if isinstance(result, int) else NO_ROOM

    async def has_response(self, name: str) -> bool:
        """Return whether there is such a response, perhaps one that was deleted."""
        return bool(await self._commands.execute("EXISTS", f"{self._prefix}r:{name}"))

    async def response_chain(self, name: str, most: int) -> Sequence[bytes]:
        """Return a response and those before it, the newest first.

        Nothing if one is missing, or beyond *most* bytes.
        """
        prefix = f"{self._prefix}r:"
        found = await self._commands.evaluate(CHAIN, [prefix + name], prefix, most, MAX_TURNS)
        return [data for data in found if isinstance(data, bytes)]

    async def delete_response(self, name: str) -> bool:
        """Let a response be found no longer; return whether there was one."""
        return bool(await self._commands.evaluate(DELETE, self._chain_keys(name)))

    def _chain_keys(self, name: str) -> list[str]:
        prefix = self._prefix
        return [f"{prefix}r:{name}", f"{prefix}responses", f"{prefix}responses:bytes"]


class _Record(msgspec.Struct, array_like=True):
    stored_at: float
    id: str
    status: str
    provider: str
    kept_there: bool
    input: bytes
    head: bytes
    output: bytes
    tail: bytes
    # Those of an earlier version do not say it.
    whole: bool = True


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Record)


class SharedResponses:
    """The responses of all instances in Redis.

    *clock* returns the time of day, which all machines share.
    """

    def __init__(self, commands: Commands, clock: Callable[[], float] = time.time) -> None:
        self._chains = RedisChains(commands)
        self._ask = commands.ask
        self._clock = clock
        self._tasks: set[asyncio.Task[bool]] = set()
        # The bytes that they send.
        self._pending = 0
        self._loads = Gate(
            MAX_LOADS,
            queue_size=MAX_LOADS_WAITING,
            queue_timeout=LOAD_TIMEOUT,
            full_error=_too_many,
            timeout_error=_too_many,
        )

    def keep(
        self,
        caller: Caller,
        record: Record,
        previous_id: str | None,
        seconds: float,
        *,
        whole: Callable[[], Record | None],
        done: Callable[[bool], None],
    ) -> bool:
        """Keep a response of *caller* for *seconds*, soon; return False if MAX_PENDING bytes are
        on their way: see `Storage`.
        """
        data = self._encoded(record)
        if data is None:
            return False
        name = name_of(caller.name, record.id)
        previous = "" if previous_id is None else name_of(caller.name, previous_id)
        writing = self._write(name, data, previous, seconds, whole)
        task = asyncio.get_running_loop().create_task(writing)
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._sent(len(data), task, done))
        return True

    async def load(
        self, caller: Caller, response_id: str, window: float, most: int
    ) -> Sequence[Record]:
        """Return a response that was stored within *window*, and those before it, the newest
        first; nothing if there is none.

        *most* are the bytes that they may have together.
        """
        name = name_of(caller.name, response_id)
        # Most ids that are not known here are known nowhere, and Redis may be slow.
        if not await self._ask(self._chains.has_response(name)):
            return ()
        try:
            place = await self._loads.enter(caller)
        except ServerAtCapacity:
            return ()
        with place:
            chain: Sequence[bytes] = (
                await self._ask(self._chains.response_chain(name, most), LOAD_TIMEOUT) or ()
            )
        records = [_decoded(data) for data in chain]
        known = [record for record in records if record is not None]
        # The clock of another machine may be behind.
        if len(known) < len(records) or not known or known[0][0] <= self._clock() - window:
            return ()
        return [record for _stored_at, record in known]

    async def delete(self, caller: Caller, response_id: str) -> bool:
        """Let a response be found no longer; return whether there was one."""
        name = name_of(caller.name, response_id)
        return bool(await self._ask(self._chains.delete_response(name), CALL_TIMEOUT))

    async def close(self) -> None:
        """Wait until what was kept is there, for CALL_TIMEOUT at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CALL_TIMEOUT)
        for task in tuple(self._tasks):
            task.cancel()

    def _encoded(self, record: Record) -> bytes | None:
        """Return *record* as bytes that are counted as on their way.

        None if there is no room for them.
        """
        data = _encoder.encode(_Record(self._clock(), *record))
        if self._pending + len(data) > MAX_PENDING:
            return None
        self._pending += len(data)
        return data

    def _sent(self, size: int, task: asyncio.Task[bool], done: Callable[[bool], None]) -> None:
        self._tasks.discard(task)
        self._pending -= size
        done(not task.cancelled() and task.exception() is None and task.result())

    async def _write(
        self,
        name: str,
        data: bytes,
        previous: str,
        seconds: float,
        whole: Callable[[], Record | None],
    ) -> bool:
        """Write a response, and return whether it is kept.

        *whole* is needed if the one before it is missing.
        """
        result = await self._put(name, data, previous, seconds)
        if result != MISSING or (record := whole()) is None:
            return result == WRITTEN
        again = self._encoded(record)
        if again is None:
            return False
        try:
            return await self._put(name, again, "", seconds) == WRITTEN
        finally:
            self._pending -= len(again)

    async def _put(self, name: str, data: bytes, previous: str, seconds: float) -> int | None:
        call = self._chains.put_response(name, data, previous, seconds, MAX_BYTES)
        return await self._ask(call, CALL_TIMEOUT)


def _too_many(retry_after: float) -> ServerAtCapacity:
    return ServerAtCapacity("too many conversations are read", retry_after=retry_after)


def _decoded(data: bytes) -> tuple[float, Record] | None:
    try:
        record = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None
    stored_at, *fields = msgspec.structs.astuple(record)
    return stored_at, Record(*fields)

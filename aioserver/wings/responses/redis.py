"""Stored responses for all instances, in Redis or Valkey, each with the name of the response that
it continues.

A response is written when it is stored, without its predecessors. An instance that does not hold
it reads it with all of them when it gets a request that continues it. An instance also holds the
responses that it has stored itself, and uses these while the server is unreachable. A key in Redis
is made of a digest: neither the caller nor the id stands in it.

A response is a hash with its `data`, its own input and output, and the name of the `previous` one;
a conversation is read along these names. A response lives for its window, and its predecessors at
least as long: they are given twice the window, so that a new turn rarely has to look further back
than one response. Each is an item of its owner (gateway/contracts/commands.py). If there is no
room, the owner that keeps most loses the items that were not continued for longest.

A deleted response is not found any more. It is kept for the responses that have continued it, if
there are any.

If the `previous` response is missing, because it was never written or was evicted, the response is
not kept either: its conversation could not be read. Its instance then writes it together with its
whole conversation.

The end of an answer waits, for a short time, until its response is written. Once its id is known a
response is announced: an instance that looks for it then waits for a moment, and looks again. A
response that is deleted before it is written is not kept.

This file is one concept: the keys of a response in Redis, and the waits for them, since scripts
change these keys as one.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from aioserver.errors import ServerAtCapacity
from aioserver.gateway.contracts.commands import (
    FULL,
    ITEM_OVERHEAD,
    ITEMS,
    KNOWN_TIMEOUT,
    MARKED,
    MAX_KEPT,
    Writes,
    name_of,
    settled,
)
from aioserver.limits.resource import Bid, Reason, Resource, Ticket
from aioserver.limits.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.gateway.contracts.commands import Commands

T = TypeVar("T")

# The subject of a look-up.
SUBJECT = "response"
# Conversations that are read at once, each of tens of megabytes at most; and those that wait,
# fairly between callers. Redis has other work, and the bytes read are not counted. One more is
# refused.
MAX_LOADS, MAX_LOADS_WAITING = 4, 1000
# The most bytes on their way to Redis, which may be slow: those of some large responses.
MAX_PENDING = 1 << 26
# The results of a look-up: the response is there, or is about to be written.
PRESENT, NEXT = 1, 2
# The results of writing a response: there is no room, it is kept, or the response that it
# continues is missing.
NO_ROOM, WRITTEN, MISSING = range(3)
# The most turns of a conversation that are read.
MAX_TURNS = 10_000
# KEYS: the response, its announcement; the previous response, if there is one. ARGV: the prefix of
# keys, the owner, the data, milliseconds to live, the most bytes of an item and of all, and the
# prefix of keys of responses, then the name of the previous one.
PUT = (
    ITEMS
    + """
local owner, data, window, start = ARGV[2], ARGV[3], ARGV[4] / 1000, ARGV[7]
local size = #data + tonumber(ARGV[5])
local deleted = redis.call('GET', KEYS[2]) == 'deleted'
local function lost() return KEYS[3] and redis.call('EXISTS', KEYS[3]) == 0 end
sweep()
if lost() then return 2 end
redis.call('DEL', KEYS[2])
if deleted then return 1 end
forget(KEYS[1])
if not room(size, tonumber(ARGV[6])) then return 0 end
-- It may have been what had to go.
if lost() then return 2 end
redis.call('HSET', KEYS[1], 'data', data, 'previous', ARGV[8] or '', 'at', time[1])
redis.call('HSET', KEYS[1], 'owner', owner, 'size', size)
redis.call('EXPIRE', KEYS[1], math.ceil(window))
note(owner, KEYS[1], size, window)
local key = KEYS[3]
if key then redis.call('HSET', key, 'continued', 1) end
for _ = 1, 10000 do
  if not key or redis.call('PTTL', key) > 1000 * window then break end
  if redis.call('EXPIRE', key, math.ceil(2 * window)) == 0 then break end
  local previous, whose, bytes = unpack(redis.call('HMGET', key, 'previous', 'owner', 'size'))
  if whose then note(whose, key, bytes, 2 * window) end
  key = previous ~= '' and start .. previous or nil
end
return 1
"""
)
# KEYS: the announcement of a response. ARGV: seconds to live.
ANNOUNCE = FULL + "if not full(0) then redis.call('SET', KEYS[1], '', 'EX', ARGV[1]) end return 1"
# KEYS: the response, its announcement. Returns whether it is there (1), or about to be (2).
LOOK = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
return 2 * redis.call('EXISTS', KEYS[2])
"""
# KEYS: the response. ARGV: the prefix of keys, the most bytes and turns. The first result is the
# seconds since it was written, by the server's clock.
CHAIN = """
local at = redis.call('HGET', KEYS[1], 'at')
local age = at and tostring(tonumber(redis.call('TIME')[1]) - tonumber(at)) or ''
local found, size, key = {age}, 0, KEYS[1]
if redis.call('HEXISTS', key, 'deleted') == 1 then return {} end
while key do
  local data, previous = unpack(redis.call('HMGET', key, 'data', 'previous'))
  if not data then return {} end
  size = size + #data
  found[#found + 1] = data
  if size > tonumber(ARGV[2]) or #found > tonumber(ARGV[3]) + 1 then return {} end
  key = previous ~= '' and ARGV[1] .. previous or nil
end
return found
"""
# KEYS: the response, its announcement. ARGV: the prefix of keys.
DELETE = (
    ITEMS
    + """
if redis.call('EXISTS', KEYS[1]) == 0 and redis.call('EXISTS', KEYS[2]) == 1 then
  redis.call('SET', KEYS[2], 'deleted', 'KEEPTTL')
  return 1
end
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
if redis.call('HEXISTS', KEYS[1], 'deleted') == 1 then return 0 end
if redis.call('HEXISTS', KEYS[1], 'continued') == 1 then
  redis.call('HSET', KEYS[1], 'deleted', 1)
else
  forget(KEYS[1])
end
return 1
"""
)


class RedisChains:
    """Stored responses as bytes. Each method raises the exceptions of its connection."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._prefix = commands.prefix

    async def put_response(
        self, owner: str, name: str, data: bytes, previous: str, seconds: float, most: int
    ) -> int:
        """Keep a response of *owner* for *seconds*, if there is room.

        *previous* is the name of the response that it continues, or "". *most* is the bound of all
        items in bytes. Return NO_ROOM, WRITTEN or MISSING.
        """
        prefix = f"{self._prefix}r:"
        values: list[bytes | str | int] = [self._prefix, owner, data, int(1000 * seconds)]
        values += (ITEM_OVERHEAD, most, prefix)
        keys = self._keys(name)
        if previous:
            keys.append(prefix + previous)
            values.append(previous)
        result = await self._commands.evaluate(PUT, keys, *values)
        return result if isinstance(result, int) else NO_ROOM

    async def announce(self, name: str) -> None:
        """Note that a response will be written."""
        await self._commands.evaluate(ANNOUNCE, self._keys(name)[1:], int(MARKED))

    async def withdraw(self, name: str) -> None:
        """Note that a response will not be written."""
        await self._commands.execute("DEL", f"{self._prefix}next:{name}")

    async def has_response(self, name: str) -> int:
        """Return PRESENT (also for a deleted response), NEXT, or 0."""
        return int(await self._commands.evaluate(LOOK, self._keys(name)))

    async def response_chain(self, name: str, most: int) -> tuple[float | None, Sequence[bytes]]:
        """Return a response and its predecessors, the newest first, and the seconds since it was
        written, if they are known.

        The result is empty if one is missing, or if they have more than *most* bytes.
        """
        prefix = f"{self._prefix}r:"
        found = await self._commands.evaluate(CHAIN, [prefix + name], prefix, most, MAX_TURNS)
        if not found:
            return None, ()
        age, *chain = found
        return float(age) if age else None, chain

    async def delete_response(self, name: str) -> bool:
        """Hide a response from further look-ups; return whether there was one."""
        return bool(await self._commands.evaluate(DELETE, self._keys(name), self._prefix))

    def _keys(self, name: str) -> list[str]:
        return [f"{self._prefix}r:{name}", f"{self._prefix}next:{name}"]


class Record(NamedTuple):
    """A response without its predecessors, on its way between instances: see
    `stored.StoredResponse` and `items.ResponseParts`.
    """

    id: str
    status: str
    provider: str
    kept_there: bool
    input: bytes
    head: bytes
    output: bytes
    tail: bytes
    whole: bool


_encoder = msgspec.msgpack.Encoder()
# The time at which it was stored, and the record.
_decoder = msgspec.msgpack.Decoder(tuple[float, Record])


class SharedResponses:
    """The responses of all instances in Redis.

    *clock* returns the time of day.
    """

    def __init__(
        self,
        commands: Commands,
        clock: Callable[[], float] = time.time,
        scheduler: Scheduler | None = None,
    ) -> None:
        self._chains = RedisChains(commands)
        self._tell, self._know, self.written = commands.tell, commands.know, commands.written
        self._clock = clock
        self._writes = Writes()
        # Responses under way for which look-ups elsewhere wait.
        self._announced: set[str] = set()
        # The bytes on their way to Redis.
        self._pending = 0
        loop = asyncio.get_running_loop()
        self._scheduler = scheduler = scheduler or Scheduler(loop)
        self._loads = Resource(
            "loads",
            MAX_LOADS,
            queue_size=MAX_LOADS_WAITING,
            queue_timeout=KNOWN_TIMEOUT,
            refuse=_too_many,
            serve=scheduler.serve,
            clock=loop.time,
        )

    def announce(self, caller: Caller, response_id: str) -> None:
        """Let look-ups of a response wait for it, from soon on."""
        name = name_of(caller.name, response_id)
        self._announced.add(name)
        self._writes.start(self._tell(self._chains.announce(name)))

    def withdraw(self, caller: Caller, response_id: str) -> None:
        """Let look-ups of a response wait no longer, from soon on."""
        self._withdraw(name_of(caller.name, response_id))

    def keep(
        self,
        caller: Caller,
        record: Record,
        previous_id: str | None,
        seconds: float,
        *,
        whole: Callable[[], Record | None],
    ) -> asyncio.Future[bool] | None:
        """Keep a response of *caller* for *seconds*, soon.

        *previous_id* is the id of the response that it continues. If that is missing, `whole()` is
        kept instead: the record with the whole conversation. Return a future whose result says
        whether it is kept; None if there is no room for it among the bytes that are on their way,
        MAX_PENDING at most.
        """
        name = name_of(caller.name, record.id)
        data = self._encoded(record)
        if data is None:
            self._withdraw(name)
            return None
        previous = "" if previous_id is None else name_of(caller.name, previous_id)
        if name not in self._announced:
            # The announcement goes first, since a large response takes a while.
            self.announce(caller, record.id)
        owner = name_of(caller.name, caller.address)
        writing = self._writes.start(self._write((owner, name), data, previous, seconds, whole))
        # Not by `_write`, which may never begin.
        writing.add_done_callback(partial(self._sent, len(data)))
        return writing

    async def load(
        self, caller: Caller, response_id: str, window: float, most: int
    ) -> Sequence[Record]:
        """Return a response that was stored within *window*, and its predecessors, the newest
        first; empty if there is none.

        *most* is the bound of their bytes together.

        Raises:
            InstanceUnavailable: it is not known whether there is one.
            ServerAtCapacity: too many are being read already.
        """
        name = name_of(caller.name, response_id)
        # Most ids that are unknown here are unknown everywhere, and reading is bounded.
        if not await self._look(name):
            return ()
        place = await self._scheduler.wait(Ticket(caller), [Bid(self._loads)])
        try:
            age, chain = await self._know(self._chains.response_chain(name, most), SUBJECT)
        finally:
            place.release()
        records = [_decoded(data) for data in chain]
        known = [record for record in records if record is not None]
        if len(known) < len(records) or not known:
            return ()
        if age is None:
            # An earlier version has written it, with the time of its machine.
            age = self._clock() - known[0][0]
        return () if age >= window else [record for _stored_at, record in known]

    async def _look(self, name: str) -> bool:
        """Return whether a response is there, or will be within a moment."""

        async def look() -> int:
            return await self._know(self._chains.has_response(name), SUBJECT)

        return await settled(look, lambda found: found == NEXT) == PRESENT

    async def delete(self, caller: Caller, response_id: str) -> bool:
        """Hide a response from further look-ups; return whether there was one.

        Raises:
            InstanceUnavailable: that is not known.
        """
        name = name_of(caller.name, response_id)
        return await self._know(self._chains.delete_response(name), SUBJECT)

    async def close(self) -> None:
        """Wait for a moment at most until the kept responses are written."""
        await self._writes.close()

    def _encoded(self, record: Record) -> bytes | None:
        """Return *record* as bytes, which count as pending; None if there is no room."""
        data = _encoder.encode((self._clock(), record))
        if self._pending + len(data) > MAX_PENDING:
            return None
        self._pending += len(data)
        return data

    def _sent(self, size: int, _writing: object) -> None:
        self._pending -= size

    def _withdraw(self, name: str) -> None:
        if name in self._announced:
            self._announced.discard(name)
            self._writes.start(self._tell(self._chains.withdraw(name)))

    async def _write(
        self,
        names: tuple[str, str],
        data: bytes,
        previous: str,
        seconds: float,
        whole: Callable[[], Record | None],
    ) -> bool:
        """Write a response, and return whether it is kept; *names* are those of its owner, and its
        own.

        *whole* is needed if the previous response is missing.
        """
        result = await self._put(names, data, previous, seconds)
        if result == MISSING and (record := whole()) is not None:
            again = self._encoded(record)
            if again is not None:
                try:
                    result = await self._put(names, again, "", seconds)
                finally:
                    self._pending -= len(again)
        if result == WRITTEN:
            self._announced.discard(names[1])
        else:
            self._withdraw(names[1])
        return result == WRITTEN

    async def _put(
        self, names: tuple[str, str], data: bytes, previous: str, seconds: float
    ) -> int | None:
        call = self._chains.put_response(*names, data, previous, seconds, MAX_KEPT)
        return await self._tell(call)


def _too_many(_reason: Reason, retry_after: float, _bid: Bid) -> ServerAtCapacity:
    return ServerAtCapacity("too many conversations are being read", retry_after=retry_after)


def _decoded(data: bytes) -> tuple[float, Record] | None:
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None

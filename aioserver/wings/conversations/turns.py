"""The turns of conversations in Redis, and the list that each caller has of its own: for `histories.py`.

A conversation is a list of turns; all of them are in one sorted set, by their last turn, so that those that rested for longest
go where there is no room. A deletion is remembered, for answers that run meanwhile, and for instances that know the
conversation still.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from aioserver.wings.conversations.turn import Position

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aioserver.wings.cluster.bus import Commands

# Conversations whose last turns end at the very same time, at most.
TIES = 20
# Begins the scripts that keep what may also be forgotten. Beyond its `maxmemory` a server refuses whatever writes,
# `settle` as well, so the last quarter is not for them.
FULL = """
local function full(more)
  local memory = redis.call('INFO', 'memory')
  local most = tonumber(memory:match('maxmemory:(%d+)'))
  return most > 0 and tonumber(memory:match('used_memory:(%d+)')) + more > most * 0.75
end
"""
# KEYS: the conversation, all conversations by their last turn. ARGV: the turn, bytes and turns that are kept, milliseconds
# to live. Where there is no room, the conversations that rested for longest go, some with each turn. One that lacks its
# newest turn goes as a whole: the instances then use what they know of it themselves. If the conversation is listed, three
# keys and values more: the list, two deletions; the id, the time of the turn, and that of its question: what was asked before a
# deletion is not kept.
_KEEP_TURN = (
    FULL
    + """
for number = 4, #KEYS do
  local deleted = redis.call('GET', KEYS[number])
  if deleted and tonumber(ARGV[7]) <= tonumber(deleted) then return 0 end
end
local now, kept = tonumber(redis.call('TIME')[1]), tonumber(ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - kept / 1000)
for _ = 1, 100 do
  if not full(#ARGV[1]) then break end
  local oldest = redis.call('ZPOPMIN', KEYS[2])[1]
  if not oldest then break end
  redis.call('DEL', oldest)
end
if full(#ARGV[1]) then
  redis.call('DEL', KEYS[1])
  return 0
end
redis.call('RPUSH', KEYS[1], ARGV[1])
local turns, size = redis.call('LRANGE', KEYS[1], 0, -1), 0
local first = #turns + 1
while first > 1 and #turns - first + 1 < tonumber(ARGV[3]) do
  size = size + #turns[first - 1]
  if size > tonumber(ARGV[2]) and first <= #turns then break end
  first = first - 1
end
if first > 1 then redis.call('LTRIM', KEYS[1], first - 1, -1) end
redis.call('PEXPIRE', KEYS[1], kept)
redis.call('ZADD', KEYS[2], now, KEYS[1])
redis.call('PEXPIRE', KEYS[2], kept)
if KEYS[3] then
  redis.call('ZADD', KEYS[3], ARGV[6], ARGV[5])
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - kept / 1000)
  redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -10001)
  redis.call('PEXPIRE', KEYS[3], kept)
end
return 1
"""
)
# KEYS: conversations. Each one's number of turns, and its first.
_FIRST_TURNS = """
local found = {}
for number, key in ipairs(KEYS) do
  found[number] = {redis.call('LLEN', key), redis.call('LINDEX', key, 0) or ''}
end
return found
"""
# KEYS: the list, all conversations, then for each a conversation and its deletion. ARGV: the time, milliseconds for which a
# deletion is remembered, then ids.
_DELETE_TURNS = """
local count = 0
for number = 3, #ARGV do
  local key = KEYS[2 * number - 3]
  redis.call('SET', KEYS[2 * number - 2], ARGV[1], 'PX', ARGV[2])
  redis.call('ZREM', KEYS[1], ARGV[number])
  redis.call('ZREM', KEYS[2], key)
  count = count + redis.call('DEL', key)
end
return count
"""


class Listed(NamedTuple):
    """The entry of a conversation in the list of its *owner*, with a new turn that ended at *updated*.

    *asked*: when the turn's question came. Both in Unix time.
    """

    owner: str
    conversation_id: str
    updated: float
    asked: float


class TurnStore(Protocol):
    """Where conversations are kept. Each method raises what its connection raises."""

    async def keep_turn(
        self,
        name: str,
        turn: bytes,
        bounds: tuple[int, int, float],
        listed: Listed | None = None,
    ) -> None:
        """Append *turn* to a conversation; *bounds*: bytes and turns that are kept, and for how many seconds."""

    async def turns(self, name: str) -> tuple[list[bytes], bool]:
        """Return the turns of a conversation, and whether it was deleted."""

    async def conversations(
        self, owner: str, limit: int, after: Position | None
    ) -> list[Position]:
        """Return the newest *limit* conversations in the list of *owner*, after a position."""

    async def first_turns(self, names: Sequence[str]) -> list[tuple[int, bytes]]:
        """Return of each conversation the number of its turns, and the first."""

    async def delete_turns(
        self, owner: str, names: Mapping[str, str], now: float, seconds: float
    ) -> int:
        """Delete conversations, by their ids, and remember it for *seconds*; return how many there were."""

    async def note_deletion(self, owner: str, now: float, seconds: float) -> bool:
        """Remember for *seconds* that all conversations of *owner* are deleted."""


class RedisTurns:
    """Conversations in Redis; *prefix* is that of the cluster's keys."""

    def __init__(self, commands: Commands, prefix: str) -> None:
        self._commands = commands
        self._prefix = prefix

    async def keep_turn(
        self,
        name: str,
        turn: bytes,
        bounds: tuple[int, int, float],
        listed: Listed | None = None,
    ) -> None:
        """Append *turn* to a conversation."""
        (size, count, seconds), prefix = bounds, self._prefix
        keys = [f"{prefix}c:{name}", f"{prefix}talks"]
        values: list[bytes | str | int] = [turn, size, count, int(1000 * seconds)]
        if listed is not None:
            owner = listed.owner
            keys += (f"{prefix}own:{owner}", f"{prefix}gone:{name}", f"{prefix}gone:{owner}")
            values += (listed.conversation_id, repr(listed.updated), repr(listed.asked))
        await self._eval(_KEEP_TURN, keys, *values)

    async def turns(self, name: str) -> tuple[list[bytes], bool]:
        """Return the turns of a conversation, and whether it was deleted."""
        turns = await self._commands.execute("LRANGE", f"{self._prefix}c:{name}", 0, -1)
        kept = [turn for turn in turns if isinstance(turn, bytes)]
        deleted = not kept and await self._commands.execute("GET", f"{self._prefix}gone:{name}")
        return kept, bool(deleted)

    async def conversations(
        self, owner: str, limit: int, after: Position | None
    ) -> list[Position]:
        """Return the newest *limit* conversations in the list of *owner*."""
        # The position itself comes first, and what has ended at the very same time.
        most = "+inf" if after is None else repr(after.updated)
        found = await self._commands.execute(
            *("ZREVRANGEBYSCORE", f"{self._prefix}own:{owner}", most, "-inf"),
            *("WITHSCORES", "LIMIT", 0, limit + (0 if after is None else TIES)),
        )
        positions = [
            Position(float(score), member.decode("utf-8", "replace"))
            for member, score in zip(found[::2], found[1::2], strict=True)
        ]
        return [each for each in positions if after is None or each < after][:limit]

    async def first_turns(self, names: Sequence[str]) -> list[tuple[int, bytes]]:
        """Return of each conversation the number of its turns, and the first."""
        if not names:
            return []
        found = await self._eval(_FIRST_TURNS, [f"{self._prefix}c:{name}" for name in names])
        return [(int(number), first) for number, first in found]

    async def delete_turns(
        self, owner: str, names: Mapping[str, str], now: float, seconds: float
    ) -> int:
        """Delete conversations, and remember it."""
        prefix = self._prefix
        keys = [f"{prefix}own:{owner}", f"{prefix}talks"]
        for name in names.values():
            keys += (f"{prefix}c:{name}", f"{prefix}gone:{name}")
        milliseconds = int(1000 * seconds)
        return int(await self._eval(_DELETE_TURNS, keys, repr(now), milliseconds, *names))

    async def note_deletion(self, owner: str, now: float, seconds: float) -> bool:
        """Remember that all conversations of *owner* are deleted."""
        key, milliseconds = f"{self._prefix}gone:{owner}", int(1000 * seconds)
        return bool(await self._commands.execute("SET", key, repr(now), "PX", milliseconds))

    async def _eval(self, script: str, keys: list[str], *values: bytes | str | int) -> Any:
        # Not EVALSHA: a Redis that comes back empty knows no script, and these are short.
        return await self._commands.execute("EVAL", script, len(keys), *keys, *values)

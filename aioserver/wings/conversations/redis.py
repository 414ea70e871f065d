"""Conversations for all instances: their turns are in Redis or Valkey.

See `wings.conversations.history.Storage`.

A turn is written when its answer has ended, and all turns are read when the next question of the
conversation is asked. The end of an answer waits for its turn, but not for long. So a question
leaves a *mark* with the turns when it reads them, which is removed when its turn is kept, or when
none will come. While there is a mark of another instance, a reader waits for a moment, and reads
again. So a turn whose end a client has seen is not missed, however late it is written. This
instance keeps the turns, too (`wings.conversations.memory`): while the server is unreachable, a
conversation continues with the local ones. Kept turns are bounded by the settings, and deleted a
day after the last turn.

A conversation is a list of turns, and an item (gateway/contracts/commands.py). If there is no
room, the owner that keeps most loses the conversations that rested for longest. A deletion is
remembered, for answers that run meanwhile, and for instances that still know the conversation; but
only if there are turns, or marks of questions. Each caller has a list of its conversations by
their last turn; without keys each address has one. The clock of the server decides whether a
question came before a deletion, since clocks of machines differ. A key in Redis is made of
digests: neither the caller nor the id stands in it.

This file is one concept: the keys of a conversation in Redis, and the waits for them, since
scripts change these keys as one.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from aioserver.gateway.contracts.commands import (
    ITEM_OVERHEAD,
    ITEMS,
    MARKED,
    MAX_KEPT,
    Writes,
    name_of,
    settled,
)
from aioserver.gateway.contracts.histories import Begun
from aioserver.wings.conversations.history import Loaded, StorageStats
from aioserver.wings.conversations.turn import Page, Position, Summary, Turn

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Persistence
    from aioserver.gateway.contracts.commands import Commands
    from aioserver.wings.conversations.memory import Conversations

# Seconds for which a conversation is kept after its last turn.
KEPT = 86_400.0
# Seconds to wait for an answer of the server where a wait is possible.
CALL_TIMEOUT = 1.0
# Conversations that are deleted in one step.
STEP = 100
# The most conversations whose last turns end at the very same time.
TIES = 20
# The server's time in seconds, with microseconds.
NOW = """
local clock = time[1] .. '.' .. string.format('%06d', time[2])
"""
# KEYS: the conversation, its deletion, its marks. ARGV: the prefix of keys, the name of this
# instance, a mark to be set ("" if none), the seconds for which it makes readers wait, and its
# lifetime in seconds. Returns the turns, whether the conversation was deleted, whether there are
# marks of other instances, and the time.
LOAD_TURNS = (
    ITEMS
    + NOW
    + """
local turns, busy = redis.call('LRANGE', KEYS[1], 0, -1), 0
for _, mark in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], clock - ARGV[4], '+inf')) do
  if mark:sub(1, #ARGV[2]) ~= ARGV[2] then busy = 1 end
end
if ARGV[3] ~= '' and not full(0) then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', clock - ARGV[5])
  redis.call('ZADD', KEYS[3], clock, ARGV[3])
  redis.call('EXPIRE', KEYS[3], ARGV[5])
end
return {turns, redis.call('EXISTS', KEYS[2]), busy, clock}
"""
)
# KEYS: the conversation, its marks; if it is listed, also the list, and two deletions. ARGV: the
# prefix of keys, the owner, the turn, the most bytes and turns to keep, milliseconds to live, the
# most bytes of an item and of all, the mark of the question. If it is listed, also the id, the
# time of the turn, and the time of its question: a turn whose question came before a deletion is
# not kept. If there is no room, the whole conversation is deleted: the instances then use their
# own memory.
KEEP_TURN = (
    ITEMS
    + """
redis.call('ZREM', KEYS[2], ARGV[9])
for number = 4, #KEYS do
  local deleted = redis.call('GET', KEYS[number])
  if deleted and tonumber(ARGV[12]) <= tonumber(deleted) then return 0 end
end
local owner, turn, seconds, overhead = ARGV[2], ARGV[3], ARGV[6] / 1000, tonumber(ARGV[7])
sweep()
if not room(#turn + overhead, tonumber(ARGV[8])) then
  forget(KEYS[1])
  return 0
end
redis.call('RPUSH', KEYS[1], turn)
local turns, size = redis.call('LRANGE', KEYS[1], 0, -1), 0
local first = #turns + 1
while first > 1 and #turns - first + 1 < tonumber(ARGV[5]) do
  local more = size + #turns[first - 1]
  if more > tonumber(ARGV[4]) and first <= #turns then break end
  size, first = more, first - 1
end
if first > 1 then redis.call('LTRIM', KEYS[1], first - 1, -1) end
redis.call('PEXPIRE', KEYS[1], ARGV[6])
note(owner, KEYS[1], size + overhead, seconds)
if KEYS[3] then
  redis.call('ZADD', KEYS[3], ARGV[11], ARGV[10])
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - seconds)
  redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -10001)
  redis.call('PEXPIRE', KEYS[3], ARGV[6])
end
return 1
"""
)
# KEYS: conversations. Returns each one's number of turns, and its first turn.
FIRST_TURNS = """
local found = {}
for number, key in ipairs(KEYS) do
  found[number] = {redis.call('LLEN', key), redis.call('LINDEX', key, 0) or ''}
end
return found
"""
# KEYS: the list, then for each conversation its turns, its deletion, and its marks. ARGV: the
# prefix of keys, the owner, milliseconds for which a deletion is remembered, the most bytes of an
# item and of all, "1" if there are questions without a mark, then ids. A conversation counts as
# existing if a question is under way in it, even if it has no turn yet: none will be kept. Nothing
# is written for conversations that do not exist.
DELETE_TURNS = (
    ITEMS
    + NOW
    + """
local count = 0
for number = 7, #ARGV do
  local first = 3 * (number - 7) + 2
  local key, deletion, marks = KEYS[first], KEYS[first + 1], KEYS[first + 2]
  local there = math.min(1, redis.call('EXISTS', key, marks))
  if there == 1 or ARGV[6] == '1' then
    forget(key)
    if not room(tonumber(ARGV[4]), tonumber(ARGV[5])) then return redis.error_reply('FULL') end
    redis.call('SET', deletion, clock, 'PX', ARGV[3])
    note(ARGV[2], deletion, tonumber(ARGV[4]), ARGV[3] / 1000)
    redis.call('DEL', marks)
  end
  redis.call('ZREM', KEYS[1], ARGV[number])
  count = count + there
end
return count
"""
)
# KEYS: the list of an owner, its deletion. ARGV: as above, without ids.
NOTE_DELETION = (
    ITEMS
    + NOW
    + """
if ARGV[6] ~= '1' and redis.call('EXISTS', KEYS[1]) == 0 then return 1 end
if not room(tonumber(ARGV[4]), tonumber(ARGV[5])) then return redis.error_reply('FULL') end
redis.call('SET', KEYS[2], clock, 'PX', ARGV[3])
note(ARGV[2], KEYS[2], tonumber(ARGV[4]), ARGV[3] / 1000)
return 1
"""
)


class Listed(NamedTuple):
    """The entry of a conversation in the list of its *owner*, with a new turn that ended at
    *updated*.

    *asked*: when the turn's question came, by the clock of the server. Both in Unix time.
    """

    owner: str
    conversation_id: str
    updated: float
    asked: float


class Turns(NamedTuple):
    """The *turns* of a conversation. Without turns it was *deleted*, or does not exist.

    *busy*: another instance is about to keep one. *now*: the server's time.
    """

    turns: list[bytes]
    deleted: bool = False
    busy: bool = False
    now: float = 0.0


class RedisTurns:
    """The turns of conversations as bytes. Each method raises the exceptions of its connection."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._prefix = commands.prefix

    async def keep_turn(
        self,
        name: str,
        turn: bytes,
        bounds: tuple[int, int, float],
        listed: Listed | None = None,
        mark: str = "",
    ) -> bool:
        """Append *turn* to a conversation, and remove the *mark* of its question.

        Return whether it is kept. *bounds*: the most bytes and turns, and the seconds to keep
        them.
        """
        (size, count, seconds), prefix = bounds, self._prefix
        owner = "" if listed is None else listed.owner
        keys = [f"{prefix}c:{name}", f"{prefix}busy:{name}"]
        values: list[bytes | str | int] = [prefix, owner, turn, size, count, int(1000 * seconds)]
        values += (ITEM_OVERHEAD, MAX_KEPT, mark)
        if listed is not None:
            keys += (f"{prefix}own:{owner}", f"{prefix}gone:{name}", f"{prefix}gone:{owner}")
            values += (listed.conversation_id, repr(listed.updated), repr(listed.asked))
        return bool(await self._commands.evaluate(KEEP_TURN, keys, *values))

    async def turns(self, name: str, mark: str = "") -> Turns:
        """Return the turns of a conversation, and leave the *mark* of a question there, if any."""
        prefix = self._prefix
        keys = [f"{prefix}c:{name}", f"{prefix}gone:{name}", f"{prefix}busy:{name}"]
        values = (prefix, self._commands.me, mark, int(MARKED), int(KEPT))
        turns, deleted, busy, now = await self._commands.evaluate(LOAD_TURNS, keys, *values)
        kept = [turn for turn in turns if isinstance(turn, bytes)]
        return Turns(kept, not kept and bool(deleted), bool(busy), float(now))

    async def settled(self, name: str, mark: str = "") -> Turns | None:
        """Return the turns of a conversation as `turns`, including those that other instances are
        about to write; None without an answer of Redis.
        """

        async def look() -> Turns | None:
            return await self._commands.ask(self.turns(name, mark), self._commands.patience)

        return await settled(look, lambda found: found is not None and found.busy)

    async def take_mark(self, name: str, mark: str) -> None:
        """Remove the mark of a question of which no turn will come."""
        await self._commands.execute("ZREM", f"{self._prefix}busy:{name}", mark)

    async def conversations(
        self, owner: str, limit: int, after: Position | None
    ) -> list[Position]:
        """Return the newest *limit* conversations in the list of *owner*, after a position."""
        # The position itself comes first, with all others of the very same time.
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
        """Return, for each conversation, the number of its turns, and the first."""
        if not names:
            return []
        found = await self._commands.evaluate(
            FIRST_TURNS, [f"{self._prefix}c:{name}" for name in names]
        )
        return [(int(number), first) for number, first in found]

    async def delete_turns(
        self, owner: str, names: Mapping[str, str], seconds: float, *, asked: bool = False
    ) -> int:
        """Delete conversations, by their ids, and remember that for *seconds*, if there are turns
        or marks, or *asked* is set; return how many there were.
        """
        prefix = self._prefix
        keys = [f"{prefix}own:{owner}"]
        for name in names.values():
            keys += (f"{prefix}c:{name}", f"{prefix}gone:{name}", f"{prefix}busy:{name}")
        values = self._deletion(owner, seconds, asked=asked)
        return int(await self._commands.evaluate(DELETE_TURNS, keys, *values, *names))

    async def note_deletion(self, owner: str, seconds: float, *, asked: bool = False) -> bool:
        """Remember for *seconds* that all conversations of *owner* are deleted, if it has any.
        *asked*: it may also have questions under way.
        """
        keys = [f"{self._prefix}own:{owner}", f"{self._prefix}gone:{owner}"]
        values = self._deletion(owner, seconds, asked=asked)
        return bool(await self._commands.evaluate(NOTE_DELETION, keys, *values))

    def _deletion(self, owner: str, seconds: float, *, asked: bool) -> tuple[str | int, ...]:
        return self._prefix, owner, int(1000 * seconds), ITEM_OVERHEAD, MAX_KEPT, int(asked)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Turn)


class RedisHistories:
    """The turns of conversations in Redis; *clock* returns the time of day."""

    # A read never lacks kept turns; otherwise there is no answer.
    troubled = False

    def __init__(
        self,
        commands: Commands,
        conversations: Conversations,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._turns = RedisTurns(commands)
        self._conversations = conversations
        self._commands = commands
        self._clock = clock
        # The questions that have begun here.
        self._questions = itertools.count()
        self._writes = Writes()

    def stats(self) -> StorageStats:
        """Return a snapshot; the state of the connection to Redis is shown elsewhere."""
        return StorageStats(storage="redis", waiting=len(self._writes))

    def apply(self, persistence: Persistence) -> None:
        """Do nothing: the bounds are those of the conversations here."""

    async def load(self, caller: Caller, conversation_id: str) -> Loaded | None:
        """Return the shared turns; invalid ones are left out."""
        found = await self._turns.settled(name_of(caller.name, conversation_id))
        return None if found is None else self._loaded(found)

    async def begin(
        self,
        caller: Caller,
        conversation_id: str,
        *,
        known: bool,
    ) -> tuple[Loaded | None, Begun]:
        """Return the shared turns, for a question, which leaves its mark."""
        mark = f"{self._commands.me}:{next(self._questions)}"
        name = name_of(caller.name, conversation_id)
        if known:
            found = await self._turns.settled(name, mark)
        else:
            # There is nothing to read, and the question needs no mark.
            found = await self._commands.ask(self._turns.turns(name, mark))
        if found is None:
            # The mark may have been set nevertheless.
            return None, Begun(mark, None)
        return self._loaded(found), Begun(mark, found.now)

    def leave(self, caller: Caller, conversation_id: str, begun: Begun) -> None:
        """Take the mark of a question away, soon."""
        name = name_of(caller.name, conversation_id)
        self._writes.start(self._unmark(name, begun.mark))

    def keep(
        self,
        caller: Caller,
        conversation_id: str,
        turn: Turn,
        asked: float,
        begun: Begun | None = None,
    ) -> asyncio.Future[None]:
        """Append a turn; return a future that is done once it is written, or as
        `Commands.written`.
        """
        begun = begun or Begun("", None)
        # If the server has not answered, only the clock of this machine has the time.
        asked = asked if begun.asked is None else begun.asked
        keeping = self._keep(caller, conversation_id, turn, asked, begun.mark)
        return self._commands.written(self._writes.start(keeping))

    async def listing(self, caller: Caller, limit: int, after: Position | None) -> Page | None:
        """Return part of the caller's conversations; those that Redis has deleted are left out."""
        owner = _owner(caller)
        found: list[Position] | None = await self._commands.ask(
            self._turns.conversations(owner, limit + 1, after), CALL_TIMEOUT
        )
        if found is None:
            return None
        names = [name_of(caller.name, position.conversation_id) for position in found[:limit]]
        firsts: list[tuple[int, bytes]] | None = await self._commands.ask(
            self._turns.first_turns(names), CALL_TIMEOUT
        )
        if firsts is None:
            return None
        summaries = []
        for (updated, conversation_id), (number, data) in zip(found, firsts, strict=False):
            if number:
                turn = _decoded(data, self._clock())
                question = "" if turn is None else turn.question
                summaries.append(Summary.of(conversation_id, question, updated, number))
        return Page(summaries, found[limit - 1] if len(found) > limit else None)

    async def delete(self, caller: Caller, conversation_id: str, *, asked: bool) -> bool | None:
        """Delete a conversation; return whether there was one, None without an answer of Redis."""
        deleted = await self._delete(caller, [conversation_id], asked=asked)
        return None if deleted is None else deleted > 0

    async def delete_all(self, caller: Caller, *, asked: bool) -> int | None:
        """Delete the caller's conversations; return their number, None without an answer of
        Redis.
        """
        owner, number = _owner(caller), 0
        # There are as many keys as in the configuration, and other instances may have questions of
        # them.
        noting = self._turns.note_deletion(owner, KEPT, asked=asked or bool(caller.name))
        noted = await self._commands.ask(noting, CALL_TIMEOUT)
        if noted is None:
            return None
        while True:
            found: list[Position] | None = await self._commands.ask(
                self._turns.conversations(owner, STEP, None), CALL_TIMEOUT
            )
            if found is None:
                return None
            if not found:
                return number
            deleted = await self._delete(caller, [position.conversation_id for position in found])
            if deleted is None:
                return None
            number += deleted

    async def close(self) -> None:
        """Wait for a moment at most until the kept turns are written."""
        await self._writes.close()

    def _loaded(self, found: Turns) -> Loaded:
        now = self._clock()
        turns = [turn for each in found.turns if (turn := _decoded(each, now)) is not None]
        # Redis may have deleted turns that this instance still knows.
        return Loaded(turns, certain=bool(turns) or found.deleted)

    async def _keep(
        self, caller: Caller, conversation_id: str, turn: Turn, asked: float, mark: str
    ) -> None:
        data = _encoder.encode(turn)
        size, turns = self._conversations.shared_bounds
        listed = Listed(_owner(caller), conversation_id, turn.ended, asked)
        name = name_of(caller.name, conversation_id)
        kept = self._turns.keep_turn(name, data, (size, turns, KEPT), listed, mark)
        if await self._commands.tell(kept) is None and mark:
            # Redis may not have received the turn, so the mark is removed separately.
            await self._unmark(name, mark)

    async def _unmark(self, name: str, mark: str) -> None:
        await self._commands.tell(self._turns.take_mark(name, mark))

    async def _delete(self, caller: Caller, ids: list[str], *, asked: bool = False) -> int | None:
        """Delete conversations; return how many there were, None without an answer of Redis."""
        names = {conversation_id: name_of(caller.name, conversation_id) for conversation_id in ids}
        deleted: int | None = await self._commands.ask(
            self._turns.delete_turns(_owner(caller), names, KEPT, asked=asked), CALL_TIMEOUT
        )
        return deleted


def _decoded(data: bytes, now: float) -> Turn | None:
    try:
        turn = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None
    # The clock of another machine may be ahead.
    return turn._replace(ended=min(now, turn.ended))


def _owner(caller: Caller) -> str:
    """Return the name of the caller's list."""
    return name_of(caller.name, caller.address)

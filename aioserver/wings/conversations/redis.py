"""Conversations for all instances: their turns are in Redis or Valkey. See `wings.conversations.history.Storage`.

A turn is written when its answer has ended, and all turns are read when the next question of the
conversation is asked. This instance keeps them, too (`wings.conversations.memory`): while the
server is away, a conversation goes on with what is known here. What is kept is bounded as the
settings say, and forgotten a day after the last turn.

A conversation is a list of turns; all of them are in one sorted set, by their last turn, so that
those that rested for longest go where there is no room. A deletion is remembered, for answers that
run meanwhile, and for instances that know the conversation still. Each caller has a list of its
conversations by their last turn; without keys each address has one. A key in Redis is made of
digests: neither the caller nor the id stands in it.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from aioserver.gateway.commands import FULL, TIMEOUT, name_of
from aioserver.wings.conversations.history import StorageStats
from aioserver.wings.conversations.turn import Page, Position, Summary, Turn, title_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Persistence
    from aioserver.gateway.commands import Commands
    from aioserver.wings.conversations.memory import Conversations

# Seconds for which a conversation is kept after its last turn.
KEPT = 86_400.0
# Seconds for which an answer of the server is awaited by what can wait.
CALL_TIMEOUT = 1.0
# Conversations that are deleted in one step.
STEP = 100
# Conversations whose last turns end at the very same time, at most.
TIES = 20
# KEYS: the conversation, all conversations by their last turn. ARGV: the turn, bytes and turns
# that are kept, milliseconds to live. Where there is no room, the conversations that rested for
# longest go, some with each turn. One that lacks its newest turn goes as a whole: the instances
# then use what they know of it themselves. If the conversation is listed, three keys and values
# more: the list, two deletions; the id, the time of the turn, and that of its question: what was
# asked before a deletion is not kept.
KEEP_TURN = (
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
FIRST_TURNS = """
local found = {}
for number, key in ipairs(KEYS) do
  found[number] = {redis.call('LLEN', key), redis.call('LINDEX', key, 0) or ''}
end
return found
"""
# KEYS: the list, all conversations, then for each a conversation and its deletion. ARGV: the time,
# milliseconds for which a deletion is remembered, then ids.
DELETE_TURNS = """
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


class RedisTurns:
    """The turns of conversations as bytes. Each method raises what its connection raises."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._prefix = commands.prefix

    async def keep_turn(
        self,
        name: str,
        turn: bytes,
        bounds: tuple[int, int, float],
        listed: Listed | None = None,
    ) -> None:
        """Append *turn* to a conversation; *bounds*: bytes and turns that are kept, and for how many seconds."""
        (size, count, seconds), prefix = bounds, self._prefix
        keys = [f"{prefix}c:{name}", f"{prefix}talks"]
        values: list[bytes | str | int] = [turn, size, count, int(1000 * seconds)]
        if listed is not None:
            owner = listed.owner
            keys += (f"{prefix}own:{owner}", f"{prefix}gone:{name}", f"{prefix}gone:{owner}")
            values += (listed.conversation_id, repr(listed.updated), repr(listed.asked))
        await self._commands.evaluate(KEEP_TURN, keys, *values)

    async def turns(self, name: str) -> tuple[list[bytes], bool]:
        """Return the turns of a conversation, and whether it was deleted."""
        turns = await self._commands.execute("LRANGE", f"{self._prefix}c:{name}", 0, -1)
        kept = [turn for turn in turns if isinstance(turn, bytes)]
        deleted = not kept and await self._commands.execute("GET", f"{self._prefix}gone:{name}")
        return kept, bool(deleted)

    async def conversations(
        self, owner: str, limit: int, after: Position | None
    ) -> list[Position]:
        """Return the newest *limit* conversations in the list of *owner*, after a position."""
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
        found = await self._commands.evaluate(
            FIRST_TURNS, [f"{self._prefix}c:{name}" for name in names]
        )
        return [(int(number), first) for number, first in found]

    async def delete_turns(
        self, owner: str, names: Mapping[str, str], now: float, seconds: float
    ) -> int:
        """Delete conversations, by their ids, and remember it for *seconds*; return how many there were."""
        prefix = self._prefix
        keys = [f"{prefix}own:{owner}", f"{prefix}talks"]
        for name in names.values():
            keys += (f"{prefix}c:{name}", f"{prefix}gone:{name}")
        milliseconds = int(1000 * seconds)
        return int(
            await self._commands.evaluate(DELETE_TURNS, keys, repr(now), milliseconds, *names)
        )

    async def note_deletion(self, owner: str, now: float, seconds: float) -> bool:
        """Remember for *seconds* that all conversations of *owner* are deleted."""
        key, milliseconds = f"{self._prefix}gone:{owner}", int(1000 * seconds)
        return bool(await self._commands.execute("SET", key, repr(now), "PX", milliseconds))


class _Turn(msgspec.Struct, array_like=True):
    kept_at: float
    question: str
    answer: str
    # Absent where an older version has written the turn.
    question_tokens: float | None = None
    answer_tokens: float | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Turn)


class RedisHistories:
    """The turns of conversations in Redis; *clock* returns the time of day, which all machines share."""

    def __init__(
        self,
        commands: Commands,
        conversations: Conversations,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._turns = RedisTurns(commands)
        self._conversations = conversations
        self._ask = commands.ask
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def troubled(self) -> bool:
        """Whether a read lacks what was kept: it does not, or there is no answer."""
        return False

    def stats(self) -> StorageStats:
        """Return a snapshot; how the instance stands with Redis is said elsewhere."""
        return StorageStats(storage="redis", waiting=len(self._tasks))

    def apply(self, persistence: Persistence) -> None:
        """Do nothing: the bounds are those of the conversations here."""

    async def load(self, caller: Caller, conversation_id: str) -> list[Turn] | None:
        """Return the turns that all have; what makes no sense is left out. None: none are known."""
        name = name_of(caller.name, conversation_id)
        found: tuple[list[bytes], bool] | None = await self._ask(self._turns.turns(name), TIMEOUT)
        if found is None:
            return None
        data, deleted = found
        turns = [turn for each in data if (turn := _decoded(each, self._clock())) is not None]
        # Redis may have forgotten what this instance knows still.
        return turns if turns or deleted else None

    def keep(self, caller: Caller, conversation_id: str, turn: Turn, asked: float) -> None:
        """Append a turn soon."""
        task = asyncio.get_running_loop().create_task(
            self._keep(caller, conversation_id, turn, asked)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def listing(self, caller: Caller, limit: int, after: Position | None) -> Page | None:
        """Return part of the caller's conversations; those that Redis has forgotten are left out."""
        owner = _owner(caller)
        found: list[Position] | None = await self._ask(
            self._turns.conversations(owner, limit + 1, after), CALL_TIMEOUT
        )
        if found is None:
            return None
        names = [name_of(caller.name, position.conversation_id) for position in found[:limit]]
        firsts: list[tuple[int, bytes]] | None = await self._ask(
            self._turns.first_turns(names), CALL_TIMEOUT
        )
        if firsts is None:
            return None
        summaries = []
        for position, (number, data) in zip(found, firsts, strict=False):
            if number:
                turn = _decoded(data, self._clock())
                title = "" if turn is None else title_of(turn.question)
                identity, updated = position.conversation_id, position.updated
                summaries.append(Summary(identity, title, updated, 2 * number))
        return Page(summaries, found[limit - 1] if len(found) > limit else None)

    async def delete(self, caller: Caller, conversation_id: str) -> bool | None:
        """Delete a conversation; return whether there was one, None without an answer of Redis."""
        deleted = await self._delete(caller, [conversation_id])
        return None if deleted is None else deleted > 0

    async def delete_all(self, caller: Caller) -> int | None:
        """Delete the caller's conversations; return their number, None without an answer of Redis."""
        owner, number = _owner(caller), 0
        noted = await self._ask(
            self._turns.note_deletion(owner, self._clock(), KEPT), CALL_TIMEOUT
        )
        if noted is None:
            return None
        while True:
            found: list[Position] | None = await self._ask(
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
        """Wait until what was kept is there, for CALL_TIMEOUT at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CALL_TIMEOUT)
        for task in tuple(self._tasks):
            task.cancel()

    async def _keep(self, caller: Caller, conversation_id: str, turn: Turn, asked: float) -> None:
        data = _encoder.encode(
            _Turn(turn.ended, turn.question, turn.answer, turn.question_tokens, turn.answer_tokens)
        )
        size, turns = self._conversations.shared_bounds
        listed = Listed(_owner(caller), conversation_id, turn.ended, asked)
        name = name_of(caller.name, conversation_id)
        kept = self._turns.keep_turn(name, data, (size, turns, KEPT), listed)
        await self._ask(kept, CALL_TIMEOUT)

    async def _delete(self, caller: Caller, ids: list[str]) -> int | None:
        """Delete conversations; return how many there were, None without an answer of Redis."""
        names = {conversation_id: name_of(caller.name, conversation_id) for conversation_id in ids}
        deleted: int | None = await self._ask(
            self._turns.delete_turns(_owner(caller), names, self._clock(), KEPT), CALL_TIMEOUT
        )
        return deleted


def _decoded(data: bytes, now: float) -> Turn | None:
    try:
        turn = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None
    # The clock of another machine may be ahead.
    ended = min(now, turn.kept_at)
    return Turn.of(turn.question, turn.answer, ended, (turn.question_tokens, turn.answer_tokens))


def _owner(caller: Caller) -> str:
    """Return the name of the caller's list."""
    return name_of(caller.name, caller.address)

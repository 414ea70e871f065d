"""Commands to the Redis or Valkey server that all instances share, for the wings that store
something there.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from aioserver.errors import InstanceUnavailable
from aioserver.gateway.contracts.timeouts import Timer, awaited, timeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

logger = logging.getLogger("aioserver.cluster")

# Seconds to wait for the server: for an answer that a request can do without, and for an answer
# whose absence must not be taken for "no such thing".
TIMEOUT, KNOWN_TIMEOUT = 0.05, 1.0
# Seconds for which the end of an answer waits until the answer is stored. A look-up at another
# instance waits for as long. A server that has answered nothing for so long hangs: no request waits
# for it until it has answered something, and the waits that have begun before end at once.
WRITE_TIMEOUT = 0.5
# The growing pauses, in seconds, of a look-up that waits for another instance's write; and the
# seconds after which the mark of such a write expires if its instance is killed.
BUSY_PAUSES, MARKED = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.185), 120.0
# Seconds after which a client may ask again if the answer is not known.
RETRY_AFTER = 1.0
# The head of the scripts that store what clients let grow. Beyond its `maxmemory` a server refuses
# every write, the renewal of leases as well, so these scripts leave the last quarter free. INFO
# takes longer than all else that such a script does. So an answer to it that is not near the bound
# counts for a tenth of a second, for small writes.
FULL = """
local function full(more)
  local key = (KEYS[1]:match('^aio:{.-}:') or '') .. 'memory'
  local used, most = (redis.call('GET', key) or ''):match('(%d+) (%d+)')
  if used and more < 4096 and (most == '0' or used + more < most * 0.65) then return false end
  local memory = redis.call('INFO', 'memory')
  used, most = memory:match('used_memory:(%d+)'), memory:match('maxmemory:(%d+)')
  if most == '0' or used + more < most * 0.65 then
    redis.call('SET', key, used .. ' ' .. most, 'PX', 100)
    return false
  end
  return used + more > most * 0.75
end
"""
# The head of the scripts that store items which may also be evicted: each item is a key that
# belongs to an owner, and all owners share the room. If there is none, the owner that keeps most
# loses the items that expire first. ARGV[1] is the prefix of the keys, which are:
#
#   PREFIX items        hash: the owner of each item, and its bytes
#   PREFIX ends         sorted set: the time at which each item expires
#   PREFIX ends:OWNER   the same for the items of one owner
#   PREFIX owners       sorted set: the bytes that each owner keeps
#   PREFIX kept         the bytes that all owners keep
ITEMS = (
    FULL
    + """
local prefix = ARGV[1]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local function forget(key)
  local owner, size = (redis.call('HGET', prefix .. 'items', key) or ''):match('^(.*) (%d+)$')
  redis.call('DEL', key)
  redis.call('ZREM', prefix .. 'ends', key)
  if not owner then return end
  redis.call('HDEL', prefix .. 'items', key)
  redis.call('ZREM', prefix .. 'ends:' .. owner, key)
  redis.call('DECRBY', prefix .. 'kept', size)
  if tonumber(redis.call('ZINCRBY', prefix .. 'owners', -size, owner)) <= 0 then
    redis.call('ZREM', prefix .. 'owners', owner)
  end
end
local function sweep()
  local over = redis.call('ZRANGEBYSCORE', prefix .. 'ends', '-inf', now, 'LIMIT', 0, 100)
  for _, key in ipairs(over) do forget(key) end
end
local function room(more, most)
  for _ = 1, 100 do
    local kept = tonumber(redis.call('GET', prefix .. 'kept') or '0')
    if kept + more <= most and not full(more) then return true end
    local owner = redis.call('ZREVRANGE', prefix .. 'owners', 0, 0)[1]
    local oldest = owner and redis.call('ZRANGE', prefix .. 'ends:' .. owner, 0, 0)[1]
    if not oldest then return false end
    forget(oldest)
  end
  return false
end
local function last(key, seconds)
  if redis.call('TTL', key) < seconds then redis.call('EXPIRE', key, math.ceil(seconds)) end
end
local function note(owner, key, size, seconds)
  local former, before = (redis.call('HGET', prefix .. 'items', key) or ''):match('^(.*) (%d+)$')
  if former then
    redis.call('ZREM', prefix .. 'ends:' .. former, key)
    redis.call('ZINCRBY', prefix .. 'owners', -before, former)
    redis.call('DECRBY', prefix .. 'kept', before)
  end
  redis.call('HSET', prefix .. 'items', key, owner .. ' ' .. size)
  redis.call('ZADD', prefix .. 'ends', now + seconds, key)
  redis.call('ZADD', prefix .. 'ends:' .. owner, now + seconds, key)
  redis.call('ZINCRBY', prefix .. 'owners', size, owner)
  redis.call('INCRBY', prefix .. 'kept', size)
  for _, name in ipairs({'items', 'ends', 'ends:' .. owner, 'owners', 'kept'}) do
    last(prefix .. name, seconds + 60)
  end
  if redis.call('ZCARD', prefix .. 'ends:' .. owner) > 20000 then
    forget(redis.call('ZRANGE', prefix .. 'ends:' .. owner, 0, 0)[1])
  end
end
"""
)
# The approximate bytes of one item beside its own: its key, and its metadata.
ITEM_OVERHEAD = 600
# The most bytes of all items, if the server has no `maxmemory`.
MAX_KEPT = 1 << 30

T = TypeVar("T")


class Connection(Protocol):
    """A connection to the server."""

    @property
    def connected(self) -> bool:
        """Whether commands can be sent."""

    @property
    def heard(self) -> float:
        """When the server last answered anything, an error too, by the clock of the event loop;
        -inf: never.
        """

    async def execute(self, *command: bytes | str | float) -> Any:
        """Return the answer to one command; the commands of one connection run in order.

        Raises:
            Exception: the server is away, or refuses the command.
        """


class Commands:
    """The shared store, as the wings use it.

    Each key begins with *prefix*. *me* is a name that no other instance has. *on_hang* is called
    when the server is found to hang.

    Always: while the server does not answer, the log says so once. No wait of a client is longer
    than WRITE_TIMEOUT from the first command that the server has left unanswered.
    """

    def __init__(
        self, connection: Connection, prefix: str, on_hang: Callable[[], object] = lambda: None
    ) -> None:
        self.prefix = prefix
        self.me = secrets.token_hex(6)
        # Whether the last `ask` had no answer.
        self.away = False
        # When the first command was sent since the server was last heard.
        self._silent_since = -inf
        # Looks whether the server still says nothing, if a command was sent lately.
        self._watch: Timer | None = None
        # When the server was last found to hang; and the call whose answer ends that.
        self._hung = -inf
        self._probe: asyncio.Task[object] | None = None
        # Each function ends a wait of a client.
        self._waits: set[Callable[[], None]] = set()
        self._connection, self._on_hang = connection, on_hang

    @property
    def patience(self) -> float:
        """Seconds for which an answer is awaited that a request can do without, at a cost.

        While the server is known to be away, the wait is short.
        """
        return WRITE_TIMEOUT if self._connection.connected else TIMEOUT

    @property
    def _hangs(self) -> bool:
        return self._connection.heard < self._hung

    def written(self, writing: asyncio.Future[Any]) -> asyncio.Future[None]:
        """Return a future that is done when *writing* is, or after WRITE_TIMEOUT: see
        `Keeper.keep`.

        A server that hangs delays the ends of answers only until it is known to hang.
        """
        done = awaited(writing, 0.0 if self._hangs else WRITE_TIMEOUT)

        def end() -> None:
            if not done.done():
                done.set_result(None)

        self._waits.add(end)
        done.add_done_callback(lambda _done: self._waits.discard(end))
        return done

    async def execute(self, *command: bytes | str | float) -> Any:
        """Return the answer to one command: see `Connection`."""
        return await self._connection.execute(*command)

    async def evaluate(
        self, script: str, keys: Sequence[str], *values: bytes | str | float
    ) -> Any:
        """Return the result of *script*, a short script: see `Connection`."""
        # Not EVALSHA: a server that has restarted empty knows no script.
        return await self._connection.execute("EVAL", script, len(keys), *keys, *values)

    async def ask(self, call: Coroutine[Any, Any, T], seconds: float = TIMEOUT) -> T | None:
        """Return the result of *call*, which executes commands, and for which a client waits.

        None if the server does not answer in time, or hangs.
        """
        answered = await self._waited(call, seconds)
        return answered[0] if answered else None

    async def tell(self, call: Coroutine[Any, Any, T]) -> T | None:
        """Do the same as `ask` for a *call* for which no client waits; it is made even if the
        server hangs.
        """
        answered = await self._answered(call, KNOWN_TIMEOUT, set())
        return answered[0] if answered else None

    async def know(self, call: Coroutine[Any, Any, T], subject: str) -> T:
        """Return the result of *call*, which looks up a *subject* that all instances share.

        Raises:
            InstanceUnavailable: the server does not answer within KNOWN_TIMEOUT, or hangs. A
                missing answer does not mean that the subject is absent.
        """
        answered = await self._waited(call, KNOWN_TIMEOUT)
        if not answered:
            raise unknown(subject)
        return answered[0]

    async def _waited(self, call: Coroutine[Any, Any, T], seconds: float) -> tuple[T] | tuple[()]:
        """Return the result of *call*, as `_answered`. While the server hangs, one call at a time
        is made, and none is waited for.
        """
        if not self._hangs:
            return await self._answered(call, seconds, self._waits)
        if self._probe is None or self._probe.done():
            self._probe = asyncio.get_running_loop().create_task(self.tell(call))
        else:
            call.close()
        return ()

    async def _answered(
        self,
        call: Coroutine[Any, Any, T],
        seconds: float,
        waits: set[Callable[[], None]],
    ) -> tuple[T] | tuple[()]:
        """Return the result of *call*; without an answer in time, or before this wait among
        *waits* is ended, nothing.
        """
        loop = asyncio.get_running_loop()
        if self._silent_since <= self._connection.heard:
            self._silent_since = loop.time()
            if self._watch is None:
                self._watch = Timer(WRITE_TIMEOUT, self._look)
        try:
            async with timeout(seconds) as end:
                waits.add(end)
                try:
                    result = await call
                finally:
                    waits.discard(end)
        except Exception as exc:  # noqa: BLE001 - whatever the server says, this instance goes on
            if not self.away:
                self.away = True
                logger.warning("no answer of the cluster's server: %r", exc)
            return ()
        self.away = False
        return (result,)

    def _look(self) -> None:
        """End all waits if the server hangs; look again if a command was sent not long ago."""
        self._watch = None
        # A late answer to a call that was given up is one, too.
        if self._hangs or self._connection.heard >= self._silent_since:
            return
        now = asyncio.get_running_loop().time()
        if (left := self._silent_since + WRITE_TIMEOUT - now) > 0:
            self._watch = Timer(left, self._look)
            return
        self._hung = now
        for end in tuple(self._waits):
            end()
        self._on_hang()


class Writes:
    """Calls that write something soon; only `close()` waits for them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin *call*."""
        task = asyncio.get_running_loop().create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Wait until all calls have ended, for KNOWN_TIMEOUT at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=KNOWN_TIMEOUT)
        for task in tuple(self._tasks):
            task.cancel()


async def settled(look: Callable[[], Awaitable[T]], busy: Callable[[T], bool]) -> T:
    """Return the first result of *look* that is not *busy*, or the last after BUSY_PAUSES."""
    for pause in BUSY_PAUSES:
        if not busy(found := await look()):
            return found
        await asyncio.sleep(pause)
    return await look()


def unknown(subject: str) -> InstanceUnavailable:
    """Return the error of a request for *subject*, whose presence is not known."""
    text = f"it is not known at the moment whether another process has this {subject}"
    return InstanceUnavailable(text, retry_after=RETRY_AFTER)


def name_of(caller: str, request_id: str) -> str:
    """Return the name under which all instances know an id of *caller*: a digest of both."""
    both = b"%d:%b%b" % (len(caller), caller.encode(), request_id.encode())
    return hashlib.sha256(both).hexdigest()[:40]

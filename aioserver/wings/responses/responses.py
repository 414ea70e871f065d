"""Stored responses for all instances: they are in Redis. See `wings.responses.storage`.

A response is written when it is stored, without those before it, and read with all of them when an instance that
does not hold it gets a request that continues it. What an instance stores it holds itself, too: while Redis is away,
it goes on with these. A key in Redis is made of a digest: neither the caller nor the id stands in it.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec

from aioserver.errors import ServerAtCapacity
from aioserver.limits.gate import Gate
from aioserver.wings.cluster.claims import TIMEOUT, name_of
from aioserver.wings.responses.chains import MISSING, WRITTEN
from aioserver.wings.responses.storage import Record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.wings.responses.chains import ChainStore

    # Awaits a call to Redis for some seconds at most, and returns its result, or None.
    Ask = Callable[[Coroutine[Any, Any, Any], float], Awaitable[Any]]

# Seconds for which a whole conversation is awaited, and what nobody waits for.
LOAD_TIMEOUT, CALL_TIMEOUT = 1.0, 1.0
# Conversations that are read at once, each of tens of megabytes at most, and that wait, fairly between callers; Redis has other
# things to do, and what comes of it is not counted. One beyond that is not found.
MAX_LOADS, MAX_LOADS_WAITING = 4, 1000
# Bytes that are on their way to Redis, which may be slow: those of some large responses.
MAX_PENDING = 1 << 26
# Bytes of all responses in Redis; a quarter of its `maxmemory` is the bound, too.
MAX_BYTES = 1 << 28


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
    """The responses of all instances in Redis; *clock* returns the time of day, which all machines share."""

    def __init__(
        self, store: ChainStore, ask: Ask, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._ask = ask
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
        """Keep a response of *caller* for *seconds*, soon; return False if MAX_PENDING bytes are on their way: see `Storage`."""
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
        """Return a response that was stored within *window*, and those before it, the newest first; nothing if there is none.

        *most* are the bytes that they may have together.
        """
        name = name_of(caller.name, response_id)
        # Most ids that are not known here are known nowhere, and Redis may be slow.
        if not await self._ask(self._store.has_response(name), TIMEOUT):
            return ()
        try:
            place = await self._loads.enter(caller)
        except ServerAtCapacity:
            return ()
        with place:
            chain: Sequence[bytes] = (
                await self._ask(self._store.response_chain(name, most), LOAD_TIMEOUT) or ()
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
        return bool(await self._ask(self._store.delete_response(name), CALL_TIMEOUT))

    async def close(self) -> None:
        """Wait until what was kept is there, for CALL_TIMEOUT at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CALL_TIMEOUT)
        for task in tuple(self._tasks):
            task.cancel()

    def _encoded(self, record: Record) -> bytes | None:
        """Return *record* as bytes that are counted as on their way; None if there is no room for them."""
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
        """Write a response, and return whether it is kept; *whole* is needed if the one before it is missing."""
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
        call = self._store.put_response(name, data, previous, seconds, MAX_BYTES)
        result: int | None = await self._ask(call, CALL_TIMEOUT)
        return result


def _too_many(retry_after: float) -> ServerAtCapacity:
    return ServerAtCapacity("too many conversations are read", retry_after=retry_after)


def _decoded(data: bytes) -> tuple[float, Record] | None:
    try:
        record = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None
    stored_at, *fields = msgspec.structs.astuple(record)
    return stored_at, Record(*fields)

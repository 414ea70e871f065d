"""The store of responses, which a request to `/v1/responses` continues by `previous_response_id`.

This file is one concept: a stored response, its references, and how long it is kept. All three
count the same bytes.

A `StoredResponse` has its own input and output, as bytes, and refers to the response that it
continued. So the responses of a conversation share their common past, and each byte is kept and
counted once. A response is kept as long as something refers to it: its name in the store, for
`store_window`, a response that continued it, or a request or a connection that may. Deleting a
response removes its name; conversations that have continued it are not affected, as at OpenAI.

`HeldResponses` are held by connections: each lane of a connection holds its latest response,
regardless of `store`. Only the connection that holds a response finds it. Such a response takes as
much room as a stored response, and may cost a client nothing (`generate: false`). So it is dropped
like a stored response if the room is needed; the response that has been held longest is the first.
A client that continues it afterwards gets an error, and sends the conversation again.

All these bytes count for `max_kept_bytes`, as kept for the owner of the response. Beyond that limit
the owner that keeps most loses its oldest entries first, logs and stored responses alike
(streams/store.py). A request has a `Draft` of the response to come (draft.py).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from functools import partial
from math import inf
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from aioserver.errors import ResponseNotFound, ServerAtCapacity
from aioserver.limits.shares import ByOwner
from aioserver.streams.store import owner_of
from aioserver.wings.responses.api import RESPONSES
from aioserver.wings.responses.items import ResponseParts, joined, replayable
from aioserver.wings.responses.redis import Record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.streams.contracts import AnswerApi
    from aioserver.streams.store import HeldBytes, StreamStore
    from aioserver.wings.responses.redis import SharedResponses

# Bytes of the Python objects of one response, its names included.
RESPONSE_OVERHEAD = 1024
# The most bytes of a conversation that is taken over from another instance: longer than any body.
MAX_LOADED = 1 << 25


class StoredResponse:
    """A response that can be continued.

    Only the number of its references changes.

    *provider* has made it. If *kept_there*, this provider keeps the response, too, and can continue
    it by its id. *input* and `output` are the joined items of this response
    (wings/responses/items.py), without the items of *previous*, the response that it continued.
    *whole* says that the whole conversation is held here; a provider may continue a response that
    only the provider knows. `history_bytes` is the size of the items of the whole conversation.

    Always: its bytes are counted while something refers to it, and not after.
    """

    def __init__(
        self,
        caller: Caller,
        parts: ResponseParts,
        input_items: bytes,
        previous: StoredResponse | None,
        *,
        provider: str,
        kept_there: bool,
        whole: bool,
        held: HeldBytes,
    ) -> None:
        self.caller = caller
        self.id, self.output = parts.id, parts.output
        self._head, self._tail, self._status = parts.head, parts.tail, parts.status
        self.input = input_items
        self.previous = previous
        self.provider = provider
        self.kept_there = kept_there
        own = len(input_items) + len(parts.output)
        self.history_bytes: int = own + (0 if previous is None else previous.history_bytes)
        self.whole: bool = whole and (previous is None or previous.whole)
        # Whether other instances can find it, as far as this instance knows.
        self.shared = False
        # When it was stored, by the store's clock.
        self.stored_at = 0.0
        self._held = held
        # The first reference is that of its maker.
        self._references = 1
        if previous is not None:
            previous.retain()

    @property
    def size(self) -> int:
        """The bytes that it takes, without those of its predecessors."""
        parts = (self._head, self.output, self._tail, self.input)
        return RESPONSE_OVERHEAD + sum(map(len, parts))

    @property
    def alive(self) -> bool:
        """Whether something refers to it."""
        return self._references > 0

    def retain(self) -> None:
        """Add a reference, until `release`."""
        self._references += 1

    def release(self) -> None:
        """Remove a reference."""
        # Not recursive: a conversation may have many thousands of turns.
        response: StoredResponse | None = self
        while response is not None:
            response = response.leave()

    def leave(self) -> StoredResponse | None:
        """Remove a reference. After the last reference return the predecessor, which loses a
        reference, too.
        """
        self._references -= 1
        if self._references:
            return None
        self._held.release()
        previous, self.previous = self.previous, None
        return previous

    def chain(self) -> list[StoredResponse]:
        """Return the responses from the first of the conversation to this one."""
        chain: list[StoredResponse] = []
        response: StoredResponse | None = self
        while response is not None:
            chain.append(response)
            response = response.previous
        chain.reverse()
        return chain

    def history(self, provider: str | None = None) -> Iterator[bytes]:
        """Yield the items of the whole conversation, in order, in pieces of joined items, which
        may be empty.

        With a *provider*, items of its responses that it would not take back are left out: see
        `replayable`.
        """
        for response in self.chain():
            yield response.input
            if provider is None:
                yield response.output
            else:
                yield replayable(response.output, same_provider=response.provider == provider)

    def shown(self) -> list[tuple[str, bytes]]:
        """Return the items that the model was shown for this response, in named pieces of joined
        items.
        """
        pieces = []
        for response in self.chain():
            name = response.id.removeprefix("resp_")
            pieces += [(name, response.input), (f"{name}_out", response.output)]
        return pieces[:-1]

    def record(self, *, alone: bool = False) -> Record | None:
        """Return the response as a record. The record has the whole conversation if it must stand
        *alone*, or if other instances cannot find the predecessor.

        Return None if other instances would not take over so many bytes.
        """
        items = self.input
        if self.previous is not None and (alone or not self.previous.shared):
            if sum(response.size for response in self.chain()) > MAX_LOADED:
                return None
            items = joined((*self.previous.history(), items))
        parts = (self._head, self.output, self._tail)
        return Record(
            self.id, self._status, self.provider, self.kept_there, items, *parts, self.whole
        )

    def response(self) -> bytes:
        """Return the JSON of the response object."""
        return b"".join((self._head, self.output, self._tail))


class HeldResponses:
    """The responses that connections hold: at most one for each holder, a lane.

    Always: each response in it has one reference for each of its holders.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # By holder: the response, and the time at which it began to be held.
        self._held: dict[Hashable, tuple[float, StoredResponse]] = {}
        # The holders, by the owners of the responses: the oldest first.
        self._holders: ByOwner[Hashable, Hashable, None] = ByOwner()

    def get(self, holder: Hashable) -> StoredResponse | None:
        """Return the response of *holder*; None if it holds none, or if that was dropped."""
        held = self._held.get(holder)
        return None if held is None else held[1]

    def hold(self, holder: Hashable, response: StoredResponse) -> None:
        """Let *holder* hold *response*, instead of its former one."""
        response.retain()
        self.drop(holder)
        self._held[holder] = self._clock(), response
        self._holders.put(owner_of(response.caller), holder, None)

    def drop(self, holder: Hashable) -> None:
        """Let *holder* hold nothing."""
        if (held := self._held.pop(holder, None)) is not None:
            self._holders.pop(owner_of(held[1].caller), holder)
            held[1].release()

    def oldest(self, owner: Hashable) -> float:
        """Return the time since which the oldest response of *owner* is held; infinity without
        any.
        """
        return next((self._held[holder][0] for holder in self._holders.of(owner)), inf)

    def drop_oldest(self, owner: Hashable) -> None:
        """Drop the response of *owner* that has been held longest, to make room."""
        self.drop(next(iter(self._holders.of(owner))))


# The least seconds between two sweeps: one sweep removes all that are due.
MIN_SWEEP_INTERVAL = 0.05


def not_found(response_id: str) -> ResponseNotFound:
    """Return the error of a request that continues a response which cannot be found, in OpenAI's
    words.
    """
    text = f"Previous response with id '{response_id[:64]}' not found."
    return ResponseNotFound(text, param="previous_response_id")


class StoredResponses:
    """The responses that a caller can find by their ids, for *window* seconds.

    The oldest is the first to be evicted.

    Always: a response is found by its caller only, within the window; the store has one reference
    to each.

    *clock* is that of the entries of logs, which are evicted together with responses. *storage*
    has the responses of other instances; None if there are none.
    """

    api: AnswerApi = RESPONSES

    def __init__(
        self,
        streams: StreamStore,
        window: float,
        storage: SharedResponses | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._streams = streams
        # The seconds that a response can be found; 0: none is stored.
        self.window = window
        self._clock = clock
        self._loop = asyncio.get_running_loop() if loop is None else loop
        # The oldest first.
        self._named: OrderedDict[tuple[Caller, str], StoredResponse] = OrderedDict()
        self._named_of: ByOwner[Hashable, str, StoredResponse] = ByOwner()
        self._sweeper: asyncio.TimerHandle | None = None
        self.held = HeldResponses(clock)
        self.storage = storage
        # In a cluster only: the responses here, as long as something refers to them, so that a
        # response from another instance can refer to them, too.
        self._known: WeakValueDictionary[tuple[Caller, str], StoredResponse] = (
            WeakValueDictionary()
        )
        streams.evictable_stores.append(self)

    def __len__(self) -> int:
        return len(self._named)

    def apply(self, window: float) -> None:
        """Use another window, also for the responses that are stored."""
        self.window = window
        self._expire()
        self._rearm()

    def hold(self) -> HeldBytes:
        """Return a count, at 0, of bytes that are kept for a response."""
        return self._streams.hold()

    def get(self, caller: Caller, response_id: str) -> StoredResponse | None:
        """Return the caller's response of this id; None if there is none."""
        self._expire()
        return self._named.get((caller, response_id))

    async def reach(self, caller: Caller, response_id: str) -> StoredResponse | None:
        """Return the caller's response of this id, for the caller to `release`.

        None if no instance has one.

        Cancelling is safe.

        Raises:
            InstanceUnavailable, ServerAtCapacity: it is not known now whether another instance has
                one.
        """
        response = self.get(caller, response_id)
        if response is not None:
            response.retain()
        elif self.storage is not None and self.window > 0:
            records = await self.storage.load(caller, response_id, self.window, MAX_LOADED)
            response = self._restore(caller, records)
        return response

    def make(
        self,
        caller: Caller,
        parts: ResponseParts,
        input_items: bytes,
        previous: StoredResponse | None,
        *,
        provider: str,
        kept_there: bool,
        whole: bool = True,
    ) -> StoredResponse | None:
        """Return a response that cannot be found yet, for its caller to `release`.

        None if there is no room.

        *whole* false: it has continued a response that is not held here.
        """
        held = self._streams.hold(owner_of(caller))
        response = StoredResponse(
            caller,
            parts,
            input_items,
            previous,
            provider=provider,
            kept_there=kept_there,
            whole=whole,
            held=held,
        )
        try:
            held.grow(response.size)
        except BaseException as exc:
            response.release()
            if isinstance(exc, ServerAtCapacity):
                return None
            raise
        if self.storage is not None:
            self._known[caller, response.id] = response
        return response

    def add(self, response: StoredResponse) -> Awaitable[None] | None:
        """Let *response* be found by its id from now on, instead of an older one of that id.

        Return the awaitable that its answer's end must wait for, so that it is found at any
        instance: see `Keeper.keep`.
        """
        if self.window <= 0:
            return None
        self._expire()
        key = (response.caller, response.id)
        response.retain()
        self._drop(key)
        response.stored_at = self._clock()
        self._named[key] = response
        self._named_of.put(owner_of(response.caller), response.id, response)
        if self._sweeper is None:
            self._rearm()
        return None if self.storage is None else self._share(response, self.storage)

    def announce(self, caller: Caller, response_id: str) -> bool:
        """Note that a response that is under way will be added; return whether this was announced
        to other instances.

        If so, the caller must call `withdraw` if the response is not added.
        """
        if self.storage is None or self.window <= 0:
            return False
        self.storage.announce(caller, response_id)
        return True

    def withdraw(self, caller: Caller, response_id: str) -> None:
        """Note that a response that was announced will not be added."""
        if self.storage is not None:
            self.storage.withdraw(caller, response_id)

    def drop(self, caller: Caller, response_id: str) -> bool:
        """Hide a response from further look-ups; return whether there was one.

        Responses that have continued it are not affected.
        """
        self._expire()
        return self._drop((caller, response_id))

    async def delete(self, caller: Caller, response_id: str) -> bool:
        """Hide a response from further look-ups at all instances; return whether there was one.

        Raises:
            InstanceUnavailable: it is not known whether another instance has it.
        """
        return self.storage is not None and await self.storage.delete(caller, response_id)

    def oldest(self, owner: Hashable) -> float:
        """Return the time since which the oldest response of *owner* is stored, or held by a
        connection; infinity without any.
        """
        return min(self._oldest_of(owner), self.held.oldest(owner))

    def drop_oldest(self, owner: Hashable) -> None:
        """Drop the oldest response of *owner*, to make room."""
        if self.held.oldest(owner) < self._oldest_of(owner):
            self.held.drop_oldest(owner)
        else:
            response = next(iter(self._named_of.of(owner).values()))
            self._drop((response.caller, response.id))

    def close(self) -> None:
        """Forget every response, and stop the timer."""
        self.window = 0.0
        self._expire()
        self._rearm()

    def _share(self, response: StoredResponse, storage: SharedResponses) -> Awaitable[None] | None:
        """Let other instances find *response*, soon."""
        previous = response.previous
        previous_id = previous.id if previous is not None and previous.shared else None
        record = response.record()
        if record is None:
            storage.withdraw(response.caller, response.id)
            return None
        # The predecessors are needed again if they prove to be missing there.
        response.retain()
        writing = storage.keep(
            response.caller,
            record,
            previous_id,
            self.window,
            whole=partial(response.record, alone=True),
        )
        response.shared = writing is not None
        if writing is None:
            response.release()
            return None
        writing.add_done_callback(partial(_note_written, response))
        return storage.written(writing)

    def _restore(self, caller: Caller, records: Sequence[Record]) -> StoredResponse | None:
        """Return the first of *records*, which continues the others, to be released.

        None if there is no room.

        Responses that are already here are not made again.
        """
        response: StoredResponse | None = None
        for record in reversed(records):
            previous, known = response, self._known.get((caller, record.id))
            if known is not None and known.alive:
                response = known
                response.retain()
            else:
                parts = ResponseParts(
                    record.id, record.status, record.head, record.output, record.tail
                )
                response = self.make(
                    caller,
                    parts,
                    record.input,
                    previous,
                    provider=record.provider,
                    kept_there=record.kept_there,
                    whole=record.whole,
                )
            if previous is not None:
                previous.release()
            if response is None:
                return None
            response.shared = True
        return response

    def _oldest_of(self, owner: Hashable) -> float:
        named = self._named_of.of(owner).values()
        return next((response.stored_at for response in named), inf)

    def _oldest(self) -> float:
        return next((response.stored_at for response in self._named.values()), inf)

    def _drop(self, key: tuple[Caller, str]) -> bool:
        response = self._named.pop(key, None)
        if response is None:
            return False
        self._named_of.pop(owner_of(response.caller), response.id)
        response.release()
        return True

    def _expire(self) -> None:
        """Drop the responses whose window is over."""
        due = self._clock() - self.window
        while self._named and self._oldest() <= due:
            self._drop(next(iter(self._named)))

    def _sweep(self) -> None:
        self._sweeper = None
        self._expire()
        self._rearm()

    def _rearm(self) -> None:
        """Let one timer run while there are responses, until the oldest is due."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        if self._named:
            delay = self._oldest() + self.window - self._clock()
            self._sweeper = self._loop.call_later(max(MIN_SWEEP_INTERVAL, delay), self._sweep)


def _note_written(response: StoredResponse, writing: asyncio.Future[bool]) -> None:
    # A response that could not be written is written with the next response that continues it.
    failed = writing.cancelled() or writing.exception() is not None
    response.shared = not failed and writing.result()
    response.release()

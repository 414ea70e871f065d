"""The queue of what waits to be written: turns and deletions, in their order, and by conversation."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping

    from aioserver.wings.conversations.turn import Turn

    Values = Mapping[str, Any]

# Bounds on what waits, in writes and in bytes of text.
MAX_WAITING, MAX_WAITING_BYTES = 10_000, 1 << 26
# Bounds on one transaction, in writes and in bytes of text.
MAX_BATCH, MAX_BATCH_BYTES = 200, 1 << 22


class Key(NamedTuple):
    """A conversation: the caller's name, and its own."""

    caller: str
    name: str


class Write:
    """A turn or a deletion that is to be written.

    *done*: the number of rows that it has deleted; cancelled: it is not written. *turn* None: it is a deletion.
    """

    __slots__ = ("done", "key", "statements", "turn", "values")

    def __init__(
        self,
        key: Key,
        statements: tuple[str, ...],
        values: Values,
        done: asyncio.Future[int],
        turn: Turn | None = None,
    ) -> None:
        self.key = key
        self.statements = statements
        self.values = values
        self.done = done
        self.turn = turn

    @property
    def size(self) -> int:
        """The bytes of its text."""
        return 0 if self.turn is None else self.turn.size


class Queue:
    """Writes in their order.

    Always: at most MAX_WAITING with MAX_WAITING_BYTES of text, but for the newest. *on_turn_out* is called with the
    conversation of each turn that leaves the queue.
    """

    def __init__(self, on_turn_out: Callable[[Key], None]) -> None:
        self._on_turn_out = on_turn_out
        self._writes: deque[Write] = deque()
        self._by_key: dict[Key, list[Write]] = {}
        self._size = 0

    def __len__(self) -> int:
        return len(self._writes)

    def add(self, write: Write) -> int:
        """Append *write*; return how many turns had to go for it."""
        self._writes.append(write)
        self._by_key.setdefault(write.key, []).append(write)
        self._size += write.size
        lost = 0
        while len(self._writes) > MAX_WAITING or (
            self._size > MAX_WAITING_BYTES and len(self._writes) > 1
        ):
            oldest = self._writes[0]
            self.remove(oldest)
            oldest.done.cancel()
            lost += oldest.turn is not None
        return lost

    def batch(self) -> list[Write]:
        """Return the first writes, which stay in the queue."""
        batch: list[Write] = []
        size = 0
        for write in self._writes:
            size += write.size
            if batch and (len(batch) == MAX_BATCH or size > MAX_BATCH_BYTES):
                break
            batch.append(write)
        return batch

    def remove(self, write: Write) -> None:
        """Take *write* out, if it is the first; it may have gone already."""
        if self._writes and self._writes[0] is write:
            self._writes.popleft()
            self._size -= write.size
            same = self._by_key[write.key]
            same.remove(write)
            if not same:
                del self._by_key[write.key]
            if write.turn is not None:
                self._on_turn_out(write.key)

    def turns(self, key: Key) -> list[Turn]:
        """Return the turns of a conversation that wait."""
        return [write.turn for write in self._by_key.get(key, ()) if write.turn is not None]

    def values(self) -> list[Values]:
        """Return the values of all turns."""
        return [write.values for write in self._writes if write.turn is not None]

    def newest(self) -> asyncio.Future[int] | None:
        """Return the end of the newest write; None if none waits."""
        return self._writes[-1].done if self._writes else None

    def cancel_deletions(self) -> None:
        """Let no deletion be written: those who have asked for one are told so."""
        for write in self._writes:
            if write.turn is None:
                write.done.cancel()

"""A response that can be continued, and through it the conversation before it.

A `StoredResponse` has its own input and output, as bytes, and the response that it continued; so the
responses of a conversation share what came before, and each byte is kept and counted once. A response is kept
as long as something refers to it: its name in the store (stored_responses.py), a response that continued it, or a
request or a connection that may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.gateway.response_storage import Record
from aioserver.protocol.response_items import joined, replayable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioserver.auth.callers import Caller
    from aioserver.protocol.response_items import ResponseParts
    from aioserver.streams.store import HeldBytes

# Bytes of the Python objects of one response, its names included.
RESPONSE_OVERHEAD = 1024


class StoredResponse:
    """A response that can be continued; nothing of it changes but the number of those who refer to it.

    *provider* has made it. *kept_there* says that this provider keeps it too, so that it can continue it by its
    id. *input* and `output` are joined items (protocol/response_items.py): its own, without those of *previous*, the response that
    it continued.

    Always: its bytes are counted while something refers to it, and not after.
    """

    __slots__ = (
        "__weakref__",
        "_head",
        "_held",
        "_references",
        "_status",
        "_tail",
        "caller",
        "id",
        "input",
        "kept_there",
        "output",
        "previous",
        "provider",
        "shared",
        "stored_at",
    )

    def __init__(
        self,
        caller: Caller,
        parts: ResponseParts,
        input_items: bytes,
        previous: StoredResponse | None,
        *,
        provider: str,
        kept_there: bool,
        held: HeldBytes,
    ) -> None:
        self.caller = caller
        self.id, self.output = parts.id, parts.output
        self._head, self._tail, self._status = parts.head, parts.tail, parts.status
        self.input = input_items
        self.previous = previous
        self.provider = provider
        self.kept_there = kept_there
        # Whether other instances can find it.
        self.shared = False
        # When it was stored, by the store's clock.
        self.stored_at = 0.0
        self._held = held
        # The one that has made it.
        self._references = 1
        if previous is not None:
            previous.retain()

    @property
    def size(self) -> int:
        """The bytes that it takes, without those of the responses before."""
        parts = (self._head, self.output, self._tail, self.input)
        return RESPONSE_OVERHEAD + sum(map(len, parts))

    @property
    def alive(self) -> bool:
        """Whether something refers to it."""
        return self._references > 0

    def retain(self) -> None:
        """Refer to it, until `release`."""
        self._references += 1

    def release(self) -> None:
        """Refer to it no longer."""
        # Not recursive: a conversation may have many thousands of turns.
        response: StoredResponse | None = self
        while response is not None:
            response = response.leave()

    def leave(self) -> StoredResponse | None:
        """Count one reference less; after the last one, return the response before, which has one less, too."""
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
        """Yield the items of the whole conversation, in order, in pieces of joined items, which may be empty.

        With a *provider*, without those of its responses that it would not take back: see `replayable`.
        """
        for response in self.chain():
            yield response.input
            if provider is None:
                yield response.output
            else:
                yield replayable(response.output, same_provider=response.provider == provider)

    def shown(self) -> list[tuple[str, bytes]]:
        """Return the items that the model was shown for this response, in named pieces of joined items."""
        pieces = []
        for response in self.chain():
            name = response.id.removeprefix("resp_")
            pieces += [(name, response.input), (f"{name}_out", response.output)]
        return pieces[:-1]

    def record(self, max_bytes: int) -> Record | None:
        """Return it as a record, which has all that came before if other instances cannot find that.

        None if that is more than *max_bytes*.
        """
        items = self.input
        if self.previous is not None and not self.previous.shared:
            if sum(response.size for response in self.chain()) > max_bytes:
                return None
            items = joined((*self.previous.history(), items))
        parts = (self._head, self.output, self._tail)
        return Record(self.id, self._status, self.provider, self.kept_there, items, *parts)

    def response(self) -> bytes:
        """Return the JSON of the response object."""
        return b"".join((self._head, self.output, self._tail))

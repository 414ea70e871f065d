"""The draft of a response: what a request to `/v1/responses` keeps for the time when its response has ended.

    previous    the response that it continues, if we hold it
    take_input  its own input, which is needed once its body is let go
    expand      its body as one that can do without `previous_response_id`
    keep        the response itself, at its end
    release     whatever happened

A response is named in the store if its request says `store: true`; or says nothing, and nobody else keeps it:
on the bridge, or on a WebSocket. A connection may hold a response that has no name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.errors import ServerAtCapacity
from aioserver.gateway.stored_responses import expanded, not_found
from aioserver.protocol.response_items import CONTINUABLE, input_items, response_parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioserver.auth.callers import Caller
    from aioserver.gateway.stored_responses import StoredResponse, StoredResponses
    from aioserver.streams.store import HeldBytes


class Draft:
    """The response to come of one request, and the response that it continues.

    *store* is the request's; None if it says nothing. *previous_id* is its `previous_response_id`, and *previous* that
    response, if it is held here. *named* says that the response will be found by its id, and *on_kept* is called
    with it, named or not: whoever keeps it further retains it there. *max_bytes* bounds an expanded body.

    Always: what it refers to and has taken is counted until `release`, and not after.
    """

    __slots__ = (
        "_held",
        "_input",
        "_responses",
        "bridged",
        "caller",
        "max_bytes",
        "named",
        "on_kept",
        "previous",
        "previous_id",
        "store",
    )

    def __init__(
        self,
        responses: StoredResponses,
        caller: Caller,
        *,
        store: bool | None,
        previous_id: str | None = None,
        previous: StoredResponse | None = None,
        max_bytes: int,
    ) -> None:
        self._responses = responses
        self.caller = caller
        self.store = store
        self.previous_id = previous_id
        self.previous = previous
        self.max_bytes = max_bytes
        self.named = store is True
        # Whether the provider was asked for a chat completion, so that it knows nothing of a response.
        self.bridged = False
        self.on_kept: Callable[[StoredResponse], None] | None = None
        # The joined items of its own input; None before they are taken, or if there was no room.
        self._input: bytes | None = None
        self._held: HeldBytes | None = None
        if previous is not None:
            previous.retain()

    def take_input(self, body: bytes) -> None:
        """Keep the input in *body*, the request's; a second call does nothing.

        Where there is no room for it, the response is not kept.
        """
        if self._held is not None:
            return
        self._held = self._responses.hold()
        items = input_items(body)
        try:
            self._held.grow(len(items))
        except ServerAtCapacity:
            return
        self._input = items

    def bridge(self, body: bytes) -> bytes:
        """Return *body* for a provider that has no responses, without `previous_response_id`.

        The response is named, unless the request says `store: false`.

        Raises:
            ResponseNotFound: the request continues a response that is not held here.
            RequestTooLarge, InvalidRequest: as `expand`.
        """
        self.bridged = True
        self.named = self.store is not False
        if self.named or self.on_kept is not None:
            self.take_input(body)
        return self.expand(body, "")

    def known_to(self, provider: str) -> bool:
        """Return whether *provider* may know what the request continues, so that the body can go as it came."""
        previous = self.previous
        return previous is None or (previous.kept_there and previous.provider == provider)

    def expand(self, body: bytes, provider: str) -> bytes:
        """Return *body* with what it continues in front of its input, for *provider*; see `expanded`.

        Raises:
            ResponseNotFound: the request continues a response that is not held here.
            RequestTooLarge, InvalidRequest: as `expanded`.
        """
        if self.previous is not None:
            return expanded(body, self.previous, provider=provider, max_bytes=self.max_bytes)
        if self.previous_id is not None:
            raise not_found(self.previous_id)
        return body

    def keep(self, response: bytes, provider: str) -> None:
        """Keep *response*, the JSON of the response object that *provider* has ended with.

        It is kept if its input was taken, it can be continued, and there is room.
        """
        if self._input is None or len(response) > self.max_bytes:
            return
        parts = response_parts(response)
        if parts is None or parts.status not in CONTINUABLE:
            return
        if self._held is not None:
            # From here on the stored response counts it.
            self._held.release()
        stored = self._responses.make(
            self.caller,
            parts,
            self._input,
            self.previous,
            provider=provider,
            kept_there=self.store is not False and not self.bridged,
        )
        if stored is None:
            return
        try:
            if self.named:
                self._responses.add(stored)
            if self.on_kept is not None:
                self.on_kept(stored)
        finally:
            stored.release()

    def release(self) -> None:
        """Forget all of it; a second call does nothing."""
        self._input = self.on_kept = None
        if self._held is not None:
            self._held.release()
        previous, self.previous = self.previous, None
        if previous is not None:
            previous.release()

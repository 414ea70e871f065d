"""The draft of a response: the parts of a request to `/v1/responses` that are kept until its
response has ended.

    begin       finds the response that it continues, if it is held here or at another instance
    body_for    its body as one provider gets it: as it came, or with the conversation in front
    keep        the response itself, at its end
    release     in any case

A body goes unchanged to a provider that has made and keeps the response being continued. It also
goes unchanged if that response is not held here, since the provider may know it. Any other
provider gets the conversation.

A response is named in the store, so that it is found by its id, unless its request says `store:
false`. A connection may hold one without a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.errors import ServerAtCapacity
from aioserver.providers.request import Answer
from aioserver.wings.responses.events import ResponseEvents
from aioserver.wings.responses.items import CONTINUABLE, continued, input_items, response_parts
from aioserver.wings.responses.stored import not_found

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioserver.auth.callers import Caller
    from aioserver.protocol.model_body import ModelBody
    from aioserver.streams.store import HeldBytes
    from aioserver.streams.stream import Stream
    from aioserver.wings.responses.stored import StoredResponse, StoredResponses


class Draft:
    """The response to come of one request, and the response that it continues.

    The `Keeper` of both.

    *store* is the request's; None, if it is absent, means true. *previous_id* is its
    `previous_response_id`, and *previous* that response, if it is held here. *named* says that the
    response will be found by its id. *on_kept* is called with it, named or not; a connection that
    holds it retains it there. *max_bytes* bounds an expanded body.

    Always: everything that it refers to and has taken is counted until `release`, and not after.
    """

    def __init__(
        self,
        responses: StoredResponses,
        caller: Caller,
        *,
        store: bool | None,
        previous_id: str | None = None,
        previous: StoredResponse | None = None,
        max_bytes: int,
        on_kept: Callable[[StoredResponse], None] | None = None,
    ) -> None:
        self._responses = responses
        self.caller = caller
        self.previous_id = previous_id
        self.previous = previous
        self.max_bytes = max_bytes
        self.named = store is not False
        # Whether the provider was sent the id of a response that is held here.
        self.by_id = False
        # Whether the provider that was asked last keeps the response, too.
        self.kept_there = False
        self._on_kept = on_kept
        # The id under which other instances wait for the response.
        self._announced: str | None = None
        # The joined items of its own input; None before they are taken, or if there was no room.
        self._input: bytes | None = None
        self._held: HeldBytes | None = None
        if previous is not None:
            previous.retain()

    async def begin(self) -> None:
        """Find the response that the request continues. Cancelling is safe.

        Raises:
            InstanceUnavailable, ServerAtCapacity: it is not known whether another instance has it.
        """
        if self.previous is None and self.previous_id is not None:
            self.previous = await self._responses.reach(self.caller, self.previous_id)

    @property
    def kept_at(self) -> str | None:
        """The name of the provider that has made the continued response, and keeps it."""
        previous = self.previous
        return previous.provider if previous is not None and previous.kept_there else None

    @property
    def unknown(self) -> bool:
        """Whether it continues a response that is unknown here."""
        return self.previous is None and self.previous_id is not None

    @property
    def slow(self) -> bool:
        """Whether its body may take long to make: it continues a response that is held here."""
        return self.previous is not None

    async def body_for(self, body: bytes, provider: str, *, keeps: bool) -> bytes:
        """Return *body* as *provider* gets it, in steps. *keeps*: the provider keeps responses, as
        far as is known.

        Raises:
            RequestTooLarge, InvalidRequest: as `expand`.
        """
        self._note_provider(body, keeps=keeps)
        previous = self.previous
        known = previous is None or (previous.kept_there and previous.provider == provider)
        self.by_id = keeps and known and previous is not None
        if known and (keeps or previous is None):
            return body
        return await self.expand(body, provider)

    async def bridge(self, body: bytes, provider: str = "") -> bytes:
        """Return *body* for a *provider* that has no responses at all: without
        `previous_response_id`, in steps.

        Raises:
            ResponseNotFound: the request continues a response that is not held here.
            RequestTooLarge, InvalidRequest: as `expand`.
        """
        self._note_provider(body, keeps=False)
        self.by_id = False
        return await self.expand(body, provider)

    async def expand(self, body: bytes, provider: str) -> bytes:
        """Return *body* with the conversation that it continues in front of its input, for
        *provider*, in steps; see `continued`.

        Raises:
            ResponseNotFound: the continued response is not held here, or without its whole
                conversation.
            RequestTooLarge, InvalidRequest: as `continued`.
        """
        if self.previous is not None and self.previous.whole:
            history = self.previous.history(provider)
            return await continued(body, history, self.max_bytes)
        if self.previous_id is not None:
            raise not_found(self.previous_id)
        return body

    def continue_nothing(self) -> None:
        """Note that the body already has the whole conversation: a hook has replaced it."""
        previous, self.previous, self.previous_id = self.previous, None, None
        if previous is not None:
            previous.release()

    def take_input(self, body: bytes) -> None:
        """Keep the input in *body*, the request's; a second call does nothing.

        If there is no room for it, the response is not kept.
        """
        if self._held is not None:
            return
        items = input_items(body)
        self._held = self._responses.hold()
        try:
            self._held.grow(len(items))
        except ServerAtCapacity:
            return
        self._input = items

    def identified(self, answer_id: str) -> None:
        """Announce the id of the response, which clients know from now on, to other instances."""
        if (
            self.named
            and self._input is not None
            and self._announced is None
            and self._responses.announce(self.caller, answer_id)
        ):
            self._announced = answer_id

    def keep(self, answer: Stream | Answer) -> Awaitable[None] | None:
        """Keep the response that *answer* is, or whose events it has; see `keep_response`."""
        if isinstance(answer, Answer):
            return self.keep_response(answer.body, answer.outcome.provider)
        events = answer.events
        if self._input is None or not isinstance(events, ResponseEvents):
            return None
        return self.keep_response(events.newest() or b"", answer.outcome.provider)

    def cut(self, _stream: Stream) -> None:
        """Do nothing: a response that was cancelled cannot be continued."""

    def keep_response(self, response: bytes, provider: str) -> Awaitable[None] | None:
        """Keep *response*, the JSON of the response object that *provider* has ended with.

        It is kept if its input was taken, it can be continued, and there is room. Return the
        awaitable that its end must wait for: see `Keeper.keep`.
        """
        if self._input is None or len(response) > self.max_bytes:
            return None
        parts = response_parts(response)
        if parts is None or parts.status not in CONTINUABLE:
            return None
        if self._held is not None:
            # From here on the stored response counts it.
            self._held.release()
        previous = self.previous
        if previous is not None and previous.history_bytes > self.max_bytes:
            # It does not fit in front of the input of any body. Its provider continues it, and
            # nothing need be held for that.
            previous = None
        stored = self._responses.make(
            self.caller,
            parts,
            self._input,
            previous,
            provider=provider,
            kept_there=self.kept_there,
            # Its provider may have continued a response that is not held here.
            whole=previous is not None or self.previous_id is None,
        )
        if stored is None:
            return None
        try:
            kept = None
            if self.named:
                if self._announced == stored.id:
                    # The store takes over from here.
                    self._announced = None
                kept = self._responses.add(stored)
            if self._on_kept is not None:
                self._on_kept(stored)
        finally:
            stored.release()
        return kept

    def release(self) -> None:
        """Forget all of it; a second call does nothing."""
        self._input = self._on_kept = None
        if self._announced is not None:
            self._responses.withdraw(self.caller, self._announced)
            self._announced = None
        if self._held is not None:
            self._held.release()
        previous, self.previous = self.previous, None
        if previous is not None:
            previous.release()

    def _note_provider(self, body: bytes, *, keeps: bool) -> None:
        """Note that a provider gets *body*, and whether it *keeps* responses: the last counts."""
        self.kept_there = keeps and self.named
        if self.named or self._on_kept is not None:
            self.take_input(body)


def draft_of(
    responses: StoredResponses, caller: Caller, body: ModelBody, max_bytes: int
) -> Draft | None:
    """Return the draft of a request with *body*.

    None if it neither continues a response nor has its own kept.
    """
    previous_id = body.previous_response_id
    if previous_id is None and (body.stored is False or not responses.window):
        return None
    return Draft(
        responses,
        caller,
        store=body.stored,
        previous_id=previous_id,
        max_bytes=max_bytes,
    )

"""A request to a provider, and an answer that was not streamed.

A request is made once and may be sent several times: each try of it is an `Attempt` (attempt.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aioserver.auth.callers import Caller
from aioserver.streams.details import headers_size
from aioserver.telemetry.request_log import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config import settings
    from aioserver.protocol.openai import Reading
    from aioserver.streams.store import HeldBytes

# The caller of a request that comes from no client.
NO_CALLER = Caller()


class ProviderRequest:
    """A request for one answer, the same for every provider that is asked.

    Always: nothing in it but its `record` and what is `held` changes from one attempt to the next.

    *path* is OpenAI's, below the provider's base URL. *body* makes the JSON for one provider, whose
    model may differ; it is called for each attempt, and its result is not kept. *reading* collects
    the text of an answer whose log has `chunk` objects; None if the log has the provider's bytes. *model* is
    for the provider that is asked first; None stands for the model in its settings.
    """

    __slots__ = ("body", "caller", "held", "model", "path", "reading", "record", "streamed")

    def __init__(
        self,
        path: str,
        body: Callable[[settings.Provider], bytes],
        *,
        streamed: bool,
        caller: Caller = NO_CALLER,
        model: str | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.path = path
        self.body = body
        self.streamed = streamed
        self.caller = caller
        self.model = model
        self.reading = reading
        self.record = RequestRecord()
        # Counts the bytes of an answer that is collected.
        self.held: HeldBytes | None = None

    @property
    def whole(self) -> bool:
        """Whether the answer is one body, passed on as the provider sent it."""
        return self.reading is None and not self.streamed


@dataclass(slots=True)
class Answer:
    """A body that was not streamed, with those of the provider's headers that clients may see.

    *usage* has the tokens, as the provider reports them. *attempts* counts the requests that were
    sent for the answer, at all providers.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    content_type: str
    provider: str
    usage: Mapping[str, Any] | None = None
    attempts: int = 1

    @property
    def size(self) -> int:
        """The bytes that it takes in memory; its usage, which is not kept for long, is not among them."""
        return len(self.body) + headers_size(self.headers)

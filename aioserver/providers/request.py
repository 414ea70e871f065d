"""What is asked of a provider, and an answer in one piece.

A request is made once and may be sent several times: each try of it is an `Attempt` (attempt.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aioserver.auth.callers import Caller
from aioserver.telemetry.request_log import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config import settings
    from aioserver.protocol.openai import Reading

ANYONE = Caller()


class ProviderRequest:
    """One request for an answer, as every provider gets it.

    *path* is OpenAI's, below the provider's base URL. *body* makes the JSON for one provider, whose
    model may differ; it is called for each try, and what it returns is not kept. *reading* collects
    what the answer says, for a log of `chunk` objects; without it the log has the provider's bytes.
    *model* is that of the first provider asked; None stands for its configured one.
    """

    __slots__ = ("body", "caller", "model", "path", "reading", "record", "streamed")

    def __init__(
        self,
        path: str,
        body: Callable[[settings.Provider], bytes],
        *,
        streamed: bool,
        caller: Caller = ANYONE,
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

    @property
    def whole(self) -> bool:
        """Whether the answer is one body, passed on as the provider sent it."""
        return self.reading is None and not self.streamed


@dataclass(slots=True)
class Answer:
    """A body that was not streamed, and those of the provider's headers that clients may see.

    *usage*: tokens, as the provider reports them. *attempts*: requests sent for it, at all providers.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    content_type: str
    provider: str
    usage: Mapping[str, Any] | None = None
    attempts: int = 1

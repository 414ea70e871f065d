"""What goes to a provider and what comes back: the question, and an answer in one piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aioserver.auth.callers import Caller
from aioserver.telemetry.request_log import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config import settings
    from aioserver.protocol.openai import Reading
    from aioserver.provider_errors import ProviderFault

ANYONE = Caller()


@dataclass(slots=True)
class Ask:
    """What is asked of a provider.

    *path* is OpenAI's, below the base URL; *body* makes the JSON for one provider, which may have
    a model of its own. *frames*: the log is for faces that show frames, else for OpenAI's.
    """

    path: str
    body: Callable[[settings.Provider], bytes]
    streamed: bool
    caller: Caller = ANYONE  # in whose turn, in the provider's queue
    model: str | None = None  # None: the provider's own
    frames: bool = False
    reading: Reading | None = None
    record: RequestRecord = field(default_factory=RequestRecord)
    again: bool = False  # it has been tried here: in front of its caller's others
    elsewhere: bool = False  # another provider may be asked instead
    trial: bool = False  # the breaker's
    pool: object = None  # to which this try went
    expected: int = 0  # tokens that this try may cost
    usage: Mapping[str, Any] | None = None  # what the provider says that it cost
    events: int = 0  # of its answer
    waited: float = 0.0  # seconds in this provider's line
    fault: ProviderFault | None = (
        None  # the end of an answer that broke off, as its client sees it
    )


@dataclass(slots=True)
class Answer:
    """A body that was not streamed, and the headers of the provider's that pass.

    *usage*: tokens, as the provider reports them.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    content_type: str
    provider: str
    usage: Mapping[str, Any] | None = None
    attempts: int = 1

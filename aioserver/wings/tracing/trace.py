"""The trace of one request while it runs: notes of its waits and its attempts, of which spans are made at its end (spans.py).

The id of an attempt's span is made before it is sent, since the provider gets it as the parent of its own spans (W3C Trace
Context). Nothing else of a span exists before the request has ended.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

from aioserver.wings.tracing.otlp import Context

if TYPE_CHECKING:
    from aioserver.protocol.client_headers import ClientHeaders

T = TypeVar("T")

# Waits, and attempts, of one request that become spans, the newest ones: while its provider is away, a request may make an
# attempt every two seconds.
MAX_CHILDREN = 32
# The flag of a trace that is sampled.
SAMPLED = 1


class Wait:
    """A wait in a queue, in monotonic time; *provider* is empty for that of the server. *error*: the code of its end."""

    __slots__ = ("began", "ended", "error", "provider", "span_id")

    def __init__(self, provider: str, began: float, ended: float) -> None:
        self.span_id = new_id(8)
        self.provider = provider
        self.began = began
        self.ended = ended
        self.error = ""


class AttemptTrace:
    """The facts of which the span of one attempt is made; times are monotonic.

    *address* is the host and the port of the provider. *error* is the code of the fault. *first_chunk*: seconds from sending to
    the first event of a stream. *tokens*: input and output, None where they are not known. *head* and *tail*: the first and the
    last bytes of the answer, which have its id, its model and why it ended.
    """

    __slots__ = (
        "address",
        "began",
        "ended",
        "error",
        "first_chunk",
        "head",
        "max_tokens",
        "model",
        "provider",
        "span_id",
        "status",
        "tail",
        "temperature",
        "tokens",
    )

    def __init__(self) -> None:
        self.span_id = new_id(8)
        self.provider = self.model = self.error = ""
        self.began = self.ended = self.first_chunk = 0.0
        self.address: tuple[str, int] = ("", 0)
        self.status = 0
        self.head = self.tail = b""
        self.max_tokens: int | None = None
        self.temperature: float | None = None
        self.tokens: tuple[int | None, int | None] = (None, None)


class Trace:
    """The trace of one request, while it runs.

    *context* is that of its SERVER span. *attempt* is under way, or about to be. *wait* is the newest one, of which the end is
    not known yet. *followed*: a client reads the answer, or has read it; any other one comes back for it.
    """

    __slots__ = ("attempt", "attempts", "context", "followed", "left_out", "path", "wait", "waits")

    def __init__(self, context: Context, path: str) -> None:
        self.context = context
        # The path of the request to the provider, below its base URL.
        self.path = path
        self.attempt: AttemptTrace | None = None
        self.attempts: list[AttemptTrace] = []
        self.wait: Wait | None = None
        self.waits: list[Wait] = []
        self.left_out = 0
        self.followed = False

    def next_attempt(self) -> AttemptTrace:
        """Return the attempt under way; a request that is sent again on another connection is the same attempt."""
        if self.attempt is None:
            self.attempt = AttemptTrace()
        return self.attempt

    def passed(self, client_headers: ClientHeaders) -> ClientHeaders:
        """Return *client_headers* with the span of the attempt under way as the parent of what the provider does."""
        trace_id, span_id = self.context.trace_id.hex(), self.next_attempt().span_id.hex()
        return client_headers.with_parent(f"00-{trace_id}-{span_id}-01".encode(), trace_id)

    def waited(self, provider: str, began: float, ended: float) -> None:
        """Note a wait that is over, for a place at *provider*, or in the server if that is empty."""
        self.wait = Wait(provider, began, ended)
        self._keep(self.waits, self.wait)

    def attempt_ended(self, attempt: AttemptTrace) -> None:
        """Note that *attempt* is over, which had a place."""
        self.attempt = self.wait = None
        self._keep(self.attempts, attempt)

    def _keep(self, kept: list[T], new: T) -> None:
        if len(kept) >= MAX_CHILDREN:
            del kept[0]
            self.left_out += 1
        kept.append(new)

    def forget(self) -> None:
        """Forget all but the context, to which the spans of later readers link: the request has ended."""
        self.waits, self.attempts = [], []
        self.attempt = self.wait = None

    def refused(self, code: str) -> None:
        """Note that the attempt under way got no place, for the reason *code*, if that is not empty."""
        if self.wait is not None:
            self.wait.error = code
        self.attempt = self.wait = None


def new_context(client_headers: ClientHeaders) -> Context | None:
    """Return the place of a new span, below that of the client, if it has one; None if the client samples no trace."""
    parent, state = client_headers.trace()
    if not parent:
        return Context(new_id(16), new_id(8))
    # A valid one begins with these parts, whatever its version.
    _version, trace_id, span_id, flags = parent.decode().split("-")[:4]
    if not int(flags, 16) & SAMPLED:
        return None
    return Context(
        bytes.fromhex(trace_id), new_id(8), bytes.fromhex(span_id), remote=True, state=state
    )


def new_id(size: int) -> bytes:
    """Return a new id of *size* bytes."""
    return random.randbytes(size)  # noqa: S311 - an id is no secret

"""The contracts of a log: its readers, its fast path, the source of its events, and what these
mean.

Each is implemented elsewhere: readers in cursor.py, fast paths in fast_path.py, sources and APIs
in the package `providers`. Those of its store and of its keeper, which see the log, stand beside
it in stream.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.errors import AioserverError
    from aioserver.protocol.openai import Shape

# Runs of consecutive events (number, sequence, last sequence), and the newest event with an
# object.
EventsState = tuple[list[tuple[int, int, int]], bytes]
# Where a request waits.
AT_KEY: Final = "key"
AT_PROVIDER: Final = "provider"


class Queued(NamedTuple):
    """Where a request waits, at which position, and the estimated seconds until it starts."""

    at: Literal["key", "provider"]
    position: int
    eta: float

    @property
    def chunk(self) -> dict[str, object]:
        """What frames of it say."""
        return {"at": self.at, "position": self.position, "eta": round(self.eta, 1)}

    @property
    def comment(self) -> bytes:
        """It as a comment in an event stream."""
        return b": queued at=%b position=%d eta=%.1f\n\n" % (
            self.at.encode(),
            self.position,
            self.eta,
        )


class Path(Protocol):
    """The fast path of a log's only reader (fast_path.py), as the log and the provider see it.

    *forwarded_at* is the loop's time of the last read that it forwarded; *read_at* when the
    provider said something last, by either path.
    """

    forwarded_at: float
    read_at: float

    def forward(self, read: bytes) -> bool:
        """Forward *read*; return False, with nothing done, if it must take the slow path."""

    def close(self) -> None:
        """Forward nothing from now on; the log has all that was forwarded when this returns."""


class Reader(Protocol):
    """A reader of a log. All its methods are called synchronously and must not raise.

    *next_index* is the index of the first entry that it has not passed, counted from the start of
    the log.
    """

    next_index: int

    def write_now(self, data: bytes) -> bool:
        """Write *data* as the next entry; return False, with nothing done, if it must wait."""

    def open_fast_path(self, shape: Shape | None) -> Path | None:
        """Return the reader's fast path.

        None if anything must be written before the next event.
        """

    def notify(self) -> None:
        """Read on: the log has grown or ended."""

    def drop(self, seen: int) -> None:
        """Leave the log, which no longer has the entry that comes next, and tell the client so.

        *seen* is the number of the last event before that entry.
        """

    def report_position(self, queued: Queued) -> None:
        """Show that the request is queued."""


class Source(Protocol):
    """Where the events of a log come from: one exchange with a provider.

    Neither method raises, and a second call of it does nothing.
    """

    def pause(self) -> None:
        """Read nothing from the provider for now, unless a request waits for a place there."""

    def resume(self) -> None:
        """Read on."""


class Held(Protocol):
    """Bytes that no log has, and that are counted: *size* of them (store.py)."""

    size: int

    def grow(self, size: int) -> None:
        """Count another *size* bytes.

        Raises:
            ServerAtCapacity: all that is kept would be more than `max_kept_bytes`.
        """

    def reset(self) -> None:
        """Give the bytes back: another attempt begins anew."""

    def release(self) -> None:
        """Give them back; a second call does nothing."""


class WholeAnswer(Protocol):
    """An answer that was not streamed."""

    @property
    def size(self) -> int:
        """The bytes that this object keeps."""


class Attempt(Protocol):
    """The attempt that fills a log (providers/attempt.py), from when it has its place until that
    is given back.
    """

    @property
    def place(self) -> str:
        """The name of the provider where it has a place."""

    @property
    def waiting(self) -> int:
        """How many requests wait there for a place that others hold."""

    def let_go(self) -> None:
        """Show what is held of the answer, before its time."""

    def received_content(self) -> None:
        """Note that the first content has come, which may still be held."""

    def first_event(self) -> None:
        """Note that the answer has begun."""


class AnswerEvents:
    """The form of the errors between the events of one answer, and what is remembered of its
    events for as long as its log.

    These are those of a chat completion, of which nothing is remembered. Clients of other APIs may
    name an event by a *sequence* number of the provider's.
    """

    __slots__ = ()

    @property
    def size(self) -> int:
        """The bytes that this object keeps."""
        return 0

    def note(self, block: bytes, first: int) -> None:
        """Look at a block of the provider's events, of which *first* is the first one's number."""

    def render(self, error: AioserverError, seen: int | None = None) -> bytes:  # noqa: ARG002
        """Return *error* as the last event of the answer, or of a reader that has *seen* the event
        of that number.
        """
        return b"data: %b\n\n" % error.body()

    def event_before(self, sequence: int, last: int) -> int | None:  # noqa: ARG002
        """Return the number of the event after which the first one above *sequence* comes, *last*
        if that is to come.

        None if *sequence* has not come yet, or events have no such numbers.
        """
        return None

    def newest(self, status: str = "") -> bytes | None:  # noqa: ARG002
        """Return the newest object that the events describe, as JSON, with another *status* if one
        is passed.
        """
        return None

    def state(self) -> EventsState | None:
        """Return all that is remembered, for `restore`; None if nothing is."""
        return None

    def restore(self, runs: Sequence[tuple[int, int, int]], newest: bytes) -> None:
        """Remember what the `state` of another object was, instead."""


class AnswerApi:
    """The API of an answer, as its log sees it; `ForwardedApi` (fast_path.py) has more of it."""

    path: str


# Of every answer whose API has no others.
PLAIN_EVENTS = AnswerEvents()

"""The contracts of a log: its readers, its fast path, the source of its events, and the API of its
answer.

Each is implemented elsewhere: readers in cursor.py, fast paths in fast_path.py, sources and APIs
in the package `providers`. The contracts of its store and its keeper stand in stream.py, beside
the log.
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
# The place of a request that waits for its key.
AT_KEY: Final = "key"
AT_PROVIDER: Final = "provider"


class Queued(NamedTuple):
    """Where a request waits, at which position, and the estimated seconds until it starts."""

    at: Literal["key", "provider"]
    position: int
    eta: float

    @property
    def chunk(self) -> dict[str, object]:
        """Its content in frames."""
        return {"at": self.at, "position": self.position, "eta": round(self.eta, 1)}

    @property
    def comment(self) -> bytes:
        """Its form as a comment in an event stream."""
        return b": queued at=%b position=%d eta=%.1f\n\n" % (
            self.at.encode(),
            self.position,
            self.eta,
        )


class Path(Protocol):
    """The fast path of a log's only reader (fast_path.py), as the log and the provider see it.

    *forwarded_at* is the loop's time of the last read that it forwarded; *read_at* is when the
    provider last sent anything, by either path.
    """

    forwarded_at: float
    read_at: float

    def forward(self, read: bytes) -> bool:
        """Forward *read*; return False, with nothing done, if it must take the slow path."""

    def close(self) -> None:
        """Stop forwarding; the log has everything that was forwarded when this returns."""


class HoldingPath(Path, Protocol):
    """The path of reads that are held; it is *ready* if the next one may only be held."""

    ready: bool


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
        """Leave the log, which no longer has the next entry, and tell the client so.

        *seen* is the number of the last event before that entry.
        """

    def report_position(self, queued: Queued) -> None:
        """Show that the request is queued."""


class Source(Protocol):
    """The origin of a log's events: one exchange with a provider.

    No method raises, and a second call does nothing.
    """

    def pause(self) -> None:
        """Pause reading from the provider, unless a request waits for a place there."""

    def resume(self) -> None:
        """Resume reading."""

    def complete(self) -> bool:
        """End the exchange if only the end mark of its answer is missing, and return whether it
        was: the log is completed then.
        """


class Held(Protocol):
    """Bytes, *size* of them, that are counted although no log has them (store.py)."""

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
    """The attempt that fills a log (providers/attempt.py), from when it gets its place until it
    gives it back.
    """

    @property
    def place(self) -> str:
        """The name of the provider at which it has a place."""

    @property
    def waiting(self) -> int:
        """The number of requests that wait there for a place that others hold."""

    def let_go(self) -> None:
        """Show what is held of the answer before its finish."""

    def first_event(self) -> None:
        """Note that the answer has begun."""


class AnswerEvents:
    """The form of errors among the events of one answer, and the state that its log keeps about
    its events.

    This class is for chat completions, which need no state. Clients of other APIs may refer to an
    event by the provider's *sequence* number.
    """

    __slots__ = ()

    @property
    def size(self) -> int:
        """The bytes that this object keeps."""
        return 0

    def note(self, block: bytes, first: int) -> None:
        """Read a block of the provider's events; the first one has the number *first*."""

    def note_run(self, number: int, sequence: int, count: int = 1) -> None:
        """Remember the numbers of *count* events: their log numbers start at *number*, their
        sequence numbers at *sequence*.
        """

    def render(self, error: AioserverError, seen: int | None = None) -> bytes:  # noqa: ARG002
        """Return *error* as the last event of the answer, or for a reader that has *seen* the
        event of that number.
        """
        return b"data: %b\n\n" % error.body()

    def event_before(self, sequence: int, last: int) -> int | None:  # noqa: ARG002
        """Return the number of the event before the first one above *sequence*; *last* if that is
        still to come.

        None if *sequence* has not come yet, or events have no such numbers.
        """
        return None

    def newest(self, status: str = "") -> bytes | None:  # noqa: ARG002
        """Return the newest object that the events describe, as JSON, with *status* in place of
        its own if given.
        """
        return None

    def state(self) -> EventsState | None:
        """Return the whole state, for `restore`; None if there is none."""
        return None

    def restore(self, runs: Sequence[tuple[int, int, int]], newest: bytes) -> None:
        """Replace the state by the `state` of another object."""


class AnswerApi:
    """The API of an answer, as its log sees it; `ForwardedApi` (fast_path.py) extends it."""

    path: str


# For every answer whose API has no other.
PLAIN_EVENTS = AnswerEvents()

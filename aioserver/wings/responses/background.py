"""A response in the background (`background: true`): its client gets the id at once, leaves, and
comes back for the answer.

If a provider has responses, it runs them by itself: the request and its answer pass unchanged.
Otherwise the response is made here:

    response.created, response.queued   as soon as its request waits for a place, or has one
    response.in_progress                with its first place
    …                                   as for any other (bridge/events.py)

From its first event on it has its id, and is asked for as a chat completion at any provider. Its
chunks are streamed, whether or not its client reads them: so the provider is never silent for as
long as the whole answer takes.

A client that is in no hurry says so by a *window* (`background_options`). Its request is batch
then, waits for as long as the window is open, and fails when it closes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.errors import InvalidRequest
from aioserver.protocol.request_headers import NO_REQUEST_OPTIONS, RequestOptions
from aioserver.streams.cursor import ConditionReader
from aioserver.wings.responses.bridge.events import opening_event
from aioserver.wings.responses.bridge.output import IN_PROGRESS, QUEUED
from aioserver.wings.responses.events import remember

if TYPE_CHECKING:
    from aioserver.protocol.model_body import ModelBody
    from aioserver.streams.contracts import Queued
    from aioserver.streams.stream import Stream
    from aioserver.wings.responses.bridge.output import Frame


# The windows of OpenAI's API, in seconds.
SOONEST, WINDOWS = "soonest", {"2h": 7200.0, "8h": 28_800.0}
# The member of a body that names one.
WINDOW = "background_options.completion_window"


def options_of(body: ModelBody) -> RequestOptions:
    """Return what the window of *body* says about its request.

    Raises:
        InvalidRequest: there is no such window, or *body* does not ask for the background.
    """
    window = body.completion_window
    if window in {None, SOONEST}:
        return NO_REQUEST_OPTIONS
    if window not in WINDOWS:
        names = ", ".join((SOONEST, *WINDOWS))
        raise InvalidRequest(f"{WINDOW} must be one of {names}", param=WINDOW)
    if not body.background:
        raise InvalidRequest(f"{WINDOW}={window} needs background: true", param=WINDOW)
    return RequestOptions(deadline=WINDOWS[window], batch=True, patient=True)


class Background:
    """One response in the background. *frame* is that of its response object, None if it is not
    yet known whether the provider runs it by itself.

    *streamed*: its client reads its events from the beginning.

    Always: each of its opening events is shown once, however many attempts there are.
    """

    def __init__(self, frame: Frame | None, *, streamed: bool) -> None:
        self.streamed = streamed
        self.frame = frame

    @property
    def made_here(self) -> bool:
        """Whether the response is made here, of a chat completion."""
        return self.frame is not None

    def queued(self, stream: Stream) -> None:
        """Show in *stream* that the response exists; a second call does nothing."""
        frame = self.frame
        if frame is None or frame.opened or stream.ended:
            return
        stream.add_alias(frame.id)
        self._show(stream, (b"created", QUEUED), (b"queued", QUEUED))

    def started(self, stream: Stream) -> None:
        """Show in *stream* that the response has a place; a second call does nothing."""
        frame = self.frame
        if frame is None or stream.ended:
            return
        self.queued(stream)
        if frame.opened == 2:
            self._show(stream, (IN_PROGRESS, IN_PROGRESS))

    def _show(self, stream: Stream, *events: tuple[bytes, bytes]) -> None:
        frame = self.frame
        assert frame is not None, "it is made here"
        parts = [
            opening_event(frame, kind, status, number)
            for number, (kind, status) in enumerate(events, frame.opened)
        ]
        frame.opened += len(parts)
        block = b"".join(parts)
        remember(stream, block)
        stream.forward(block, len(parts))


class OpeningReader(ConditionReader):
    """A reader that waits until a response in the background, *running*, has its id, or will get
    none.
    """

    def __init__(self, stream: Stream, running: Background) -> None:
        self._running = running
        super().__init__(stream, _opened)

    def report_position(self, _queued: Queued) -> None:
        """Show that the response exists, since it waits at a provider, or for its own key."""
        self._running.queued(self._stream)


def _opened(stream: Stream) -> bool:
    return stream.ended or stream.whole is not None or stream.events.newest() is not None

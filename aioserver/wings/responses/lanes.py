"""The lanes of one connection of the Responses API: what comes on each, in which order it is
answered, and what may be continued.

What comes on one lane is answered in its order, and different lanes are answered at once, at most
MAX_RUNNING. The next turn is that of the lane which has waited longest. A lane keeps the latest of
its responses, so that a request on any lane can continue it, although nobody else may keep it
(`store: false`), unless the room is needed (wings/responses/stored.py).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from aioserver.errors import ConcurrencyExceeded, StreamLimitReached
from aioserver.wings.responses.path import response_messages

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from aioserver.faces.admission import BodyHold
    from aioserver.streams.stream import Stream
    from aioserver.wings.responses.frames import Create, Refused, Resume
    from aioserver.wings.responses.stored import HeldResponses, StoredResponse

# Responses under way at once on one connection, and its lanes with a name, as OpenAI has them.
MAX_RUNNING, MAX_NAMED_LANES = 16, 32
# Commands that wait on one connection, on all of its lanes: two for each lane that may have a
# name.
MAX_WAITING = 64
# Their bytes, unless it is one command: they wait for answers that may take an hour, and count for
# max_body_bytes meanwhile.
MAX_WAITING_BYTES = 1 << 25


class Turn(NamedTuple):
    """A command on its lane, and the count of its bytes."""

    lane: Lane
    command: Create | Refused | Resume
    hold: BodyHold


class Lane:
    """One lane of a connection; *name* is None for the one without a `stream_id`.

    *stream* is the response that is read, or was read last, *response_id* its id, once it is
    known, and *continues* the id of the one before it. *asked* fills the last one that was asked
    for here, which a resumed one is not, and *on_end* is called at its end. *under_way* counts
    what its end still has to wait for, such as events that are not written.
    """

    __slots__ = (
        "asked",
        "continues",
        "format",
        "name",
        "on_end",
        "response_id",
        "stream",
        "turns",
        "under_way",
    )

    def __init__(self, name: str | None, on_end: Callable[[Lane], None]) -> None:
        self.name = name
        self.on_end = on_end
        self.format = response_messages(name)
        self.turns: deque[Turn] = deque()
        self.stream: Stream | None = None
        self.response_id: str | None = None
        self.asked: asyncio.Task[None] | None = None
        self.continues: str | None = None
        self.under_way = 0

    def ended(self, _task: object) -> None:
        """Note that `asked` has ended."""
        self.on_end(self)


class Lanes:
    """The lanes of one connection. `close` must be called at its end.

    Always: at most MAX_RUNNING lanes have something under way, and at most MAX_WAITING commands
    wait, of MAX_WAITING_BYTES; a lane has a place in `_due` if and only if a command waits on it,
    and nothing is under way there.

    *held* has the latest response of each lane, until it is dropped to make room. *on_end* is
    called with a lane when the response that was asked for on it has ended, and counts for no
    limit of its caller any more.
    """

    def __init__(self, held: HeldResponses, on_end: Callable[[Lane], None]) -> None:
        self._held = held
        self._on_end = on_end
        self._lanes: dict[str | None, Lane] = {}
        # The lane that has waited longest comes first.
        self._due: dict[Lane, None] = {}
        self._running = 0
        self._waiting = self._waiting_bytes = 0

    @property
    def busy(self) -> bool:
        """Whether anything is under way, or waits."""
        return bool(self._running or self._waiting)

    def under_way(self) -> Iterator[Lane]:
        """Yield the lanes on which something is under way."""
        return (lane for lane in self._lanes.values() if lane.under_way)

    def add(self, name: str | None, command: Create | Refused | Resume, hold: BodyHold) -> None:
        """Let *command* wait for its turn, which may be at once.

        The bytes that *hold* counts count until then.

        Raises:
            StreamLimitReached: there are too many lanes with a name.
            ConcurrencyExceeded: too many commands wait.
        """
        lane = self._lane(name)
        waits = lane.under_way or lane.turns or self._running >= MAX_RUNNING
        if waits and self._waiting >= MAX_WAITING:
            raise _too_much(f"{MAX_WAITING} responses wait on this socket already")
        if waits and self._waiting and self._waiting_bytes + hold.size > MAX_WAITING_BYTES:
            raise _too_much(f"more than {MAX_WAITING_BYTES} bytes would wait on this socket")
        hold.given = True
        lane.turns.append(Turn(lane, command, hold))
        self._waiting += 1
        self._waiting_bytes += hold.size
        self.free(lane)

    def next(self) -> Turn | None:
        """Return the next command that may be carried out; None if there is none now.

        `free` follows.
        """
        if not self._due or self._running >= MAX_RUNNING:
            return None
        lane = next(iter(self._due))
        del self._due[lane]
        self._waiting -= 1
        turn = lane.turns.popleft()
        self._waiting_bytes -= turn.hold.size
        turn.hold.given = False
        return turn

    def begun(self, lane: Lane) -> None:
        """Note that something is under way on *lane*, until `done`."""
        if not lane.under_way:
            self._running += 1
        lane.under_way += 1

    def done(self, lane: Lane) -> None:
        """Note that something is over that was under way on *lane*."""
        lane.under_way -= 1
        if not lane.under_way:
            self._running -= 1
            self.free(lane)

    def free(self, lane: Lane) -> None:
        """Note that the next turn on *lane* may come, unless something is under way there."""
        if lane.turns and not lane.under_way:
            self._due.setdefault(lane)

    def keep(self, lane: Lane, response: StoredResponse) -> None:
        """Keep *response* as the latest of *lane*."""
        self._held.hold(lane, response)

    def latest(self, response_id: str) -> StoredResponse | None:
        """Return the response of this id, if it is the latest of a lane, and still kept."""
        for lane in self._lanes.values():
            response = self._held.get(lane)
            if response is not None and response.id == response_id:
                return response
        return None

    def forget(self, response_id: str | None) -> None:
        """Keep a response no longer: a request has continued it in vain."""
        for lane in self._lanes.values():
            response = self._held.get(lane)
            if response is not None and response.id == response_id:
                self._held.drop(lane)

    def close(self) -> None:
        """Forget what waits and what is kept."""
        for lane in self._lanes.values():
            self._held.drop(lane)
            if lane.asked is not None:
                lane.asked.remove_done_callback(lane.ended)
            # Otherwise the socket and its lanes would hold each other.
            lane.on_end = _ignore
            for turn in lane.turns:
                turn.hold.release()
            lane.turns.clear()
        self._due.clear()
        self._waiting = self._waiting_bytes = 0
        self._on_end = _ignore

    def _lane(self, name: str | None) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            named = len(self._lanes) - (None in self._lanes)
            if name is not None and named >= MAX_NAMED_LANES:
                text = f"{MAX_NAMED_LANES} lanes of this socket have a name already"
                raise StreamLimitReached(text, param="stream_id")
            lane = self._lanes[name] = Lane(name, self._on_end)
        return lane


def _ignore(_lane: Lane) -> None:
    """Hear of the end of a lane whose socket is gone."""


def _too_much(text: str) -> ConcurrencyExceeded:
    # nobody knows when one of them ends
    return ConcurrencyExceeded(text, retry_after=1.0)

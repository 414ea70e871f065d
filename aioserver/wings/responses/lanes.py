"""The lanes of one connection of the Responses API: what comes on each, in which order it is
answered, and what may be continued.

What comes on one lane is answered in its order, and different lanes are answered at once, at most
MAX_RUNNING. The next turn is that of the lane which has waited longest. Whoever waits is told so, and
whoever hears nothing of a response that runs as well (`LaneNews`). A lane keeps the latest of its
responses, so that a request on any lane can continue it, although nobody else may keep it
(`store: false`), unless the room is needed (wings/responses/stored.py).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aioserver.errors import ConcurrencyExceeded, StreamLimitReached
from aioserver.streams.formats import WS_TEXT, ws_frame
from aioserver.wings.responses import frames
from aioserver.wings.responses.path import response_messages

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from aioserver.faces.admission import BodyHold
    from aioserver.faces.context import Context
    from aioserver.streams.contracts import Queued
    from aioserver.streams.stream import Stream
    from aioserver.streams.writer import Writer
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


# Durations of responses of one connection that are remembered, for what those that wait are told.
DURATIONS = 8
# Seconds between two looks at what is told.
NEWS_INTERVAL = 1.0


class Turn:
    """A command on its lane, and the count of its bytes; *number* counts those of its connection.

    The client was *told* its position at a time, *told_at*.
    """

    def __init__(
        self,
        lane: Lane,
        command: Create | Refused | Resume,
        hold: BodyHold,
        number: int,
    ) -> None:
        self.lane = lane
        self.command = command
        self.hold = hold
        self.number = number
        self.told, self.told_at = 0, 0.0


class Lane:
    """One lane of a connection; *name* is None for the one without a `stream_id`.

    *stream* is the response that is read, or was read last, None until there is one of what is
    under way now, *response_id* its id, once it is known, and *continues* the id of the one before
    it. *asked* fills the last one that was asked for here, which a resumed one is not, and
    *on_end* is called at its end. *under_way* counts what its end still has to wait for, such as
    events that are not written, and was first more than 0 at *began*. *queued* is what the client
    was told of its wait at its key or provider, None once it waits no more. It has been silent
    since *silent_since*, with so many *events* behind it.
    """

    def __init__(self, name: str | None, on_end: Callable[[Lane], None]) -> None:
        self.name = name
        self.on_end = on_end
        self.format = response_messages(name)
        self.turns: deque[Turn] = deque()
        self.stream: Stream | None = None
        self.response_id: str | None = None
        self.asked: asyncio.Task[None] | None = None
        self.continues: str | None = None
        self.under_way = self.events = 0
        self.began = self.silent_since = 0.0
        self.queued: Queued | None = None

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
    limit of its caller any more. *clock* has the time of the loop.
    """

    def __init__(
        self, held: HeldResponses, on_end: Callable[[Lane], None], clock: Callable[[], float]
    ) -> None:
        self._held = held
        self._clock = clock
        # How long the latest responses have taken, and how many commands have come.
        self._durations: deque[float] = deque(maxlen=DURATIONS)
        self._commands = 0
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

    def add(
        self,
        name: str | None,
        command: Create | Refused | Resume,
        hold: BodyHold,
    ) -> None:
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
        self._commands += 1
        lane.turns.append(Turn(lane, command, hold, self._commands))
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
            lane.began = lane.silent_since = self._clock()
            lane.events, lane.queued, lane.stream = 0, None, None
        lane.under_way += 1

    def done(self, lane: Lane) -> None:
        """Note that something is over that was under way on *lane*."""
        lane.under_way -= 1
        if not lane.under_way:
            self._running -= 1
            self._durations.append(self._clock() - lane.began)
            self.free(lane)

    def waiting(self) -> list[tuple[Turn, int, float | None]]:
        """Return the commands that wait, each with its position and the seconds that its wait is
        expected to take, None while no response has ended.

        While less than MAX_RUNNING lanes have something under way, only the commands on its own
        lane are before a command. It is the number of those that came before it otherwise, of
        which each round takes MAX_RUNNING.
        """
        if self._running < MAX_RUNNING:
            placed = [
                (turn, number, number)
                for lane in self._lanes.values()
                for number, turn in enumerate(lane.turns, 1)
            ]
        else:
            turns = [turn for lane in self._lanes.values() for turn in lane.turns]
            turns.sort(key=lambda turn: turn.number)
            placed = [
                (turn, number, -(-number // MAX_RUNNING)) for number, turn in enumerate(turns, 1)
            ]
        known = self._durations
        mean = sum(known) / len(known) if known else None
        return [
            (turn, position, None if mean is None else round(mean * rounds, 1))
            for turn, position, rounds in placed
        ]

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


class LaneNews:
    """What the client of one connection is told of its *lanes* by *writer* while nothing else
    comes on them: a member of the timer wheel.

    A command that waits on the connection is told of when it comes, when its position has changed,
    at most once each NEWS_INTERVAL, and each *interval* seconds; a response that waits at its
    provider, or whose provider is silent, each *interval* seconds. A client that is not reading is
    told nothing: it would be outdated when it is read, and stand behind the last event of its
    response.
    """

    def __init__(self, lanes: Lanes, writer: Writer, context: Context) -> None:
        # Set by the wheel.
        self.bucket = 0
        self._lanes, self._writer, self._context = lanes, writer, context

    @property
    def interval(self) -> float:
        """The seconds of silence after which the client is told again."""
        return self._context.settings.chat.websocket.ping_interval

    def begin(self, now: float) -> None:
        """Tell what has to be told *now*, and later for as long as anything waits or runs."""
        if not self._writer.blocked:
            self._tell_waiting(now)
        if not self.bucket:
            self._context.wheel.add(self, min(NEWS_INTERVAL, self.interval))

    def end(self) -> None:
        """Tell nothing any more."""
        self._context.wheel.remove(self)

    def visit(self, now: float) -> float | None:
        """Tell what is due; return the seconds until the next visit, None if there is nothing to
        tell of.
        """
        if not self._lanes.busy:
            return None
        if not self._writer.blocked:
            self._tell_waiting(now)
            self._tell_running(now)
        return min(NEWS_INTERVAL, self.interval)

    def _tell_running(self, now: float) -> None:
        """Tell on each lane that its response is still awaited, if it has been silent for long."""
        interval = self.interval
        for lane in self._lanes.under_way():
            stream = lane.stream
            events = 0 if stream is None else stream.last
            if events != lane.events:
                lane.events, lane.silent_since, lane.queued = events, now, None
            elif now - lane.silent_since >= interval * 0.99:
                lane.silent_since = now
                if stream is not None and stream.ended:
                    # The rest of it is written soon; its last event may have been.
                    pass
                elif lane.queued is None:
                    self._send(frames.heartbeat(lane.name))
                else:
                    self._send(frames.queued(lane.name, *lane.queued))

    def _tell_waiting(self, now: float) -> None:
        """Tell each command that waits where it stands, if it is news or long ago."""
        interval = self.interval
        for turn, position, eta in self._lanes.waiting():
            if turn.told != position or now - turn.told_at >= interval * 0.99:
                turn.told, turn.told_at = position, now
                self._send(frames.queued(turn.lane.name, "connection", position, eta))

    def _send(self, event: bytes) -> None:
        self._writer.send(ws_frame(WS_TEXT, event))


def _ignore(_lane: Lane) -> None:
    """Hear of the end of a lane whose socket is gone."""


def _too_much(text: str) -> ConcurrencyExceeded:
    # nobody knows when one of them ends
    return ConcurrencyExceeded(text, retry_after=1.0)

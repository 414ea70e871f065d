"""The lanes of one connection of the Responses API: the commands on each, the order of answers,
and the responses that may be continued.

Commands on one lane are answered in order, and different lanes at once, at most MAX_RUNNING of
them. The lane that has waited longest has the next turn. `LaneNews` reports to the client the
position of waiting commands, and that silent responses are still running. A lane keeps the latest
of its responses, so that a request on any lane can continue it, even if it is stored nowhere else
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
    from aioserver.gateway.contracts.instances import Reading
    from aioserver.streams.stream import Stream
    from aioserver.streams.writer import Writer
    from aioserver.wings.responses.frames import Create, Refused, Resume
    from aioserver.wings.responses.stored import HeldResponses, StoredResponse

# Responses under way at once on one connection, and its lanes with a name, as at OpenAI.
MAX_RUNNING, MAX_NAMED_LANES = 16, 32
# Commands that may wait on one connection, on all of its lanes: two for each lane that may have a
# name.
MAX_WAITING = 64
# The most bytes of several waiting commands: they wait for answers that may take an hour, and
# count for max_body_bytes meanwhile.
MAX_WAITING_BYTES = 1 << 25


# The number of recent response durations from which waits are estimated.
DURATIONS = 8
# Seconds between two checks for news.
NEWS_INTERVAL = 1.0


class Turn:
    """A command on its lane, and the count of its bytes; *number* counts the commands of its
    connection.

    *reported* is the position that was last sent to the client, at the time *reported_at*.
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
        self.reported, self.reported_at = 0, 0.0


class Lane:
    """One lane of a connection; *name* is None for the one without a `stream_id`.

    *stream* is the log of the response that is read, or was read last. It is None until the
    response under way has begun, and for a response of another instance, which *reading* reads.
    *response_id* is its id, once it is known, and *continues* the id of its predecessor. *asked*
    is the task that fills the last response requested here; a resumed response has no such task.
    *on_end* is called at the end of that task. *under_way* counts what the end of the turn still
    waits for, such as events that are not written, and was first more than 0 at *began*. The lane
    has been silent since *silent_since*, after *events* events.
    """

    def __init__(self, name: str | None, on_end: Callable[[Lane], None]) -> None:
        self.name = name
        self._on_end = on_end
        self.format = response_messages(name)
        self.turns: deque[Turn] = deque()
        self.stream: Stream | None = None
        self.reading: Reading | None = None
        self.response_id: str | None = None
        self.asked: asyncio.Task[None] | None = None
        self.continues: str | None = None
        self.under_way = self.events = 0
        self.began = self.silent_since = 0.0

    def ended(self, _task: object) -> None:
        """Note that `asked` has ended."""
        self._on_end(self)

    def close(self) -> None:
        """Drop the waiting commands; `on_end` is not called any more."""
        if self.reading is not None:
            self.reading.leave()
        if self.asked is not None:
            self.asked.remove_done_callback(self.ended)
        # Otherwise the socket and its lanes would be a reference cycle.
        self._on_end = _ignore
        for turn in self.turns:
            turn.hold.release()
        self.turns.clear()


class Lanes:
    """The lanes of one connection. `close` must be called at its end.

    Always: at most MAX_RUNNING lanes have something under way. At most MAX_WAITING commands wait,
    with MAX_WAITING_BYTES. A lane is in `_due` if and only if a command waits on it, and nothing
    is under way there.

    *held* has the latest response of each lane, until it is dropped to make room. *on_end* is
    called with a lane when the response requested on it has ended, and no longer counts for a
    limit of its caller. *clock* returns the time of the loop.
    """

    def __init__(
        self, held: HeldResponses, on_end: Callable[[Lane], None], clock: Callable[[], float]
    ) -> None:
        self._held = held
        self._clock = clock
        # The durations of the latest responses, and the number of commands so far.
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

        The bytes of *hold* count until then.

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
            lane.events, lane.stream, lane.response_id = 0, None, None
        lane.under_way += 1

    def done(self, lane: Lane) -> None:
        """Note the end of something that was under way on *lane*."""
        lane.under_way -= 1
        if not lane.under_way:
            self._running -= 1
            self._durations.append(self._clock() - lane.began)
            self.free(lane)

    def waiting(self) -> list[tuple[Turn, int, float | None]]:
        """Return the waiting commands, each with its position and the expected seconds of its
        wait, None while no response has ended.

        While less than MAX_RUNNING lanes have something under way, only the commands on its own
        lane are ahead of a command. Otherwise all earlier commands are, and each round takes
        MAX_RUNNING of them.
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
        """Allow the next turn on *lane*, unless something is under way there."""
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
        """Drop a response: a request has failed to continue it."""
        for lane in self._lanes.values():
            response = self._held.get(lane)
            if response is not None and response.id == response_id:
                self._held.drop(lane)

    def close(self) -> None:
        """Drop the waiting commands and the kept responses."""
        for lane in self._lanes.values():
            self._held.drop(lane)
            lane.close()
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
    """The news of *lanes* that *writer* sends to the client of one connection while nothing else
    comes on them: a member of the timer wheel.

    The position of a waiting command is sent when the command comes, when the position has
    changed, at most once each NEWS_INTERVAL, and each *interval* seconds. A response that waits at
    its provider, or whose provider is silent, is reported each *interval* seconds. Nothing is sent
    to a client that is not reading: the news would be outdated when it is read, and stand behind
    the last event of its response.
    """

    def __init__(self, lanes: Lanes, writer: Writer, context: Context) -> None:
        # Set by the wheel.
        self.bucket = 0
        self._lanes, self._writer, self._context = lanes, writer, context

    @property
    def interval(self) -> float:
        """The seconds of silence after which a report is repeated."""
        return self._context.settings.chat.websocket.ping_interval

    def begin(self, now: float) -> None:
        """Send the news that is due *now*, and later for as long as anything waits or runs."""
        if not self._writer.blocked:
            self._tell_waiting(now)
        if not self.bucket:
            self._context.wheel.add(self, min(NEWS_INTERVAL, self.interval))

    def end(self) -> None:
        """Send nothing any more."""
        self._context.wheel.remove(self)

    def visit(self, now: float) -> float | None:
        """Send the news that is due; return the seconds until the next visit, None if nothing
        waits or runs.
        """
        if not self._lanes.busy:
            return None
        if not self._writer.blocked:
            self._tell_waiting(now)
            self._tell_running(now)
        return min(NEWS_INTERVAL, self.interval)

    def _tell_running(self, now: float) -> None:
        """Report on each lane that has been silent for long that its response is awaited."""
        interval = self.interval
        for lane in self._lanes.under_way():
            stream, reading = lane.stream, lane.reading
            events = 0 if stream is None else stream.last
            if reading is not None:
                events = reading.passed
            if events != lane.events:
                lane.events, lane.silent_since = events, now
            elif now - lane.silent_since >= interval * 0.99:
                lane.silent_since = now
                if stream is not None and stream.ended:
                    # The rest of the response is written soon, or has been written already.
                    pass
                elif stream is None or stream.queued is None:
                    self._send(frames.heartbeat(lane.name))
                else:
                    self._send(frames.queued(lane.name, *stream.queued))

    def _tell_waiting(self, now: float) -> None:
        """Report the waiting commands whose positions are new, or were reported long ago."""
        interval = self.interval
        for turn, position, eta in self._lanes.waiting():
            if turn.reported != position or now - turn.reported_at >= interval * 0.99:
                turn.reported, turn.reported_at = position, now
                self._send(frames.queued(turn.lane.name, "connection", position, eta))

    def _send(self, event: bytes) -> None:
        self._writer.send(ws_frame(WS_TEXT, event))


def _ignore(_lane: Lane) -> None:
    """Ignore the end of a lane whose socket is gone."""


def _too_much(text: str) -> ConcurrencyExceeded:
    # It is not known when a running response will end.
    return ConcurrencyExceeded(text, retry_after=1.0)

"""How a client talks on the WebSocket of the Responses API: conversations on several lanes, on one
connection after another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from tests.simulation.conversation import Turn, lost, next_turn
from tests.simulation.patience import Left
from tests.simulation.returning import come_back
from tests.simulation.truth import Violation

if TYPE_CHECKING:
    from tests.simulation.client import Client

# Lanes of a client: also more than run at once, and more than may have a name.
LANES = (1, 1, 2, 5, 20, 34)
# Requests of a conversation that are refused, or fail, before its client gives up.
TRIES = 3
# What a server says of a response that cannot be resumed; the last one if another instance has it,
# or may have it, and does not answer.
NOT_RESUMED = {"stream_not_found", "resume_gap", "server_shutdown", "instance_unavailable"}
# How a connection is closed that was good.
CLOSED_WELL = 1000
NO_ROOM = "wait on this socket already"
NOT_CANCELLED = "no such response is under way"


class Lane:
    """A conversation on the lane *name*: *left* turns are to come, and *chain* are those that the
    next one continues.

    *asked* are the turns that were sent and have not ended; the oldest one is answered first.
    *latest* is the turn whose response the present connection keeps for this lane.
    """

    def __init__(self, name: str | None, left: int) -> None:
        self.name = name
        self.left = left
        self.chain: tuple[Turn, ...] = ()
        self.asked: list[Turn] = []
        self.latest: Turn | None = None
        self.failed = 0
        self.outcome = ""
        # Whether the oldest turn is being resumed; whether it is cancelled.
        self.resumed = self.cancelled = False
        # What was cancelled on the present connection.
        self.cancels = 0

    @property
    def over(self) -> bool:
        """Whether nothing more is asked here, or awaited."""
        return bool(self.outcome) or not (self.left or self.asked)


class Talk:
    """All that one client says, and is told."""

    def __init__(self, client: Client) -> None:
        dice = client.dice
        self.client = client
        # Whether all turns of a lane are sent at once, so that none continues another.
        self.at_once = dice.random() < 0.2
        count = dice.choice(LANES)
        # The turns may be more than can wait.
        turns = dice.choice((1, 2, 4)) if count < 20 or self.at_once else 1
        unnamed = dice.random() < 0.5
        self.lanes = {
            name: Lane(name, turns)
            for name in (
                None if unnamed and not number else f"lane-{number}" for number in range(count)
            )
        }
        self.prepares = dice.random() < 0.3
        self.store = dice.choice((None, True, False))
        self.events = 0
        # Whether the server has said that it closes the connection.
        self.closes = False

    @property
    def outcome(self) -> str:
        """How it has ended; empty while it has not."""
        lanes = self.lanes.values()
        if not all(lane.over for lane in lanes):
            return ""
        return next((lane.outcome for lane in lanes if lane.outcome), "complete")

    async def connect(self, _attempt: int) -> None:
        """Talk on one connection, until nothing is left to be said.

        Raises:
            EOFError: the server has closed it before.
            Left: the client has left.
        """
        client = self.client
        url = client.base.replace("http", "ws", 1) + "/v1/responses"
        self.closes = False
        async with client.session.ws_connect(url, max_msg_size=0, headers=client.headers) as ws:
            for lane in self.lanes.values():
                lane.latest, lane.cancelled, lane.cancels = None, False, 0
                await self._begin(ws, lane)
            async for message in ws:
                client.patience.heard()
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                lane_event = self._take(orjson.loads(message.data))
                if self.outcome:
                    return
                if client.now("leave", self.events):
                    raise Left
                if lane_event is not None and not self.closes:
                    await self._go_on(ws, lane_event)
                await client.pause()
            if self.closes and ws.close_code == CLOSED_WELL:
                raise Violation("an error of the connection, which is closed as if it were none")
            raise EOFError(f"closed with {ws.close_code}")

    async def _begin(self, ws: aiohttp.ClientWebSocketResponse, lane: Lane) -> None:
        """Go on with *lane* on a new connection: resume what may be resumed, and ask for the rest
        anew.
        """
        unfinished, lane.asked, lane.resumed = lane.asked, [], False
        if unfinished and not lane.outcome:
            first, *others = unfinished
            if first.read.id and first.store is not False and not first.prepared:
                lane.asked, lane.resumed = [first], True
                lane.left += len(others)
                resume = {
                    "type": "response.resume",
                    "response_id": first.read.id,
                    "starting_after": first.read.last,
                }
                await self._send(ws, lane, resume)
                return
            lane.left += len(unfinished)
        await self._ask(ws, lane)

    async def _go_on(self, ws: aiohttp.ClientWebSocketResponse, lane: Lane) -> None:
        """Do what follows from what has come on *lane*."""
        if not lane.asked:
            await self._ask(ws, lane)
        elif self.client.now("cancel", lane.asked[0].read.last) and not lane.cancelled:
            lane.cancelled = True
            lane.cancels += 1
            by_id = {"response_id": lane.asked[0].read.id} if lane.asked[0].read.id else {}
            await self._send(ws, lane, {"type": "response.cancel", **by_id})
            await self._send(ws, lane, {"type": "response.processed"})

    async def _ask(self, ws: aiohttp.ClientWebSocketResponse, lane: Lane) -> None:
        """Ask for the next turn of *lane*, or for all of them."""
        while lane.left and not lane.outcome:
            lane.left -= 1
            prepared = self.prepares and not lane.chain
            turn = next_turn(self.client, lane.chain, self.store, prepared=prepared)
            lane.asked.append(turn)
            generate = {"generate": False} if turn.prepared else {}
            model = self.client.model(turn.question, grouped=False)
            await self._send(
                ws, lane, {"type": "response.create", "model": model, **turn.fields, **generate}
            )
            if not self.at_once:
                return

    async def _send(
        self, ws: aiohttp.ClientWebSocketResponse, lane: Lane, frame: dict[str, Any]
    ) -> None:
        named = {} if lane.name is None else {"stream_id": lane.name}
        await ws.send_str(orjson.dumps({**frame, **named}).decode())

    def _take(self, event: dict[str, Any]) -> Lane | None:
        """Take one event; return its lane, None if it belongs to no lane."""
        self.events += 1
        lane = self.lanes.get(event.get("stream_id"))
        if event["type"] == "error" and "status" in event:
            self._refused(lane, event)
            return lane
        if lane is None:
            if event["type"] == "aioserver:queued" and "stream_id" not in event:
                return None
            raise Violation(f"an event on no lane: {event}")
        if event["type"] == "aioserver:queued":
            # That of the connection has no lane either.
            return lane
        if event["type"] == "aioserver:heartbeat":
            if not lane.asked:
                raise Violation("a heartbeat on a lane where nothing is under way")
            return lane
        if not lane.asked:
            raise Violation(f"{event['type']} on a lane where nothing is under way")
        turn = lane.asked[0]
        turn.read.take(event)
        if turn.read.end:
            self._ended(lane, turn)
        return lane

    def _ended(self, lane: Lane, turn: Turn) -> None:
        lane.asked.pop(0)
        resumed, lane.resumed, lane.cancelled = lane.resumed, False, False
        if turn.read.end != "complete":
            self._failed(lane, turn, turn.read.end)
            return
        turn.end()
        if not self.at_once:
            lane.chain = turn.chain
            # A response that was begun on another connection is kept there.
            lane.latest = None if resumed else turn

    def _failed(self, lane: Lane, turn: Turn, outcome: str) -> None:
        """Try once more, or give up. What is at once under way is answered, too."""
        lane.failed += 1
        # A lane forgets what was continued in vain.
        for other in self.lanes.values():
            if turn.before and other.latest is turn.before[-1]:
                other.latest = None
        if self.at_once:
            return
        if lane.failed >= TRIES:
            lane.outcome = outcome
        else:
            lane.left += 1

    def _refused(self, lane: Lane | None, event: dict[str, Any]) -> None:
        """Take the error of a request, or of the connection."""
        error, status = event["error"], event["status"]
        code = error["code"]
        if lane is not None and lane.cancels and error["message"].startswith(NOT_CANCELLED):
            # It was over already.
            lane.cancels -= 1
            return
        headers = {name.title(): value for name, value in error.get("headers", {}).items()}
        self.client.note_refusal(status, error, headers)
        outcome, self.client.outcome = self.client.outcome, ""
        if lane is None or not lane.asked:
            # The server closes the connection.
            return
        # What cannot wait is refused at once, whatever comes before it on its lane.
        newest = error["message"].endswith(NO_ROOM)
        turn = lane.asked[-1 if newest else 0]
        if newest and self.at_once:
            lane.outcome = outcome
            lane.asked.remove(turn)
            # Nothing says which of those it was that have not begun.
            for other in lane.asked:
                if other.read.last < 0:
                    other.question.may_be(turn.question)
            return
        if lane.resumed and code in NOT_RESUMED:
            lane.asked.pop(0)
            lane.resumed = False
            lane.left += 1
            return
        if turn.read.last >= 0:
            if "stream_id" not in event:
                # An error of the whole connection looks like one of the lane without a name. The
                # server closes the connection; what is under way goes on until then.
                self.closes = True
                return
            raise Violation(f"{code} as a refusal, after {turn.read.last + 1} events")
        lane.asked.pop(0)
        lane.resumed = lane.cancelled = False
        if lost(status, error):
            self._lost(lane, turn, code)
        self._failed(lane, turn, outcome)

    def _lost(self, lane: Lane, turn: Turn, code: str | None) -> None:
        """Look at a refusal to continue a response, and begin anew."""
        if not turn.before:
            raise Violation(f"{code}, though nothing is continued")
        last = turn.before[-1]
        if last.must_go_on(self.client.plan, to_lane=lane.latest is last):
            raise Violation(f"{code}: {last.read.id} is kept no longer")
        lane.chain = ()


async def talk(client: Client) -> None:
    """Talk on several lanes, and come back where the connection breaks."""
    talking = Talk(client)
    await come_back(client, talking.connect, lambda: talking.outcome)

"""Servers that break one promise each, as proof that the simulation would notice:
`python -m tests.simulation.breakages`.

Each is broken by a piece of code in a process of its own, which is forked once all is imported. It
prints a line for each: its name, and what was noticed, which is nothing if all seeds pass.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import sys
import traceback
from typing import Any

from tests.simulation import clock, sick_hook

# Seeds that are tried, each with so many clients.
SEEDS, CLIENTS = 30, 40
# Seconds for one of them.
LONGEST = 120
# Where their code stands, in tracebacks.
BREAKAGE = "<breakage>"
# The name of a server that has a bug, and what each violation says that is one; and the servers of
# which a bug is all that is noticed.
BUG = "a bug of the server"
CRASHES = {BUG, "that a brief timer does not know its time"}
BREAKAGES = {
    # Each loses one thing now and then.
    "an event": """
from aioserver.streams.stream import Stream
add, count = Stream.add_entry, [0]
def lossy(self, entry):
    count[0] += 1
    if count[0] % 40 or entry.status != b"chunk":
        return add(self, entry)
    self.last += entry.count
Stream.add_entry = lossy
""",
    # Of deadlines that clients set.
    "that a request has a deadline": """
from aioserver.limits.deadline import Guard
Guard._expire = lambda self, moment: None
""",
    # Of the doors.
    "that a closed hook has to decide": """
from aioserver.wings.hooks.hook_set import HookSet
HookSet._failed = lambda self, hook, event, request, fault: None
""",
    "when a token is over": """
from aioserver.wings.jwt import token
from aioserver.wings.jwt import token_callers
token.SKEW = token_callers.SKEW = 1e6
""",
    "that the token of a socket is over": """
from aioserver.faces.socket import Socket
Socket.check_token = lambda self: None
""",
    # Of what answers cost.
    "a usage that is taken out": """
from aioserver.providers.sinks import EventSink
EventSink._without_usage = lambda self, block, at, plain: block
""",
    "what a provider has counted": """
from msgspec.structs import replace
from aioserver.providers import costs
from aioserver.protocol.tokens import tokens_of
def fewer(usage):
    tokens = tokens_of(usage)
    return replace(tokens, answer=tokens.answer and tokens.answer - 1)
costs.tokens_of = fewer
""",
    "that a refusal costs nothing": """
from aioserver.providers import costs
costs.MIN_ERROR_STATUS = 1000
""",
    "a reservation": """
from aioserver.limits.budget import Reservation
settle, count = Reservation.settle, [0]
def lossy(self, tokens):
    count[0] += 1
    if count[0] % 5:
        settle(self, tokens)
Reservation.settle = lossy
""",
    # Of an answer that breaks off and is continued.
    "what was said last": """
from aioserver.protocol.transcript import ChatTranscript, ReadTranscript
for kind in (ChatTranscript, ReadTranscript):
    def text(self, text=kind.text):
        said = text(self)
        return said and said[:-1] or said
    kind.text = text
""",
    "that it is one answer": """
from aioserver.protocol import said
rest = said.ChatTranscript.rest
def other(self, earlier):
    self._head = {}
    return rest(self, earlier)
said.ChatTranscript.rest = other
""",
    "what has come before a fault in the rest": """
from aioserver.gateway import continuation
class Lossy(continuation.SeamSink):
    def _take(self, data, parts):
        super()._take(data, parts)
        if b"[DONE]" not in data and self.progress > 2:
            parts.clear()
continuation.SeamSink = Lossy
""",
    "how often it is continued": """
from aioserver.gateway import continuation
continuation.MAX_HOPS = 50
""",
    "that the call of a tool is not continued": """
from aioserver.protocol.transcript import BadEvent, ChatTranscript
text_of = ChatTranscript._text_of
def lax(self, data):
    try:
        return text_of(self, data)
    except BadEvent:
        return "call"
ChatTranscript._text_of = lax
""",
    "that nobody goes on behind a verdict": """
from aioserver.gateway import continuation
continuation.breaks = lambda fault: True
""",
    "that a verdict is final": """
from aioserver.provider_errors import ProviderRefused
ProviderRefused.failover = True
""",
    "what an attempt has cost": """
from msgspec.structs import replace
from aioserver.providers.provider import Provider
ended, count = Provider._ended, [0]
def generous(self, attempt, exc, part):
    count[0] += 1
    if part is not None and not count[0] % 5:
        part = replace(part, tokens_out=part.tokens_out + 100)
    ended(self, attempt, exc, part)
Provider._ended = generous
""",
    "a line of the ledger": """
from aioserver.usage.accounting import Usage
put, count = Usage._put, [0]
def lossy(self, *line):
    count[0] += 1
    if count[0] % 5:
        put(self, *line)
Usage._put = lossy
""",
    "that an attempt has its last line": """
from aioserver.usage.accounting import Usage
def forgetful(self, record):
    return None
Usage._taken = forgetful
""",
    "what was paid before the rest": """
from aioserver.gateway import continuation
from aioserver.protocol.transcript import Tokens
class Forgetful(continuation.Hop):
    def __init__(self, *args):
        super().__init__(*args)
        self.earlier = Tokens()
continuation.Hop = Forgetful
""",
    "a place": """
from aioserver.limits.resource import Resource
leave, count = Resource.leave, [0]
def lossy(self, grant, work, *, serve=True):
    count[0] += 1
    if count[0] % 100:
        leave(self, grant, work, serve=serve)
    else:
        grant.ticket.grants.pop(grant, None)
Resource.leave = lossy
""",
    "that a request stands in other lines": """
from aioserver.limits.scheduler import Scheduler
take_away = Scheduler._take_away
def forgetful(self, bid, now):
    if not bid.standing or bid.ticket.won in (None, bid):
        take_away(self, bid, now)
Scheduler._take_away = forgetful
""",
    "to wait at the members of a group": """
from aioserver.limits.resource import Resource
stand = Resource.stand
def nowhere(self, bid):
    stand(self, bid)
    if len(bid.ticket.bids) > 1:
        self.drop(bid)
Resource.stand = nowhere
""",
    "that a request was offered a member": """
from aioserver.limits.scheduler import Scheduler
take_away, start = Scheduler._take_away, Scheduler._start
def late(self, bid, now):
    if not bid.standing or bid.ticket.won in (None, bid):
        take_away(self, bid, now)
    else:
        self._loop.call_later(1.0, take_away, self, bid, now)
def once(self, bid):
    if bid.ticket in self.waiting:
        return start(self, bid)
    bid.resource.start(bid)
    return True
Scheduler._take_away, Scheduler._start = late, once
""",
    # Of answers in the background.
    "that half of the places are for others": """
from aioserver.providers import capacity
capacity.half = lambda places: places
""",
    "that it runs without a reader": """
from aioserver.streams.lifetime import Lifetime
Lifetime.run_in_background = lambda self, stream: None
""",
    "that a permit is given back": """
from aioserver.limits.resource import Resource
leave, count = Resource.leave, [0]
def forgetful(self, grant, work, *, serve=True):
    count[0] += self.within is not None
    if self.within is None or count[0] % 5:
        leave(self, grant, work, serve=serve)
Resource.leave = forgetful
""",
    "that nobody has cancelled an answer": """
from aioserver.streams.lifetime import Lifetime
def make_room(self, provider):
    for stream in self.store.running():
        if stream.place == provider and stream.readers:
            self.end(stream)
            return
Lifetime.make_room = make_room
""",
    "that an entry of the table is void": """
from aioserver.gateway.groups import Member
marks = {}
def holds(self):
    self.mark = marks.setdefault((id(self.marks), self.provider.name), len(marks))
    return not self.provider.health.breaker.dead
Member.mark_holds = holds
""",
    "that a member has died": """
from aioserver.providers.breaker import Breaker
die = Breaker._die
def unnoticed(self):
    die(self)
    self.deaths = 0
Breaker._die = unnoticed
""",
    "the end of a delay": """
from aioserver.limits.scheduler import Scheduler
begin = Scheduler._begin
def never(self, bids, now):
    for bid in bids:
        if bid.not_before > now and not bid.parked:
            bid.not_before += 1000.0
    begin(self, bids, now)
Scheduler._begin = never
""",
    "a fault": """
from aioserver.streams.entries import COMPLETE
from aioserver.streams.stream import Stream
Stream.fail = lambda self, error: self.end(COMPLETE, {}, data=b"data: [DONE]\\n\\n")
""",
    "the error of a cut": """
from aioserver.streams.stream import Stream
Stream.final_error = lambda self, error, number: b""
""",
    "that a provider's connection was cut": """
from aioserver.providers.exchange import Exchange
from aioserver.providers.reading_sinks import ChatSink
from aioserver.providers.sinks import EventSink
from aioserver.wings.responses.sinks import ResponseSink
lost = Exchange.connection_lost
def whole(self, exc):
    if self._parser.sink is None or self._done.done():
        lost(self, exc)
    else:
        self._parser.whole = True
        self._push()
Exchange.connection_lost = whole
for kind in (ChatSink, EventSink, ResponseSink):
    kind._complete_without_mark = True
""",
    "a pooled connection": """
from aioserver.providers.connections import Connections
give_back, count = Connections.give_back, [0]
def lossy(self, connection):
    count[0] += 1
    if count[0] % 20:
        give_back(self, connection)
Connections.give_back = lossy
""",
    "bytes of a body": """
from aioserver.faces.admission import BodyHold
release, count = BodyHold.release, [0]
def lossy(self):
    count[0] += 1
    if count[0] % 50:
        release(self)
BodyHold.release = lossy
""",
    "a task": """
import asyncio
from aioserver.limits.resource import Resource
leave, kept = Resource.leave, []
def lossy(self, *args, **kwargs):
    leave(self, *args, **kwargs)
    if len(kept) < 1:
        kept.append(asyncio.ensure_future(asyncio.Event().wait()))
Resource.leave = lossy
""",
    "a timer": """
import asyncio
from aioserver.limits.timer_wheel import TimerWheel
close = TimerWheel.close
def lossy(self):
    close(self)
    asyncio.get_running_loop().call_later(3600.0, print)
TimerWheel.close = lossy
""",
    # The others forget a bound, or a deadline.
    "the limit of a pool": """
from aioserver.providers import pool, pools
from aioserver.providers.capacity import Capacity
from aioserver.providers.connections import Connections
gate, connections, init = pool.connection_gate, Connections.__init__, Capacity.__init__
def wide_gate(*args):
    made = gate(*args)
    made.places.limit = 1000
    return made
def wide_connections(self, *args, **kwargs):
    connections(self, *args, **{**kwargs, "limit": 0})
def wide_queue(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.resource.places.limit = 1000
pool.connection_gate = pools.connection_gate = wide_gate
Connections.__init__ = wide_connections
Capacity.__init__ = wide_queue
""",
    "the bound of what is kept": """
from aioserver.streams.store import StreamStore
StreamStore._drop_unread = lambda self: None
""",
    "that kept answers are dropped": """
from aioserver.streams.lifetime import Lifetime
Lifetime._sweep = lambda self: None
""",
    "the deadline of a place": """
from aioserver.faces.admission import Admission
init = Admission.__init__
def patient(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.gate.queue_timeout = max(1.0, 4 * self.gate.queue_timeout)
Admission.__init__ = patient
""",
    "the deadline of a provider's queue": """
from aioserver.providers.capacity import Capacity
init = Capacity.__init__
def patient(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.resource.queue_timeout *= 4
Capacity.__init__ = patient
""",
    "the deadline of silence": """
from aioserver.providers.exchange import Exchange
Exchange.check_deadline = lambda self: 1.0
""",
    "the deadline of a connection": """
from aioserver.providers import pool
from aiohttp import ClientTimeout
init = pool.Pool.__init__
def patient(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self._connections._timeout = ClientTimeout(total=None, connect=60.0)
pool.Pool.__init__ = patient
""",
    "the deadline of a client's reading": """
from aioserver.limits.write_watchdog import WriteWatchdog
WriteWatchdog._look = lambda self: None
""",
    "the deadline of a body": """
from aioserver.faces import intake
intake.BODY_TIMEOUT = 600.0
from tests.simulation import silence
silence.BODY_TIMEOUT = 15.0
""",
    "the deadline of an idle connection": """
from aioserver.server import runner
options = runner._options
runner._options = lambda settings: {**options(settings), "keepalive_timeout": 600.0}
""",
    "the deadline of a pong": """
from aioserver.faces.socket import Socket
visit = Socket.visit
def forgiving(self, now):
    self._ping = None
    return visit(self, now)
Socket.visit = forgiving
""",
    "the deadline of a stop": """
from aioserver.server.connection import ConnectionServer
wait = ConnectionServer.wait_closed
async def patient(self, seconds, *, silent=False):
    await wait(self, 20 * seconds, silent=silent)
ConnectionServer.wait_closed = patient
""",
    "the weights of a fair queue": """
from aioserver.limits.fair_queue import FairQueue
add = FairQueue.add
def unfair(self, item, caller, *args, **kwargs):
    add(self, item, caller, *args, **kwargs)
    if caller == "key0":
        counter = self.callers.counters[caller]
        counter.tag = self.callers.virtual
        self.callers.push(counter)
FairQueue.add = unfair
""",
    "what a request has cost": """
from aioserver.limits.fair_queue import Charge
settle = Charge.settle
def forgetful(self, cost=None):
    settle(self)
    self.work = self.work if cost is None else cost
Charge.settle = forgetful
""",
    "the places that batch leaves": """
from aioserver.providers import capacity
interactive, batch = capacity.BOTH_CLASSES
capacity.BOTH_CLASSES = interactive, batch._replace(places=lambda limit: limit)
""",
    "the room that batch leaves": """
from aioserver.providers import capacity
interactive, batch = capacity.BOTH_CLASSES
capacity.BOTH_CLASSES = interactive, batch._replace(room=1.0)
""",
    "who waits while a place is free": """
from aioserver.limits.scheduler import Scheduler
serve, count = Scheduler.serve, [0]
def idle(self, resource):
    count[0] += resource.bare
    if not resource.bare or count[0] % 3:
        serve(self, resource)
Scheduler.serve = idle
""",
    "who waits at a provider": """
from aioserver.limits.scheduler import Scheduler
serve, count = Scheduler.serve, [0]
def idle(self, resource):
    count[0] += not resource.bare
    if resource.bare or count[0] % 3:
        serve(self, resource)
Scheduler.serve = idle
""",
    "that an id is known": """
from aioserver.gateway.gateway import Gateway
Gateway._existing = lambda self, request: None
""",
    # Faults that were found once, put back.
    "that rounding holds nobody back": """
from aioserver.limits import gcra, quota, scheduler
from aioserver.providers import capacity
gcra.ROUNDING = quota.ROUNDING = scheduler.ROUNDING = capacity.ROUNDING = 0.0
""",
    "that a brief timer does not know its time": """
from aioserver.faces.idle_sockets import IdleSockets
def asking(self, delay):
    timer = self._timer
    if timer is None or timer.when() > self._loop.time() + delay:
        self._timer = self._loop.call_later(delay, self._make_room)
IdleSockets._look_in = asking
""",
    "the type of an error in a response": """
from aioserver.wings.responses.sinks import ResponseSink
from aioserver.providers.sinks import PassingSink
ResponseSink._end_with_error = PassingSink._end_with_error
""",
    "that what was read makes room": """
from aioserver.streams.store import StreamStore
StreamStore.note_unread = lambda self: None
""",
    "that running answers keep no more than they need": """
from aioserver.streams.lifetime import Lifetime
from aioserver.streams.stream import Stream
Stream.cut = Lifetime.crowded = lambda self, size: None
""",
    "the error of a cancelled answer": """
from aioserver.streams.entries import CANCELLED
from aioserver.streams.stream import Stream
end = Stream.end
def silent(self, status, chunk, *, data=b""):
    end(self, status, chunk, data=b"" if status == CANCELLED else data)
Stream.end = silent
""",
    "the sequence number of an error": """
from aioserver.streams.stream import Stream
Stream.final_error = lambda self, error, number: self.events.render(error)
""",
    "what a late reader has missed": """
from aioserver.wings.responses.events import ResponseEvents
render = ResponseEvents.render
ResponseEvents.render = lambda self, error, seen=None: render(self, error)
""",
    # What conversations of the Responses API rely on.
    "the order of a lane": """
from aioserver.wings.responses import lanes
class Turns(lanes.deque):
    def popleft(self):
        return self.pop()
init = lanes.Lane.__init__
def unordered(self, *args):
    init(self, *args)
    self.turns = Turns()
lanes.Lane.__init__ = unordered
""",
    "that a lane is free": """
from aioserver.wings.responses.lanes import Lanes
done, count = Lanes.done, [0]
def busy(self, lane):
    count[0] += 1
    if count[0] % 10:
        done(self, lane)
Lanes.done = busy
""",
    "the latest response of a lane": """
from aioserver.wings.responses.stored import HeldResponses
HeldResponses.hold = lambda self, holder, response: None
""",
    "the responses of a connection that is gone": """
from aioserver.wings.responses.lanes import Lanes
Lanes.close = lambda self: None
""",
    "a stored response": """
from aioserver.wings.responses.stored import StoredResponses
add, count = StoredResponses.add, [0]
def lossy(self, response):
    count[0] += 1
    if count[0] % 5:
        add(self, response)
StoredResponses.add = lossy
""",
    "the bytes of a stored response": """
from aioserver.wings.responses.stored import StoredResponse
leave, count = StoredResponse.leave, [0]
def lossy(self):
    count[0] += 1
    return leave(self) if count[0] % 10 else None
StoredResponse.leave = lossy
""",
    "what came first in a conversation": """
from aioserver.wings.responses.stored import StoredResponse
chain = StoredResponse.chain
StoredResponse.chain = lambda self: chain(self)[-1:]
""",
    "that a response was deleted": """
from aioserver.wings.responses.stored import StoredResponses
drop = StoredResponses._drop
StoredResponses.drop = lambda self, caller, response_id: self.get(caller, response_id) is not None
""",
    "that only its provider knows what came before": """
from aioserver.wings.responses.stored import StoredResponse
init = StoredResponse.__init__
def whole(self, *args, **kwargs):
    init(self, *args, **{**kwargs, "whole": True})
StoredResponse.__init__ = whole
""",
    "when a client may come back that has sent too much": """
from aioserver.errors import RateLimitExceeded
from aioserver.faces import client_messages, socket
client_messages.too_much = socket.too_much = RateLimitExceeded
""",
    "that a trial is over which proves nothing": """
from aioserver.providers.breaker import Breaker
Breaker.unsure = lambda self, *, trial: None
""",
    "that a slow client gives way": """
from aioserver.providers.backpressure import Backpressure
Backpressure._look = lambda self: None
""",
    # What another attempt relies on.
    "that content commits an attempt": """
from aioserver.gateway import attempts
from aioserver.providers.request import ProviderRequest
ProviderRequest.forget_body = lambda self: None
attempts.begun = lambda stream: stream is not None and stream.ended
""",
    "that a preamble goes with its attempt": """
from aioserver.providers.sinks import PassingSink, StreamSink
def shown(self):
    if self._held and not self._stream.ended:
        self._show(b"".join(self._held))
    self._held = []
    StreamSink.forget(self)
PassingSink.forget = shown
""",
    "the preamble of an answer": """
from aioserver.providers.sinks import PassingSink
release = PassingSink._release
def lossy(self):
    self._held = self._held[-1:]
    return release(self)
PassingSink._release = lossy
""",
    "the preamble of a response from a bridge": """
from aioserver.wings.responses.sinks import BridgeSink
from aioserver.providers.reading_sinks import ReadingSink
begin = BridgeSink._begin
def early(self, data):
    parts = begin(self, data)
    return parts if self._stream.answered_at else [*self._writer.begin(), *parts]
BridgeSink._begin = early
""",
    # What conversations in a file rely on.
    "a turn of a conversation": """
from aioserver.wings.conversations.history import History
keep, count = History.keep, [0]
def lossy(self, *args, **kwargs):
    count[0] += 1
    return keep(self, *args, **kwargs) if count[0] % 5 else None
History.keep = lossy
""",
    "that a conversation was deleted": """
from aioserver.wings.conversations.sqlite import SqliteStorage
async def kept(self, caller, conversation_id, *, asked):
    return True
SqliteStorage.delete = kept
""",
    # What instances promise each other.
    "the end of a lease": """
from aioserver.wings.cluster.leases import Leases
Leases.check = lambda self: None
""",
    "that others wait for a slow client's place": """
from aioserver.wings.cluster.leased import LeasedCapacity
LeasedCapacity.waiting_elsewhere = 0
""",
    "whose an id is": """
from aioserver.wings.cluster.claims import OURS
from tests.simulation.shared_server import SimulatedStore
take = SimulatedStore.take
async def ours(self, *args, **kwargs):
    return (await take(self, *args, **kwargs))._replace(state=OURS)
SimulatedStore.take = ours
""",
    "an event of a mirror": """
from aioserver.wings.cluster.mirrors import Mirror
append, count = Mirror._append, [0]
def lossy(self, entries):
    count[0] += 1
    if entries and not count[0] % 10:
        self.stream.last += entries.pop(0).count
    append(self, entries)
Mirror._append = lossy
""",
    "that an owner was killed": """
from aioserver.wings.cluster.mirrors import Mirror
Mirror.lose = lambda self: None
""",
    "what it has when it comes back": """
from aioserver.wings.cluster.grants import Grant
op = Grant.op
def forgetful(self):
    said = op(self)
    return said and said._replace(have=0)
Grant.op = forgetful
""",
    "that a response could not be written": """
from aioserver.wings.responses import stored as stored_responses
stored_responses._note_written = lambda response, kept: response.release()
""",
    "a response that others find": """
from aioserver.wings.responses.redis import SharedResponses
import asyncio
keep, count = SharedResponses.keep, [0]
def lossy(self, *args, whole):
    count[0] += 1
    if count[0] % 5:
        return keep(self, *args, whole=whole)
    kept = asyncio.get_running_loop().create_future()
    kept.set_result(True)
    return kept
SharedResponses.keep = lossy
""",
    "that a slot is used": """
from aioserver.wings.cluster.rates import SharedRate
SharedRate.take = lambda self, seconds: None
""",
    "when a slot is over": """
from aioserver.wings.cluster.rates import PrefetchedSlots
add = PrefetchedSlots.add
PrefetchedSlots.add = lambda self, begins, ends: add(self, begins, begins + 2.0)
""",
    "what has started when its state is lost": """
from aioserver.wings.cluster.lease_messages import UNKNOWN_PACE
from tests.support.settle_model import _Call
pace = _Call.pace
def forgetful(self, op):
    self.world.lost = 0.0
    return pace(self, op._replace(known=UNKNOWN_PACE))
_Call.pace = forgetful
""",
    "tokens that a request has taken": """
from aioserver.wings.cluster.shared_budget import PrefetchedTokens
take = PrefetchedTokens._take
def generous(self, reservation):
    had = self._in_hand
    take(self, reservation)
    self._in_hand = max(had, self._in_hand)
PrefetchedTokens._take = generous
""",
    "that who waits follows its group": """
from aioserver.gateway.candidates import Candidates
Candidates.regroup = lambda self: None
""",
    # Of messages over a bridge.
    "the index of a block": """
from aioserver.wings.anthropic.bridge.events import MessageWriter
begin = MessageWriter._begin_block
def skipping(self, kind, events):
    self._blocks += self._blocks > 0
    begin(self, kind, events)
MessageWriter._begin_block = skipping
""",
    "that one block is open": """
from aioserver.wings.anthropic.bridge.events import TEXT, MessageWriter
end = MessageWriter._end_block
def open_still(self, kind, call, events):
    if kind is TEXT and not self._called:
        end(self, kind, call, events)
MessageWriter._end_block = open_still
""",
    "that one call is written at a time": """
from aioserver.wings.anthropic.bridge.events import MessageWriter
argue = MessageWriter._argue
def mixing(self, call, text, events):
    current = self._call_under_way
    if current is not None and call is not current and call in self._kept:
        call = current
    argue(self, call, text, events)
MessageWriter._argue = mixing
""",
    "white space in front of a call": """
from aioserver.wings.anthropic.bridge.events import MessageWriter
write = MessageWriter._write_text
def eager(self, kind, text, events):
    if self._block is not kind and text.isspace():
        self._close(events)
        self._open(kind, events)
    write(self, kind, text, events)
MessageWriter._write_text = eager
""",
    "the reasoning of a whole answer": """
from aioserver.wings.anthropic.bridge.whole import WholeWriter
from aioserver.wings.anthropic.bridge.events import MessageWriter
def silent(self, piece, choice, events):
    if piece.kind != "reasoning":
        MessageWriter._speak(self, piece, choice, events)
WholeWriter._speak = silent
""",
    "that a call is why an answer ends": """
from aioserver.wings.anthropic.bridge.events import MessageWriter
reason = MessageWriter._stop_reason
def said(self):
    found = reason(self)
    return b"end_turn" if found == b"tool_use" and self.finish_reason == "stop" else found
MessageWriter._stop_reason = said
""",
    "that a message has not ended well": """
from aioserver.wings.anthropic.sink import BridgeSink
BridgeSink._complete_without_mark = True
""",
    "the tokens of a message": """
from aioserver.wings.anthropic.bridge import events
from aioserver.protocol import tokens
events.tokens_of = lambda usage: tokens.tokens_of({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 10}})
events.max = lambda least, count: count
""",
    "what the engine calls a call": """
from aioserver.wings.anthropic.bridge import ids
ids.own = lambda shown: shown
""",
    "that two calls have the same id": """
from aioserver.wings.anthropic.bridge import ids
from aioserver.wings.anthropic.bridge.events import MessageWriter
MessageWriter._id_for = lambda self, own: ids.shown(own) if own else "toolu_" + self._name[:12]
""",
    "that results stand behind their calls": """
from aioserver.protocol.bridging.turns import Turns
close = Turns._close_user
def late(self):
    if self._speaking or not (self._below or self._asked):
        return close(self)
    results, self._results = self._results, []
    close(self)
    self._messages += results
Turns._close_user = late
""",
    "that the system is one message": """
from aioserver.protocol.bridging.turns import PARAGRAPH, Turns
def instruct(self, text):
    self._close_user()
    self._close_assistant()
    self._close_system()
    self._system.append(text)
Turns.instruct = instruct
""",
    "a reminder": """
from aioserver.protocol.bridging.turns import Turns
instruct = Turns.instruct
def lossy(self, text):
    if not (self._messages or self._joined):
        instruct(self, text)
Turns.instruct = lossy
""",
    "what changes with each request": """
from aioserver.wings.anthropic.bridge import blocks
blocks._BILLING = b"none"
""",
    "what an engine refuses": """
from aioserver.gateway.bridging import ChatCapabilities
ChatCapabilities.refuse = ChatCapabilities.keep_most = lambda self, *args: None
""",
    "that it has repeated a request": """
from aioserver.gateway.bridging import LearningAttempt
count = [0]
repeats = LearningAttempt._repeats_without
def forgetful(self, what):
    count[0] += 1
    again = repeats(self, what)
    if count[0] % 40:
        self._learnt -= {what}
    return again
LearningAttempt._repeats_without = forgetful
""",
    # Of agents that wait.
    "that a session is a flow": """
from aioserver.faces import intake
intake.SESSION_HEADERS = ()
""",
    "that a comment is no event": """
from aioserver.faces import openai
from aioserver.wings.responses import face
face._dialect = lambda request: openai.OPENAI
""",
    BUG: """
from aioserver.providers import sinks
sinks.complete = None
""",
}
# A cluster in which everything goes well, but for what a breakage needs.
GOOD: dict[str, Any] = {"instances": 3, "shared": {}, "balancer": "random", "operations": {}}
CROWDED = {
    "llm.providers.sim.http_client.concurrent_requests": 5,
    "llm.providers.sim.http_client.max_connections": 5,
    "llm.providers.sim.http_client.max_keepalive": 5,
    "llm.providers.sim.http_client.requests_per_minute": 1_000_000,
    "llm.providers.sim.http_client.queue_size": 1000,
    "llm.providers.sim.http_client.queue_timeout": 30.0,
}
PACED = {
    "llm.providers.sim.http_client.requests_per_minute": 600,
    "llm.providers.sim.http_client.queue_size": 1000,
    "llm.providers.sim.http_client.queue_timeout": 30.0,
}
KEPT = {"chat.streams.resume_window": 30.0, "chat.streams.max_kept_bytes": 268_435_456}
LANES = {"faces": ("response lanes",), "responses": "forgets", "faults": {}, "changes": KEPT}
UPLOADS: dict[str, Any] = {
    "uploads": 0.3,
    "spread": 5.0,
    "faults": {},
    "habits": {},
    "provider_links": {},
    "provider_fault_share": 0.0,
    "changes": {
        **CROWDED,
        "chat.websocket.concurrency.max_connections": 300,
        "chat.websocket.concurrency.connection_queue_size": 300,
        "chat.websocket.concurrency.max_body_bytes": 1 << 28,
    },
}
CHAINS = {"faces": ("response chain",), "responses": "forgets", "faults": {}, "changes": KEPT}
TALKS = {"faces": ("conversation",), "sql": True, "faults": {}, "changes": KEPT}
# What a run must try, so that few seeds are enough to notice some of them.
GROUPED = {"spare": True, "pinned": False, "grouped": "least_busy"}
ENGINES = {
    "engines": {
        "members": [{"provider": name} for name in ("sim", "spare", "third")],
        "choose": "least_busy",
        "affinity": "prefix",
    }
}
THIRD = {"engines": {**ENGINES["engines"], "members": [{"provider": "third"}]}}
AT_HOME = {"spare": True, "pinned": False, "grouping": {"models": ENGINES, "changed": ENGINES}}
NO_FAULTS = {"faults": {}, "provider_links": {}, "provider_fault_share": 0.0, "operations": {}}
# Requests of one key at three instances, which need more than its budget.
SPENT: dict[str, Any] = {
    **NO_FAULTS,
    **GOOD,
    "clients": 300,
    "spread": 30.0,
    "faces": ("stream", "whole"),
    "keys": (("spender", 1.0, 1),),
    "changes": {
        **CROWDED,
        "auth.keys": [
            {
                "name": "spender",
                "sha256": hashlib.sha256(b"aio-spender").hexdigest(),
                "priority": 1,
                "class": "interactive",
                "max_concurrent": 1000,
                "max_connections": 0,
                "requests_per_minute": 100_000,
                "queue_size": 200,
                "tokens_per_minute": 20_000,
                "tokens_per_day": 0,
            }
        ],
    },
}
# All clients have tokens of one name.
TOKENS: dict[str, Any] = {
    **NO_FAULTS,
    "keys": (("token", 1.0, 1, True),),
    "tokens": {"token": {"class": "interactive", "queue_size": 0}},
}
CROWD = {
    "llm.providers.sim.http_client.concurrent_requests": 2,
    "llm.providers.sim.http_client.max_connections": 2,
    "llm.providers.sim.http_client.max_keepalive": 2,
    "llm.providers.sim.http_client.requests_per_minute": 1_000_000,
    "llm.providers.sim.http_client.queue_timeout": 30.0,
}
# A provider that breaks off, often before its first token, and another one.
SPARED: dict[str, Any] = {
    "spare": True,
    "pinned": False,
    "faces": ("stream",),
    "faults": {},
    "habits": {},
    "provider_links": {},
    "provider_fault_share": 0.7,
    "provider_faults": ("cut-<n>", "end-<n>", "stall-<n>", "error-event-<n>", "bad-json-<n>"),
    "preambles": 0.7,
}
CONTINUED: dict[str, Any] = {
    "continued": True,
    "faces": ("stream", "websocket"),
    "faults": {},
    "habits": {},
    "provider_fault_share": 0.5,
    "provider_faults": ("cut-<n>",),
    "changes": {
        "llm.providers.sim.continuation": "prefill",
        "llm.providers.sim.http_client.max_retries": 0,
    },
}
# By a provider without that fault, so that the rest can be whole.
SAID_ELSEWHERE: dict[str, Any] = {
    **CONTINUED,
    "faces": ("websocket",),
    "spare": True,
    "pinned": False,
}
# Agents that ask for messages of engines with chat completions alone.
BRIDGED: dict[str, Any] = {
    **NO_FAULTS,
    "messages": 1.0,
    "message_kinds": ("bridged", "bridged"),
    "refuses": ("stream_options", "top_k"),
    "habits": {},
    "silent": 0.0,
    "spread": 30.0,
    "changes": {
        "llm.providers.sim.messages": "bridge",
        "llm.providers.sim.http_client.requests_per_minute": 1_000_000,
        "chat.websocket.concurrency.max_connections": 300,
        "chat.websocket.concurrency.connection_queue_size": 300,
        "chat.websocket.concurrency.max_body_bytes": 1 << 28,
        "llm.providers.sim.http_client.concurrent_requests": 20,
        "llm.providers.sim.http_client.max_connections": 20,
        "llm.providers.sim.http_client.max_keepalive": 20,
        "llm.providers.sim.http_client.queue_size": 1000,
        "llm.providers.sim.http_client.queue_timeout": 30.0,
    },
}
JUDGED: dict[str, Any] = {
    **SPARED,
    "continued": True,
    "verdicts": 0.5,
    "changes": CONTINUED["changes"],
}
# Of a provider that has no responses, with few places.
BACKGROUND: dict[str, Any] = {
    "background": 0.7,
    "responses": "bridged",
    "operations": {},
    "changes": {
        "llm.providers.sim.responses": False,
        "llm.providers.sim.http_client.concurrent_requests": 4,
        "llm.providers.sim.http_client.max_connections": 4,
        "llm.providers.sim.http_client.max_keepalive": 4,
        "llm.providers.sim.http_client.queue_timeout": 30.0,
    },
}
NEEDS: dict[str, dict[str, Any]] = {
    "that a request has a deadline": {"hurried": 0.5},
    "that a closed hook has to decide": {"changes": {"hooks": [sick_hook.CLOSED]}},
    "when a token is over": TOKENS,
    "that the token of a socket is over": {
        **TOKENS,
        **LANES,
        "clients": 150,
        "habits": {"read slowly": 1.0},
        "changes": {**UPLOADS["changes"], **KEPT},
    },
    **dict.fromkeys(
        (
            *("that content commits an attempt", "that a preamble goes with its attempt"),
            "the preamble of an answer",
        ),
        SPARED,
    ),
    **dict.fromkeys(
        (
            *("the index of a block", "that one block is open", "a reminder"),
            *("that one call is written at a time", "white space in front of a call"),
            *("the reasoning of a whole answer", "that a call is why an answer ends"),
            *("the tokens of a message", "what the engine calls a call"),
            *("that two calls have the same id", "that results stand behind their calls"),
            *("that the system is one message", "what changes with each request"),
            *("what an engine refuses", "that it has repeated a request"),
        ),
        BRIDGED,
    ),
    "that a session is a flow": {"agents": True},
    "that a comment is no event": {"agents": True},
    "that a message has not ended well": {
        **BRIDGED,
        "provider_fault_share": 0.5,
        "provider_faults": ("cut-<n>", "end-<n>"),
    },
    "the preamble of a response from a bridge": {
        **SPARED,
        "faces": ("responses",),
        "responses": "lacks",
    },
    "what was said last": CONTINUED,
    "that it is one answer": CONTINUED,
    "what has come before a fault in the rest": SAID_ELSEWHERE,
    "how often it is continued": CONTINUED,
    "that the call of a tool is not continued": {**CONTINUED, "faces": ("stream",), "calls": 0.5},
    "that nobody goes on behind a verdict": JUDGED,
    "that a verdict is final": JUDGED,
    "what an attempt has cost": SPARED,
    "what was paid before the rest": SAID_ELSEWHERE,
    **dict.fromkeys(
        (
            *("that half of the places are for others", "that it runs without a reader"),
            "that a permit is given back",
        ),
        BACKGROUND,
    ),
    "that nobody has cancelled an answer": {**GOOD, "faces": ("websocket", "sse")},
    "that a request stands in other lines": GROUPED,
    "to wait at the members of a group": GROUPED,
    "that a request was offered a member": {**AT_HOME, "spread": 0.1, "changes": CROWD},
    "that who waits follows its group": {
        **AT_HOME,
        "grouping": {"models": ENGINES, "changed": THIRD},
        "operations": {"regroup": 3.0},
        "spread": 3.0,
        "changes": CROWD,
    },
    "that an entry of the table is void": {
        **AT_HOME,
        "faces": ("conversation", "stream"),
        "grouping": {"models": ENGINES, "changed": THIRD},
        "operations": {"regroup": 8.0, "restore groups": 12.0},
        "spread": 30.0,
    },
    "that a member has died": {
        **AT_HOME,
        **NO_FAULTS,
        "clients": 200,
        "continued": False,
        "faces": ("stream",),
        "grouping": {"models": ENGINES, "changed": ENGINES, "kills": ((5.0, "sim", 20.0),)},
        "spread": 60.0,
        "changes": CROWD,
    },
    "the end of a delay": {
        **AT_HOME,
        **NO_FAULTS,
        "faces": ("stream", "whole"),
        "spread": 0.1,
        "changes": CROWD,
    },
    "that a provider's connection was cut": {"provider_links": {"reset": 0.5}},
    "the deadline of a client's reading": {
        "faces": ("whole",),
        "faults": {"small kernel": 0.5, "black hole": 0.5},
    },
    "the type of an error in a response": {
        "faces": ("responses",),
        "provider_fault_share": 0.5,
        "provider_faults": ("error-event-3",),
    },
    "that a brief timer does not know its time": {
        "spread": 0.1,
        "changes": {
            "chat.websocket.concurrency.max_connections": 5,
            "chat.websocket.concurrency.queue_timeout": 5.0,
        },
    },
    "that running answers keep no more than they need": {
        "faces": ("websocket", "sse"),
        "faults": {},
        "habits": {"leave": 0.9},
        "large": 0.5,
        "changes": {"chat.streams.resume_window": 30.0, "chat.streams.max_kept_bytes": 65_536},
    },
    "the error of a cancelled answer": {
        "faces": ("stored responses", "keyed stream"),
        "faults": {"reset": 0.3},
        "habits": {"return": 0.9, "leave": 0.5},
    },
    "the sequence number of an error": {
        "faces": ("stored responses",),
        "habits": {"return": 0.9, "leave": 0.9},
    },
    "what a late reader has missed": {
        "clients": 200,
        "faces": ("stored responses",),
        "faults": {"slow link": 0.5, "small kernel": 0.5},
        "habits": {"return": 0.9},
    },
    "that rounding holds nobody back": {"spread": 30.0},
    **dict.fromkeys(
        (
            *("the order of a lane", "that a lane is free", "the latest response of a lane"),
            "the responses of a connection that is gone",
        ),
        LANES,
    ),
    **dict.fromkeys(
        (
            *("a stored response", "the bytes of a stored response"),
            *("what came first in a conversation", "that a response was deleted"),
        ),
        CHAINS,
    ),
    "that only its provider knows what came before": {**CHAINS, "responses": "keeps"},
    **dict.fromkeys(("a turn of a conversation", "that a conversation was deleted"), TALKS),
    "when a client may come back that has sent too much": {
        "faces": ("response lanes",),
        "faults": {},
        "changes": {"chat.websocket.concurrency.max_connections": 5},
    },
    "the end of a lease": {
        **GOOD,
        "clients": 100,
        "spread": 30.0,
        "changes": CROWDED,
        "shared": {"events": ((10.0, "stop instance", 12.0),)},
    },
    "whose an id is": {
        **GOOD,
        "clients": 15,
        "faces": ("sse", "keyed stream"),
        "habits": {"ask twice": 1.0},
        "changes": KEPT,
    },
    "that an id is known": {
        "faces": ("sse", "keyed stream"),
        "habits": {"ask twice": 1.0},
        "changes": KEPT,
    },
    "an event of a mirror": {
        **GOOD,
        "clients": 15,
        "faces": ("websocket", "sse"),
        "habits": {"ask twice": 1.0},
    },
    "that a trial is over which proves nothing": {
        **UPLOADS,
        "uploads": 0.0,
        "clients": 80,
        "spread": 30.0,
        "spare": True,
        "pinned": False,
        "provider_fault_share": 0.8,
        "provider_faults": ("status-500",),
        "habits": {"leave": 0.5},
    },
    "that a slow client gives way": UPLOADS,
    # So few that whoever waits does so at another instance.
    "that others wait for a slow client's place": {
        **GOOD,
        **UPLOADS,
        "clients": 20,
        "spread": 60.0,
        "changes": {
            **UPLOADS["changes"],
            "llm.providers.sim.http_client.concurrent_requests": 2,
            "llm.providers.sim.http_client.max_connections": 2,
            "llm.providers.sim.http_client.max_keepalive": 2,
        },
    },
    "that an owner was killed": {
        **GOOD,
        "faces": ("websocket", "sse"),
        "habits": {"ask twice": 1.0, "read slowly": 0.5},
        "shared": {"events": ((5.0, "kill instance", 3.0),)},
    },
    "what it has when it comes back": {
        **GOOD,
        "spread": 5.0,
        "changes": CROWDED,
        "shared": {"events": ((2.0, "kill", 3.0), (8.0, "empty", 0.0))},
    },
    "that a response could not be written": {
        **GOOD,
        **CHAINS,
        "instances": 3,
        "shared": {"lost": 0.1},
    },
    "a response that others find": {**GOOD, **CHAINS},
    "that a slot is used": {
        **GOOD,
        "clients": 15,
        "spread": 0.1,
        "changes": {"llm.providers.sim.http_client.requests_per_minute": 600},
    },
    "tokens that a request has taken": SPENT,
    "when a slot is over": {**GOOD, "faults": {}, "changes": PACED},
    "what has started when its state is lost": {
        **GOOD,
        "shared": {"events": ((1.0, "empty", 0.3), (8.0, "roll back", 3.0), (16.0, "empty", 0.3))},
        "faults": {},
        "spread": 0.1,
        "changes": {
            **PACED,
            "llm.providers.sim.http_client.concurrent_requests": 100,
            "llm.providers.sim.http_client.max_connections": 100,
        },
    },
}
# The seed that is tried first, where an earlier one is known to notice nothing: for speed alone.
FIRST = {
    "that a session is a flow": 8,
    "that a comment is no event": 8,
    "a reminder": 1,
    "the reasoning of a whole answer": 1,
    "what the engine calls a call": 1,
    "white space in front of a call": 3,
    "that a member has died": 1,
    "that nobody has cancelled an answer": 4,
    "that a trial is over which proves nothing": 1,
    "that others wait for a slow client's place": 1,
    "bytes of a body": 2,
    "the limit of a pool": 4,
    "the bound of what is kept": 21,
    "the deadline of a place": 7,
    "the deadline of a provider's queue": 4,
    "the deadline of silence": 1,
    "the deadline of a connection": 17,
    "the deadline of a client's reading": 1,
    "the deadline of a body": 7,
    "the deadline of an idle connection": 11,
    "the deadline of a pong": 16,
    "the deadline of a stop": 18,
    "the places that batch leaves": 4,
    "that rounding holds nobody back": 25,
    "that what was read makes room": 23,
    "the error of a cancelled answer": 8,
    "the sequence number of an error": 8,
    "what a late reader has missed": 22,
    "the order of a lane": 1,
    "a usage that is taken out": 1,
    "that a lane is free": 1,
    "the latest response of a lane": 2,
    "the bytes of a stored response": 1,
    "that a response was deleted": 1,
    "that only its provider knows what came before": 3,
    "the end of a lease": 9,
    "an event of a mirror": 1,
    "what it has when it comes back": 9,
    "that an owner was killed": 4,
    "when a slot is over": 16,
    "tokens that a request has taken": 1,
    "what has started when its state is lost": 25,
}


def noticed(name: str) -> str:
    """Return what is noticed of the server that has forgotten *name*."""
    from tests.simulation import agents
    from tests.simulation.configuration import Key
    from tests.simulation.grouping import Grouping
    from tests.simulation.plan import Shared, draw
    from tests.simulation.world import play
    from tests.support.issuer import jwt_settings

    exec(compile(BREAKAGES[name], BREAKAGE, "exec"), {})
    first = FIRST.get(name, 0)
    for seed in range(first, first + SEEDS):
        # A few agents in each run would be a few others less.
        needs = {"messages": 0.0, "refuses": (), **NEEDS.get(name, {})}
        if needs.pop("agents", False):
            plan = agents.plan_of(seed)
            if violations := _counting(name, play(plan).violations):
                return f"seed {seed}: {violations[0]}"
            continue
        if "shared" in needs:
            needs["shared"] = Shared(**needs["shared"])
        if "keys" in needs:
            needs["keys"] = tuple(Key(*each) for each in needs["keys"])
        if "grouping" in needs:
            needs["grouping"] = Grouping(**needs["grouping"])
        plan = draw(seed, CLIENTS, needs.get("instances", 1), groups=False)
        changes = plan.changes | needs.get("changes", {})
        if limits := needs.pop("tokens", None):
            changes |= {
                "auth.jwt": jwt_settings("", limits=limits, jwks_url=None),
                "auth.keys": [],
            }
        plan = dataclasses.replace(plan, **{**needs, "changes": changes})
        if violations := _counting(name, play(plan).violations):
            return f"seed {seed}: {violations[0]}"
    return ""


def _counting(name: str, violations: list[str]) -> list[str]:
    """Return those of *violations* that count as a notice of the server that has forgotten
    *name*.
    """
    assert not any("ConfigurationError" in violation for violation in violations), violations
    if name in CRASHES:
        return violations
    # Code that fits the server no more breaks no promise: what it raises is no notice.
    assert not any(f"raised in {BREAKAGE}" in each for each in violations), violations
    return [each for each in violations if BUG not in each]


def main() -> None:
    """Break each server in a process of its own, and print what was noticed."""
    clock.fix_hashes("tests.simulation.breakages")
    clock.install()
    from tests.simulation.swarm import prepare

    prepare()
    for name in sys.argv[1:] or BREAKAGES:
        sys.stdout.flush()
        if child := os.fork():
            os.waitpid(child, 0)
        else:
            # An end, if the broken server goes on for ever.
            signal.alarm(LONGEST)
            try:
                print(f"{name}\t{noticed(name)}", flush=True)
            except Exception:  # noqa: BLE001 - the process ends without a word otherwise
                traceback.print_exc()
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()

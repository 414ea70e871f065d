"""Servers that break one promise each, as proof that the simulation would notice:
`python -m tests.simulation.breakages`.

Each stands for a class of faults that one of the watchers notices, so that each watcher has one.
A server is broken in a process of its own, which is forked once all is imported. It ends as soon as
something is noticed, and prints that behind the server's name; nothing if all seeds pass.
"""

# What a server does is replaced, whatever its type is.
# ruff: noqa: ANN001, ANN002, ANN003, ANN202
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import dataclasses
import hashlib
import os
import pkgutil
import signal
import sys
import tempfile
import traceback
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from tests.simulation import clock, sick_hook

if TYPE_CHECKING:
    from collections.abc import Callable

    Needs = dict[str, Any]

# Seeds that are tried, each with so many clients; and the seconds for one of them.
SEEDS, CLIENTS, LONGEST = 30, 40, 120
# What each violation says that is a bug of the server; and the servers of which that counts.
BUG = "a bug of the server"
FULL_HOUSE = "a full house with keys"
CRASHES = {BUG, FULL_HOUSE}
# The one that is noticed among agents alone.
AGENTS = "that a session is a flow"
# Sections of the configuration; nothing of the package is imported before the clock is virtual.
HTTP = "llm.providers.sim.http_client"
GATE = "chat.websocket.concurrency"


@dataclasses.dataclass(frozen=True, slots=True)
class Breakage:
    """What a server has instead of what is at each path; and what a run *needs* to try, so that
    few seeds are enough to notice it. *seed* is the first one that is tried, for speed alone.
    """

    replaced: dict[str, Callable[[Any], Any]]
    seed: int
    needs: Needs

    def damage(self) -> None:
        """Break the server."""
        for path, replacement in self.replaced.items():
            owner, _, name = path.replace(":", ".").rpartition(".")
            kind = pkgutil.resolve_name(
                owner if path.startswith("tests") else f"aioserver.{owner}"
            )
            setattr(kind, name, replacement(getattr(kind, name)))


BREAKAGES: dict[str, Breakage] = {}


def breaks(
    name: str, paths: str, by: Callable[[Any], Any], needs: Needs | None = None, seed: int = 0
) -> None:
    """Add a server in which *by* replaces what is at each of *paths*, and is called with that."""
    BREAKAGES[name] = Breakage(dict.fromkeys(paths.split(), by), seed, needs or {})


def left_out(every: int = 1) -> Callable[[Any], Any]:
    """Return what leaves out each call whose number is a multiple of *every*."""

    def by(whole):
        numbers = count(1)
        return lambda *args, **more: whole(*args, **more) if next(numbers) % every else None

    return by


def constant(value: object) -> Callable[[Any], Any]:
    """Return what replaces anything by *value*."""
    return lambda _: value


def then(after: Callable[[Any], object]) -> Callable[[Any], Any]:
    """Return what lets each call of a method be followed by *after*."""

    def by(whole):
        def followed(self, *args, **more):
            whole(self, *args, **more)
            after(self)

        return followed

    return by


def places(number: int, **more: Any) -> dict[str, Any]:
    """Return the changes by which the provider has so many places, and *more* of its settings."""
    same = dict.fromkeys(("concurrent_requests", "max_connections", "max_keepalive"), number)
    return {f"{HTTP}.{name}": value for name, value in (same | more).items()}


def keys_of(*names: str, token: bool = False, **limits: Any) -> Needs:
    """Return what a run needs in which all clients have keys, or tokens, of these *limits*."""
    limits = {"class": "interactive", "queue_size": 0} | limits
    limits = {"max_concurrent": 1000, "requests_per_minute": 100_000} | limits
    digests = {name: hashlib.sha256(f"aio-{name}".encode()).hexdigest() for name in names}
    return {
        "keys": tuple((name, 1 / len(names), 1, token) for name in names),
        "entries": [{"name": name, "sha256": digests[name]} | limits for name in names],
    }


def one_key(*, token: bool = False, **limits: Any) -> Needs:
    """Return what a run needs in which all clients have one key, or a token, of these *limits*."""
    return keys_of("only", token=token, **limits)


def cluster(*events: tuple[float, str, float], **more: Any) -> Needs:
    """Return what a run needs of three instances, to which *events* happen, and *more*."""
    good = {"instances": 3, "balancer": "random", "operations": {}, "shared": {"events": events}}
    return good | more


# What a run needs: the fields of its plan. What goes well beside what is broken; and who is there.
GOOD: Needs = {"faults": {}, "provider_links": {}, "provider_fault_share": 0.0, "operations": {}}
FAST = {"requests_per_minute": 1_000_000, "queue_size": 1000, "queue_timeout": 30.0}
FIVE = {"changes": places(5, **FAST)}
KEPT = {"chat.streams.resume_window": 30.0, "chat.streams.max_kept_bytes": 1 << 28}
TWICE: Needs = {"habits": {"ask twice": 1.0}, "faces": ("sse", "keyed stream"), "changes": KEPT}
ROOMY = {f"{GATE}.{name}": 300 for name in ("max_connections", "connection_queue_size")}
ROOMY |= places(5, **FAST) | {f"{GATE}.max_body_bytes": 1 << 28}
LANES: Needs = {"faces": ("response lanes",), "responses": "forgets", "faults": {}}
LANES["changes"] = KEPT
CHAINS = LANES | {"faces": ("response chain",)}
SPARE: Needs = {"spare": True, "pinned": False}
ENGINES, THIRD = (
    {"engines": {"members": [{"provider": each} for each in names], "choose": "least_busy"}}
    for names in (("sim", "spare", "third"), ("third",))
)
# Who waits for a group while its members change.
REGROUPED = SPARE | {"spread": 3.0, "operations": {"regroup": 3.0}}
REGROUPED |= {"grouping": {"models": ENGINES, "changed": THIRD}}
REGROUPED |= {"changes": places(2, requests_per_minute=1_000_000, queue_timeout=30.0)}
# A provider that breaks off, often before its first token, and another one; or none.
SPARED = SPARE | GOOD | {"faces": ("stream",), "habits": {}, "preambles": 0.7}
SPARED |= {"provider_fault_share": 0.7, "provider_faults": ("cut-<n>", "end-<n>", "bad-json-<n>")}
CONTINUED: Needs = {"continued": True, "faces": ("stream", "websocket"), "faults": {}}
CONTINUED |= {"habits": {}, "provider_fault_share": 0.5, "provider_faults": ("cut-<n>",)}
CONTINUED |= {"changes": {"llm.providers.sim.continuation": "prefill", f"{HTTP}.max_retries": 0}}
# Agents that ask for messages of engines with chat completions alone.
BRIDGED = GOOD | {"messages": 1.0, "message_kinds": ("bridged", "bridged"), "habits": {}}
BRIDGED |= {"refuses": ("stream_options", "top_k"), "spread": 30.0, "silent": 0.0}
BRIDGED |= {"changes": ROOMY | places(20) | {"llm.providers.sim.messages": "bridge"}}
# Answers in the background, of a provider that has no responses.
BACKGROUND: Needs = {"background": 0.7, "responses": "bridged", "operations": {}}
BACKGROUND["changes"] = places(4, queue_timeout=30.0) | {"llm.providers.sim.responses": False}
SLOW = GOOD | {"habits": {}, "uploads": 0.3, "spread": 5.0, "changes": ROOMY}
DEAF: Needs = {"faces": ("whole",), "faults": {"small kernel": 0.5, "black hole": 0.5}}
FULL: Needs = {"spread": 0.1}
FULL["changes"] = {f"{GATE}.max_connections": 5, f"{GATE}.queue_timeout": 5.0}
PACED: Needs = {"clients": 15, "spread": 0.1, "changes": {f"{HTTP}.requests_per_minute": 600}}
SPENT = one_key(queue_size=200, tokens_per_minute=20_000) | cluster(
    **GOOD | {"clients": 300, "spread": 30.0, "faces": ("stream", "whole"), **FIVE}
)
# Two callers, of whom each says what the other one says, or asks how its requests have ended.
TWO = GOOD | keys_of("one", "two") | {"changes": ROOMY | KEPT, "habits": {}}
TALKED = TWO | {"faces": ("stream", "whole"), "talks": 1.0}
TALKED["changes"] = TWO["changes"] | {"llm.cache_losses": True}
LOOKED = TWO | {"faces": ("sse", "websocket"), "curious": 1.0}
TALKS = LANES | {"faces": ("conversation",), "sql": True}
GROUPED = SPARE | {"grouped": "least_busy"}
HURRIED = {"hurried": 0.5}
READS = {"ask twice": 1.0, "read slowly": 0.5}
CLOSED = {"changes": {"hooks": [sick_hook.CLOSED]}}


# Agents whose turns are calls, of a provider that breaks off.
CALLED: Needs = {"faces": ("stream",), "sessions": 1.0, "calls": 1.0, "habits": {}, "faults": {}}
CALLED |= {"spare": False, "provider_fault_share": 0.3, "provider_faults": ("cut-<n>",)}
CALLED |= {"changes": ROOMY | places(20) | KEPT | {f"{HTTP}.max_retries": 2}}
HELD = GOOD | {"faces": ("stream",), "sessions": 1.0, "habits": {}}
HELD |= {"changes": ROOMY | places(20) | KEPT | {"chat.streams.max_stream_bytes": 4096}}


# How servers are broken by more than a line.
def _hold_all(holding):
    holding.max_held = 1 << 30


def _let_go(_drop):
    return lambda self: self.let_go()


def _ends_well(stream, _error):
    stream.end(b"complete", {}, data=b"data: [DONE]\n\n")


def _cut(text):
    return lambda self: (said := text(self)) and said[:-1]


def _lossy(add):
    numbers = count(1)

    def lossy(self, entry):
        if entry.status != b"chunk" or next(numbers) % 40:
            return add(self, entry)
        self.last += entry.count
        return None

    return lossy


def _swapped(add):
    kept: list[Any] = []
    numbers = count(1)

    def swapped(self, entry):
        if kept and kept[0][0] is not self and entry.status == b"chunk":
            other, earlier = kept.pop()
            if not other.ended:
                add(other, entry)
            return add(self, earlier)
        if entry.status != b"chunk" or kept or next(numbers) % 40:
            return add(self, entry)
        return kept.append((self, entry))

    return swapped


def _asking_timers(_look_in):
    def asking(self, delay):
        timer = self._timer
        if timer is None or timer.when() > self._loop.time() + delay:
            self._timer = self._loop.call_later(delay, self._make_room)

    return asking


def _leaking(every, *, within):
    def by(leave):
        numbers = count(1)

        def lossy(self, grant, work, *, serve=True):
            if (self.within is None) is within or next(numbers) % every:
                leave(self, grant, work, serve=serve)
            else:
                grant.ticket.grants.pop(grant, None)

        return lossy

    return by


def _idle(serve):
    numbers = count(1)

    def idle(self, resource):
        if not resource.bare or next(numbers) % 3:
            serve(self, resource)

    return idle


def _standing(take_away):
    def forgetful(self, bid, now):
        if not bid.standing or bid.ticket.won in (None, bid):
            take_away(self, bid, now)

    return forgetful


def _last(_first):
    def last(self):
        waiting = [each for each in self.counters.values() if each.waiting]
        return max(waiting, key=lambda each: (each.tag, each.serial))

    return last


def _fewer_tokens(tokens_of):
    def fewer(usage):
        tokens = tokens_of(usage)
        return replace(tokens, answer=tokens.answer and tokens.answer - 1)

    return fewer


def _generous(reserve):
    def generous(self, tokens):
        granted = self._granted
        reservation = reserve(self, tokens)
        self._granted = granted
        return reservation

    return generous


def _ours(take):
    async def ours(self, *args, **more):
        return (await take(self, *args, **more))._replace(owner=self._me)

    return ours


def _newest(chain):
    return lambda self: chain(self)[-1:]


def _same(_other):
    return lambda same: same


def _is_ended(stream):
    return getattr(stream, "ended", False)


def _released(_note_written):
    return lambda response, _kept: response.release()


def _all_for_batch(classes):
    interactive, batch = classes
    return interactive, batch._replace(places=lambda limit: limit)


def _be_patient(capacity):
    capacity.resource.queue_timeout *= 4


def _widen(quota):
    quota.resource.places.limit = 1000


def _of_anybody(last):
    def of_anybody(self, _caller, key, now):
        turns = (last(self, caller, key, now) for caller in self._turns)
        return next((turn for turn in turns if turn is not None), None)

    return of_anybody


def _found_for_all(find):
    return lambda self, _caller, request_id: find(self, None, request_id)


def _refusing(retire):
    def refusing(self):
        self.context.gateway.drain()
        retire(self)

    return refusing


def _endless(_until_empty):
    async def endless(_empty, _most, stop):
        await stop.wait()
        return 0.0

    return endless


def _deaf(once):
    async def deaf(self):
        return self._server.context.lifecycle.retired.is_set() or await once(self)

    return deaf


def _lazy(wait_closed):
    return lambda self, seconds, **more: wait_closed(self, 20 * seconds + 20, **more)


class _Stack(deque[Any]):
    """Gives the newest first."""

    popleft = deque.pop


# What a client reads (truth.py, conversation.py, message_events.py, agents.py).
ADD, LIFE = "streams.stream:Stream.add_entry", "streams.lifetime:Lifetime"
STORED, LANE = "wings.responses.stored:", "wings.responses.lanes:Lane.__init__"
SAID = "protocol.transcript:ChatTranscript.text protocol.transcript:ReadTranscript.text"
HOLDING = "providers.holding:Holding"
breaks("an event", ADD, _lossy)
breaks("whose answer it is", ADD, _swapped, {"faces": ("websocket", "sse")})
breaks("that an answer has failed", "streams.stream:Stream.fail", constant(_ends_well))
breaks("what was said last", SAID, _cut, CONTINUED)
breaks(
    "that calls wait for the finish",
    f"{HOLDING}.__init__",
    then(lambda held: setattr(held, "_marks", ())),
    CALLED,
)
breaks("that a turn which fails is dropped", f"{HOLDING}.drop", _let_go, CALLED)
breaks("a turn of a conversation", "wings.conversations.history:History.keep", left_out(5), TALKS)
breaks("a stored response", f"{STORED}StoredResponses.add", left_out(5), CHAINS)
breaks("what came first in a conversation", f"{STORED}StoredResponse.chain", _newest, CHAINS)
breaks("the order of a lane", LANE, then(lambda lane: setattr(lane, "turns", _Stack())), LANES, 1)
breaks("an answer in the background", f"{LIFE}.run_in_background", left_out(), BACKGROUND)
breaks("what the engine calls a call", "wings.anthropic.bridge.ids:own", _same, BRIDGED, 1)
breaks(AGENTS, "faces.intake:SESSIONS", constant(()), seed=8)

# What a server does and holds, at any moment and at the end (world.py, watch.py, grouping.py).
LEAVE, SCHEDULER = "limits.resource:Resource.leave", "limits.scheduler:Scheduler"
KEY = one_key(max_concurrent=2) | {"spread": 0.1}
breaks(BUG, "providers.sinks:complete", constant(None))
breaks(FULL_HOUSE, "faces.idle_sockets:IdleSockets._look_in", _asking_timers, FULL)
breaks("a place", LEAVE, _leaking(100, within=False))
breaks("a permit", LEAVE, _leaking(5, within=True), BACKGROUND)
breaks("a pooled connection", "providers.connections:Connections.give_back", left_out(20))
breaks("a reservation", "limits.budget:Reservation.settle", left_out(5))
breaks("how much of a turn is held", f"{HOLDING}.__init__", then(_hold_all), HELD)
breaks("the limit of a key", "limits.quota:Quota.__init__", then(_widen), KEY)
breaks("the bound of what is kept", "streams.store:StreamStore._drop_unread", left_out(), seed=21)
breaks("that half is for others", "providers.capacity:half", _same, BACKGROUND)
breaks("the places that batch leaves", "providers.capacity:BOTH_CLASSES", _all_for_batch, seed=4)
breaks("who waits while a place is free", f"{SCHEDULER}.serve", _idle, seed=9)
breaks("that a request stands elsewhere", f"{SCHEDULER}._take_away", _standing, GROUPED)
REGROUP = "gateway.candidates:Candidates.regroup"
breaks("that who waits follows its group", REGROUP, left_out(), REGROUPED)

# How long it waits (deadlines.py, silence.py, hurry.py), and for whom (fairness.py).
CHECK = "providers.exchange:Exchange.check_deadline"
QUEUE, PACES = "providers.capacity:Capacity.__init__", "providers.backpressure:Backpressure._look"
breaks("that a request has a deadline", "limits.deadline:Guard._expire", left_out(), HURRIED)
breaks("the deadline of a queue", QUEUE, then(_be_patient), seed=4)
breaks("the deadline of silence", CHECK, constant(lambda _: 1.0), seed=1)
breaks("the deadline of reading", "limits.write_watchdog:WriteWatchdog._look", left_out(), DEAF, 1)
breaks("the deadline of a body", "faces.intake:BODY_TIMEOUT", constant(600.0), seed=7)
breaks("that a slow client gives way", PACES, left_out(), SLOW)
breaks("the order of a fair queue", "limits.fair_queue:_Level.first", _last)

# Who is let in (doors.py), and what that costs (bills.py, book.py).
SKEW = "wings.jwt.token:SKEW wings.jwt.token_callers:SKEW"
ERROR = "providers.costs:MIN_ERROR_STATUS"
breaks("that a hook has to decide", "wings.hooks.hook_set:HookSet._failed", left_out(), CLOSED)
breaks("when a token is over", SKEW, constant(1e6), GOOD | one_key(token=True))
breaks(
    "whose the last turn was", "wings.cache_loss.turns:Conversations.last", _of_anybody, TALKED, 1
)
breaks("whose a request is", "telemetry.ended_requests:EndedRequests.find", _found_for_all, LOOKED)
breaks("a usage", "providers.costs:tokens_of", _fewer_tokens)
breaks("that a refusal costs nothing", ERROR, constant(1000))
breaks("a line of the ledger", "usage.accounting:Usage._put", left_out(5))

# How often a provider is asked, and for what (sums.py, messages.py).
COMMIT = "providers.request:ProviderRequest.forget_body gateway.attempts:begun"
REFUSE = "gateway.bridging:ChatCapabilities.refuse gateway.bridging:ChatCapabilities.keep_most"
FAILOVER = "provider_errors:ProviderRefused.failover"
JUDGED = SPARED | {"continued": True, "verdicts": 0.5}
breaks("an answer that is known", "gateway.gateway:Gateway._existing", left_out(), TWICE)
breaks("that content commits an attempt", COMMIT, constant(_is_ended), SPARED, 4)
breaks("that a verdict is final", FAILOVER, constant(value=True), JUDGED)
breaks("what an engine refuses", REFUSE, left_out(), BRIDGED)

# What instances promise each other (together.py).
LEASES, RESERVE = (
    "wings.cluster.limits.leases:Leases",
    "wings.cluster.limits.shared_budget:SharedBudget.reserve",
)
STOPPED = cluster((10.0, "stop instance", 12.0), clients=100, spread=30.0, **FIVE)
CLAIM = "tests.simulation.shared_server:SimulatedStore.take"
UNWRITTEN = cluster(**CHAINS) | {"shared": {"lost": 0.1}}
KILLED = cluster((5.0, "kill instance", 3.0), faces=("websocket", "sse"), habits=READS)
breaks("the end of a lease", f"{LEASES}.check", left_out(), STOPPED, 9)
breaks(
    "that a slot is used",
    "wings.cluster.limits.rates:SharedRate.take",
    left_out(),
    cluster(**PACED),
)
breaks("tokens that a request has taken", RESERVE, _generous, SPENT, 1)
breaks(
    "that an owner was killed",
    "wings.cluster.answers.tunnels:Tunnel.connection_lost",
    left_out(),
    KILLED,
    4,
)
breaks("whose an id is", CLAIM, _ours, cluster(**TWICE, clients=15))
breaks("that a response was not written", f"{STORED}_note_written", _released, UNWRITTEN)

# What a deploy promises (deploys.py).
DEPLOYED = GOOD | {"clients": 60, "spread": 20.0, "silent": 0.0, "faces": ("stream", "sse")}
DEPLOYED |= {"changes": ROOMY | KEPT | places(60, **FAST), "habits": {}}
DEPLOYED["changes"] |= {f"chat.websocket.{name}_timeout": 5.0 for name in ("replace", "shutdown")}
LASTING = DEPLOYED | {"changes": DEPLOYED["changes"] | {"chat.websocket.replace_timeout": 600.0}}
DEPLOY = cluster((6.0, "deploy", 0.0), **LASTING)
REVOKED = keys_of("one", "two") | DEPLOY | {"operations": {"reload keys": 7.0}}
SHORT = DEPLOY | {"changes": DEPLOYED["changes"]}
STOPS = cluster(**DEPLOYED) | {"operations": {"drain": 7.0}}
SILENT = constant(lambda _runner: True)
breaks("that a former process keeps its answers", "server.runner:Runner._done", SILENT, DEPLOY)
breaks("that a former process refuses nothing", "server.app:Server.retire", _refusing, DEPLOY)
breaks("that a former process ends", "server.runner:until_empty", _endless, SHORT)
breaks("that a former process is reloaded", "server.reload:Reload.once", _deaf, REVOKED)
breaks("the end of a stop", "server.connection:ConnectionServer.wait_closed", _lazy, STOPS, 8)


def look(name: str) -> None:
    """Print what is noticed of the server that has forgotten *name*, and end the process then."""
    from tests.simulation import agents
    from tests.simulation.configuration import Key
    from tests.simulation.grouping import Grouping
    from tests.simulation.plan import Shared, draw
    from tests.simulation.world import World, play
    from tests.support.issuer import jwt_settings
    from tests.support.virtual_loop import START

    breakage = BREAKAGES[name]
    breakage.damage()
    seed = breakage.seed

    def broken(self: World, what: str) -> None:
        try:
            counts = _counts(name, what)
        except AssertionError:
            traceback.print_exc()
            os._exit(1)
        if counts:
            print(f"{name}\tseed {seed}: at {clock.Clock.now - START:.3f} s: {what}", flush=True)
            os._exit(0)

    World.broken = broken  # type: ignore[method-assign]
    for seed in range(breakage.seed, breakage.seed + SEEDS):
        # A few agents in each run would be a few others less.
        needs = {"messages": 0.0, "refuses": (), **breakage.needs}
        if name == AGENTS:
            plan = agents.plan_of(seed)
        else:
            plan = draw(seed, CLIENTS, needs.get("instances", 1), groups=False)
            changes = plan.changes | needs.pop("changes", {})
            if (entries := needs.pop("entries", None)) is not None:
                needs["keys"] = (key, *_) = tuple(Key(*each) for each in needs["keys"])
                changes["auth.keys"] = [] if key.token else entries
                limits = {key.name: {"class": "interactive", "queue_size": 0}}
                if key.token:
                    changes["auth.jwt"] = jwt_settings("", limits=limits, jwks_url=None)
                else:
                    changes.pop("auth.jwt", None)
            for field, kind in (("shared", Shared), ("grouping", Grouping)):
                if field in needs:
                    needs[field] = kind(**needs[field])
            plan = dataclasses.replace(plan, **{**needs, "changes": changes})
        play(plan)


def _counts(name: str, violation: str) -> bool:
    """Return whether *violation* is a notice of the server that has forgotten *name*."""
    assert "ConfigurationError" not in violation, violation
    if name in CRASHES:
        return True
    # Code that fits the server no more breaks no promise: what it raises is no notice.
    assert f"raised in {__file__}" not in violation, violation
    return BUG not in violation


def main() -> None:
    """Break each server in a process of its own, and print what was noticed."""
    clock.fix_hashes("tests.simulation.breakages")
    clock.install()
    from tests.simulation.swarm import prepare

    prepare()
    # A process that ends in the middle of a run leaves its files there.
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        for name in sys.argv[1:] or BREAKAGES:
            sys.stdout.flush()
            if child := os.fork():
                os.waitpid(child, 0)
                continue
            # An end, if the broken server goes on for ever.
            signal.alarm(LONGEST)
            try:
                look(name)
            except Exception:  # noqa: BLE001 - the process ends without a word otherwise
                traceback.print_exc()
            finally:
                os._exit(1)


if __name__ == "__main__":
    main()

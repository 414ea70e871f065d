"""What must hold of one server, looked at from inside whenever time is about to pass.

It runs hundreds of thousands of times in a run, so it reads a few numbers and makes no snapshots.
What costs more is looked at twice a second (deadlines.py).

Private names used here: those of resources, of the store, of the pools and of lanes, which no
snapshot shows cheaply.
"""

# ruff: noqa: SLF001 - see above

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, cast

import msgspec

from aioserver.limits.gcra import ROUNDING
from aioserver.providers.capacity import ProviderRate
from aioserver.streams.store import SEARCH_STEP
from aioserver.streams.stream import RESUME_BYTES
from aioserver.telemetry.ended_requests import MAX_KEPT
from aioserver.wings.cluster.limits.leased import MOMENTARY, LeasedCapacity
from aioserver.wings.cluster.limits.rates import SharedRate
from aioserver.wings.responses.lanes import MAX_NAMED_LANES, MAX_RUNNING, MAX_WAITING
from aioserver.wings.responses.socket import ResponsesSocket
from tests.simulation.clock import Clock
from tests.simulation.deadlines import LATE, Deadlines
from tests.simulation.fairness import Fairness
from tests.simulation.grouping import GroupWatch
from tests.support.stored_responses import conversations_in, stored_in

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aioserver.gateway.candidates import Candidates
    from aioserver.limits.resource import Resource, Ticket
    from aioserver.providers.capacity import Capacity
    from aioserver.providers.provider import Provider
    from aioserver.streams.stream import Stream
    from aioserver.wings.cluster.limits.leases import Leases
    from tests.simulation.instance import Instance
    from tests.simulation.network import Network

# Seconds between two closer looks.
CLOSER = 0.5
# More entries than a log has.
MANY = 1 << 30
# What may come of one answer before room is looked for: one read from a provider.
SLACK = 1 << 16


class Watch:
    """Looks at *instance*, and calls *broken* with what it has broken."""

    def __init__(
        self, instance: Instance, network: Network, broken: Callable[[str], None]
    ) -> None:
        self._instance = instance
        self._server = server = instance.server
        self._gate = server.context.admission.gate
        self._streams = server.streams
        self._broken = broken
        self._deadlines = Deadlines(instance, network, broken)
        self._fairness = Fairness(broken)
        self._groups = GroupWatch(
            server.context.router, server.context.admission.scheduler, broken
        )
        self._reloaded = False
        # The places that were taken at the last look, of each resource that has more inside than
        # its limit.
        self._taken: dict[Resource, int] = {}
        # The most bytes that answers under way have needed since all that was kept had room last.
        self._needed = 0
        self._closer_at = 0.0
        instance.before_reload = self.forget

    def forget(self) -> None:
        """Forget the last look: a reload changes limits."""
        self._reloaded = True
        self._taken.clear()
        self._fairness.forget()
        self._deadlines.reloaded()

    def look(self) -> None:
        """Check what must hold whenever nothing is about to happen in this moment."""
        if self._instance.killed or self._instance.closed or self._instance.stopped:
            return
        gate, broken = self._gate, self._broken
        inside, limit = gate.inside, gate.limit
        if inside > limit:
            self._look_at_excess(gate, "of the server")
        elif inside < limit and gate.waiting:
            broken(f"{gate.waiting} clients wait while {limit - inside} places are free")
        self._look_at_loans()
        for provider in self._server.context.router.providers.values():
            self._look_at_provider(provider)
        if self._streams._bytes > self._streams._max_kept_bytes:
            self._look_at_kept()
        else:
            self._needed = 0
        if Clock.now >= self._closer_at:
            self._closer_at = Clock.now + CLOSER
            self._look_at_keys()
            self._look_at_slots()
            self._look_at_turns()
            self._look_at_ended()
            self._look_closer()

    def _look_at_turns(self) -> None:
        """What is held of a turn has at most half of the bytes of a log."""
        for stream in self._streams.running():
            held = getattr(getattr(stream.attempt, "holding", None), "held", b"")
            if len(held) > stream.max_bytes // 2:
                self._broken(f"{len(held)} bytes of a turn are held, of {stream.max_bytes}")

    def _look_at_ended(self) -> None:
        """What is remembered of requests is bounded, and each caller has its own alone."""
        ended = self._server.context.monitor.ended
        if len(ended) > MAX_KEPT:
            self._broken(f"{len(ended)} requests are remembered")
        for name, kept in ended._kept.items():
            request_id = next(reversed(kept))
            newest = ended.find(name, request_id)
            fields = msgspec.json.decode(newest or b"{}")
            if (fields.get("caller", ""), fields["request_id"]) != (name, request_id):
                self._broken(f"{name!r} sees the request {newest!r}")

    def _look_at_loans(self) -> None:
        """Those that wait at their keys take half of the door's queue at most, and no place."""
        gate, lent = self._gate, self._server.context.admission.lent
        arriving, returning = (queue.size for queue in gate.queue.queues)
        if lent < returning or gate.slots != arriving + lent:
            self._broken(f"{lent} places are lent, and {gate.slots} slots are counted")
        if lent > gate.queue_size // 2 and not self._reloaded:
            self._broken(f"{lent} places are lent, of {gate.queue_size} in the queue")

    def _look_at_keys(self) -> None:
        """What is reserved belongs to answers that count or wait, and nobody waits at a key whose
        limits allow a start.
        """
        for name, quota in self._server.context.access.quotas().items():
            queue, budget = quota.queue, quota.budget
            if budget.reserved < 0 or (budget.reserved and not quota.running):
                self._broken(f"{name} has reserved {budget.reserved}, {quota.running} run")
            if any(min(state[1:4]) < 0 for state in budget.states().values()):
                self._broken(f"{name} has budgets below nothing: {budget.states()}")
            resource = quota.resource
            if resource.slots != sum(
                ticket.slot is resource for ticket in quota.scheduler.waiting
            ):
                self._broken(f"{resource.slots} slots of {name} are taken")
            if quota.shared is not None:
                continue
            if quota.running > quota.limit and not self._reloaded:
                self._broken(f"{quota.running} answers of {name} run, of {quota.limit}")
            if not queue.size:
                continue
            if quota.running < quota.limit:
                head = queue.queues[0].head()
                assert head is not None
                if quota.rate.delay(head[0].cost) <= ROUNDING:
                    self._broken(f"{len(queue)} wait at {name}, and the first could start")
                elif _stopped(resource.timer):
                    self._broken(f"{len(queue)} wait at {name}, and no timer lets them start")

    def _look_at_provider(self, provider: Provider) -> None:
        capacity, sockets = provider.capacity, provider.pools.gate
        resource = capacity.resource
        if resource not in self._fairness.followed:
            self._follow(capacity)
        for part in capacity.parts:
            inside, limit = part.inside, part.limit
            if inside > limit:
                self._look_at_excess(part, provider.name)
            elif inside < limit and (found := part.queue.next(part._is_closed)) is not None:
                # Only its pace, or its breaker, may keep the next request from starting.
                if (delay := delay_of(part, found[1].cost)) <= ROUNDING:
                    self._broken(
                        f"requests wait at {provider.name} while {limit - inside} may start"
                    )
                elif _stopped(part.timer) and delay < inf:
                    self._broken(f"requests wait at {provider.name}, and no timer lets them in")
        self._look_at_background(provider)
        if not (self._reloaded or resource.supply):
            for part in capacity.parts:
                self._look_at_batch(part)
        if sockets.inside > sockets.limit:
            self._look_at_excess(sockets, f"connections to {provider.name}")
        elif sockets.waiting and sockets.inside < sockets.limit:
            self._broken(f"requests wait for connections to {provider.name}, and some are free")

    def _follow(self, capacity: Capacity) -> None:
        """Follow the queues of *capacity*, and those of its part for the background once it is
        made.
        """
        self._fairness.follow(capacity.resource)
        make = capacity._make_background

        def made() -> Resource:
            part = make()
            self._fairness.follow(part)
            return part

        capacity._make_background = made  # type: ignore[method-assign]

    def _look_at_background(self, provider: Provider) -> None:
        """Look at the places of answers in the background: at most half of all, at least one."""
        part = provider.capacity._background
        if part is None or self._reloaded or part.inside > part.limit:
            # The limit was lowered, by a reload or by other instances.
            return
        most = max(1, provider.settings.http_client.concurrent_requests // 2)
        running = self._server.context.gateway.lifetime._background
        attempts: list[Any] = [each.attempt for each in running if each.place == provider.name]
        # A provider that runs them by itself only says so.
        taken = [attempt for attempt in attempts if attempt.background]
        if len(taken) > most:
            places = f"{len(taken)} places at {provider.name}"
            self._broken(f"{places} are for the background, of {most}")

    def _look_at_batch(self, resource: Resource) -> None:
        """Look at how much of its places and its queue batch takes."""
        limit = resource.limit - max(1, resource.limit // 10) if resource.limit > 1 else 1
        places = resource.limits[1]
        assert places is not None
        if places.inside > limit:
            self._broken(f"{places.inside} of {limit} places of batch are taken")
        slots = resource.class_slots[1]
        if slots <= -(-resource.queue_size // 2):
            return
        # Those of a group may have their room elsewhere.
        router = self._server.context.router
        groups = *router.groups.values(), *router.listed.values()
        if not any(len(group.members) > 1 for group in groups):
            self._broken(f"{slots} of {resource.queue_size} in the queue are batch")

    def _look_at_slots(self) -> None:
        """Those that wait stand where they bid, and each has a slot of one queue, unless all of
        its bids are still to come.
        """
        waiting = self._server.context.admission.scheduler.waiting
        slots: Counter[Resource] = Counter()
        for ticket in waiting:
            if not ticket.bids:
                self._broken("a request waits for nothing")
            if any(bid.ticket is not ticket for bid in ticket.bids):
                self._broken("a request waits by the bid of another one")
            if (resource := ticket.slot) is not None:
                slots[resource] += 1
                if resource.within is not None:
                    slots[resource.within] += 1
            elif any(bid.standing for bid in ticket.bids):
                self._broken("a request waits without a slot")
            for bid in ticket.bids:
                away = bid in (bid.resource.within or bid.resource).away
                coming = bid.not_before + LATE >= Clock.now and bid.parked == away
                if away if bid.standing else not coming:
                    self._broken(f"a request waits for {bid.resource.name} in no queue")
        for provider in self._server.context.router.providers.values():
            for part in provider.capacity.parts:
                # Those that may have to come back keep theirs.
                if part.slots < slots[part] or part.slots != sum(part.class_slots):
                    self._broken(
                        f"{part.slots} slots of {provider.name} are taken, {slots[part]} wait"
                    )
                elif part.slots > slots[part] + part.inside and part.within is None:
                    # Whoever may come back runs, as a trial.
                    self._broken(f"{part.slots} slots of {provider.name} are taken for nobody")
                for bid in part.queue.order():
                    ticket = bid.ticket
                    if ticket not in waiting or bid not in ticket.bids or bid.resource is not part:
                        self._broken(
                            f"a request that waits no more stands in line at {provider.name}"
                        )

    def _look_at_excess(self, resource: Resource, what: str) -> None:
        """Look at a resource that has more inside than its limit: it was lowered, and nobody may
        enter.
        """
        inside = resource.inside
        if resource.supply:
            # What is in hand may be lowered at any time; together.py looks at each start.
            return
        if not self._reloaded or inside > self._taken.get(resource, inside):
            self._broken(f"{inside} of {resource.limit} places are taken: {what}")
        self._taken[resource] = inside

    def _look_at_kept(self) -> None:
        """Look at a store that keeps too much: only what answers under way, and readers that are
        not late, have needed since there was room last may do that.
        """
        store, lifetime = self._streams, self._server.context.gateway.lifetime
        logs = [*store._running, *store._finished]
        needed = store._bytes - sum(stream.kept_bytes for stream in logs)
        needed += sum(needed_bytes(each) for each in logs if each not in lifetime._detached)
        self._needed = max(self._needed, needed)
        most = max(store._max_kept_bytes, self._needed) * (1 + SEARCH_STEP) + SLACK
        if any(not stream.readers for stream in store._finished) or store._bytes > most:
            self._broken(
                f"{store._bytes} of {store._max_kept_bytes} bytes are kept, {self._needed} are needed"
            )

    def _look_closer(self) -> None:
        admission = self._server.context.admission
        bodies = admission._limits.max_body_bytes
        if admission.body_bytes > bodies:
            self._broken(f"{admission.body_bytes} of {bodies} bytes of bodies")
        most = self._gate.queue_size
        if isinstance(self._gate.supply, LeasedCapacity):
            # As many more as others may have had places for, or a place on its way to.
            most += self._gate.supply.limit + MOMENTARY
        # Those that return have their room since their places were lent.
        if (arriving := self._gate.queue.queues[0].size) > most:
            self._broken(f"{arriving} clients wait, at most {most}")
        lifetime = self._server.context.gateway.lifetime
        if lifetime.detached > lifetime._bounds.max_detached:
            self._broken(f"{lifetime.detached} answers without a reader")
        if lifetime.background > (lifetime._bounds.max_detached + 1) // 2:
            self._broken(f"{lifetime.background} answers in the background")
        for stream in lifetime._background:
            if stream in lifetime._detached or stream.timer is not None:
                self._broken("an answer in the background is to end for want of a reader")
        router = self._server.context.router
        room: dict[str, int] = {}
        grouped: dict[Ticket, Resource | None] = {}
        for group in {**router.groups, **router.listed}.values():
            for each in group.candidates:
                ticket = cast("Candidates", each)._request.provider_request.ticket
                grouped[ticket] = ticket.slot
        for provider in router.providers.values():
            pool = provider.pools.stats()
            if pool.open > pool.limit and Clock.now > self._deadlines.settled_at:
                self._broken(f"{pool.open} of {pool.limit} connections to {provider.name}")
            resource = provider.capacity.resource
            most = resource.queue_size
            if isinstance(resource.supply, LeasedCapacity):
                # As many more as others may have had places for.
                most += resource.supply.limit
            room[provider.name] = most
            # Those of a group have the room of all its members.
            waiting = resource.slots - sum(
                resource in (slot, slot and slot.within) for slot in grouped.values()
            )
            # After a reload, as many as there were.
            if waiting > most and Clock.now > self._deadlines.settled_at:
                self._broken(f"{waiting} requests wait, at most {most}")
        for group in router.groups.values():
            most = sum(room[member.provider.name] for member in group.members)
            if group.waiting > most and Clock.now > self._deadlines.settled_at:
                self._broken(f"{group.waiting} requests wait for {group.name}, at most {most}")
        self._groups.look(settled=Clock.now > self._deadlines.settled_at)
        lanes = 0
        for socket in self._server.context.sockets:
            if isinstance(socket, ResponsesSocket):
                lanes += self._look_at_lanes(socket)
        if len(stored_in(self._server).held._held) > lanes:
            self._broken("a response is kept for a lane that is gone")
        self._look_at_shares()
        self._deadlines.look()

    def _look_at_shares(self) -> None:
        """Look at what is said of who keeps how much, by which room is made."""
        store, finished, numbers, tokens = self._streams, Counter(), Counter(), Counter()  # type: ignore[var-annotated]
        for stream, owner in store._finished.items():
            if owner is not None:
                finished[owner] += stream.kept_bytes
        shares = store._shares
        short = any(shares.of(owner) < size for owner, size in finished.items())
        if short or not sum(finished.values()) <= shares.total <= store._bytes:
            self._broken(f"{shares._sizes} bytes are said to be kept of {finished}")
        kept = conversations_in(self._server)
        listed = 0
        for conversation in kept._kept.values():
            numbers[conversation.owner] += 1
            tokens[conversation.owner] += conversation.tokens
            listed += conversation.listed is not None
        if kept._numbers._sizes != numbers or kept._tokens._sizes != tokens:
            self._broken(f"{kept._numbers._sizes} conversations are said to be kept of {numbers}")
        if listed != sum(map(len, kept._lists.values())) or len(kept._used) != len(kept._kept):
            self._broken(f"{listed} conversations are to be listed, not those of {kept._lists}")

    def _look_at_lanes(self, socket: ResponsesSocket) -> int:
        """Look at the lanes of one connection, and return how many they are."""
        lanes = socket._lanes
        every = lanes._lanes.values()
        running = sum(lane.under_way > 0 for lane in every)
        waiting = sum(len(lane.turns) for lane in every)
        if (lanes._running, lanes._waiting) != (running, waiting):
            self._broken(f"{running} lanes are busy, and {waiting} requests wait: {vars(lanes)}")
        if running > MAX_RUNNING or waiting > MAX_WAITING or len(every) > MAX_NAMED_LANES + 1:
            self._broken(f"{running} responses at once, {waiting} that wait, {len(every)} lanes")
        # A socket that is closing begins nothing any more.
        if running < MAX_RUNNING and lanes._due and socket.open and not self._instance.ended:
            self._broken(f"{waiting} requests wait on lanes while {running} responses come")
        return len(every)


def needed_bytes(stream: Stream) -> int:
    """Return what is needed of *stream*: all but its events, the newest of these, and what its
    readers have still to read, unless they are late.
    """
    if stream.whole is not None:
        return stream.kept_bytes
    if not stream.entries:
        return stream.extra_bytes
    *older, newest = [entry.size for entry in stream.entries]
    passed = min([reader.next_index - stream.offset for reader in stream.readers], default=MANY)
    unread = min(sum(older[max(0, passed) :]), RESUME_BYTES + max(older, default=0))
    return stream.extra_bytes + newest + unread


def delay_of(resource: Resource, cost: int) -> float:
    """Return the seconds until the next start at *resource*, of *cost*; a shared rate asks for no
    slots meanwhile.
    """
    if resource.rate is None:
        return 0.0
    assert isinstance(resource.rate, ProviderRate)
    rate = resource.rate._pace._starts
    if not isinstance(rate, SharedRate):
        return resource.rate.delay(cost)
    caller, ask_at = rate._leases, rate.ask_at
    rate._leases = cast("Leases", _Silence(caller.instances, caller.round_trip))
    try:
        return resource.rate.delay(cost)
    finally:
        rate._leases, rate.ask_at = caller, ask_at


@dataclass
class _Silence:
    """Carries no calls."""

    instances: int
    round_trip: float

    def pace(self, _user: object) -> None:
        """Do nothing."""

    def call_by(self, _moment: float) -> None:
        """Do nothing."""


def _stopped(timer: asyncio.TimerHandle | None) -> bool:
    """Return whether *timer* will not fire."""
    return timer is None or timer.cancelled()

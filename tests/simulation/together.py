"""What holds of all instances that share a server, looked at from inside whenever time is about to
pass.

    limits      over all instances no more is inside than the limit, but for what those have that
                were cut off for longer than their lease, or whose server has forgotten them
    leases      nothing starts on a lease that is over, or beyond what is in hand
    rates       in any window of t seconds at most `t * rate + burst` requests start; and where an
                instance is not heard, its part of that
    tokens      what all instances start of a key fits its budget, as one bucket would have it, but
                for what is used above its estimate; and so does what they use of a day
    idleness    nobody waits for a place while one is free, once all are joined and nothing goes
                wrong
    tunnels     who reads an answer of an instance that was killed is told so
    responses   a stored response is there for others, as far as its instance relies on that

Private names used here: those of `Leases`, of its grants and of rates, which no snapshot shows.
"""

# ruff: noqa: SLF001 - see above

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from aioserver.gateway.contracts.commands import name_of
from aioserver.limits.budget import MINUTE, Reservation
from aioserver.limits.resource import Resource
from aioserver.wings.cluster.limits.grants import State
from aioserver.wings.cluster.limits.keys import LeasedPlaces
from aioserver.wings.cluster.limits.lease_messages import SECOND, TIMES
from aioserver.wings.cluster.limits.leased import LeasedCapacity
from aioserver.wings.cluster.limits.rates import SharedRate
from aioserver.wings.cluster.limits.shared_budget import SharedBudget, SharedReservation
from tests.simulation.clock import Clock
from tests.simulation.deploys import Deploys
from tests.simulation.noting import noted, together
from tests.simulation.slowness import HELD_UP_ELSEWHERE, Slowness
from tests.simulation.watch import delay_of
from tests.support.stored_responses import stored_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import ExitStack

    from aioserver.wings.cluster.limits.grants import Grant
    from aioserver.wings.cluster.limits.leases import Leases
    from tests.simulation.client import Client
    from tests.simulation.instance import Instance
    from tests.simulation.loop import SimulatedLoop
    from tests.simulation.membership import Member
    from tests.simulation.provider import Call
    from tests.simulation.shared_server import SharedServer

# Seconds after which all have heard of a reload, and after which nothing is left of a fault: a
# lease, and what is blind.
SETTLED = 20.0
# Seconds for which a place may be free while somebody waits: a beat, and some calls.
IDLE = 3.0
# Seconds after which a reader knows that the owner of its answer was killed; with links that lose
# what they carry.
TOLD, TOLD_LATE = 4.0, 16.0
# Starts beyond the bound of a rate, for what is rounded.
ROUNDED = 1e-3
CLOSER = 0.5
# Seconds for which an instance is away, at most.
LONGEST = 20.0
# Seconds by which a request may start later than its tokens were given, with messages that are late
# or lost, and without; the share of what instances use alone that others may use as well.
LATE_START, ON_TIME, SEEN = 3.0, 0.01, 1.0
# Seconds in which it is known whether a response was written.
UNWRITTEN = 5.0
# Seconds before an answer begins in which it may have been claimed: its request waits, and is
# tried again.
CLAIMED = 120.0


class Starts:
    """The starts of a rate, as a bucket that leaks: its level is never above the burst.

    A burst that is lowered holds in each window of time that begins afterwards, so that such a
    window has a bucket of its own. The one of before is looked at until it is empty.
    """

    def __init__(self) -> None:
        # The level of each, and the largest burst that was allowed in it: the latest window last.
        self._buckets: list[tuple[float, float]] = []
        self._at = Clock.now

    def add(self, starts: float, interval: float, burst: float) -> tuple[float, float]:
        """Count *starts* while *burst* is allowed; return the level, and at most what it may be,
        of the bucket that exceeds that most.
        """
        leaked, self._at = (Clock.now - self._at) / interval, Clock.now
        left = [(level - leaked, most) for level, most in self._buckets]
        left = [(level, most) for level, most in left if level > 0]
        if not left or left[-1][1] > burst + ROUNDED:
            left.append((0.0, burst))
        self._buckets = [(level + starts, max(most, burst)) for level, most in left]
        return max(self._buckets, key=lambda bucket: bucket[0] - bucket[1])


class Spending:
    """What all instances use of the tokens of one key, whose budgets are *per_minute* and *per_day*:
    by estimates, less what was not used of them. An estimate above a whole budget counts as that
    budget, and what was used above its estimate is not its start's.

    The minute is a bucket from which the tokens of each request drain before those of later ones.
    It is exact, where that of an instance (limits/budget.py) may take what was given back for
    tokens that stood in front: that one is fuller, and never emptier.

    *of_parts* is what instances have used of a day that were not heard.
    """

    def __init__(self, per_minute: int, per_day: int) -> None:
        self.per_minute, self.per_day = per_minute, per_day
        self.today = self.of_parts = 0
        # The tokens of each request that have not drained yet, the oldest first.
        self._bucket: dict[Reservation, float] = {}
        self._at = Clock.now

    def start(self, of: Reservation, *, part: bool) -> None:
        """Count the estimate *of* a request; *part*: of what its instance may use by itself."""
        self.today += min(of.tokens, self.per_day)
        self.of_parts += of.tokens if part else 0
        self._drain()
        # Of a part it is looked at by the bucket of that.
        if self.per_minute and not part:
            self._bucket[of] = float(min(of.tokens, self.per_minute))

    def end(self, of: Reservation, tokens: int) -> None:
        """Count what was not used."""
        self.today -= max(0, min(of.tokens, self.per_day) - tokens)
        self._drain()
        if of in self._bucket:
            unused = min(of.tokens, self.per_minute) - tokens
            self._bucket[of] -= min(self._bucket[of], max(0, unused))

    def _drain(self) -> None:
        out, self._at = (Clock.now - self._at) * self.per_minute / MINUTE, Clock.now
        while out > 0 and self._bucket:
            oldest = next(iter(self._bucket))
            tokens = self._bucket.pop(oldest)
            if tokens > out:
                self._bucket = {oldest: tokens - out, **self._bucket}
            out -= tokens

    @property
    def level(self) -> int:
        """How many tokens are in the bucket of the minute."""
        return round(sum(self._bucket.values()))


class Together:
    """Looks at all *instances*, which share *server*, and calls *broken* with what they have
    broken together.

    *counts* says how often something happened that a fault explains.
    """

    def __init__(
        self,
        server: SharedServer,
        loop: SimulatedLoop,
        instances: Sequence[Instance],
        broken: Callable[[str], None],
    ) -> None:
        self.server = server
        self.counts: Counter[str] = Counter()
        # When each instance was killed; when something began that all have to get over.
        self.killed: dict[str, float] = {}
        self.troubled_at = Clock.now
        # When an instance was killed, stopped, cut off or ended.
        self.absences: list[tuple[int, float]] = []
        self._loop = loop
        self._instances = instances
        self._broken = broken
        self._limits: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._idle_since: dict[str, float] = {}
        self._reloaded_at = float("-inf")
        self._closer_at = 0.0
        self.deploys = Deploys(instances, broken)
        self._rates: dict[tuple[str, str], Starts] = {}
        self._spending: dict[str, Spending] = {}
        self._slowness: dict[tuple[int, str], Slowness] = {}

    def reloaded(self) -> None:
        """Note that limits are about to change."""
        self._reloaded_at = Clock.now

    def trouble(self) -> None:
        """Note that something goes wrong now, or has done so until now."""
        self.troubled_at = Clock.now

    def look(self) -> None:
        """Check what must hold whenever nothing is about to happen in this moment."""
        totals: dict[str, list[int]] = {}
        for instance in self._instances:
            member = instance.member
            if instance.killed or instance.closed or member is None:
                continue
            alone = self._alone(instance, member)
            for name, grant in member.leases._grants.items():
                inside = grant.user.inside
                left = member.left_over[name] = min(member.left_over[name], inside)
                excess = max(left, inside, grant.share) if alone else left
                if (total := totals.get(name)) is None:
                    totals[name] = [inside, grant.limit, excess]
                else:
                    total[0] += inside
                    total[1] = max(total[1], grant.limit)
                    total[2] += excess
        for name, (inside, limit, excess) in totals.items():
            if inside > limit:
                self._look_at_excess(name, inside, limit, excess)
            self._totals[name] = inside
            if Clock.now > self._reloaded_at + SETTLED:
                self._limits[name] = limit
        if Clock.now >= self._closer_at:
            self._closer_at = Clock.now + CLOSER
            self._look_closer(totals)

    def _alone(self, instance: Instance, member: Member) -> bool:
        """Return whether the instance uses what the server does not know of."""
        leases, world = member.leases, self.server.script.world
        if instance.number in self._loop.absent or leases.standing.state is State.ALONE:
            return True
        if Clock.now >= leases.lease_end:
            return True
        if leases.epoch == world.get("epoch", leases.epoch) or self.server.reaches(member.number):
            return False
        if Clock.now * SECOND + world["offset"] >= world["blind"]:
            # It uses what it had in a world that is gone, and the server cannot know.
            for name, grant in leases._grants.items():
                member.left_over[name] = max(member.left_over[name], grant.user.inside)
        return False

    def _look_at_excess(self, name: str, inside: int, limit: int, excess: int) -> None:
        if self._reloaded_at > float("-inf"):
            # What was taken before a limit was lowered stays taken, also over a second reload.
            limit = max(limit, self._totals.get(name, 0))
            if Clock.now < self._reloaded_at + SETTLED:
                limit = max(limit, self._limits.get(name, 0))
        self.counts["moments above a limit"] += inside > limit
        if inside > limit + excess:
            self._broken(
                f"{inside} of {limit} places of {name} are taken in all, at most {excess} more"
            )

    def _look_closer(self, totals: dict[str, list[int]]) -> None:
        self.deploys.look()
        living = [each for each in self._instances if not (each.killed or each.closed)]
        members = [each.member for each in living if each.member is not None]
        for member in members:
            if member.known is not None and member.number not in self._loop.absent:
                self._look_at_tunnels(member)
        for instance in living:
            if instance.number not in self._loop.absent:
                self._look_at_responses(instance)
        calm = Clock.now > self.troubled_at + SETTLED and not self.server.faults.lossy
        for member in members:
            standing = member.leases.standing
            calm = calm and standing.state is State.JOINED and not standing.grace
        if calm:
            self._look_at_slow(living)
        else:
            self._slowness.clear()
        for name, (inside, limit, _excess) in totals.items():
            if (
                not calm
                or inside >= limit
                or not any(_waits(each, name, inside) for each in members)
            ):
                self._idle_since.pop(name, None)
            elif Clock.now - self._idle_since.setdefault(name, Clock.now) > IDLE:
                self._broken(
                    f"requests wait for {name}, of which {limit - inside} places are free"
                )

    def _look_at_slow(self, living: Sequence[Instance]) -> None:
        """Look at clients that are too slow, and at the requests of all instances."""
        waited: dict[str, float] = {}
        slow: Counter[str] = Counter()
        for instance in living:
            for name, provider in instance.server.context.router.providers.items():
                key = instance.number, name
                slowness = self._slowness.get(key)
                if slowness is None:
                    slowness = self._slowness[key] = Slowness(provider)
                slowness.look()
                waited[name] = max(waited.get(name, 0.0), slowness.waited)
                slow[name] += slowness.slow
        for name, seconds in waited.items():
            if slow[name] and seconds > HELD_UP_ELSEWHERE + slow[name]:
                self._broken(
                    f"a request waits for {name} for {seconds:.2f} s, where {slow[name]} clients "
                    f"of all instances are too slow"
                )

    def _look_at_tunnels(self, member: Member) -> None:
        assert member.known is not None
        for owner in member.known._tunnels._open.values():
            # A bad link tells late of it.
            bound = TOLD_LATE if self.server.faults.links else TOLD
            if Clock.now - self.killed.get(owner, Clock.now) > bound:
                self._broken(f"an answer of {owner} is awaited, which was killed")

    def _look_at_responses(self, instance: Instance) -> None:
        """Look at the stored responses of which an instance believes that others can find them."""
        stored = stored_in(instance.server)
        for (caller, response_id), response in stored._named.items():
            # It may still be on its way, or be forgotten since.
            since = response.stored_at - UNWRITTEN
            if response.shared and Clock.now > response.stored_at + UNWRITTEN:
                forgotten = any(moment >= since for moment in self.server.disturbed)
                name = name_of(caller.name, response_id)
                if not forgotten and name not in self.server.world.responses:
                    self._broken(f"{response_id} is not there for other instances")

    def started(self, rate: SharedRate, seconds: float) -> None:
        """Note that a start was counted, or with negative *seconds* that it never happened."""
        name, key = rate.name, (rate.name, "")
        # A start may be later than its slot: where the burst is less than what the rate allows
        # meanwhile, as many as that.
        interval, tolerance = rate.interval, max(rate._tolerance, rate._late)
        forgotten = self.forgotten
        if rate._state is not State.JOINED:
            # Its part of the rate, of which the server does not know.
            local = rate._local
            interval, tolerance = local.interval, local._tolerance
            key = name, rate._leases.instance
            forgotten = 0
        # GCRA allows the burst and one that is due.
        burst = 1 + tolerance / interval
        bucket = self._rates.setdefault(key, Starts())
        level, most = bucket.add(1 if seconds > 0 else -1, interval, burst)
        # A server that has lost its state, and is not told by all what they know, allows the burst
        # again.
        if level > most * (1 + forgotten) + ROUNDED:
            self._broken(f"{level:.2f} starts of {key} at once, at most {most:.2f}")

    def spends(self, budget: SharedBudget, reservation: SharedReservation) -> None:
        """Note that *reservation* has its tokens of *budget*."""
        name, (minute, day) = budget.name, budget.limits
        spending = self._spending.setdefault(name, Spending(minute, day))
        spending.start(reservation, part=reservation.part is not None)
        self.counts["starts of a budget"] += 1
        # Those that come late start as late; and a server that has lost its state, and is not told
        # by all what they know, allows everything again.
        late = LATE_START if self.server.faults.lossy else ON_TIME
        most = minute * (1 + self.forgotten) + minute / 60 * late
        if (level := spending.level) > most:
            self._broken(f"{level} tokens of {name} are in use at once, at most {most:.0f}")
        # What is left when the server goes away, each has seen at another moment.
        most = day * (1 + self.forgotten + self.server.faults.lossy) + spending.of_parts * SEEN
        if day and spending.today > most:
            self._broken(f"{spending.today} tokens of {name} are used of {most:.0f} a day")

    def spent(self, budget: SharedBudget, reservation: SharedReservation, tokens: int) -> None:
        """Note that the request of *reservation* has cost so many *tokens* of *budget*."""
        if (spending := self._spending.get(budget.name)) is not None:
            spending.end(reservation, tokens)

    @property
    def forgotten(self) -> int:
        """How often starts may have been forgotten: the server has lost its state, and some
        instance was not heard in time, or was killed before it could say what it knew.
        """
        if self.server.faults.lossy:
            return len(self.server.disturbed)
        return sum(
            any(moment - LONGEST < absent <= moment + TIMES.grace for _, absent in self.absences)
            for moment in self.server.disturbed
        )

    def entered(self, resource: Resource, leases: Leases) -> None:
        """Look at a start."""
        if resource.inside > resource.limit:
            self._broken(f"{resource.inside} are inside of {resource.limit} places in hand")
        if leases.standing.state is not State.ALONE and Clock.now >= leases.lease_end:
            self._broken(f"{leases.instance} starts on a lease that is over")

    def check_calls(self, client: Client, calls: Sequence[Call], window: float) -> None:
        """Check that two instances have not asked for one answer, unless the claim could not be
        made.

        *calls* are all calls for its question that have arrived, in their order.
        """
        caller = client.key.caller if client.key else ""
        for first, second in _pairs(calls):
            if second.begun_at - first.begun_at >= window:
                continue
            self.counts["answered twice"] += 1
            since = first.begun_at - CLAIMED
            forgotten = any(since <= moment <= second.begun_at for moment in self.server.disturbed)
            absent = any(
                number == first.instance and since <= moment <= second.begun_at
                for number, moment in self.absences
            )
            names = self.server.troubled
            unclaimed = client.has_id and (
                name_of(caller, client.name) in names or self.server.faults.lossy
            )
            if not (forgotten or absent or unclaimed):
                apart = second.begun_at - first.begun_at
                self._broken(
                    f"client {client.number} ({client.face}) was answered by instances "
                    f"{first.instance} and {second.instance}, {apart:.3f} s apart"
                )

    def patches(self) -> ExitStack:
        """Let starts be noted, in the block."""
        return together(
            self.deploys.patches(),
            noted(SharedRate, "take", after=lambda _, rate, seconds: self.started(rate, seconds)),
            noted(
                SharedBudget, "reserve", after=lambda each, budget, _: self.spends(budget, each)
            ),
            noted(SharedBudget, "settle", before=self.spent),
            # Those that have waited, and those that start at once.
            *(noted(Resource, name, after=self._look_at_start) for name in ("try_start", "start")),
        )

    def _look_at_start(self, grant: object | None, resource: Resource, *_what: Any) -> None:
        if grant is not None and isinstance(resource.supply, LeasedCapacity | LeasedPlaces):
            self.entered(resource, resource.supply._leases)


def _waits(member: Member, name: str, inside: int) -> bool:
    """Return whether a request waits for a place of the limit *name* alone, of which *inside* are
    taken. A reload reaches one instance after the other: each obeys the limit that it knows.
    """
    grant: Grant | None = member.leases._grants.get(name)
    if grant is None or not isinstance(grant.user, LeasedCapacity) or inside >= grant.limit:
        return False
    resource = grant.user._resource
    # Batch leaves what it must of the places that its instance has in hand.
    following = resource.queue.next(
        lambda index: (
            (limit := resource.limits[index]) is not None and limit.inside >= max(1, limit.limit)
        )
    )
    return following is not None and delay_of(resource, following[1].cost) <= 0


def _pairs(calls: Sequence[Call]) -> Iterator[tuple[Call, Call]]:
    """Iterate over calls of two instances, the second after one that arrived."""
    for number, second in enumerate(calls):
        for first in calls[:number]:
            if first.instance != second.instance and first.arrived:
                yield first, second
                break

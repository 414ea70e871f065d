"""The reference model of wings/cluster/renew.lua: the same calls, answers and state in Python.

It is the model of the server in tests, where time is an argument, and it says why `settle` does
what it does. A test runs random calls through both. Whoever changes one of them changes the other.

What has to hold, however calls are lost, late or repeated, servers emptied and processes stopped:
the places that instances may use are never more than the limit. So a place has one holder at each
moment, in the eyes of the server, and who may hold places that the server does not know of is
waited for before anything is given:

1. A call that was given up may still arrive. Calls have numbers (`seq`), and one that is not newer
   than the last is refused.
2. A *world* is one life of the server's state; it has a name of its own, its `epoch`. In the first
   seconds of a world the server gives nothing (it is *blind*): those who live in another world
   have places, and come within a beat. The ones that somebody knew are woken and, if they do not
   come, their part of each limit is kept until their leases are over.
3. A server that nobody has called for longer than any beat was away itself (stopped, paused, cut
   off), and so is each lease longer than it seems. The same goes for a server that is not the
   process it was: a replica that lags has forgotten its last answers, and so has one that has
   loaded a file: it is blind until each member has called, or its lease is over, which may have
   been renewed just before. No lease ends meanwhile.
4. An instance without a call for the length of its lease is no member; its places are free. It
   lets go of them earlier by its own clock, from the moment of sending on.
5. Above a limit (somebody came back, or the limit was lowered) whoever calls may not use all that
   is too much, and gives it back with its next call. Nothing starts on such a place before.
6. Fixed shares are for times without a server: of N instances each has `limit // N`, and the first
   `limit % N` one more. Instances may have heard of different members then. So whoever is new has
   no share until all others have said that they know of it; and whoever has vanished without a
   word is counted for a while, as it may be alone somewhere. A share only falls with a higher rank
   and with more instances, so the sum of all shares is at most the limit.

The starts of a pace are one number, the time of its next slot. A server that is new or has moved
may have forgotten some of them: while it is blind, no pace has rested, and whoever comes says when
the next slot begins, as far as it knows.

The tokens of a key are a bucket that drains evenly, and a count of the day. What is in the bucket
and in all hands is at most the budget. Instances wait for room in it in the order in which they
asked; one that has not come half a second after its turn has waits no longer.
What an instance has in hand that is no member any more goes into the bucket. Such a server takes
the bucket for full if an instance has used it before, and gives no tokens while it is blind. What
all have had of the day is the most that anybody knows of, and what each has had since its last
answer. An instance says all that it has of the day and in hand, not what has changed: so a call
that was not answered counts once.

Between instances start-time fair queueing (as in limits/fair_queue.py) decides whose turn it is,
weighted by the callers that wait there. One that does not come for what it was given gets no more,
or a stopped process would collect all places.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from aioserver.wings.cluster.lease_messages import (
    SECOND,
    Answer,
    Op,
    Request,
    Result,
    Slots,
    Tell,
    Tokens,
    encode,
)
from tests.support.settle_world import Hold, Limit, Member, Tally, Want, World

if TYPE_CHECKING:
    from aioserver.wings.cluster.lease_messages import BudgetOp, PaceOp

DAY, MINUTE = 86_400 * SECOND, 60 * SECOND
# For so long an instance may be late at the moment at which its turn for tokens comes.
LATE = SECOND // 2

decode_request = msgspec.msgpack.Decoder(Request).decode


class Stale(Exception):
    """The call was given up: a later one has been answered."""


class Model:
    """A server that has the script; *now* is its time in microseconds, and *world* its state."""

    def __init__(self) -> None:
        self.world: World | None = None

    def renew(self, request: bytes, wall: float) -> tuple[bytes, dict[str, list[str]]]:
        """Return the answer, and the words that wake other instances.

        Raises:
            Stale: a later call of the same instance has been answered.
        """
        call = _Call(self.world, decode_request(request), wall)
        self.world = call.world
        return encode(call.answer()), call.wakes


class _Call:
    """One call, in the order of the script."""

    def __init__(self, world: World | None, request: Request, wall: float) -> None:
        self.request = request
        self.lease, self.pause, self.grace_period, self.unheard, self.gone = request.times
        me = request.instance
        if world is None:
            epoch = f"{me}@{wall:.0f}"
            grace = wall + self.grace_period
            world = World(epoch, request.run, last=wall, grace=grace, lost=grace, before=grace)
        former = world.members.get(me) or world.gone.get(me)
        if former is not None and request.seq <= former.seq:
            raise Stale("the call was given up")
        self.world = world
        now = wall + world.offset
        if now < world.last:
            # The machine's clock was put back: the time goes on evenly.
            world.offset = world.last - wall
            now = world.last
        self.now = now
        self.wakes: dict[str, list[str]] = {}
        self.touched: dict[str, Limit] = {}
        self.newly: set[str] = set()
        self.spare: dict[str, int] = {}

    def answer(self) -> Answer:
        """Do it all."""
        request, world = self.request, self.world
        self.notice_absence()
        self.sweep()
        mine = self.renew()
        silent = [member.ends for member in world.members.values() if member.silent]
        grace_ends = max([world.grace, *silent])
        grace = self.now < grace_ends
        missing = len(world.awaited)
        reserve = missing / max(1, missing + len(world.members))
        if mine is not None:
            for op in request.ops:
                self.say(op, anew=self.anew)
        over = {
            name: self.share_out(name, limit, reserve, grace=grace)
            for name, limit in self.touched.items()
        }
        results = [self.result(op.name, over[op.name]) for op in request.ops if mine is not None]
        self.keep()
        slots = [self.pace(op) for op in request.paces]
        closed = max(0, world.lost - self.now, grace_ends - self.now)
        tokens = [self.budget(op, closed) for op in request.budgets]
        told = self.tell_states()
        rank, count, known_to_all = self.place_of(mine, missing)
        names = []
        if mine is not None and (request.heard, request.epoch) != (world.number, world.epoch):
            names = sorted(world.members, key=lambda name: world.members[name].number)
        return Answer(
            epoch=world.epoch,
            anew=self.anew,
            grace=max(0, grace_ends - self.now),
            number=world.number,
            rank=rank,
            count=count,
            known_to_all=known_to_all,
            members=names,
            version=world.version,
            told=told,
            results=results,
            slots=slots,
            tokens=tokens,
        )

    def tell(self, instance: str, word: str) -> None:
        self.wakes.setdefault(instance, []).append(word)

    def notice_absence(self) -> None:
        world, run = self.world, self.request.run
        moved = run not in ("", world.run)
        if moved or (self.now - world.last > self.pause and world.members):
            before = world.grace
            world.grace = max(world.grace, self.now + self.grace_period)
            if moved or self.now >= before:
                world.silent, world.before = {}, world.grace if moved else before
            if not moved:
                world.silent |= dict.fromkeys(world.members, 1)
            for name, member in world.members.items():
                # An older state lacks the last renewals, and what was given with them.
                length = self.lease if moved else self.grace_period
                member.ends = max(member.ends, self.now + length)
                member.silent |= moved
                self.tell(name, "")
        if moved:
            world.run = run
            world.lost = max(world.lost, self.now + self.grace_period)
        world.last = self.now

    def touch(self, name: str) -> Limit:
        return self.touched.setdefault(name, self.world.limits.get(name) or Limit())

    def forget(self, instance: str) -> None:
        for name in self.world.limits:
            limit = self.touch(name)
            for of in (limit.holds, limit.wants, limit.turns, limit.unheard):
                of.pop(instance, None)

    def leave(self, instance: str) -> None:
        world = self.world
        if instance in world.members:
            self.forget(instance)
        if instance in world.members or instance in world.gone:
            world.number += 1
        world.members.pop(instance, None)
        world.gone.pop(instance, None)

    def sweep(self) -> None:
        world, me = self.world, self.request.instance
        for name, member in list(world.members.items()):
            if member.ends < self.now and name != me:
                self.leave(name)
                world.gone[name] = member
        for name, member in list(world.gone.items()):
            if member.ends + self.gone < self.now:
                self.leave(name)
        for name in self.request.ended:
            self.leave(name)
            if world.silent.pop(name, None) and not world.silent:
                # Nobody lives who could have used more than is known here.
                world.grace = world.before

    def renew(self) -> Member | None:
        world, request, me = self.world, self.request, self.request.instance
        mine = world.members.get(me)
        # An instance that comes anew says what it has, and whom it knew.
        self.anew = mine is None or mine.ends < self.now or request.epoch != world.epoch
        if request.bye:
            self.leave(me)
            mine = None
        else:
            if mine is None:
                world.number += 1
                mine = world.gone.pop(me, None) or Member(0, 0, world.number, 0)
                world.members[me] = mine
            elif self.anew:
                self.forget(me)
            world.awaited.pop(me, None)
            mine.ends, mine.seq, mine.silent = self.now + self.lease, request.seq, False
            mine.heard = request.heard if request.epoch == world.epoch else 0
        for name, ends in list(world.awaited.items()):
            if ends < self.now or name in world.members:
                del world.awaited[name]
        asks = (self.anew and self.now < world.grace) or self.now < world.lost
        if asks and mine is not None:
            for name in request.known:
                if name not in world.members and name not in world.awaited:
                    world.awaited[name] = self.now + self.lease
                    self.tell(name, "")
        return mine

    def say(self, op: Op, *, anew: bool) -> None:
        me = self.request.instance
        limit = self.touch(op.name)
        limit.limit = op.limit
        limit.unheard.pop(me, None)
        self.spare[op.name] = op.spare
        recorded = limit.holds.get(me, Hold(0)).recorded - op.give
        # What I have is what I say, unless more is known here: it was given since, and answers a
        # part of what I want.
        if anew or recorded < op.have:
            recorded = op.have
        limit.holds[me] = Hold(recorded)
        want = op.want - (recorded - op.have)
        if want <= 0:
            limit.wants.pop(me, None)
        elif me in limit.wants:
            limit.wants[me].need, limit.wants[me].weight = want, op.weight
        else:
            limit.orders += 1
            # At virtual time, or where its last turn has ended.
            tag = max(limit.virtual, limit.turns.get(me, 0))
            limit.wants[me] = Want(tag, limit.orders, want, op.weight)
            self.newly.add(op.name)

    def share_out(self, name: str, limit: Limit, reserve: float, *, grace: bool) -> int:
        """Give the free places to those whose turn it is; return by how much the limit was
        exceeded.
        """
        me, holds, wants = self.request.instance, limit.holds, limit.wants
        total = limit.total
        free = 0 if grace else limit.limit - math.ceil(limit.limit * reserve) - total
        while free > 0 and wants:
            who = min(wants, key=lambda name: (wants[name].tag, wants[name].order))
            want, since = wants[who], limit.unheard.get(who)
            if since is not None and self.now - since > self.unheard:
                del wants[who]
                continue
            holds.setdefault(who, Hold(0)).recorded += 1
            free -= 1
            limit.virtual = want.tag
            limit.turns[who] = want.tag = want.tag + 1 / want.weight
            want.need -= 1
            if want.need <= 0:
                del wants[who]
            if who != me and since is None:
                limit.unheard[who] = self.now
                self.tell(who, name)
        if free > 0 and (spare := self.spare.get(name, 0)) > 0:
            holds[me].recorded += min(free, spare)
        if name in self.newly and me in wants:
            for instance, hold in holds.items():
                if instance != me and hold.recorded > 0 and not hold.knows:
                    hold.knows = 1
                    self.tell(instance, f"?{name}")
        return max(0, total - limit.limit)

    def result(self, name: str, over: int) -> Result:
        me, limit = self.request.instance, self.touched[name]
        hold = limit.holds[me]
        starving = len(limit.wants) - (me in limit.wants)
        hold.knows = int(starving > 0)
        return Result(hold.recorded, starving, max(0, hold.recorded - over))

    def keep(self) -> None:
        limits = self.world.limits
        for name, limit in self.touched.items():
            limit.holds = {who: hold for who, hold in limit.holds.items() if hold.recorded}
            if not limit.wants:
                # In an empty queue nobody is ahead or behind.
                limit.virtual, limit.orders, limit.turns = 0, 0, {}
            if limit.holds or limit.wants:
                limits[name] = limit
            else:
                limits.pop(name, None)

    def pace(self, op: PaceOp) -> Slots:
        """GCRA (limits/gcra.py)."""
        now, name = self.now, op.name
        slack, first = op.slack, 0.0
        if now < self.world.lost:
            # Starts may be forgotten: nothing has rested. Slots that were given before begin
            # within a horizon.
            slack, first = 0.0, self.world.lost - self.grace_period + op.horizon
        due = self.world.paces.get(name, now - op.rested)
        due = max(due, now - slack, now + op.known, first)
        if op.slots < 0:
            due = max(due + op.slots * op.step, now - slack)
        delays: list[float] = []
        while len(delays) < op.slots and due <= now + op.horizon:
            delays.append(max(0, due - now))
            due += op.step
        self.world.paces[name] = due
        return Slots(delays, due - now)

    def budget(self, op: BudgetOp, closed: float) -> Tokens:
        now, me = self.now, self.request.instance
        tally = self.world.tallies.setdefault(op.name, Tally(now))
        rate, lost = op.per_minute / MINUTE, now < self.world.lost
        tally.drained = min(tally.charged, tally.drained + (now - tally.at) * rate)
        tally.at = now
        # What an instance has in hand that is no more counts as used.
        gone = {name for name in tally.held if name not in self.world.members} - {me}
        spent = op.spent + sum(tally.held[name] for name in gone)
        others = {name: count for name, count in tally.held.items() if name not in {me, *gone}}
        tally.held, held = others, sum(others.values())
        tally.charged += spent
        if lost and op.met:
            tally.charged = max(tally.charged, tally.drained + op.per_minute)
        # What is given back may never have come into this bucket.
        for part, stood in [] if lost else op.back:
            # What others have returned since may have stood in front of it.
            left = min(stood - tally.returned - tally.drained, part, tally.charged - tally.drained)
            left = max(0, left)
            tally.charged -= left
            tally.returned += left
        self.count_day(tally, op, lost=lost)
        at = next((at for at, each in enumerate(tally.queue) if each[0] == me), len(tally.queue))
        # Whoever is late, or is no member any more, waits no longer.
        before, behind = (
            [each for each in part if each[0] in self.world.members and now <= each[2] + LATE]
            for part in (tally.queue[:at], tally.queue[at + 1 :])
        )
        front = sum(count for _who, count, _due in before)
        waiting = front + sum(count for _who, count, _due in behind)
        granted, wait, mine = 0, 0.0, []
        for need in op.needs:
            # What is more than a whole budget counts as that budget.
            most, least, ahead = min(need, op.per_minute), min(need, op.per_day), 0.0
            if op.per_minute:
                # The level first: the sum is exact then where the bucket is empty.
                level = tally.charged - tally.drained
                ahead = (level + most + held + op.have + front - op.per_minute) / rate
            full = op.per_day > 0 and tally.count + least > op.per_day
            if closed or ahead > op.patience or full:
                break
            if ahead > 0:
                wait, mine = ahead, [(me, most, now + ahead)]
                break
            tally.charged += most
            granted += 1
            self.count_more(tally, op, least)
        tally.queue = [*before, *mine, *behind]
        more = 0 if closed or granted < len(op.needs) else op.more
        if op.per_minute:
            room = op.per_minute - tally.charged + tally.drained - held - waiting - op.have
            more = min(more, math.floor(room))
        if op.per_day:
            more = min(more, op.per_day - tally.count)
        more = max(0, more)
        if op.have + more:
            tally.held[me] = op.have + more
        self.count_more(tally, op, more)
        if not lost:
            tally.told = tally.count
        return Tokens(
            granted,
            wait,
            more,
            closed,
            tally.charged,
            tally.drained,
            tally.returned,
            held + waiting,
            tally.day,
            tally.count,
            (tally.day + 1) * DAY - now,
        )

    def count_day(self, tally: Tally, op: BudgetOp, *, lost: bool) -> None:
        me, today = self.request.instance, int(self.now // DAY)
        if today > tally.day:
            tally.day, tally.count, tally.told, tally.of = today, 0, 0, {}
        if op.day != tally.day:
            return
        # What all have had is the most that anybody knows, and what each has had since.
        if lost or op.anew:
            tally.count += max(0, op.known - tally.told)
            tally.told = max(tally.told, op.known)
        former = op.was if lost or op.anew else tally.of.get(me, op.was)
        tally.count = max(0, tally.count + op.mine - former)
        tally.of[me] = op.mine

    def count_more(self, tally: Tally, op: BudgetOp, tokens: int) -> None:
        if op.per_day:
            me = self.request.instance
            tally.count += tokens
            tally.of[me] = tally.of.get(me, 0) + tokens

    def tell_states(self) -> list[Tell]:
        world, request, now = self.world, self.request, self.now
        states = world.told
        for name, word, length in request.tells:
            words = states.setdefault(name, {})
            words.pop(word, None)
            if length > 0:
                words[word] = now + length
            world.version += 1
        if request.tells:
            for instance in world.members:
                if instance != request.instance:
                    self.tell(instance, "")
        if request.tells:
            for name, words in list(states.items()):
                states[name] = {word: ends for word, ends in words.items() if ends >= now}
                if not states[name]:
                    del states[name]
        told: list[Tell] = []
        if request.version != world.version:
            told = [
                Tell(name, word, int(ends - now))
                for name, words in states.items()
                for word, ends in words.items()
                if ends >= now
            ]
        return told

    def place_of(self, mine: Member | None, missing: int) -> tuple[int, int, bool]:
        """Return the rank and the number of all that may live, and whether all of them know of
        me.
        """
        if mine is None:
            return missing, missing, not missing
        all_members = (*self.world.members.values(), *self.world.gone.values())
        known_to_all = all(
            member.heard >= mine.number for member in all_members if member is not mine
        )
        rank = sum(member.number < mine.number for member in all_members)
        return rank + missing, len(all_members) + missing, known_to_all and not missing

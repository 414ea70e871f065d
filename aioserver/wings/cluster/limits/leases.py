"""The leases of an instance, and its calls to the server: the state machine, without I/O.

This file is one concept: the states of an instance and its calls in each of them are one machine.

                      an answer (no grace)                 a call failed
            ALONE ─────────────────────────▶ JOINED ───────────────────────▶ UNHEARD
              ▲                                │  ▲         an answer           │  │
              │       the lease expires        │  └─────────────────────────────┘  │
              └────────────────────────────────┴───────────────────────────────────┘

A joined instance uses its grants (grants.py) without a call. A suspect one (UNHEARD) continues to
use them until its lease expires. A partitioned one (ALONE) has its fixed share of each limit
(limits/fixed_share.py). The lease is counted from the moment of *sending* the last call that was
answered, and is shorter here than at the server by a margin. Nothing starts on an expired lease:
`check` must be called before each start. A timer alone would be too late, since a suspended
process reads its sockets first when it resumes.

On rejoining, an instance reports max(in use, fixed share) for each limit, because it may start
that many before the reply. If these places were granted to others meanwhile, the sum is above the
limit; the answer then allows so much less.

When a lease expires, the leases of all others expire within a beat and a bound. Until then an
instance has no more granted than before, even if its share is larger.

At most one call is under way, and later changes go with the next one. A call is due when a request
begins to wait that could be served, a place ends while others starve, a message came, or a limit
has changed; else after a beat.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from math import inf
from typing import TYPE_CHECKING

import msgspec

from aioserver.gateway.contracts.timeouts import LATE
from aioserver.limits.fixed_share import FixedShare
from aioserver.wings.cluster.limits.grants import Grant, Standing, State
from aioserver.wings.cluster.limits.lease_messages import (
    SECOND,
    TIMES,
    Request,
    Times,
    decode_answer,
    encode,
)
from aioserver.wings.cluster.limits.provider_states import Announcements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aioserver.limits.fixed_share import Scope
    from aioserver.wings.cluster.limits.grants import User
    from aioserver.wings.cluster.limits.lease_messages import Op
    from aioserver.wings.cluster.limits.rates import SharedRate
    from aioserver.wings.cluster.limits.shared_budget import SharedBudget

# The quickest of this many calls is the estimate of the round trip: some calls are late.
ROUND_TRIPS = 8
# A place that ends is used at once, even though others starve, for this multiple of the length of
# the last call, and for this many seconds at most. An instance then has a place in transit for a
# fifth of the time.
KEPT, MOST_KEPT = 4.0, 0.5
# Seconds, and multiples of the quickest recent call, after which a call is overdue: starts then wait
# no longer for its slots.
OVERDUE, TIMES_ROUND_TRIP = 0.2, 4.0


class Leases:
    """The leases of one *instance*, whose name no other instance ever has.

    Always: granted places are recorded at the server, while the lease lasts; at most one call is
    under way.

    *fixed* is a rank from 0 and a number of instances, known by other means. *on_due* is called
    when `due`, the time of the next call, becomes earlier. *on_state* is called with the former
    state and the reason when the state has changed, *on_members* when the number of known
    instances has changed. *on_announced* is called with the provider, the word and the seconds
    left of each announcement (provider_states.py). `ask` sends the question of a budget, and lets it be
    `answered`; `later` calls a function after so many seconds.
    """

    def __init__(
        self,
        instance: str,
        *,
        fixed: tuple[int, int] | None = None,
        times: Times = TIMES,
        clock: Callable[[], float] = time.monotonic,
        on_due: Callable[[], None] = lambda: None,
        on_state: Callable[[State, State, str], None] = lambda _old, _new, _why: None,
        on_members: Callable[[], None] = lambda: None,
        on_announced: Callable[[str, str, float], None] = lambda _name, _word, _seconds: None,
        ask: Callable[[SharedBudget], None] = lambda _budget: None,
        later: Callable[[float, Callable[[], None]], object] = lambda _seconds, _action: None,
    ) -> None:
        self.instance = instance
        self.times = times
        self.ask, self.later = ask, later
        self._on_due, self._on_state, self._on_members = on_due, on_state, on_members
        self._clock = clock
        self._fixed = FixedShare(fixed)
        self.standing = Standing(self._fixed.of, self._call_soon_for, self._asked, clock)
        self._grants: dict[str, Grant] = {}
        self._paces: dict[str, SharedRate] = {}
        self.budgets: dict[str, SharedBudget] = {}
        # Grants with a change to be sent at once, and grants that may have none by the time of the
        # call.
        self._dirty: set[Grant] = set()
        self._asking: set[Grant] = set()
        self.members: list[str] = []
        self.epoch = ""
        # The epoch and the server's process that have answered last, and those to which the paces
        # were reported.
        self._met = self._restated_to = ("", "")
        self._run = ""
        # Whether the call under way reports the paces.
        self._restates = False
        # The seconds of the last calls.
        self._round_trips: deque[float] = deque(maxlen=ROUND_TRIPS)
        self._seq = self._answer_number = 0
        self._bye = False
        self.lease_end = -inf
        # When ALONE: the time at which grants may be raised to the share, since all other leases
        # have expired by then.
        self._raise_at = clock() + times.lease
        self._next_whole = -inf
        # Whether the call under way mentions all limits.
        self._whole = True
        self.due = -inf
        self._sent = 0.0
        self._ops: list[tuple[Grant, Op]] = []
        self._pace_ops: list[SharedRate] = []
        # The tokens of instances that have ended, as far as they may be members.
        self._ended: set[str] = set()
        self.announcements = Announcements(self.call_soon, on_announced)
        self.calls = self.failures = 0
        # Whether the server knows that this instance has left.
        self.left = False

    @property
    def state(self) -> State:
        """The state of this instance."""
        self.check()
        return self.standing.state

    @property
    def now(self) -> float:
        """The time of its clock."""
        return self._clock()

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self.standing.busy

    # The interface for the process.

    def hold(
        self, name: str, limit: int, user: User, *, least: int = 0, scope: Scope | None = None
    ) -> Grant:
        """Share *limit* under *name*, which is the same in all instances, or in those of *scope*.

        *least* is the smallest fixed share.
        """
        grant = Grant(name, limit, user, self.standing, least=least, scope=scope)
        self._grants[name] = grant
        # No other instance has a limit that the first workers alone share.
        known = self._clock() >= self._raise_at or (scope is not None and scope.first)
        if self.standing.state is State.ALONE and known:
            grant.resize(grant.share)
        self._call_soon_for(grant)
        return grant

    def drop(self, grant: Grant) -> None:
        """Stop sharing a limit. Places inside stay in use, and are not counted."""
        if self._grants.get(grant.name) is grant:
            del self._grants[grant.name]
            self._asking.discard(grant)
            grant.dropped = True
            self._call_soon_for(grant)

    def pace(self, user: SharedRate) -> None:
        """Share the pace of *user*."""
        self._paces[user.name] = user
        user.stand(self.standing.state, self._fixed.instances)

    def drop_pace(self, user: SharedRate) -> None:
        """Stop sharing a pace."""
        if self._paces.get(user.name) is user:
            del self._paces[user.name]

    def share_budget(self, budget: SharedBudget) -> None:
        """Let *budget* know when the server has changed, as it has for a budget that is new."""
        self.budgets[budget.name] = budget
        if self.epoch:
            budget.server_changed()

    def drop_budget(self, budget: SharedBudget) -> None:
        """Let *budget* know nothing more."""
        if self.budgets.get(budget.name) is budget:
            del self.budgets[budget.name]

    @property
    def sharing(self) -> int:
        """The number of instances that have fixed shares; 0 if it is not known."""
        return self._fixed.instances

    def ended(self, token: str) -> None:
        """Note that the instance with *token* has certainly ended, so that its lease need not
        expire first.
        """
        self._ended.add(token)
        self.call_soon()

    @property
    def freeing(self) -> bool:
        """Whether the server may not know yet of an instance that has `ended`."""
        return bool(self._ended) and (not self.members or bool(self._ended_members()))

    def _ended_members(self) -> list[str]:
        """Return the names of the members that have ended."""
        return [name for name in self.members if token_of(name) in self._ended]

    def use_fixed(self) -> None:
        """Use the fixed shares now: no other instance has more than its own.

        For instances without a server, and for instances that all start together with a server of
        their own.
        """
        self._raise_at = -inf
        self._use_share()

    def retire(self) -> None:
        """Give back all unused places, now and from now on: others serve in place of this
        instance, which needs places only for its present answers.
        """
        self.standing.retired = True
        for grant in self._grants.values():
            self._call_soon_for(grant)

    def leave(self) -> None:
        """Take no more places.

        Places inside are given back as they end, and after the last of them the instance is no
        member.
        """
        self.standing.leaving = True
        for grant in self._grants.values():
            grant.resize(min(grant.granted, grant.user.inside))
        self._next_whole = -inf
        self.call_soon()

    def woken(self, words: Iterable[str]) -> None:
        """Handle a message (`decode_words`): places were granted, or others starve."""
        for word in words:
            grant = self._grants.get(word.removeprefix("?"))
            if grant is None:
                # A server that has lost its state asks for everything.
                self._next_whole = -inf
                self.call_soon()
            elif word.startswith("?"):
                grant.others_starve()
            else:
                self._call_soon_for(grant)

    @property
    def instances(self) -> int:
        """How many instances are members."""
        return self.standing.members

    @property
    def round_trip(self) -> float:
        """The seconds of the quickest recent call."""
        return min(self._round_trips, default=0.0)

    def call_by(self, moment: float) -> None:
        """Make the next call at *moment* at the latest."""
        if moment < self.due and not self.standing.busy and not self.left:
            self._set_due(moment)

    def call_soon(self) -> None:
        """Let the next call be due at once."""
        if self.due > -inf and not self.left:
            self.due = -inf
            self._on_due()

    def hangs(self) -> None:
        """Let starts be counted on a part of each rate until the next answer: a server that hangs
        grants no slots.
        """
        if self.standing.state is State.JOINED:
            for pace in self._paces.values():
                pace.stand(State.UNHEARD, self._fixed.instances)

    # The interface for the connection.

    def check(self) -> None:
        """Drop the grants if the lease has expired; called before each start."""
        if self.standing.state is not State.ALONE and self._clock() >= self.lease_end:
            self._lapse()

    def request(self, run: str) -> bytes:
        """Return a request that is sent now, to the server's process *run*.

        `answered` or `failed` must follow.
        """
        self.check()
        standing = self.standing
        assert not standing.busy
        self._sent = self._clock()
        self._whole = standing.state is not State.JOINED or standing.grace or standing.leaving
        self._whole = self._whole or self._sent >= self._next_whole
        grants = self._dirty | self._asking
        if self._whole:
            grants.update(self._grants.values())
        self._dirty.clear()
        self._asking.clear()
        if self._whole:
            self._next_whole = self._sent + self.times.beat
        in_order = sorted(grants, key=lambda grant: grant.name)
        self._ops = [(grant, grant.op()) for grant in in_order]
        self._bye = standing.leaving and not any(
            each.user.inside for each in self._grants.values()
        )
        self._run = run
        self._restates = self._met != self._restated_to or run != self._met[1]
        asked = [
            (user, slots)
            for user in self._paces.values()
            if (slots := user.op(restate=self._restates)) is not None
        ]
        self._pace_ops = [user for user, _slots in asked]
        tells = self.announcements.take()
        standing.busy = True
        self.due = inf
        self._seq += 1
        self.calls += 1
        self._watch(self._seq)
        return encode(
            Request(
                instance=self.instance,
                epoch="" if standing.state is State.ALONE else self.epoch,
                run=run,
                seq=self._seq,
                heard=self._answer_number,
                version=self.announcements.version,
                times=self.times.for_server(),
                known=[name for name in self.members if name != self.instance],
                ended=self._ended_members(),
                bye=self._bye,
                ops=[op for _grant, op in self._ops],
                paces=[slots for _user, slots in asked],
                tells=tells,
            )
        )

    def answered(self, data: bytes) -> None:
        """Handle the answer to the last request."""
        self.check()
        now = self._clock()
        lease_end = self._sent + self.times.lease - self.times.margin
        if now >= lease_end:
            # The process was suspended meanwhile: the granted places may be others' by now.
            self.failed("the answer came too late")
            return
        try:
            answer = decode_answer(data)
        except msgspec.MsgspecError as error:
            self.failed(f"not an answer to a renewal: {error}")
            return
        self._round_trips.append(now - self._sent)
        met, self._met = self._met, (answer.epoch, self._run)
        for budget in tuple(self.budgets.values()) if met != self._met else ():
            budget.server_changed()
        if self._restates:
            self._restated_to = self._met
        if answer.anew and not self._whole:
            # The server has lost its state: everything is reported before any other instance is
            # granted it.
            self.failed("the server has lost its state")
            return
        standing = self.standing
        standing.busy, standing.grace = False, answer.grace > 0
        standing.keeps_until = now + min(KEPT * (now - self._sent), MOST_KEPT)
        self.epoch, self.lease_end = answer.epoch, lease_end
        self.members = answer.members or self.members
        joined = standing.state is not State.ALONE or not standing.grace
        if not standing.grace and not self._bye:
            self._answer_number = answer.number
            self._fixed.adopt(answer.rank, answer.count, known_to_all=answer.known_to_all)
            before, standing.members = standing.members, max(1, len(self.members))
            if standing.members != before:
                self._on_members()
        if joined:
            self._change(State.JOINED, "the server answers")
        elif self._raise_at > -inf:
            self._raise_at = now + self.times.lease
        for (grant, op), result in zip(self._ops, answer.results, strict=False):
            grant.answered(op, result, use=joined and not standing.grace)
        for user, slots in zip(self._pace_ops, answer.slots, strict=True):
            user.answered(slots, self._sent)
        self._pace_ops = []
        self._ended.intersection_update(map(token_of, self.members))
        self.announcements.answered(answer)
        self._asking.update(grant for grant, _op in self._ops)
        self._asking = {grant for grant in self._asking if grant.wants_call()}
        self._ops = []
        if self._bye:
            self._end()
        elif self._more_to_say():
            self._set_due(-inf)
        else:
            grace = max(answer.grace / SECOND, 0.001) if standing.grace else inf
            self._set_due(now + min(self.times.beat, grace))

    def failed(self, why: str) -> None:
        """Note that the last request was not answered, or with an error.

        Another one is due soon.
        """
        standing = self.standing
        standing.busy = False
        self.failures += 1
        for grant in self._grants.values():
            grant.failed()
        for user in self._pace_ops:
            user.answered(None, self._sent)
        self._dirty.update(grant for grant, _op in self._ops if grant.dropped)
        self._ops, self._pace_ops = [], []
        self.check()
        now = self._clock()
        if standing.state is State.JOINED:
            self._change(State.UNHEARD, why)
        elif standing.state is State.ALONE and now >= self._raise_at:
            self._use_share()
        self._set_due(now + self.times.bound / 10)

    def _watch(self, number: int) -> None:
        """Check after a while whether the call *number* is still under way."""
        wait = max(OVERDUE, TIMES_ROUND_TRIP * self.round_trip)
        self.later(wait, partial(self._look, number, self._clock() + wait))

    def _look(self, number: int, due: float) -> None:
        """Note that the server hangs if the call *number* is overdue: it fails only after its
        bound.
        """
        if not self.standing.busy or self._seq != number:
            return
        if self._clock() > due + LATE:
            # This process was suspended, and the answer may have come meanwhile.
            self._watch(number)
        else:
            self.hangs()

    def _more_to_say(self) -> bool:
        if self._dirty or self._asking or self.announcements.pending or self._ended:
            return True
        if self._met != self._restated_to and self._paces:
            return True
        if self.standing.leaving and not any(each.user.inside for each in self._grants.values()):
            return True
        return self._next_whole == -inf

    def _end(self) -> None:
        self.left = True
        self._change(State.ALONE, "it has left")
        for grant in self._grants.values():
            grant.partitioned(0)
        self._set_due(inf)

    def _set_due(self, due: float) -> None:
        asked = [pace.ask_at for pace in self._paces.values()]
        self.due = min(due, *asked) if asked else due
        self._on_due()

    def _call_soon_for(self, grant: Grant) -> None:
        self._dirty.add(grant)
        self.call_soon()

    def _asked(self, grant: Grant) -> None:
        self._asking.add(grant)
        self.call_soon()

    def _change(self, state: State, why: str) -> None:
        old, self.standing.state = self.standing.state, state
        if old is not state:
            self._on_state(old, state, why)
        for pace in self._paces.values():
            pace.stand(state, self._fixed.instances)

    def _lapse(self) -> None:
        standing = self.standing
        # The others were last answered at most a beat and a bound later than this one.
        self._raise_at = self.lease_end + self.times.beat + self.times.bound
        # If no call has failed, this process was suspended, and the others use its places.
        away = standing.state is State.UNHEARD
        self._change(State.ALONE, "its lease is over")
        standing.grace = True
        for grant in self._grants.values():
            grant.partitioned(min(grant.granted, grant.share) if away else 0)
        self.call_soon()

    def _use_share(self) -> None:
        for grant in self._grants.values():
            grant.partitioned(grant.share)


def token_of(name: str) -> str:
    """Return the token in the *name* of an instance: HOST-PID-TOKEN@END."""
    return name.partition("@")[0].rpartition("-")[2]

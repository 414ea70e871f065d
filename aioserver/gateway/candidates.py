"""The candidates of one request in one group: the members that may still answer it, the order in
which they are tried, and the wait for the first place at one of them.

This file is one concept: the remaining members decide where the request waits, and the end of a
wait decides which members remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from aioserver.config.models import PREFIX
from aioserver.errors import AioserverError
from aioserver.gateway.affinity import MAX_SHARE, Affinity, Placement, measured
from aioserver.gateway.groups import Group, Member
from aioserver.gateway.request import Request
from aioserver.limits.resource import Bid
from aioserver.protocol.prefix import Prefix, prefix_of
from aioserver.provider_errors import (
    CircuitOpen,
    ConnectError,
    ConnectTimeout,
    ContextTooLong,
    NoProvider,
    ProviderFault,
    ProviderPaced,
)
from aioserver.providers.attempt import Attempt
from aioserver.providers.health import WAIT
from aioserver.providers.provider import enter, granted, leave
from aioserver.streams.stream import Stream
from aioserver.telemetry.outcome import NONE, GroupStart

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.limits.resource import Grant
    from aioserver.protocol.regions import Regions
    from aioserver.providers.provider import Provider


class Candidates(msgspec.Struct, eq=False):
    """The members of *group* that may still answer *request*; *left* are the members of this pass.

    If one member stores the response being continued, only that member is tried, unless it is dead
    or cannot be reached. Members that take no more than *too_small* tokens are skipped. A change
    of the group's members applies at once, also to a request that waits.

    The only member of a group without a name is asked for *model*. *prefix* is the beginning of the
    prompt, by which *affinity* finds its home; None: the group has no affinity.

    Raises:
        NoProvider: no member can answer.
    """

    group: Group
    _request: Request
    _stream: Stream | None
    affinity: Affinity
    model: str | None
    too_small: int = 0
    # The prefix of the prompt; the placement that follows from it; and whether it must still be
    # found.
    prefix: Prefix | None = None
    placement: Placement | None = None
    placeable: bool = False
    # The member where the request has started; None before.
    chosen: Member | None = None
    # The member that is tried next, before the others; None: any member that can start first.
    _only: Member | None = None
    # The members that get the whole conversation if the member that stores the response dies, and
    # the provider of that member.
    _heirs: Sequence[Member] = ()
    _kept_at: str | None = None
    # The members that may be tried again, with the codes of their faults.
    _again: tuple[tuple[Member, str], ...] = ()
    # The members that were tried and will not be tried again; and the members for which the
    # request was too long.
    _asked: frozenset[Member] = frozenset()
    _short: tuple[Member, ...] = ()
    # The version of the group that was last read, and whether the group has changed during a wait.
    _seen: int = 0
    _regrouped: bool = False
    # While the request waits: the start of the wait, whether other members or groups can be asked
    # instead, the waiting attempts, and their bids.
    began: float = 0.0
    _fallback: bool = False
    _attempts: dict[Member, Attempt] = {}
    _bids: dict[Bid, Member] = {}
    # The members of this pass.
    left: Sequence[Member] = ()
    # Whether the request stays at one member, however the group changes; and whether the group has
    # only one member.
    _settled: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        """Find the members of the first pass."""
        group, request = self.group, self._request
        self.left = group.members
        self._settled = self.alone = not group.name and len(self.left) == 1
        if self._settled:
            most = self.left[0].max_context
            if most is not None and most <= self.too_small:
                self.left = ()
            return
        self.model = None
        if request.keeper is not None:
            self._kept_at = request.keeper.kept_at
        if not self._look():
            raise group.empty()
        self.placeable = (
            group.affinity == PREFIX and len(group.members) > 1 and not request.route.pinned
        )

    async def find_prefix(self, regions: Regions | None = None) -> None:
        """Read the beginning of the prompt, which determines the home of the request. *regions*
        are those of the prompt, if they were read already.
        """
        self.placeable = False
        if regions is None:
            member, asked = self.left[0], self._request.provider_request
            regions = await self.affinity.reader.read(
                asked.body(member.settings, member.asked_model)
            )
            asked.pictures = regions is not None and regions.picture
        if regions is not None:
            self.prefix = prefix_of(regions, self.group.name)

    def _usable(self) -> list[Member]:
        """Return the members that can answer the request, by the group's present settings."""
        request = self._request
        api, pinned = request.provider_request.api, request.route.pinned
        members = self.group.usable(api, one_model=pinned)
        if request.provider_request.estimated and any(each.max_context for each in members):
            body = request.provider_request.body(members[0].settings, members[0].model)
            members = self.group.fitting(members, len(body))
        return members

    def _look(self) -> bool:
        """Find the members of this pass, by the group's present settings; return whether any
        member can answer such a request.
        """
        self._seen, self.alone = self.group.version, len(self.group.members) == 1
        usable = self._usable()
        members = [
            member
            for member in usable
            if member not in self._asked
            and (member.max_context is None or member.max_context > self.too_small)
            and all(member.takes_more_than(short) for short in self._short)
        ]
        keeping = [member for member in members if member.provider.name == self._kept_at]
        others = [member for member in members if member not in keeping]
        if any(not member.provider.health.breaker.dead for member in keeping):
            self.left, self._heirs = keeping, others
        else:
            self.left, self._heirs = others or keeping, ()
        return bool(usable)

    # Starting.

    async def start(
        self,
        again: bool = False,
        fallback: bool = False,
        parked: float | None = None,
        *,
        once: bool = False,
    ) -> tuple[Attempt, Grant]:
        """Wait for the first place at one of the remaining members; return the attempt there, and
        its grant. Cancelling is safe.

        *again*: the request was sent before. *fallback*: another group can be asked instead.
        *parked*: the seconds until the request comes back to a provider that is away; None: it is
        not away. *once*: no other provider is tried if this attempt fails.

        Raises:
            ProviderFault: no member can start it in time, or none is available. If there is only
                one, the outcome of the request names its provider.
        """
        request = self._request.provider_request
        only = self.left[0] if self.alone and self.left else None
        self.chosen, attempt, grant = None, None, None
        try:
            if only is not None and self._settled:
                member, provider = only, only.provider
                attempt = self._attempt(only, self.model, again=again, fallback=fallback)
                provider.capacity.check(movable=attempt.fallback)
                if (grant := enter(attempt, (provider.bid(attempt, parked),))) is None:
                    grant = await granted(attempt, (provider,))
            else:
                member, attempt, grant = await self._start_first(
                    again=again, fallback=fallback, parked=parked, once=once
                )
            self.chosen = member
            request.begin_attempt(member.provider.name, attempt.asked_model)
        except BaseException as error:
            if attempt is not None and grant is not None:
                self.give_up(attempt, grant)
            self._leave()
            if only is not None:
                model = only.asked_model if attempt is None else attempt.asked_model
                request.begin_attempt(only.provider.name, model)
                request.outcome.attempts -= isinstance(error, AioserverError)
            raise
        return attempt, grant

    async def run(self, attempt: Attempt, grant: Grant) -> None:
        """Run *attempt*, which `start` has returned with its *grant*, as `Provider.run`."""
        member = self.chosen
        assert member is not None
        try:
            await member.provider.run(attempt, grant)
        except BaseException:
            # The attempt may never have begun.
            self.give_up(attempt, grant)
            raise

    def give_up(self, attempt: Attempt, grant: Grant) -> None:
        """Give back what `start` has returned, unless it has run."""
        assert self.chosen is not None
        self.chosen.provider.give_up(attempt, grant)

    async def _start_first(
        self, *, again: bool, fallback: bool, parked: float | None, once: bool
    ) -> tuple[Member, Attempt, Grant]:
        group = self.group
        if group.version != self._seen:
            self._look()
        left, only = self.left, self._only
        self._only, self.placement = None, None
        self._fallback = fallback or len(left) > 1
        if only is not None and only in left:
            left, self.chosen, fallback = (only,), only, self._fallback
        elif self.prefix is not None:
            self.placement = self.affinity.place(self.prefix, left)
        members = group.order(left)
        started: Member | None = None
        trial = None if again else group.trial(members, by_time=not once)
        try:
            if trial is not None or self.placement is not None:
                home = None if self.placement is None else self.placement.home
                members.sort(key=lambda member: (member is not trial, member is not home))
            self._attempts = {
                member: self._attempt(
                    member, member.asked_model, again=again, fallback=self._fallback
                )
                for member in members
            }
            if trial is not None:
                self._attempts[trial].trial = True
            member, grant = await self._wait(trial, fallback=fallback, parked=parked)
            attempt = self._attempts[member]
            group.started(member, list(self._attempts))
            if group.name:
                self._request.provider_request.outcome.start = self._placed_at(member)
            if self.prefix is not None:
                self.affinity.sent(self.prefix, member)
            started = member
        finally:
            self._attempts, self._bids = {}, {}
            if trial is not None and started is not trial:
                # The request has started elsewhere, or nowhere.
                trial.provider.health.breaker.unsure(trial=True)
        return member, attempt, grant

    def _placed_at(self, member: Member) -> GroupStart:
        """Return how the request was placed at *member*, with the bytes of its prompt that the
        member knows.
        """
        home, known, size, placement = NONE, 0, 0, self.placement
        if placement is not None:
            home = placement.label(member)
            if placement.remembered:
                # A member that joined since the placement was not considered.
                known, size = placement.known.get(member, 0), placement.prefix.size
        return GroupStart(self.group.name, member.provider.name, home, known, size)

    def _attempt(
        self, member: Member, model: str | None, *, again: bool, fallback: bool
    ) -> Attempt:
        request = self._request
        return request.make_attempt(
            member.provider,
            request.provider_request,
            self._stream,
            model=model,
            fallback=fallback,
            again=again,
        )

    async def _wait(
        self, trial: Member | None, *, fallback: bool, parked: float | None
    ) -> tuple[Member, Grant]:
        """Bid for each of the attempts; return the member that has started, and its grant."""
        attempts, group = self._attempts, self.group
        if not attempts:
            raise group.empty()
        ready = self._ready(fallback=fallback)
        delays: Mapping[Member, float] = {}
        first = attempts[ready[0]]
        if self.placement is not None and next(iter(attempts)) is ready[0]:
            # The request waits for its home only if the home is tried now.
            delays = self.placement.delays
        now = first.provider.scheduler.time()
        longest = MAX_SHARE * self._request.provider_request.left
        for member in ready:
            bid = member.provider.bid(attempts[member], parked)
            if member is not trial and (delay := delays.get(member)):
                bid.not_before = now + min(delay, longest)
            self._bids[bid] = member
        bids = list(self._bids)
        if (grant := enter(first, bids)) is None:
            group.held_back += any(bid.not_before for bid in bids)
            self.began = now
            group.candidates[self] = None
            try:
                grant = await granted(first, [member.provider for member in ready])
            finally:
                del group.candidates[self]
        won = first.request.ticket.won
        assert won is not None
        return self._bids[won], grant

    def _ready(self, *, fallback: bool) -> list[Member]:
        """Return the members at which the request may wait now.

        Raises:
            ProviderFault: there is no such member; the fault is the refusal that may end soonest.
        """
        refusals: list[ProviderFault] = []
        ready: list[Member] = []
        cooling: list[Member] = []
        for member, attempt in self._attempts.items():
            try:
                member.provider.capacity.check(movable=attempt.fallback)
            except ProviderFault as refusal:
                refusals.append(refusal)
                if isinstance(refusal, ProviderPaced):
                    cooling.append(member)
            else:
                ready.append(member)
        if not ready and not fallback:
            # If all members are cooling down, requests wait for them as they do for a single
            # provider.
            ready = cooling
            for member in cooling:
                self._attempts[member].fallback = False
        if not ready:
            raise min(refusals, key=lambda refusal: refusal.retry_after or 0.0)
        refusals.clear()
        return ready

    def regroup(self) -> None:
        """Wait for new members of the group as well, and no longer for removed members."""
        self._look()
        self._regrouped = True
        former = list(self._bids.items())
        for member in self.group.order(self.left):
            if member in self._attempts:
                continue
            attempt = self._attempt(member, member.asked_model, again=False, fallback=True)
            self._attempts[member] = attempt
            with suppress(ProviderFault):
                member.provider.capacity.check(movable=attempt.fallback)
                bid = member.provider.bid(attempt)
                self._bids[bid] = member
                member.provider.join(attempt, bid)
        for bid, member in former:
            if member not in self.group.members or not member.settings.usable:
                member.provider.scheduler.withdraw(bid, self.group.empty)

    # Afterwards.

    def _leave(self) -> None:
        """End every wait, and give back a grant that was not read yet: `start` has failed."""
        ticket = self._request.provider_request.ticket
        leave(ticket, self.group.members[0].provider)
        for grant in [each for each in ticket.grants if each is not self._request.grant]:
            grant.cancel()

    def repeat(self) -> None:
        """Try the member that has failed once more, before the others."""
        self._only = self.chosen

    def settle(self, member: Member) -> None:
        """Stay with *member*, for which the whole group waits."""
        self.left, self._settled, self.alone = (member,), True, True
        self.model = member.asked_model

    def answered(self, attempt: Attempt) -> None:
        """Learn from the first content of *attempt* how fast its member reads a prompt."""
        member, placement = self.chosen, self.placement
        if member is None or placement is None:
            return
        record = attempt.request.record
        seconds = record.first_event_at - record.outcome.sent_at
        if record.first_event_at and seconds > 0:
            unknown = placement.prefix.size - placement.known.get(member, 0)
            member.reading = measured(member.reading, seconds, unknown)

    def failed(self, fault: ProviderFault) -> bool:
        """Record that the request has failed with *fault* at its member, or could start at no
        member; return whether another member is tried in this pass.
        """
        member = self.chosen
        if member is not None:
            self._cross_off(member, fault)
        if not self._settled and (self._regrouped or self.group.version != self._seen):
            self._regrouped = False
            self._look()
        elif self._heirs and (
            isinstance(fault, CircuitOpen | NoProvider | ConnectError | ConnectTimeout)
            or (member is not None and member.provider.health.breaker.dead)
        ):
            # The member that stores the response will not answer: it is dead, or cannot be
            # reached. The latter is known long before the former.
            self.left, self._heirs, self._again = self._heirs, (), ()
        elif member is None:
            self.left = ()
        if self.left and member is not None:
            member.provider.meter.failovers[fault.code].value += 1
        return bool(self.left)

    def _cross_off(self, member: Member, fault: ProviderFault) -> None:
        """Try *member*, which has failed with *fault*, no more in this pass."""
        if fault.retry and not fault.once:
            self._again += ((member, fault.code),)
        if self._settled:
            self.left = ()
            return
        self._asked |= {member}
        self.left = [other for other in self.left if other is not member]
        if isinstance(fault, ContextTooLong):
            # The estimate was wrong: members with no larger context are skipped.
            self.too_small = max(self.too_small, member.max_context or 0)
            self._short += (member,)
            self.left = [other for other in self.left if other.takes_more_than(member)]
            self._again = tuple(each for each in self._again if each[0].takes_more_than(member))

    def unknown(self) -> bool:
        """Record that the member where the request has started does not know the response being
        continued; return whether another member is tried.
        """
        if self._settled or self.chosen is None:
            return False
        self._asked |= {self.chosen}
        self.left = [other for other in self.left if other is not self.chosen]
        return bool(self.left)

    @property
    def away(self) -> bool:
        """Whether the request waits for its only provider, which is away, to come back."""
        if not self.left:
            return False
        health = self.left[0].provider.health
        return health.breaker.dead and health.away

    def awaited(self, fault: ProviderFault) -> Member | None:
        """Return the member for whose return the request may wait, if no member is available now;
        *fault* is their refusal.
        """
        if self.chosen is not None or self._heirs or not isinstance(fault, CircuitOpen):
            return None
        return next(
            (
                member
                for member in self.left
                if member.settings.when_down == WAIT and member.provider.health.breaker.unreachable
            ),
            None,
        )

    def next(self) -> list[tuple[Provider, str]]:
        """Begin the next pass with the members that may be tried again and are still members;
        return them with the codes of their faults.
        """
        again = self._again
        if not self._settled:
            again = tuple(each for each in again if each[0] in self.group.members)
            self._asked = self._asked.difference(member for member, _ in again)
        self._again = ()
        self.left = [member for member, _ in again]
        return [(member.provider, code) for member, code in again]

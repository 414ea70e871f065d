"""Groups: one name of a model, which several providers can answer.

A group has members, each a provider and the model that it is asked for, and chooses among those
that can answer a request: the first that can start it, the least busy, or by weight. It has no
queue of its own. Where no member has a place, the request stands in the line of each
(limits/lines.py) and starts at the first place that is offered, so that each provider's places are
shared fairly by all who ask for it, whatever name they use.

This file is one concept: which member starts a request.
"""

from __future__ import annotations

import contextlib
import time
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING

from aioserver.config.models import LEAST_BUSY, ORDERED, WEIGHTED
from aioserver.gateway.members import Member, load, sick, well
from aioserver.limits.lines import Lines
from aioserver.provider_errors import NoProvider, ProviderFault, ProviderPaced
from aioserver.telemetry.outcome import NONE, GroupStart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from aioserver.gateway.homes import Placement
    from aioserver.limits.gate import Place
    from aioserver.limits.lines import Wish
    from aioserver.providers.api import Api
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.provider import Provider
    from aioserver.telemetry.outcome import Outcome

# A prompt is skipped for a member if, by this estimate, it is longer than what the member takes by
# more than half.
BYTES_PER_TOKEN, DOUBT = 4, 1.5


class Waiting:
    """One request in the lines of members, since it *began* to wait: at each of *attempts* with one
    of its *wishes*. *more* returns the attempts at members that have come to its group since it was
    called last.
    """

    __slots__ = ("_more", "attempts", "began", "lines", "since", "wishes")

    def __init__(
        self,
        lines: Lines,
        attempts: dict[Member, Attempt],
        more: Callable[[], Mapping[Member, Attempt]],
        began: float,
    ) -> None:
        self.lines, self.attempts, self.began = lines, attempts, began
        self._more = more
        self.wishes: dict[Member, Wish] = {}
        # When it has begun to wait for members that came later.
        self.since: dict[Member, float] = {}

    def regroup(self, group: Group, now: float) -> None:
        """Stand in the lines of new members of *group* as well, and no more in those of others."""
        for member, attempt in self._more().items():
            with contextlib.suppress(ProviderFault):
                member.provider.check(attempt)
                self.attempts[member], self.since[member] = attempt, now
                self.wishes[member] = wish = member.provider.wish(attempt)
                self.lines.join(wish)
        for member, wish in self.wishes.items():
            if member not in group.members or not member.settings.usable:
                self.lines.quit(wish, group.empty)


class Group:
    """The *members* that can answer for *name*; an implied group, which nobody has configured, has
    no name. In an ordered one another group may stand in the place of a member: all of its members
    do then, in the order that it chooses.

    *fallbacks* are asked where no member is left that could answer.

    Always: `waiting` is the number of distinct requests that stand in lines for the group.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Member | Group],
        choose: str = ORDERED,
        affinity: str = "none",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.members: Sequence[Member] = ()
        self.fallbacks: Sequence[Group] = ()
        # What the members come of.
        self._parts: Sequence[Member | Group] = ()
        self._clock = clock
        self._marks = count()
        # Grows with each change of its members.
        self.version = 0
        # Requests that were held back for their home.
        self.held_back = 0
        # The requests that stand in lines, in the order in which they have come.
        self._waiting: dict[Waiting, None] = {}
        self.apply(parts, choose, affinity)

    def apply(self, parts: Sequence[Member | Group], choose: str, affinity: str) -> None:
        """Use other members and another choice from now on.

        One that stays keeps its counts. Requests that wait stand in the lines of new ones at once,
        and in those of others no more.
        """
        own = (old for old in self._parts if isinstance(old, Member))
        known = {(old.provider, old.asked_model): old for old in own}
        kept: list[Member | Group] = []
        for new in parts:
            if isinstance(new, Group):
                kept.append(new)
                continue
            member = known.get((new.provider, new.asked_model), new)
            member.marks = self._marks
            member.model, member.factor = new.model, new.factor
            member.weight, member.max_context = new.weight, new.max_context
            kept.append(member)
        self._parts, self.choose, self.affinity = kept, choose, affinity
        members: dict[tuple[Provider, str], Member] = {}
        for part in kept:
            for member in part.members if isinstance(part, Group) else (part,):
                members.setdefault((member.provider, member.asked_model), member)
        self.members = list(members.values())
        self._nested = any(isinstance(part, Group) for part in kept)
        self.version += 1
        now = self._clock()
        for waiting in list(self._waiting):
            waiting.regroup(self, now)

    @property
    def available(self) -> bool:
        """Whether a member is asked like any other."""
        return any(member.provider.health.available for member in self.members)

    @property
    def waiting(self) -> int:
        """How many requests wait for a place at any member; of a group of one: all who wait
        there.
        """
        if len(self.members) == 1:
            return self.members[0].provider.stats().queue.waiting
        return len(self._waiting)

    @property
    def oldest_wait(self) -> float:
        """For how many seconds the request has waited that came first."""
        if len(self.members) == 1:
            return self.members[0].provider.stats().queue.oldest_wait
        began = min((waiting.began for waiting in self._waiting), default=None)
        return 0.0 if began is None else self._clock() - began

    def empty(self) -> NoProvider:
        """Return the fault of a request that none of its members can answer any more."""
        return NoProvider(f"no provider of {self.name} is usable")

    def usable(self, api: Api, *, one_model: bool = False) -> list[Member]:
        """Return the members that can be asked for a request of *api*, in their order.

        With *one_model* only those that are asked for the same model as the first.
        """
        members = [
            member
            for member in self.members
            if member.settings.usable and api.speaks(member.settings)
        ]
        if one_model and members:
            first = members[0].asked_model
            members = [member for member in members if member.asked_model == first]
        return members

    def fitting(self, members: list[Member], size: int) -> list[Member]:
        """Return those of *members* that take a body of *size* bytes, by an estimate.

        The one that takes most is always among them: its engine says the refusal.
        """
        most = max((member.max_context or 0 for member in members), default=0)
        if any(member.max_context is None for member in members):
            most = 0
        tokens = size / BYTES_PER_TOKEN
        return [
            member
            for member in members
            if member.max_context is None
            or member.max_context == most
            or tokens <= DOUBT * member.max_context
        ]

    def order(self, members: Iterable[Member]) -> list[Member]:
        """Return *members* in the order in which they are offered a request: sick ones last."""
        members = list(members)
        if self._nested:
            members = [
                member
                for part, among in self._by_part(members)
                for member in (among if part is None else part.order(among))
            ]
        elif self.choose == LEAST_BUSY:
            members.sort(key=load)
        elif self.choose == WEIGHTED:
            members.sort(key=lambda member: -(member.credit + member.weight))
        if not any(map(sick, members)):
            return members
        # `sorted` keeps their order otherwise.
        return sorted(members, key=sick)

    def trial(self, members: Sequence[Member], *, by_time: bool = True) -> Member | None:
        """Return the one of *members*, which `order` has put in order, that a request asks first
        as a trial, since it is sick; its breaker has to be told of the end. None: there is none.

        *by_time* is as for `Breaker.start_spared`.
        """
        if not members or not sick(members[-1]) or not any(map(well, members)):
            return None
        for member in self.first_if_well(members)[0]:
            if member.provider.health.breaker.start_spared(by_time=by_time):
                return member
        return None

    def first_if_well(self, members: Sequence[Member]) -> tuple[list[Member], bool]:
        """Return the sick ones of *members* that would be asked first if they were well, and
        whether none of those behind this group would be.
        """
        if self.choose != ORDERED:
            return [member for member in members if sick(member)], any(map(well, members))
        candidates: list[Member] = []
        for part, among in self._by_part(self.members):
            if part is not None:
                of_part, last = part.first_if_well([each for each in members if each in among])
                candidates += of_part
            else:
                (member,) = among
                candidates += [member] if member in members and sick(member) else []
                last = well(member)
            if last:
                return candidates, True
        return candidates, False

    def _by_part(self, members: Sequence[Member]) -> Iterator[tuple[Group | None, list[Member]]]:
        """Yield *members* by what they have come of, in its order: a group, or None for one that
        is of this group itself.
        """
        left = dict.fromkeys(members)
        for part in self._parts:
            among = part.members if isinstance(part, Group) else (part,)
            here = [member for member in members if member in among and member in left]
            for member in here:
                del left[member]
            if here:
                yield (part if isinstance(part, Group) else None), here

    def started(
        self,
        chosen: Member,
        among: Sequence[Member],
        outcome: Outcome,
        placement: Placement | None = None,
    ) -> None:
        """Note, in the *outcome* of a request, too, that it has started at *chosen*, which was
        chosen *among* these, and where it belonged.
        """
        if self.name:
            home, known, size = NONE, 0, 0
            if placement is not None:
                home = placement.label(chosen)
                if placement.remembered:
                    # One that has come since it was placed was not looked at.
                    known, size = placement.known.get(chosen, 0), placement.prefix.size
            outcome.start = GroupStart(self.name, chosen.provider.name, home, known, size)
        chosen.starts += 1
        chosen.started_at = self._clock()
        self.count_start(chosen, among)

    def count_start(self, chosen: Member, among: Sequence[Member]) -> None:
        """Note what the weights owe each member, since *chosen* of *among* has started."""
        if self._nested:
            for part, here in self._by_part(among):
                if part is not None and chosen in here:
                    part.count_start(chosen, here)
        elif self.choose == WEIGHTED:
            total = sum(map(attrgetter("weight"), among))
            for member in among:
                # One that was full, and so was passed over, is not owed more than a round.
                member.credit = min(member.credit + member.weight, total)
            chosen.credit -= total

    async def start(
        self,
        attempts: Mapping[Member, Attempt],
        placement: Placement | None = None,
        *,
        more: Callable[[], Mapping[Member, Attempt]] = dict,
        fallback: bool = False,
    ) -> tuple[Member, Place]:
        """Wait for a place of one of *attempts*, of which each is one at that member; they are in
        the order in which their members are asked. Return the member, and its place.

        With a *placement* its home comes first but for a trial, and others may have to be waited
        for. *more* puts attempts at members that have come since into *attempts*, and returns
        them. *fallback* says that others can be asked instead of all of them. Cancelling is safe.

        Raises:
            ProviderFault: no member can start it in time, or all are left alone.
        """
        if not attempts:
            raise self.empty()
        among = list(attempts)
        delays: Mapping[Member, float] = {}
        if placement is not None:
            delays = placement.delays
            trial = next((each for each in among if attempts[each].trial), None)
            among.sort(key=lambda member: (member is not trial, member is not placement.home))
            if trial is not None:
                delays = {each: delay for each, delay in delays.items() if each is not trial}
        while True:
            offer = await self._offer(among, attempts, delays, more, fallback=fallback)
            if offer is not None:
                break
            # One in the background has its permit now, and may still have to wait for its place:
            # at the members of now, of which some may have come, and some have gone.
            later = (member for member in attempts if member not in among)
            among = [member for member in (*among, *later) if member in self.members]
            if not among:
                raise self.empty()
        member, place = offer
        try:
            self.started(member, list(attempts), attempts[member].request.outcome, placement)
        except BaseException:
            place.release()
            raise
        return member, place

    async def _offer(
        self,
        among: Sequence[Member],
        attempts: Mapping[Member, Attempt],
        delays: Mapping[Member, float],
        more: Callable[[], Mapping[Member, Attempt]],
        *,
        fallback: bool,
    ) -> tuple[Member, Place] | None:
        """Return the first place that a member offers, *among* these in their order; None if a
        permit has come.
        """
        refusals: list[ProviderFault] = []
        ready: list[Member] = []
        cooling: list[Member] = []
        for member in among:
            try:
                if delays.get(member):
                    member.provider.check(attempts[member])
                    place = None
                else:
                    place = member.provider.offer(attempts[member])
            except ProviderFault as refusal:
                refusals.append(refusal)
                if isinstance(refusal, ProviderPaced):
                    cooling.append(member)
                continue
            if place is not None:
                return member, place
            ready.append(member)
        if not ready and not fallback:
            # While all cool, requests wait for them as they do at one provider.
            ready = cooling
            for member in cooling:
                attempts[member].fallback = False
        if not ready:
            raise min(refusals, key=lambda refusal: refusal.retry_after or 0.0)
        if among[0] not in ready:
            # Nobody waits for a home that is not asked now.
            delays = {}
        self.held_back += any(delays.get(member) for member in ready)
        return await self._wait({each: attempts[each] for each in ready}, delays, more)

    async def _wait(
        self,
        attempts: dict[Member, Attempt],
        delays: Mapping[Member, float],
        more: Callable[[], Mapping[Member, Attempt]],
    ) -> tuple[Member, Place] | None:
        """Stand in the line of each member until one starts the request; None if it has given a
        permit.
        """
        first = next(iter(attempts.values()))
        caller = first.request.caller
        bound = first.request.bound
        queued: Callable[[int, float], None] | None = None
        if first.shows_position:
            queued = first.queued
        if bound is not None and self.name:
            queued = bound.telling(self.name, queued)
        lines = Lines(
            caller.flow,
            caller.subflow,
            weight=caller.priority,
            on_position=queued,
            came=first.came
            if first.retry or any(attempt.permit for attempt in attempts.values())
            else None,
            batch=first.request.batch,
            within=first.request.left,
        )
        waiting = Waiting(lines, attempts, more, self._clock())
        wishes = waiting.wishes
        winner: Member | None = None
        place: Place | None = None
        self._waiting[waiting] = None
        try:
            for member, attempt in attempts.items():
                wishes[member] = member.provider.wish(attempt, delays.get(member, 0.0))
            taken, place = await lines.wait(list(wishes.values()))
            winner = next(member for member, wish in wishes.items() if wish is taken)
        except BaseException:
            if place is not None:
                place.release(0)
            raise
        finally:
            del self._waiting[waiting]
            for member, wish in wishes.items():
                own = place if member is winner else None
                began = waiting.since.get(member, waiting.began)
                member.provider.waited(attempts[member], wish, began, own)
        return None if attempts[winner].permit is place else (winner, place)

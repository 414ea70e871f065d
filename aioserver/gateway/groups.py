"""Groups: one name of a model, which several providers can answer.

A group has members, each a provider and the model that it is asked for, and chooses among those
that can answer a request: the first that can start it, the least busy, or by weight. It has no
queue of its own. Where no member has a place, the request bids for a place of each, and starts at
the first one that becomes free, so that each provider's places are shared fairly by all who ask
for it, whatever name they use.

This file is one concept: which member starts a request.
"""

from __future__ import annotations

import time
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from aioserver.config.models import LEAST_BUSY, ORDERED, WEIGHTED
from aioserver.gateway.members import Member, load, sick, well
from aioserver.provider_errors import NoProvider
from aioserver.telemetry.outcome import NONE, GroupStart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aioserver.gateway.affinity import Placement
    from aioserver.providers.api import Api
    from aioserver.providers.provider import Provider
    from aioserver.telemetry.outcome import Outcome

# A prompt is skipped for a member if, by this estimate, it is longer than what the member takes by
# more than half.
BYTES_PER_TOKEN, DOUBT = 4, 1.5


class Waiting(Protocol):
    """A request that waits for members (gateway/candidates.py), since it *began* to."""

    began: float

    def regroup(self) -> None:
        """Wait for new members of the group as well, and no more for those that have left it."""


class Group:
    """The *members* that can answer for *name*; an implied group, which nobody has configured, has
    no name. In an ordered one another group may stand in the place of a member: all of its members
    do then, in the order that it chooses.

    *fallbacks* are asked where no member is left that could answer.

    Always: `waiting` is the number of requests that wait for a place at any member.
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
        # The requests that wait, in the order in which they have begun to.
        self.candidates: dict[Waiting, None] = {}
        self.apply(parts, choose, affinity)

    def apply(self, parts: Sequence[Member | Group], choose: str, affinity: str) -> None:
        """Use other members and another choice from now on.

        One that stays keeps its counts. Requests that wait do so at new ones as well, and at others
        no more.
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
        for candidates in list(self.candidates):
            candidates.regroup()

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
        return len(self.candidates)

    @property
    def oldest_wait(self) -> float:
        """For how many seconds the request has waited that came first."""
        if len(self.members) == 1:
            return self.members[0].provider.stats().queue.oldest_wait
        if (longest := next(iter(self.candidates), None)) is None:
            return 0.0
        return self.members[0].provider.scheduler.time() - longest.began

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

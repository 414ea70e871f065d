"""Groups: one name of a model, which several providers can answer, and their members.

A group has members, each a provider and the model that it is asked for, and chooses among those
that can answer a request: the first that can start it, the least busy, or by weight. It has no
queue of its own. Where no member has a place, the request bids for a place of each, and starts at
the first one that becomes free, so that each provider's places are shared fairly by all who ask
for it, whatever name they use.

This file is one concept: which member starts a request.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

import msgspec

from aioserver.config.models import LEAST_BUSY, ORDERED, WEIGHTED
from aioserver.provider_errors import NoProvider
from aioserver.providers.provider import Provider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aioserver.config.settings import Provider as ProviderSettings
    from aioserver.providers.api import Api

# A prompt is skipped for a member if, by this estimate, it is longer than what the member takes by
# more than half.
BYTES_PER_TOKEN, DOUBT = 4, 1.5
# Seconds in which an engine reads one byte of a prompt, before it is measured.
READING = 60e-6
# Scores of members are below this, a prime number.
PRIME = (1 << 61) - 1


class Waiting(Protocol):
    """A request that waits for members (gateway/candidates.py), since it *began* to."""

    began: float

    def regroup(self) -> None:
        """Wait for new members of the group as well, and no more for those that have left it."""


class Member(msgspec.Struct, eq=False):
    """One provider of a group, and the model that it is asked for; None stands for its own.

    *starts* counts the requests that have started there by the group; *started_at* is the
    monotonic time of the newest. *credit* is what the weights owe it (smooth weighted round robin,
    as nginx has it): it grows by the weight with each start, and the member that starts gives back
    the weights of all.

    *mark* is what affinity.py knows it by, one of its group's *marks*. It holds for one *address* and
    until the provider dies, whose *deaths* it knows. *reading* has the seconds in which it reads a
    byte of a prompt. *factor* is of its names, the same in every process: by it members compete
    for conversations.
    """

    provider: Provider
    model: str | None = None
    weight: int = 1
    max_context: int | None = None
    starts: int = 0
    started_at: float = 0.0
    credit: int = 0
    mark: int = 0
    reading: float = READING
    marks: Iterator[int] = msgspec.field(default_factory=count)
    address: str = ""
    deaths: int = 0
    factor: int = 0

    def __post_init__(self) -> None:
        name = f"{self.provider.name}/{self.asked_model}".encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        self.factor = int.from_bytes(digest) % PRIME

    def mark_holds(self) -> bool:
        """Return whether what was sent to it under its mark may still be in its cache; it gets
        another mark if not.
        """
        address, breaker = self.provider.pools.base_url, self.provider.health.breaker
        if address != self.address or breaker.deaths != self.deaths:
            self.address, self.deaths, self.mark = address, breaker.deaths, next(self.marks)
        return not breaker.dead

    def takes_more_than(self, other: Member) -> bool:
        """Return whether it may take a prompt that is too long for *other*: unless it is known to
        take no more.
        """
        if self.max_context is None or other.max_context is None:
            return True
        return self.max_context > other.max_context

    @property
    def settings(self) -> ProviderSettings:
        """The settings of its provider."""
        return self.provider.settings

    @property
    def asked_model(self) -> str:
        """The model that it is asked for."""
        return self.model or self.provider.settings.model


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

    def started(self, chosen: Member, among: Sequence[Member]) -> None:
        """Note that a request has started at *chosen*, which was chosen *among* these."""
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


def load(member: Member) -> tuple[float, float]:
    """Return what the least busy member has least of: its share of places taken, then the time of
    its newest start.
    """
    inside, limit = member.provider.places
    return inside / max(1, limit), member.started_at


def sick(member: Member) -> bool:
    """Return whether *member* comes last, but for trials, since its provider is sick."""
    breaker = member.provider.health.breaker
    return breaker.sick and not breaker.dead


def well(member: Member) -> bool:
    """Return whether *member* is asked like any other: its provider is neither sick nor dead, and
    has not refused our key.
    """
    health = member.provider.health
    return health.available and not health.breaker.sick

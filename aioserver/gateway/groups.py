"""Groups: one model name that several providers serve, and their members.

A group has members, each a provider and the model that it is asked for. Among the members that can
answer a request it chooses the first that can start it, the least busy, or one by weight. A group
has no queue of its own. If no member has a place, the request bids for a place at each, and starts
at the first that becomes free, so that all requests share each provider's places fairly, whatever
name they use.

This file is one concept: the choice of the member that starts a request.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from aioserver.config.models import LEAST_BUSY, ORDERED, WEIGHTED
from aioserver.provider_errors import NoProvider
from aioserver.providers.provider import Provider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aioserver.config.settings import Provider as ProviderSettings
    from aioserver.providers.request import Api

# A member is skipped if the prompt, by this estimate, exceeds the member's context by more than
# half.
BYTES_PER_TOKEN, DOUBT = 4, 1.5
# Seconds in which an engine reads one byte of a prompt, before any measurement.
READING = 60e-6
# Scores of members are below this, a prime number.
PRIME = (1 << 61) - 1


class Waiting(Protocol):
    """A request that waits for members (gateway/candidates.py); *began* is the start of its wait."""

    began: float

    def regroup(self) -> None:
        """Wait for new members of the group as well, and no longer for removed members."""


class Modalities(NamedTuple):
    """What a prompt and an answer of a model may have, as OpenRouter names it; empty: not known."""

    input: Sequence[str] = ()
    output: Sequence[str] = ()


class Member(msgspec.Struct, eq=False):
    """One provider of a group, and the model that it is asked for; None: the provider's model.

    *starts* counts the requests that the group has started there; *started_at* is the monotonic
    time of the newest. *credit* is for the smooth weighted round robin of nginx: it grows by the
    weight with each start, and the member that starts gives back the weights of all.

    affinity.py knows the member by its *mark*, one of its group's *marks*. A mark is valid for one
    *address*, and until the provider's count of *deaths* changes. *reading* is the seconds in
    which it reads a byte of a prompt. *factor* is derived from its names, the same in every
    process: it is the member's part of the rendezvous.
    """

    provider: Provider
    model: str | None = None
    weight: int = 1
    max_context: int | None = None
    modalities: Modalities = Modalities()
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
        """Return whether prompts that were sent under its mark may still be in its cache; if not,
        it gets a new mark.
        """
        address, breaker = self.provider.pools.base_url, self.provider.health.breaker
        if address != self.address or breaker.deaths != self.deaths:
            self.address, self.deaths, self.mark = address, breaker.deaths, next(self.marks)
        return not breaker.dead

    def takes_more_than(self, other: Member) -> bool:
        """Return whether it may take a prompt that is too long for *other*: unless its context is
        known to be no larger.
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
    """The *members* that can answer for *name*; a group that is not configured has no name. An
    ordered group may contain another group instead of a member: that group's members then come at
    this place, in the order that it chooses.

    *fallbacks* are asked if no member can answer any more.

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
        # The members or groups from which the members come.
        self._parts: Sequence[Member | Group] = ()
        self._clock = clock
        self._marks = count()
        # Incremented at each change of its members.
        self.version = 0
        # The number of requests that were held back for their home.
        self.held_back = 0
        # The waiting requests, in the order in which they have begun to wait.
        self.candidates: dict[Waiting, None] = {}
        self.apply(parts, choose, affinity)

    def apply(self, parts: Sequence[Member | Group], choose: str, affinity: str) -> None:
        """Apply another list of members and another choice.

        Members that stay keep their counts. Waiting requests join new members, and leave removed
        members.
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
            member.modalities = new.modalities
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
        """Whether at least one member is well."""
        return any(member.provider.health.available for member in self.members)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a place at any member; for a group of one member,
        all requests that wait there.
        """
        if len(self.members) == 1:
            return self.members[0].provider.stats().queue.waiting
        return len(self.candidates)

    @property
    def oldest_wait(self) -> float:
        """The seconds for which the oldest request has waited."""
        if len(self.members) == 1:
            return self.members[0].provider.stats().queue.oldest_wait
        if (longest := next(iter(self.candidates), None)) is None:
            return 0.0
        return self.members[0].provider.scheduler.time() - longest.began

    def empty(self) -> NoProvider:
        """Return the fault of a request that no member can answer any more."""
        return NoProvider(f"no provider of {self.name} is usable")

    def max_context(self, model: str | None) -> int | None:
        """Return the tokens of the longest prompt that a member takes, by the settings or by what
        its engine has said; None: they are not known of all. *model* is that of a request for a
        group without a name.
        """
        most = 0
        for member in self.members:
            asked = member.asked_model if self.name else member.model or model
            known = member.max_context or member.provider.context_limit(
                asked or member.asked_model
            )
            if known is None:
                return None
            most = max(most, known)
        return most or None

    @property
    def modalities(self) -> Modalities:
        """What a prompt and an answer of every member may have."""
        return Modalities(
            _common([member.modalities.input for member in self.members]),
            _common([member.modalities.output for member in self.members]),
        )

    def usable(self, api: Api, *, one_model: bool = False) -> list[Member]:
        """Return the members that can serve a request of *api*, in order.

        With *one_model*, only those with the same model as the first.
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

        The member with the largest context is always included: its engine then refuses.
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
        """Return *members* in the order in which a request tries them, sick ones last."""
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
        # `sorted` is stable.
        return sorted(members, key=sick)

    def trial(self, members: Sequence[Member], *, by_time: bool = True) -> Member | None:
        """Return the sick member that a request tries first, as a trial; None: there is no trial.

        *members* are ordered by `order`. The caller must report the outcome to the member's breaker.
        *by_time* is as for `Breaker.start_spared`.
        """
        if not members or not sick(members[-1]) or not any(map(well, members)):
            return None
        for member in self.first_if_well(members)[0]:
            if member.provider.health.breaker.start_spared(by_time=by_time):
                return member
        return None

    def first_if_well(self, members: Sequence[Member]) -> tuple[list[Member], bool]:
        """Return the sick members that would be tried first if they were well, and whether a well
        member ends the search.
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
        """Yield *members* by the part that they come from, in order: a group, or None for a member
        of this group itself.
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
        """Note that a request has started at *chosen*, one of *among*."""
        chosen.starts += 1
        chosen.started_at = self._clock()
        self.count_start(chosen, among)

    def count_start(self, chosen: Member, among: Sequence[Member]) -> None:
        """Update the credits of *among*, since *chosen* has started."""
        if self._nested:
            for part, here in self._by_part(among):
                if part is not None and chosen in here:
                    part.count_start(chosen, here)
        elif self.choose == WEIGHTED:
            total = sum(map(attrgetter("weight"), among))
            for member in among:
                # A member that was passed over because it was full is owed at most one round.
                member.credit = min(member.credit + member.weight, total)
            chosen.credit -= total


def load(member: Member) -> tuple[float, float]:
    """Return the sort key of the least busy member: its share of taken places, then the time of
    its newest start.
    """
    inside, limit = member.provider.capacity.places
    return inside / max(1, limit), member.started_at


def sick(member: Member) -> bool:
    """Return whether the provider of *member* is sick, so that it comes last except for trials."""
    breaker = member.provider.health.breaker
    return breaker.sick and not breaker.dead


def well(member: Member) -> bool:
    """Return whether the provider of *member* is available: neither sick nor dead, with its key
    accepted.
    """
    return member.provider.health.well


def _common(lists: Sequence[Sequence[str]]) -> list[str]:
    """Return what all of *lists* have; nothing if one of them is empty."""
    return [each for each in lists[0] if all(each in other for other in lists)] if lists else []

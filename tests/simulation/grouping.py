"""Groups of a run: several names over three providers, whose members change, and one of which may
be killed; and what must hold of their requests.

Each group has some of the providers in some order, chooses in some way, perhaps by the beginnings
of prompts, with weights, bounds of the context, and members whose model fails. The clients of one
talk begin with the same words, so that they have one home.

What is remembered of prompts is compared with all that each member was sent since it joined its
group at its present address, and since it died last.

Private names used here: those of candidates and of breakers, which no snapshot shows.
"""

# ruff: noqa: SLF001 - see above

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from aioserver.gateway.affinity import MAX_SHARE, Affinity
from aioserver.gateway.groups import Group
from aioserver.providers.breaker import Breaker
from tests.simulation.clock import Clock
from tests.simulation.noting import noted, together

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence
    from contextlib import ExitStack

    from aioserver.gateway.affinity import Placement
    from aioserver.gateway.candidates import Candidates
    from aioserver.gateway.groups import Member
    from aioserver.gateway.router import Router
    from aioserver.limits.scheduler import Scheduler
    from aioserver.protocol.prefix import Prefix

PROVIDERS = ("sim", "spare", "third")
NAMES = ("one", "two", "three")
CHOICES = ("ordered", "least_busy", "weighted")
# Faults of a member's model: each comes before the answer, so that another member gives it whole.
FAULTS = ("status-500", "status-429", "slow-down", "capacity", "retry-after-ms", "drop", "flap-2")
# The talks of which a client's question may be the second turn; 0: it is the first of its own.
TALKS = 5
# Seconds by which a timer may be late.
LATE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """The groups of a run as `llm.models` has them: *models*, and *changed* after a reload.

    *kills*: the moments at which a provider is killed, which, and for how many seconds.
    """

    models: Mapping[str, Any]
    changed: Mapping[str, Any]
    kills: tuple[tuple[float, str, float], ...] = ()

    def members_of(self, name: str) -> set[str]:
        """Return the providers that may ever be asked for the group *name*."""
        entries = (*self.models[name]["members"], *self.changed[name]["members"])
        return {entry["provider"] for entry in entries}


def draw_grouping(seed: int) -> Grouping | None:
    """Draw the groups of *seed*; a quarter of the seeds has some."""
    dice = random.Random(f"groups {seed}")
    if dice.random() >= 0.25:
        return None
    names = NAMES[: dice.randrange(1, len(NAMES) + 1)]
    models = {name: _draw_group(dice) for name in names}
    changed = {name: _change(dice, group) for name, group in models.items()}
    kills = [
        (dice.uniform(0.5, 40.0), name, dice.choice((0.3, 3.0, 20.0)))
        for name in PROVIDERS
        if dice.random() < 0.25
    ]
    return Grouping(models=models, changed=changed, kills=tuple(kills))


def _draw_group(dice: random.Random) -> dict[str, Any]:
    choose = dice.choice(CHOICES)
    affinity = choose != "ordered" and dice.random() < 0.7
    providers = dice.sample(PROVIDERS, dice.choice((2, 3, 3)))
    return {
        "members": [_draw_member(dice, name, choose) for name in providers],
        "choose": choose,
        **({"affinity": "prefix"} if affinity else {}),
    }


def _draw_member(dice: random.Random, provider: str, choose: str) -> dict[str, Any]:
    member: dict[str, Any] = {"provider": provider}
    if dice.random() < 0.2:
        member["model"] = f"fault-{dice.choice(FAULTS)}"
    if choose == "weighted":
        member["weight"] = dice.choice((1, 2, 5))
    if dice.random() < 0.3:
        member["max_context"] = dice.choice((20, 200, 2000))
    return member


def _change(dice: random.Random, group: dict[str, Any]) -> dict[str, Any]:
    """Draw what *group* is after a reload: a member less, or one more, in another order."""
    choose, members = group["choose"], list(group["members"])
    names = {member["provider"] for member in members}
    missing = [name for name in PROVIDERS if name not in names]
    if missing:
        members.append(_draw_member(dice, missing[0], choose))
    if not missing or dice.random() < 0.5:
        members.pop(dice.randrange(len(members)))
    dice.shuffle(members)
    return {**group, "members": members}


class GroupWatch:
    """Looks at the groups of *router*, and calls *broken* with what they have broken."""

    def __init__(
        self, router: Router, scheduler: Scheduler, broken: Callable[[str], None]
    ) -> None:
        self._router, self._scheduler = router, scheduler
        self._broken = broken

    def look(self, *, settled: bool) -> None:
        """Check that each request that waits for a group stands in a line of a member that may
        start it, or will soon; *settled*: no reload was lately.
        """
        for group in {**self._router.groups, **self._router.listed}.values():
            for each in group.candidates:
                self._look_at(group, cast("Candidates", each), settled=settled)

    def _look_at(self, group: Group, candidates: Candidates, *, settled: bool) -> None:
        ticket = candidates._request.provider_request.ticket
        if ticket not in self._scheduler.waiting:
            self._broken(f"a request that waits no more is one of {group.name}")
            return
        coming = [bid for bid in ticket.bids if not bid.standing]
        # One in the background waits for its part first.
        standing = [bid.resource.within or bid.resource for bid in ticket.bids if bid.standing]
        resources = set(standing)
        if len(resources) < len(standing):
            self._broken(f"a request stands twice in a line of {group.name}")
        if resources - {member.provider.capacity.resource for member in group.members}:
            self._broken(f"a request of {group.name} stands in the line of no member")
        dead = {
            provider.capacity.resource
            for provider in self._router.providers.values()
            if provider.health.breaker.dead
            and provider.settings.when_down != "wait"
            # One may wait for the pace, as the next trial.
            and provider.capacity.waiting > 1
        }
        if settled and resources and not coming and resources <= dead:
            self._broken(f"a request waits for {group.name} at dead members alone")
        if not (coming and settled):
            return
        # Whoever waits for a home.
        deadlines = [
            provider.settings.http_client.queue_timeout
            for provider in self._router.providers.values()
        ]
        last, began = max(bid.not_before for bid in coming), candidates.began
        longest = MAX_SHARE * min(ticket.deadline - began, max(deadlines)) + LATE
        if last - began > longest or Clock.now > last + LATE:
            self._broken(
                f"a request waits for its home in {group.name} for {last - began:.2f} s, at most "
                f"{longest} s"
            )


class Remembered:
    """What each member was sent in its present life, as a reference for affinity.py."""

    def __init__(self, broken: Callable[[str], None]) -> None:
        self._broken = broken
        self._sent: defaultdict[Hashable, set[int]] = defaultdict(set)
        self._deaths: Counter[int] = Counter()
        self._removals: Counter[Hashable] = Counter()

    def _life(self, affinity: Affinity, member: Member) -> Hashable:
        """Return what names the cache of *member*: another one after each end of a life."""
        provider = member.provider
        breaker = provider.health.breaker
        removals = self._removals[_name(member)]
        return (
            *(id(affinity), _name(member), removals),
            *(id(breaker), self._deaths[id(breaker)], provider.pools.base_url),
        )

    def sent(self, affinity: Affinity, prefix: Prefix, member: Member) -> None:
        """Note that *member* was sent a prompt."""
        self._sent[self._life(affinity, member)].update(prefix.digests)

    def placed(self, affinity: Affinity, placement: Placement) -> None:
        """Check that each member was sent what it is said to know."""
        prefix = placement.prefix
        for member, known in placement.known.items():
            if not known:
                continue
            if member.provider.health.breaker.dead:
                self._broken(f"{member.provider.name} is said to know a prompt, and is dead")
            digest = prefix.digests[list(prefix.lengths).index(known)]
            if digest not in self._sent[self._life(affinity, member)]:
                self._broken(
                    f"{member.provider.name} is said to know {known} bytes that it was not sent"
                )

    def applied(self, group: Group, members: Sequence[Member], *_how: object) -> None:
        """Note that *group* has other *members* now."""
        stay = {_name(member)[1:] for member in members}
        for old in group.members:
            if _name(old)[1:] not in stay:
                self._removals[_name(old)] += 1

    def patches(self) -> ExitStack:
        """Let all of that be noted, in the block."""
        return together(
            noted(Affinity, "place", after=lambda made, affinity, *_: self.placed(affinity, made)),
            noted(Affinity, "sent", before=self.sent),
            noted(Group, "apply", before=self.applied),
            noted(Breaker, "_die", before=lambda breaker: self._deaths.update([id(breaker)])),
        )


def _name(member: Member) -> tuple[int, str, str]:
    # A group is known by the marks that it gives to its members.
    return id(member.marks), member.provider.name, member.asked_model


def talk_of(number: int) -> list[dict[str, str]]:
    """Return the messages that come before the question of client *number*, of a talk that
    several clients have; none, if it is the first of its own.
    """
    talk = number // 7 % (TALKS + 1)
    if not talk:
        return []
    words = " ".join([f"talk{talk}"] * 400)
    return [{"role": "user", "content": words}, {"role": "assistant", "content": "Yes."}]

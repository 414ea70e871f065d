"""The state of the server, as the reference model of wings/cluster/renew.lua has it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Member:
    """An instance: when its lease ends, its last call, when it joined, which of those that joined
    it knows, and whether it has not called since the server had an older state.
    """

    ends: float
    seq: int
    number: int
    heard: int
    silent: bool = False


@dataclass(slots=True)
class Hold:
    """The places that an instance holds, and whether it knows that others starve."""

    recorded: int
    knows: int = 0


@dataclass(slots=True)
class Want:
    """How many places an instance wants, and its turn: the smallest tag, then order, is next."""

    tag: float
    order: int
    need: int
    weight: int


@dataclass(slots=True)
class Limit:
    """The holders of a limit and those who want more of it, each with a number; *turns* is where
    the last turn of each has ended.
    """

    limit: int = 0
    virtual: float = 0
    orders: int = 0
    holds: dict[str, Hold] = field(default_factory=dict)
    wants: dict[str, Want] = field(default_factory=dict)
    turns: dict[str, float] = field(default_factory=dict)
    unheard: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many places are held."""
        return sum(hold.recorded for hold in self.holds.values())


@dataclass(slots=True)
class Tally:
    """The tokens of a key: a bucket that drains, and the count of a day.

    *charged* have come into the bucket, *drained* have left it until *at*, and *returned* were
    taken out again; *held* are in the hands of instances. Those in the *queue* wait for
    room in the bucket: who, for how many tokens, and when its turn comes. *told* is the most that was said of
    *count* since it may be forgotten, and *of* what each instance has of it.
    """

    at: float
    charged: float = 0
    drained: float = 0
    returned: float = 0
    held: dict[str, int] = field(default_factory=dict)
    queue: list[tuple[str, int, float]] = field(default_factory=list)
    day: int = 0
    count: int = 0
    told: int = 0
    of: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class World:
    """The state of the server."""

    epoch: str
    run: str
    last: float
    grace: float
    offset: float = 0
    # Until then the starts of paces may be forgotten.
    lost: float = 0
    number: int = 0
    version: int = 0
    members: dict[str, Member] = field(default_factory=dict)
    gone: dict[str, Member] = field(default_factory=dict)
    awaited: dict[str, float] = field(default_factory=dict)
    # Those whose silence has begun a grace period, and when it had ended without them.
    silent: dict[str, int] = field(default_factory=dict)
    before: float = 0
    limits: dict[str, Limit] = field(default_factory=dict)
    paces: dict[str, float] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    told: dict[str, dict[str, float]] = field(default_factory=dict)

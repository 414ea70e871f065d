"""How one connection is made, and what goes wrong on it: `Dial`, and how it is drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# What may go wrong on a connection.
LINK_FAULTS = (
    "reset",
    "stall",
    "black hole",
    "slow link",
    "full accept queue",
    "refused",
    "small kernel",
)
# Bytes a second of the slowest link.
SLOWEST = 500.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What happens to one direction of a connection. Bytes are counted from its beginning.

    *reset_at*: the connection is reset when so many bytes were sent. *stall_at*: then nothing
    arrives for *stall_seconds*. *black_hole_at*: from then on nothing arrives, and nobody is told.
    *latency* is in seconds, *bandwidth* in bytes a second; *kernel* bytes are taken from the
    transport before it buffers.
    """

    latency: float = 0.0002
    bandwidth: float = 1e8
    kernel: int = 1 << 17
    reset_at: int | None = None
    stall_at: int | None = None
    stall_seconds: float = 0.0
    black_hole_at: int | None = None

    @property
    def loses(self) -> bool:
        """Whether bytes may be lost or late by more than a moment."""
        return (self.reset_at, self.stall_at, self.black_hole_at) != (None, None, None)


GOOD = Faults()


@dataclass(frozen=True, slots=True)
class Dial:
    """How one connection is made: its dice, the faults of both directions, and what its listener
    does.

    *accept_after*: seconds until the listener accepts it (its queue is full so long). *refused*:
    it does not. *address*: whence it comes. *owner*: the instance that makes it; -1 is a client.
    *patience*: the seconds in which whoever dials gives up by itself, 0 if nobody has promised
    that.
    """

    dice: random.Random
    there: Faults = GOOD
    back: Faults = GOOD
    accept_after: float = 0.0
    refused: bool = False
    address: str = "127.0.0.1"
    owner: int = -1
    patience: float = 0.0

    @property
    def good(self) -> bool:
        """Whether what is written arrives, and soon."""
        slow = min(self.there.bandwidth, self.back.bandwidth) < GOOD.bandwidth
        return not (slow or self.there.loses or self.back.loses)


def draw_dial(
    leases: Mapping[str, float],
    dice: random.Random,
    *,
    address: str = "127.0.0.1",
    owner: int = -1,
    patience: float = 0.0,
) -> Dial:
    """Draw how a connection is made, whose faults happen as often as *shares* says."""
    accept_after = dice.uniform(0.5, 5.0) if _happens(leases, "full accept queue", dice) else 0.0
    return Dial(
        random.Random(dice.random()),
        there=_direction(leases, dice),
        back=_direction(leases, dice),
        accept_after=accept_after,
        refused=_happens(leases, "refused", dice),
        address=address,
        owner=owner,
        patience=patience,
    )


def _happens(leases: Mapping[str, float], name: str, dice: random.Random) -> bool:
    # The dice are thrown in any case: leaving a fault out changes nothing else.
    thrown = dice.random()
    return thrown < leases.get(name, 0.0)


def _direction(leases: Mapping[str, float], dice: random.Random) -> Faults:
    size = dice.choice((300, 1500, 6000, 50_000))
    place = dice.randrange(1, size)
    seconds = dice.choice((0.3, 3.0, 25.0))
    small = dice.choice((512, 4096))
    slow = dice.choice((SLOWEST, 20_000.0))
    return Faults(
        latency=GOOD.latency if dice.random() < 0.7 else dice.choice((0.01, 0.2)),
        bandwidth=slow if _happens(leases, "slow link", dice) else GOOD.bandwidth,
        kernel=small if _happens(leases, "small kernel", dice) else GOOD.kernel,
        reset_at=place if _happens(leases, "reset", dice) else None,
        stall_at=place if _happens(leases, "stall", dice) else None,
        stall_seconds=seconds,
        black_hole_at=place if _happens(leases, "black hole", dice) else None,
    )

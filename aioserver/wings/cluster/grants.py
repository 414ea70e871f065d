"""A grant: the places of one limit that an instance may use, and what it says of them in its
calls.

The numbers, from the inside out:

- `inside`: the places that are taken now, as the *user* of the grant says (a gate, a quota).
- `granted`: the places that may be taken. The user is told each change, and starts nothing beyond.
- `recorded`: what the server knew at its last answer. What is recorded beyond what is granted is
  given back with the next call.

A grant is lowered first and told afterwards, and raised only by an answer: so the server always
knows of at least what is granted. Given back is only what is not needed: an instance keeps its
places inside, one for each request that waits and may use it (batch leaves some), and a few to
spare (a quarter of its part of the limit, or of places for connections all of its part) unless
others starve. What is to spare comes only of what nobody wants, and nobody waits for it, or two
idle instances would pass a place to and fro.

While others starve, a place that ends is not taken by the next request here: it goes back with the
own want, in the same call, and turns decide. But never two gives in doubt: while a call is under
way, or after one that failed, a place that ends is used at once, or a paused server would drain
all places within moments. The same goes for a while after each call, some times as long as the
call took: a place that changes hands is idle for that long, and a far server would keep many of
them idle.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import msgspec

from aioserver.wings.cluster.lease_messages import Op

if TYPE_CHECKING:
    from aioserver.limits.fixed_share import Scope
    from aioserver.wings.cluster.lease_messages import Result


class State(Enum):
    """How an instance stands with the server; the drawing is in wings/cluster/leases.py."""

    ALONE = "alone"
    JOINED = "joined"
    UNHEARD = "unheard"


class Standing(msgspec.Struct):
    """What all grants of an instance know of it. *share* is its fixed share of a limit.

    *busy*: a call is under way. *grace*: the server is in its grace period, and gives nothing.
    *members* is how many instances there are.
    """

    share: Callable[[int, int], int]
    call_soon: Callable[[Grant], None]
    # As `call_soon`, if it is still to be said when a call can be made.
    ask: Callable[[Grant], None]
    clock: Callable[[], float]
    # Until then a place that ends is used at once, though others starve.
    keeps_until: float = 0.0
    state: State = State.ALONE
    busy: bool = False
    grace: bool = True
    leaving: bool = False
    # Whether others serve in place of this instance, which keeps no places to spare.
    retired: bool = False
    members: int = 1


class User(Protocol):
    """What takes the places of a grant: the supply of a resource."""

    @property
    def inside(self) -> int:
        """How many places are taken."""

    @property
    def wanting(self) -> int:
        """How many requests wait and could start if there were places for them."""

    @property
    def ready(self) -> int:
        """How many of them could start with the free places that are granted already."""

    @property
    def weight(self) -> int:
        """The weights of the callers that wait, together; at least 1."""

    def resize(self, places: int) -> None:
        """Take no more than *places* from now on, and start what waits if there are more than
        before.
        """

    def others_starve(self) -> None:
        """Hear that others wait for places, and cannot get them."""


class Grant:
    """The places of the limit *name* that an instance may use.

    *scope*: the instances that share it, if they are not all.

    Always: `granted <= limit`; joined, what the server has recorded is at least what is granted,
    and at least what is inside. Made by `Leases.hold`.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        user: User,
        standing: Standing,
        *,
        least: int = 0,
        scope: Scope | None = None,
    ) -> None:
        self.name = name
        self.limit = limit
        self.user = user
        self.granted = 0
        self.recorded = 0
        self.starving = False
        # Whether the limit is shared no more: all of it is given back.
        self.dropped = False
        # Whether no more places are taken: each is given back as it ends.
        self.left = False
        self._least = least
        self._scope = scope
        self._standing = standing
        # The want of which the server knows, as far as it was not answered.
        self._wanted = 0
        # Whether a message said, while a call was under way, that others starve.
        self._told = False

    @property
    def share(self) -> int:
        """The fixed share of the limit."""
        if self._scope is not None:
            return self._scope.share(self.limit)
        return min(self.limit, self._standing.share(self.limit, self._least))

    @property
    def joined(self) -> bool:
        """Whether places move between the instances."""
        return self._standing.state is State.JOINED and not self._standing.grace

    @property
    def elsewhere(self) -> int:
        """How many places may be free elsewhere, as far as is known: none while others starve, or
        a want is not met.
        """
        standing = self._standing
        if not self.joined or self.starving:
            return 0
        return (
            max(0, self.limit - max(self.granted, self.user.inside))
            if standing.busy or not self._wanted
            else 0
        )

    def apply(self, limit: int) -> None:
        """Use another limit for all instances, which they are told with the next call.

        After a lower one nothing starts before the server has answered, since others may have all
        of its places.
        """
        if limit != self.limit:
            lowered, self.limit = limit < self.limit, limit
            if self._standing.state is State.ALONE:
                self.resize(min(self.granted, self.share))
            elif lowered and self._standing.state is State.JOINED and not self._standing.grace:
                self.resize(0)
            self.resize(min(self.granted, limit))
            self._standing.call_soon(self)

    def leave(self) -> None:
        """Take no more places; what is inside is given back as it ends."""
        self.left = True
        self.resize(min(self.granted, self.user.inside))
        self._standing.call_soon(self)

    def wait_begins(self) -> None:
        """Say that a request waits for a place, which another instance may have."""
        if self.wants_call():
            self._standing.ask(self)

    def wait_ends(self) -> None:
        """Say that a request waits no more, as it has started elsewhere or has given up: others
        may have what the server would give for it.
        """
        if self.joined and not (self.dropped or self._leaving) and self._wanted > self._more():
            self._standing.call_soon(self)

    def _more(self) -> int:
        """Return how many places are missing for those that wait."""
        inside = self.user.inside
        missing = self.user.wanting - max(0, self.granted - inside)
        return max(0, min(missing, self.limit - max(inside, self.granted)))

    def place_ends(self) -> None:
        """Say that a place is about to be given back, before it is counted as free: others may get
        it.
        """
        standing, inside = self._standing, self.user.inside
        if self._leaving:
            self.resize(min(self.granted, inside - 1))
        elif standing.state is not State.JOINED or standing.busy:
            return
        elif inside > self.granted:
            pass
        elif self.starving and (standing.clock() >= standing.keeps_until or not self.user.wanting):
            self.resize(self.granted - 1)
        else:
            return
        standing.call_soon(self)

    def others_starve(self) -> None:
        """Say that others starve, as a message said."""
        if self._standing.busy:
            self._told = True
        elif self._standing.state is State.JOINED and not self._standing.grace:
            self.starving = True
            self.user.others_starve()
            self.wait_begins()

    def wants_call(self) -> bool:
        """Return whether something is to be said that does not wait for the next beat."""
        if self.dropped:
            return False
        if self._standing.state is not State.JOINED or self._standing.grace:
            return False
        inside = self.user.inside
        free = self.granted - inside
        unused = (self.starving or self._standing.retired) and free > self.user.ready
        if self.recorded > max(self.granted, inside) or unused:
            return True
        return self._more() > self._wanted and not self._leaving

    def op(self) -> Op:
        """Say what this instance has and wants, and lower the grant to it.

        It is said also where both are nothing: the server may know of a want that is over, and
        have given a place for it.
        """
        standing, inside, wanting = self._standing, self.user.inside, self.user.wanting
        if self.dropped:
            self.resize(0)
            return Op(self.name, 0, self.recorded, 0, 1, self.limit, 0)
        keeps_none = self.starving or self._leaving or standing.retired
        target = 0 if keeps_none else self._to_spare()
        if self._leaving:
            have, wanting = inside, 0
        elif standing.state is State.JOINED:
            have = max(inside, min(self.granted, inside + self.user.ready + target))
        elif standing.state is State.UNHEARD:
            have = max(inside, self.granted)
        else:
            # What starts between the call and its answer is counted as well.
            have = max(inside, self.granted, self.share)
        if standing.state is not State.ALONE or self._leaving:
            self.resize(min(self.granted, have))
        self._wanted = max(0, min(wanting - (have - inside), self.limit - have))
        spare = max(0, target - max(0, have - inside - wanting))
        self._told = False
        give = max(0, self.recorded - have)
        return Op(self.name, have, give, self._wanted, self.user.weight, self.limit, spare)

    def answered(self, op: Op, result: Result, *, use: bool) -> None:
        """Take in the server's *result*; without *use* nothing more is granted for it."""
        if self.dropped:
            return
        self.recorded = result.recorded
        self._wanted = max(0, op.want - max(0, result.recorded - op.have))
        self.starving = use and (result.starving > 0 or self._told)
        raised = use and not self._leaving
        self.resize(result.allowed if raised else min(self.granted, result.allowed))
        if self.starving:
            self.user.others_starve()

    def failed(self) -> None:
        """Take in that the call was not answered: what is granted stays, and nothing is given."""
        self.starving = self._told = False

    def alone(self, places: int) -> None:
        """Use *places*, of which the server is not told."""
        self.recorded = self._wanted = 0
        self.starving = self._told = False
        self.resize(0 if self._leaving else places)

    def resize(self, places: int) -> None:
        """Let *places* be granted."""
        if places != self.granted:
            self.granted = max(0, places)
            self.user.resize(self.granted)

    @property
    def _leaving(self) -> bool:
        return self.left or self._standing.leaving

    def _to_spare(self) -> int:
        if self._scope is None:
            return max(1, self.limit // (4 * max(1, self._standing.members)))
        # Nobody else has them: what no worker uses is shared out, and so found without a call.
        least = max(1, self.limit // (4 * self._scope.workers))
        return max(least, self.share - self.user.inside)

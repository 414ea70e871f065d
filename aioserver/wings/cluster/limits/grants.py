"""A grant: the places of one limit that an instance may use, and its part of the instance's calls.

The numbers, from the inside out:

- `inside`: the places that are taken now, by the *user* of the grant (a resource, a quota).
- `granted`: the places that may be taken. The user is notified of each change, and starts nothing
  beyond.
- `recorded`: the places that the server knew of at its last answer. The part of `recorded` beyond
  `granted` is given back with the next call.

A grant is lowered before the server is told, and raised only by an answer: so the server always
knows of at least the granted places. Only unneeded places are given back. An instance keeps its
places inside, and one for each waiting request that may use it (batch leaves some). It also keeps
a few spares (a quarter of its part of the limit, or its whole part for connections) unless others
starve. Spares are granted from unclaimed places only, and no instance waits for them: otherwise
two idle instances would pass a place to and fro.

While others starve, the next request here does not take a place that ends: the place goes back,
with this instance's own want, in the same call, and the server grants in turn. But at most one
place is given back without a confirmation. While a call is under way, or after a failed call, a
place that ends is used here at once: otherwise a paused server would drain all places within
moments. The same holds for a multiple of a call's duration after each call. A place that changes
hands is idle for that long, and a distant server would keep many of them idle.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import msgspec

from aioserver.wings.cluster.limits.lease_messages import Op

if TYPE_CHECKING:
    from aioserver.limits.fixed_share import Scope
    from aioserver.wings.cluster.limits.lease_messages import Result


class State(Enum):
    """The state of an instance; leases.py has the diagram."""

    ALONE = "alone"
    JOINED = "joined"
    UNHEARD = "unheard"


class Standing(msgspec.Struct):
    """The part of an instance's state that all its grants share. *share* returns its fixed share
    of a limit.

    *busy*: a call is under way. *grace*: the server is in its grace period, and grants nothing.
    *members* is the number of instances.
    """

    share: Callable[[int, int], int]
    call_soon: Callable[[Grant], None]
    # As `call_soon`, if there is still a change to be sent when a call can be made.
    ask: Callable[[Grant], None]
    clock: Callable[[], float]
    # Until this time a place that ends is used at once, even though others starve.
    keeps_until: float = 0.0
    state: State = State.ALONE
    busy: bool = False
    grace: bool = True
    leaving: bool = False
    # Whether others serve in place of this instance, which keeps no places to spare.
    retired: bool = False
    members: int = 1


class User(Protocol):
    """The owner of a grant's places: the supply of a resource."""

    @property
    def inside(self) -> int:
        """The number of places that are taken."""

    @property
    def wanting(self) -> int:
        """The number of waiting requests that could start if there were places for them."""

    @property
    def ready(self) -> int:
        """The number of these that could start with free granted places."""

    @property
    def weight(self) -> int:
        """The sum of the weights of the waiting callers; at least 1."""

    def resize(self, places: int) -> None:
        """Take no more than *places* from now on, and start waiting requests if there are more
        than before.
        """

    def starve(self) -> None:
        """Note that requests wait for places, here or in other instances, and cannot get them."""


class Grant:
    """The places of the limit *name* that an instance may use.

    *scope* is the group of instances that share it; None: all do.

    Always: `granted <= limit`; while joined, the server has recorded at least the granted places,
    and at least the places inside. Made by `Leases.hold`.
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
        # Whether the limit is no longer shared: all of its places are given back.
        self.dropped = False
        # Whether no more places are taken: each is given back as it ends.
        self.left = False
        self._least = least
        self._scope = scope
        self._standing = standing
        # The want that the server knows of and has not met.
        self._wanted = 0
        # Whether a message reported, while a call was under way, that others starve.
        self._starving_reported = False

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
        """The number of places that may be free elsewhere, as far as is known. It is 0 while
        others starve, or a want is not met.
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
        """Use another limit for all instances, which the next call reports.

        After a lower limit nothing starts before the server has answered, since others may have
        all of its places.
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
        """Take no more places; places inside are given back as they end."""
        self.left = True
        self.resize(min(self.granted, self.user.inside))
        self._standing.call_soon(self)

    def wait_begins(self) -> None:
        """Note that a request waits for a place, which another instance may have."""
        if self.wants_call():
            self._standing.ask(self)

    def wait_ends(self) -> None:
        """Note that a request has stopped waiting, since it has started elsewhere or has given up:
        others may have the place that the server would grant for it.
        """
        if self.joined and not (self.dropped or self._leaving) and self._wanted > self._more():
            self._standing.call_soon(self)

    def _more(self) -> int:
        """Return the number of places that waiting requests lack."""
        inside = self.user.inside
        missing = self.user.wanting - max(0, self.granted - inside)
        return max(0, min(missing, self.limit - max(inside, self.granted)))

    def place_ends(self) -> None:
        """Note that a place is about to be given back, before it is counted as free: others may
        get it.
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
        """Handle the message that others starve."""
        if self._standing.busy:
            self._starving_reported = True
        elif self._standing.state is State.JOINED and not self._standing.grace:
            self.starving = True
            self.user.starve()
            self.wait_begins()

    def wants_call(self) -> bool:
        """Return whether there is a change that does not wait for the next beat."""
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
        """Return the report of places and want of this instance, and lower the grant to it.

        It is also sent if both are zero: the server may know of an earlier want, and have granted
        a place for it.
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
            # Starts between the call and its answer are counted as well.
            have = max(inside, self.granted, self.share)
        if standing.state is not State.ALONE or self._leaving:
            self.resize(min(self.granted, have))
        self._wanted = max(0, min(wanting - (have - inside), self.limit - have))
        spare = max(0, target - max(0, have - inside - wanting))
        self._starving_reported = False
        give = max(0, self.recorded - have)
        return Op(self.name, have, give, self._wanted, self.user.weight, self.limit, spare)

    def answered(self, op: Op, result: Result, *, use: bool) -> None:
        """Apply the server's *result*; without *use* no further places are granted by it."""
        if self.dropped:
            return
        self.recorded = result.recorded
        self._wanted = max(0, op.want - max(0, result.recorded - op.have))
        self.starving = use and (result.starving > 0 or self._starving_reported)
        raised = use and not self._leaving
        self.resize(result.allowed if raised else min(self.granted, result.allowed))
        if self.starving or self._wanted:
            self.user.starve()

    def failed(self) -> None:
        """Note that the call was not answered: the granted places stay, and none is given back."""
        self.starving = self._starving_reported = False
        if self.user.wanting:
            self.user.starve()

    def partitioned(self, places: int) -> None:
        """Use *places*, of which the server does not know."""
        self.recorded = self._wanted = 0
        self.starving = self._starving_reported = False
        self.resize(0 if self._leaving else places)

    def resize(self, places: int) -> None:
        """Set the number of granted *places*."""
        if places != self.granted:
            self.granted = max(0, places)
            self.user.resize(self.granted)

    @property
    def _leaving(self) -> bool:
        return self.left or self._standing.leaving

    def _to_spare(self) -> int:
        if self._scope is None:
            return max(1, self.limit // (4 * max(1, self._standing.members)))
        # Only these workers use the limit: places that no worker uses are divided among them, and
        # so found without a call.
        least = max(1, self.limit // (4 * self._scope.workers))
        return max(least, self.share - self.user.inside)

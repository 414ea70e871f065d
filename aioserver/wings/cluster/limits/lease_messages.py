"""The messages of a renewal: the request of an instance, and the answer of the server, in msgpack.

Both are arrays, in the order of the fields, and renew.lua reads the fields by their positions. Times
are in microseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

SECOND = 1_000_000
# The value of `PaceOp.known` if nothing is known of a pace.
UNKNOWN_PACE = -1e15


class Times(NamedTuple):
    """The times of a cluster, in seconds; all its instances must have the same.

    A test may shorten them, and must keep the order: `beat + bound <= grace < lease`.
    """

    # The time without a call after which an instance is not a member any more. It is 2 s less than
    # the time for which a killed instance may keep its places.
    lease: float = 8.0
    # The time by which an instance takes its lease to be shorter, since clocks differ and the answer
    # needs some time.
    margin: float = 1.0
    # The time between two calls of an instance that has nothing to report.
    beat: float = 2.0
    # The time in which a call must be answered; after that it has failed.
    bound: float = 1.0
    # While members live, a call comes in each `beat + bound`. After this time without a call the
    # server concludes that it was away.
    pause: float = 3.5
    # The time for which a server that was away or is new grants nothing. Each living instance calls
    # in this time.
    grace: float = 3.5
    # An instance that has not fetched a grant for this time gets no further grants.
    suspect: float = 0.1
    # The time for which an instance whose lease has expired is counted in the fixed shares, since it
    # may still serve alone.
    gone: float = 30.0

    def for_server(self) -> tuple[int, int, int, int, int]:
        """Return the times that the server needs, in microseconds."""
        lease, pause, grace, suspect, gone = (
            round(seconds * SECOND)
            for seconds in (self.lease, self.pause, self.grace, self.suspect, self.gone)
        )
        return lease, pause, grace, suspect, gone


TIMES = Times()


class Op(NamedTuple):
    """The report of an instance about one limit: it has *have* places, gives *give* back, and wants
    *want* more.

    *weight* is the sum over its waiting callers. It takes up to *spare* more places that no
    instance wants.
    """

    name: str
    have: int
    give: int
    want: int
    weight: int
    limit: int
    spare: int


class PaceOp(NamedTuple):
    """Asks for *slots* of a pace; a negative number gives slots back.

    Slots are *step* microseconds apart; after a rest `slack / step` more slots follow at once. The
    server grants only slots that begin within *horizon*. A pace that it does not know has rested.
    *known* are the microseconds from now at which the next slot begins at the earliest; a negative
    number means that it could have begun before.
    """

    name: str
    slots: int
    step: float
    slack: float
    horizon: float
    known: float = UNKNOWN_PACE


class Tell(NamedTuple):
    """Announces to all instances that *word* holds of the provider *name* for *length* microseconds;
    0: it holds no longer.
    """

    name: str
    word: str
    length: int


class Request(msgspec.Struct, array_like=True, frozen=True):
    """The request of an instance.

    *epoch* is the epoch in which its lease has not expired; empty without a lease. *run* names the
    server's process, and *seq* counts the calls of the instance. *heard* and *version* come from
    the last answer. *known* are the other members that it knows; *ended* are instances that have
    ended for certain; *bye* says that this instance ends.
    """

    instance: str
    epoch: str
    run: str
    seq: int
    heard: int
    version: int
    times: tuple[int, int, int, int, int]
    known: list[str] = []
    ended: list[str] = []
    bye: bool = False
    ops: list[Op] = []
    paces: list[PaceOp] = []
    tells: list[Tell] = []


class Result(NamedTuple):
    """The places of one limit: the server has *recorded* so many for this instance, which may use
    *allowed* of them; *starving* is the number of other instances that starve.
    """

    recorded: int
    starving: int
    allowed: int


class Slots(NamedTuple):
    """Slots of a pace: the microseconds until each slot begins, and until the *next* slot would
    begin; negative after a rest.
    """

    delays: list[float]
    next: float


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """The answer, with results in the order of the request.

    *anew* says that the server did not know the instance; it now knows only the limits that the
    request has mentioned. The server grants nothing for another *grace* microseconds. *number*
    counts the changes among the members. *count* instances may be alive, and *rank* of them come
    before this one. *known_to_all* says that all of them know this instance. *members* are in the
    order in which they joined; empty if the instance knows them. *told* are the announcements;
    empty unless *version* has changed.
    """

    epoch: str
    anew: bool
    grace: float
    number: int
    rank: int
    count: int
    known_to_all: bool
    members: list[str]
    version: int
    told: list[Tell]
    results: list[Result]
    slots: list[Slots]


encode = msgspec.msgpack.Encoder().encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
# The names of limits that were granted ("NAME"), or that another instance wants ("?NAME"). An empty
# name only wakes the instance.
decode_words = msgspec.msgpack.Decoder(list[str]).decode

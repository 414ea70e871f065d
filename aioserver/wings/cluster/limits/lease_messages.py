"""What an instance and the server say to each other in one renewal, in msgpack.

Both are arrays, in the order of the fields: renew.lua takes them apart by their places. Times are
in microseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

SECOND = 1_000_000
# Microseconds from now: nothing is known of a pace.
UNKNOWN_PACE = -1e15


class Times(NamedTuple):
    """The times of a cluster, in seconds; all its instances must have the same.

    A test may shorten them, and must keep the order: `beat + bound <= grace < lease`.
    """

    # An instance without a call for so long is no member any more. 2 s less than a killed one may
    # keep its places.
    lease: float = 8.0
    # What the instance's own lease is shorter, for clocks that do not run alike and for the way of
    # the answer.
    margin: float = 1.0
    # An instance that has nothing to say calls after so long.
    beat: float = 2.0
    # A call that is not answered by then has failed.
    bound: float = 1.0
    # While members live, some call comes in each `beat + bound`: after this time without one, the
    # server was away.
    pause: float = 3.5
    # A server that was away or is new gives nothing for so long. Each living instance calls
    # meanwhile.
    grace: float = 3.5
    # An instance that has not come for so long for what it was given gets no more.
    suspect: float = 0.1
    # An instance whose lease is over may live alone. It is counted in the fixed shares for so
    # long.
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
    """What an instance says of one limit: it has *have* places, gives *give*, and wants *want*
    more.

    *weight* is that of its waiting callers together. Of places that nobody wants it takes *spare*
    more.
    """

    name: str
    have: int
    give: int
    want: int
    weight: int
    limit: int
    spare: int


class PaceOp(NamedTuple):
    """Asks for *slots* of a pace; a negative number gives some back.

    Slots are *step* microseconds apart; after a rest `slack / step` more follow each other at
    once. Only those that begin within *horizon* are given. A pace of which nothing is known has
    rested for *rested*; *known* says that its next slot does not begin before so many microseconds
    have passed, a negative number that it could have begun so many before.
    """

    name: str
    slots: int
    step: float
    slack: float
    horizon: float
    rested: float
    known: float = UNKNOWN_PACE


class BudgetOp(NamedTuple):
    """Asks for tokens of the budgets of one key, *per_minute* and *per_day*; 0: there is none.

    This instance has *have* tokens in hand. Each of *needs* is given for a request, as a whole or
    not at all, in their order. The first for which there is no room waits for it in the queue of
    the server, if that takes no longer than *patience* microseconds, as long as each call says it
    again. As far as there are *more* now, they come into the hand. Since it was answered last, *spent* were used of the
    minute, those from its hand included, and *back* are given back to it: how many, and where they
    stood (see `Tokens`).

    This instance has used, reserved and in hand *mine* of the day whose number is *day*; *was* is
    what that was at the last answer, and *known* what all instances have had then at least. A
    server that has lost its state does not know it, nor does any if it is *anew*. *met*: a server
    has given tokens to this instance before.
    """

    name: str
    per_minute: int
    per_day: int
    have: int
    needs: list[int]
    patience: float
    more: int
    back: list[tuple[int, float]]
    spent: int
    day: int
    mine: int
    was: int
    known: int
    anew: bool
    met: bool


class Tell(NamedTuple):
    """Tells all instances that *word* holds of the provider *name* for *length* microseconds.

    0: no more.
    """

    name: str
    word: str
    length: int


class Request(msgspec.Struct, array_like=True, frozen=True):
    """All that an instance has to say.

    *epoch* is empty, or that of the world in which its lease is not over; *run* names the server's
    process, and *seq* counts the calls of the instance. *heard* and *version* are those of the
    last answer. *known* are the other members that it knows of; *ended* are instances that have
    ended for certain; *bye* says that it ends itself.
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
    budgets: list[BudgetOp] = []


class Result(NamedTuple):
    """The places of one limit: those that the server has *recorded*, of which *allowed* may be
    used; how many others starve.
    """

    recorded: int
    starving: int
    allowed: int


class Slots(NamedTuple):
    """Slots of a pace: microseconds until each begins, and until the *next* one would, which is
    negative after a rest.
    """

    delays: list[float]
    next: float


class Tokens(NamedTuple):
    """Tokens of a budget: so many of the needs were *granted*, and *more* tokens; for *closed*
    microseconds nothing is. The next need is to be said again in *wait* microseconds, when its
    turn comes; 0: it does not wait.

    The bucket of the minute: *charged* have come into it, and *drained* have left it; what was
    given back is not among the charged, but *returned*. A token stands at its number among the
    charged and the returned; those that are given for requests are the last ones. The others have
    *held* in hand, or wait for them, which will come into it. The day: its number, what all instances have
    *counted* of it, and the microseconds that are left of it.
    """

    granted: int
    wait: float
    more: int
    closed: float
    charged: float
    drained: float
    returned: float
    held: int
    day: int
    counted: int
    left: float


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """The answer, with results in the order of the request.

    *anew*: the server knew nothing of the instance, and knows of no limit now that the request did
    not mention. The server gives nothing for *grace* microseconds more. *number* counts the
    changes among the members. *count* instances may live, and *rank* of them come before this one;
    it is *known_to_all* once they have all heard of it. *members* are in the order in which they
    joined; empty if the instance knows them. *told* is empty unless *version* has changed.
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
    tokens: list[Tokens] = []


encode = msgspec.msgpack.Encoder().encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
# The names of limits that were given ("NAME"), or wanted by somebody ("?NAME"); an empty one only
# wakes.
decode_words = msgspec.msgpack.Decoder(list[str]).decode

"""What became of one request at its providers: one object, to which its record, its log, its
answer and its error refer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from aioserver.protocol.tokens import NO_TOKENS, Tokens

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
# Where a request of a group has started: at the member whose cache has its conversation, at
# another one, as a new conversation; none where that is not known.
HOME, OTHER, NEW, NONE = HOMES = ("home", "other", "new", "none")
# What became of a turn of which something was held: it was whole, or another attempt was whole; it
# was lost with its answer; or it was shown before its time.
WHOLE, RESCUED, LOST, LET_GO = TURNS = ("whole", "rescued", "lost", "let_go")
# The counter of the tokens of an attempt: its provider; nobody, so that they are estimated; the
# provider the prompt alone. NOBODY: they are not known.
PROVIDER, ESTIMATE, MIXED, NOBODY = "provider", "estimate", "mixed", "none"
# Those of which a provider has counted the prompt.
COUNTED = PROVIDER, MIXED


class GroupStart(NamedTuple):
    """A start of a request at a member of *group*.

    Of the *size* bytes of its prompt so many were *known* there; size 0: nobody remembers any.
    """

    group: str
    provider: str
    home: str = NONE
    known: int = 0
    size: int = 0


class AttemptCost(msgspec.Struct, frozen=True, gc=False):
    """What one attempt has cost that was sent, in full or in part, and was not answered with a
    status of 400 or more: its tokens, as far as they are known.

    *outcome* is that of the ledger (usage/accounting.py), *source* who has counted. The two sums
    are those of this attempt alone, and *tokens* has what they do not say; *work* is what they
    cost the caller's share. Durations are in seconds: *wait* in the provider's queue, *first* from
    sending to the first content, 0.0 if there was none or the answer was not streamed, and
    *duration* from sending to the end.
    """

    provider: str
    model: str
    outcome: str
    tokens_in: int
    tokens_out: int
    source: str
    tokens: Tokens = NO_TOKENS
    wait: float = 0.0
    first: float = 0.0
    duration: float = 0.0
    work: int = 0

    @property
    def estimated(self) -> bool:
        """Whether its tokens are known, and nobody has counted all of them."""
        return self.source in (ESTIMATE, MIXED)


class Continued(NamedTuple):
    """A seam of an answer: behind *at* characters of text its provider broke off, for the reason
    of this *code*, and another attempt went on.
    """

    at: int
    broken: str
    provider: str
    code: str

    def described(self) -> dict[str, object]:
        """Return it as clients are told."""
        return {"at": self.at, "from": self.broken, "to": self.provider, "code": self.code}

    @property
    def comment(self) -> bytes:
        """It as a comment in an event stream."""
        told = " ".join(f"{name}={value}" for name, value in self.described().items())
        return b": seam %b\n\n" % told.encode()


class Outcome(msgspec.Struct, eq=False):
    """The provider that was asked last, and what is known of its answer.

    Always: it is written by the router and its attempts alone; where the answer is another
    instance's, by the facts that come from there. If the request has failed, it is about the
    attempt whose fault is raised.

    *attempts* counts the requests that were sent, at all providers, and the one that is under way.
    *sent*: one was sent, so that the answer may cost money; *sent_at* is the monotonic time when
    the newest was, 0.0 if it was not. *headers* are those of the provider's answer that clients
    may see. Until the request is logged, *usage* has its tokens, as the provider reports them, and
    *start* where it has started last by a group. *costs* has the attempts that have ended and may
    have cost something, *seams* where an answer was continued. *entry* is the number of the request
    in the ledger, 0 if it has none, and how many of its attempts are numbered there.

    *bridge*: the request is translated from this API, and *left_out* are the hosted tools that the
    provider does not get then. *learnt* is what refusals have taught, each with one repeat. *hooks*
    are the names of those that have refused or changed it. *hold* says what is held of a streamed
    answer, empty where nothing can be; *turn* what has become of what was held, so far, empty where
    that is nothing; *cuts* how often it was dropped, and *held_for* the seconds for which an event
    was held at most.
    """

    provider: str = ""
    model: str = ""
    attempts: int = 0
    headers: Mapping[str, str] = NO_HEADERS
    sent: bool = False
    sent_at: float = 0.0
    usage: Mapping[str, Any] | None = None
    start: GroupStart | None = None
    costs: tuple[AttemptCost, ...] = ()
    seams: tuple[Continued, ...] = ()
    entry: tuple[int, int] = (0, 0)
    bridge: str = ""
    left_out: tuple[str, ...] = ()
    learnt: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    hold: str = ""
    turn: str = ""
    cuts: int = 0
    held_for: float = 0.0

    @property
    def spent(self) -> tuple[int, int]:
        """The tokens of all parts: of what was asked, and of what was answered."""
        asked = answered = 0
        for cost in self.costs:
            asked += cost.tokens_in
            answered += cost.tokens_out
        return asked, answered

    @property
    def work(self) -> int:
        """What all parts have cost engines, as fair queues count it."""
        work = 0
        for cost in self.costs:
            work += cost.work
        return work

    def begin_attempt(self, provider: str, model: str) -> None:
        """Note that *provider* is asked for an answer of *model*."""
        if self.attempts or self.sent_at or self.bridge:
            # All that is known is about an earlier one.
            self.headers, self.sent_at, self.usage = NO_HEADERS, 0.0, None
            self.bridge, self.left_out = "", ()
        self.provider, self.model = provider, model
        self.attempts += 1

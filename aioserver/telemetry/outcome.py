"""The outcome of one request at its providers: one object, to which its record, its log, its
answer and its error refer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import msgspec

from aioserver.protocol.tokens import NO_TOKENS, Tokens

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
# Where a request of a group has started: at the member whose cache has its conversation, at
# another one, as a new conversation; none if that is not known.
HOME, OTHER, NEW, NONE = HOMES = ("home", "other", "new", "none")
# The result of a turn of which events were held: it was whole; another attempt was whole; it was lost
# with its answer; or it was shown before its finish.
WHOLE, RESCUED, LOST, LET_GO = TURNS = ("whole", "rescued", "lost", "let_go")
# The source of an attempt's token counts: its provider; an estimate; or, for MIXED, the provider
# for the prompt alone. NOBODY: they are not known.
PROVIDER, ESTIMATE, MIXED, NOBODY = "provider", "estimate", "mixed", "none"
# The sources with a provider's count of the prompt.
COUNTED = PROVIDER, MIXED


class GroupStart(NamedTuple):
    """A start of a request at a member of *group*.

    So many of the *size* bytes of its prompt were *known* there; size 0: this is not recorded.
    """

    group: str
    provider: str
    home: str = NONE
    known: int = 0
    size: int = 0


class AttemptCost(msgspec.Struct, frozen=True, gc=False):
    """The cost of one attempt that was sent, in full or in part, and was not answered with a
    status of 400 or more: its tokens, as far as they are known.

    *outcome* is that of the ledger (usage/accounting.py), *source* the source of the counts. The
    two sums are those of this attempt alone, and *tokens* has further counts; *work* is the cost
    for the caller's share. *tier* is the service tier that the provider reports, "" without one.
    Durations are in seconds: *wait* in the provider's queue, *first* from sending to the first
    content, 0.0 if there was none or the answer was not streamed, and *duration* from sending to
    the end.
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
    tier: str = ""

    @property
    def estimated(self) -> bool:
        """Whether its tokens are known, and at least some of them by an estimate."""
        return self.source in (ESTIMATE, MIXED)


def comment(word: str, fields: Mapping[str, object]) -> bytes:
    """Return a comment of an event stream: *word*, and each of the *fields* as `name=value`."""
    values = " ".join(f"{name}={value}" for name, value in fields.items())
    return f": {word} {values}\n\n".encode()


class CacheLoss(NamedTuple):
    """What a turn has lost of its provider's cache: so many *tokens* of its prompt were read again,
    by this *verdict* (docs/slow.md).

    *at* is the first region that differs, whose first byte is *byte* of the prompt; or for `moved`,
    why the last turn's member was not taken, with no byte. *tokens* are 0 if that is not known.
    """

    verdict: str
    at: str = ""
    byte: int | None = None
    tokens: int = 0

    @property
    def text(self) -> str:
        """Its form for the client; empty if no loss is known."""
        if not self.tokens:
            return ""
        at = f"at={self.at} " if self.at else ""
        byte = "" if self.byte is None else f"byte={self.byte} "
        return f"lost {at}{byte}tokens={self.tokens} by={self.verdict}"


class CachedTurn(Protocol):
    """The turn of a conversation, whose prompt was compared with the last turn's."""

    def ended(self, outcome: Outcome) -> CacheLoss | None:
        """Return what was lost of the cache, by the usage in *outcome*."""


class Continued(NamedTuple):
    """A seam of an answer: after *at* characters of text its provider broke off, for the reason of
    this *code*, and another attempt continued.
    """

    at: int
    broken: str
    provider: str
    code: str

    def described(self) -> dict[str, object]:
        """Return its form for clients."""
        return {"at": self.at, "from": self.broken, "to": self.provider, "code": self.code}

    @property
    def comment(self) -> bytes:
        """Its form as a comment in an event stream."""
        return comment("seam", self.described())


class Fault(NamedTuple):
    """The end of an attempt at *provider* that has failed, with the error of this *code*; its times
    are monotonic, and it *began* when it had its place.
    """

    provider: str
    code: str
    began: float
    ended: float


class Outcome(msgspec.Struct, eq=False):
    """The provider that was asked last, and the facts about its answer.

    Always: only the router and its attempts write it; for another instance's answer, the facts
    that come from there. If the request has failed, it describes the attempt whose fault is
    raised.

    *attempts* counts the requests that were sent, at all providers, and the one that is under way.
    *sent*: one was sent, so the answer may cost money; *sent_at* is the monotonic time of the
    newest sending, 0.0 if there was none. *headers* are those of the provider's answer that
    clients may see. Until the request is logged, *usage* has its tokens, as the provider reports
    them, and *start* its last start in a group. *costs* has the attempts that have ended and may
    have cost something, *faults* those that have failed, and *seams* the points at which an answer
    was continued. *entry* has the number of the request in the ledger, 0 if it has none, and the number of its attempts there.

    *bridge*: the API from which the request is translated; *left_out* are the hosted tools that
    the provider does not get then. *learnt* is what refusals have taught, each with one repeat.
    *hooks* are the names of those that have refused or changed it. *hold* says what is held of a
    streamed answer, empty where nothing can be; *held_for* is the longest time in seconds that an
    event was held, None if none was. *cuts* are the provider and the code of each break of which the
    client has seen nothing, and *dropped* are the bytes that were held at the last break; *let_go*
    says that held events were shown before the finish.

    *turn_read* is the turn whose prompt was read to find what its provider's cache has lost, until
    that is known; *cache_lost* is the result. Both are None unless `llm.cache_losses` is on.
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
    faults: tuple[Fault, ...] = ()
    seams: tuple[Continued, ...] = ()
    entry: tuple[int, int] = (0, 0)
    bridge: str = ""
    left_out: tuple[str, ...] = ()
    learnt: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    hold: str = ""
    cuts: tuple[tuple[str, str], ...] = ()
    dropped: int = 0
    let_go: bool = False
    held_for: float | None = None
    turn_read: CachedTurn | None = None
    cache_lost: CacheLoss | None = None

    def find_loss(self) -> CacheLoss | None:
        """Return what was lost of the provider's cache, now that the usage is known."""
        if (turn := self.turn_read) is not None:
            self.turn_read = None
            self.cache_lost = turn.ended(self)
        return self.cache_lost

    def turn(self, *, lost: bool) -> str:
        """Return the result of a turn of which events were held, and which was *lost* at its end."""
        if self.let_go:
            return LET_GO
        if lost:
            return LOST
        return RESCUED if self.cuts or self.seams else WHOLE

    @property
    def spent(self) -> tuple[int, int]:
        """The tokens of all attempts: of their prompts, and of their answers."""
        asked = answered = 0
        for cost in self.costs:
            asked += cost.tokens_in
            answered += cost.tokens_out
        return asked, answered

    @property
    def work(self) -> int:
        """The work of all attempts for engines, in the unit of fair queues."""
        work = 0
        for cost in self.costs:
            work += cost.work
        return work

    def forget_attempt(self) -> None:
        """Forget the facts about an earlier attempt, since another one begins."""
        self.headers, self.sent_at, self.usage = NO_HEADERS, 0.0, None
        self.bridge, self.left_out = "", ()

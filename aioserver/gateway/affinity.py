"""Affinity: a conversation's *home* is the member of a group whose cache has the beginning of its
prompt.

An engine that has read the beginning before reads only the rest, which saves seconds in a long
conversation. So a request goes to its home if the home has a place, and otherwise waits there for a
moment: at most a few times the seconds in which another member would read the prompt. That is delay
scheduling (Zaharia et al., "Delay Scheduling", EuroSys 2010). A member is not a home while it has
more than twice its share of the work under way, and two more ("Consistent Hashing with Bounded
Loads", Mirrokni, Thorup, Zadimoghaddam, SODA 2018). So a popular beginning does not fill one
engine while others are idle.

A new conversation's home is the winner of the rendezvous of its identity and the members' names
(Thaler, Ravishankar, "Using name-based mappings to increase hit rates", 1998). So conversations
are spread evenly, and all instances of a cluster agree. Several instances use the rendezvous
alone, since the record of each instance is soon outdated.

These digests are a guess about the caches of engines. A wrong guess costs time, never an answer.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from aioserver.gateway.groups import PRIME
from aioserver.protocol.regions import RegionReader
from aioserver.telemetry.outcome import HOME, NEW, OTHER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.gateway.groups import Member
    from aioserver.protocol.prefix import Prefix

# Digests kept in one process: some 1,000 conversations, in 5 MB at most.
MAX_DIGESTS = 1 << 15
# A request waits at its home for at most PATIENCE times the cost of reading the unknown part, and
# for at most this share of its queue's deadline.
PATIENCE, MAX_SHARE = 3.0, 0.25
# A home has at most so many times its share of the work under way, plus SPARE.
OVERLOAD, SPARE = 2.0, 2
# The bounds of the seconds in which an engine reads one byte of a prompt; the weight of the newest
# measurement, and the bytes that it needs.
LEAST_READING, MOST_READING = 1e-6, 1e-3
SMOOTHING, MEASURED_BYTES = 0.1, 4096


class Placement(NamedTuple):
    """The place of one request. *home* is a member, None if the request has no home. *known* has
    the bytes of the prompt that each member knows, and *delays* the seconds after which the request
    joins the queue of each. *remembered* says whether sent prompts are recorded here.
    """

    prefix: Prefix
    home: Member | None
    known: dict[Member, int]
    delays: dict[Member, float]
    remembered: bool

    @property
    def held_back(self) -> bool:
        """Whether it waits at its home first, though other members may have a place."""
        return any(self.delays.values())

    def label(self, started_at: Member) -> str:
        """Return a word for the member at which the request has started: its home or not."""
        if not self.prefix.has_history:
            return NEW
        return HOME if started_at is self.home else OTHER


class Affinity:
    """The members to which prompts were sent, by digests of the beginnings of the prompts. The least
    recently used digests are dropped.

    Always: there are at most MAX_DIGESTS digests. *alone* False: other instances send prompts to
    the same engines, so the home follows from the rendezvous alone.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self._alone = alone
        self.reader = RegionReader()
        # Members, a bit for each mark, by digest. Each group has digests of its own.
        self._members: OrderedDict[int, int] = OrderedDict()

    def place(self, prefix: Prefix, members: Sequence[Member]) -> Placement:
        """Return the placement of the request with this *prefix* among *members*."""
        known = self._known(prefix, members) if self._alone else dict.fromkeys(members, 0)
        knowing: list[Member] = []
        if prefix.has_history:
            least = prefix.identity_length
            knowing = [member for member, length in known.items() if length >= least]
            knowing.sort(key=known.__getitem__, reverse=True)
        home = _first_fit(members, knowing) if knowing else None
        if home is None:
            home = _first_fit(members, _ranked(prefix, members))
        delays = dict.fromkeys(members, 0.0)
        if home is None or not prefix.has_history or (self._alone and not any(known.values())):
            return Placement(prefix, home, known, delays, self._alone)
        for member in members:
            if member is not home:
                cost = PATIENCE * member.reading * (prefix.size - known[member])
                longest = MAX_SHARE * member.provider.settings.http_client.queue_timeout
                delays[member] = min(longest, cost)
        return Placement(prefix, home, known, delays, self._alone)

    def sent(self, prefix: Prefix, member: Member) -> None:
        """Remember that the prompt with *prefix* was sent to *member*."""
        # The member may have joined while the request waited, and have no mark of its own yet.
        member.mark_holds()
        mark, members = 1 << member.mark, self._members
        # The shortest digest becomes the newest: a member that knows a beginning knows all shorter
        # beginnings.
        for digest in reversed(prefix.digests):
            members[digest] = members.pop(digest, 0) | mark
        while len(members) > MAX_DIGESTS:
            members.popitem(last=False)

    def _known(self, prefix: Prefix, members: Sequence[Member]) -> dict[Member, int]:
        """Return how many bytes of the prompt were sent to each member before."""
        known = dict.fromkeys(members, 0)
        wanted = {1 << member.mark: member for member in members if member.mark_holds()}
        # A member that does not know the shortest beginning knows no beginning.
        shortest = self._members.get(prefix.digests[0], 0) if prefix.digests else 0
        left = sum(wanted) & shortest
        for index in range(len(prefix.digests) - 1, -1, -1):
            found = self._members.get(prefix.digests[index], 0) & left
            if found:
                left ^= found
                for mark, member in wanted.items():
                    if found & mark:
                        known[member] = prefix.lengths[index]
                if not left:
                    break
        return known


def _first_fit(members: Sequence[Member], ranked: Sequence[Member]) -> Member | None:
    """Return the first of *ranked* that can be a home among *members*: a member that is well and
    not overloaded.
    """
    under_way = limits = 0
    for member in members:
        inside, limit = member.provider.capacity.places
        under_way += inside
        limits += limit
    share = OVERLOAD * under_way / max(1, limits)
    for member in ranked:
        inside, limit = member.provider.capacity.places
        if inside <= share * limit + SPARE and member.provider.capacity.well:
            return member
    return None


def _ranked(prefix: Prefix, members: Sequence[Member]) -> list[Member]:
    """Return *members* in the order of the conversation's rendezvous, the winner first.

    A score is a universal hash of the identity (Carter, Wegman, "Universal classes of hash
    functions", 1979), whose factor is the member's own.
    """
    number = int.from_bytes(prefix.identity[:8])
    return sorted(members, key=lambda member: number * member.factor % PRIME, reverse=True)


def measured(reading: float, seconds: float, unknown: int) -> float:
    """Return the new average of the seconds per byte, *reading* so far. The first content of an
    answer came after *seconds*, and so many bytes of its prompt were *unknown*.
    """
    if unknown <= MEASURED_BYTES:
        return reading
    newest = min(MOST_READING, max(LEAST_READING, seconds / unknown))
    return reading + SMOOTHING * (newest - reading)

"""The turns of conversations: the last one of each, in memory, and the reading of a new one.

A conversation is the session that an agent names, or the caller's `conversation_id`, or else the
digest of its first user message. What affinity takes for its identity includes the tools and the
system prompt, and so would change exactly when they do. A request that an agent above has begun is
another conversation of the same session. The model as the client names it belongs to all of these.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING
from zlib import crc32

from aioserver.protocol.regions import RegionReader
from aioserver.protocol.request_headers import TURN
from aioserver.protocol.tokens import CACHE_WRITTEN, tokens_of
from aioserver.providers.request import WordlessApi
from aioserver.telemetry.bookkeeping import bookkeeping, nothing
from aioserver.wings.cache_loss.verdict import (
    LEAST,
    SHARE,
    Difference,
    LastTurn,
    Sent,
    compare,
    ended_at,
    expected,
    judge,
    packed,
    packed_regions,
    unpacked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from aioserver.gateway.request import Request
    from aioserver.protocol.regions import Regions
    from aioserver.providers.provider import Provider
    from aioserver.telemetry.bugs import Bugs
    from aioserver.telemetry.outcome import CacheLoss, Outcome

# The length of what names a conversation.
KEY_BYTES = 16
# Conversations that are kept, and the seconds since their last turn.
MAX_CONVERSATIONS, LIFE = 4096, 3600.0
# Losses of one minute that are told apart by their region.
MAX_KINDS = 200
MINUTES = 60
# Why a turn went to another member: the last one is no member any more, is not well, had no free
# place, or had one.
GONE, SICK, FULL, OTHER = "gone", "sick", "full", "other"


class Conversations:
    """The last turn of each conversation, by its caller.

    Always: there are at most *most* of them, the caller with most loses its oldest, and none is
    returned that is older than LIFE.
    """

    def __init__(self, most: int = MAX_CONVERSATIONS) -> None:
        self._most, self._number = most, 0
        # The callers, and the conversations of each, the most recently used last.
        self._turns: OrderedDict[Hashable, OrderedDict[bytes, bytes]] = OrderedDict()

    def __len__(self) -> int:
        return self._number

    def last(self, caller: Hashable, key: bytes, now: float) -> LastTurn | None:
        """Return the last turn of the conversation *key* of *caller*, at the time *now*."""
        turns = self._turns.get(caller)
        data = None if turns is None else turns.get(key)
        return None if data is None or _old(data, now) else unpacked(data)

    def keep(self, caller: Hashable, key: bytes, turn: bytes, now: float) -> None:
        """Keep *turn* as the last of the conversation *key* of *caller*."""
        turns = self._turns.setdefault(caller, OrderedDict())
        self._turns.move_to_end(caller)
        self._number += key not in turns
        turns[key] = turn
        turns.move_to_end(key)
        while _old(next(iter(turns.values())), now):
            self._drop(caller)
        # The caller that was here least recently, if all that it has is too old.
        while _old(next(reversed((turns := next(iter(self._turns.values()))).values())), now):
            self._number -= len(turns)
            self._turns.popitem(last=False)
        if self._number > self._most:
            self._drop(max(self._turns, key=lambda each: len(self._turns[each])))

    def _drop(self, caller: Hashable) -> None:
        """Drop the oldest conversation of *caller*."""
        self._turns[caller].popitem(last=False)
        self._number -= 1
        if not self._turns[caller]:
            del self._turns[caller]


def _old(turn: bytes, now: float) -> bool:
    return now - ended_at(turn) > LIFE


class Losses:
    """The losses of the last hour, by minute, and all verdicts since the start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._minutes: deque[tuple[int, Counter[tuple[str, str]]]] = deque(maxlen=MINUTES)
        self.verdicts: Counter[str] = Counter()

    def add(self, loss: CacheLoss) -> None:
        """Count *loss*."""
        self.verdicts[loss.verdict] += 1
        if not loss.tokens:
            return
        minute = int(self._clock() / 60)
        if not self._minutes or self._minutes[-1][0] != minute:
            self._minutes.append((minute, Counter()))
        kinds = self._minutes[-1][1]
        kind = loss.verdict, loss.at
        if kind not in kinds and len(kinds) >= MAX_KINDS:
            kind = loss.verdict, ""
        kinds[kind] += loss.tokens

    def hour(self) -> Counter[tuple[str, str]]:
        """Return the tokens that were lost in the last hour, by verdict and region."""
        oldest, total = int(self._clock() / 60) - MINUTES, Counter[tuple[str, str]]()
        for minute, kinds in self._minutes:
            if minute > oldest:
                total.update(kinds)
        return total


class Reader:
    """Reads the prompts of turns, and finds what the caches of their providers have lost."""

    def __init__(self, bugs: Bugs, clock: Callable[[], float] = time.monotonic) -> None:
        self.bugs, self.clock = bugs, clock
        self._regions = RegionReader()
        self.conversations = Conversations()
        self.losses = Losses(clock)
        # By provider, the longest pause after which it has still had a prompt.
        self.longest: dict[str, float] = {}
        # Providers that say that nothing was written to their cache, and have it all the same.
        self.automatic: set[str] = set()

    async def read(
        self, request: Request, conversation_id: str | None, providers: Mapping[str, Provider]
    ) -> Regions | None:
        """Read the prompt of *request*, as the contract has it."""
        asked, route = request.provider_request, request.route
        if isinstance(asked.api, WordlessApi) or not asked.api.costs:
            return None
        caller, name = asked.caller.flow, route.group.name
        body = asked.body(route.provider.settings, route.model)
        model = name or f"{route.provider.name}/{route.model or ''}"
        regions = await self._regions.read(body)
        if regions is None:
            return None
        asked.pictures = regions.picture
        if regions.picture or regions.cut:
            return regions
        first = regions.start if regions.user is None else regions.user
        session, said = asked.options.session, f"{regions.digests[first]}"
        named = session or conversation_id
        if named and asked.options.agent != TURN:
            said = ""
        whole = f"{bool(session)} {model} {named or ''} {said}".encode()
        key = blake2b(whole, digest_size=KEY_BYTES).digest()
        why = partial(_why, request, providers)
        asked.outcome.turn_read = self.turn(caller, key, regions, why)
        return regions

    @bookkeeping(nothing)
    def turn(
        self, caller: Hashable, key: bytes, regions: Regions, why: Callable[[str], str]
    ) -> Turn:
        """Return the next turn of the conversation *key* of *caller*, whose prompt has *regions*.

        *why* says why it would not go to the provider of that name now.
        """
        last = self.conversations.last(caller, key, self.clock())
        reason = "" if last is None else why(last.sent.provider)
        return Turn(self, caller, key, regions, last, reason)


def _why(request: Request, providers: Mapping[str, Provider], name: str) -> str:
    """Return why the turn would not go to the provider *name* now."""
    provider, group = providers.get(name), request.route.group
    if provider is None or not provider.settings.usable:
        return GONE
    if all(member.provider is not provider for member in group.members):
        return GONE
    if not provider.capacity.well:
        return SICK
    inside, limit = provider.capacity.places
    return FULL if inside >= limit else OTHER


class Turn:
    """A turn whose prompt was compared with the *last* one of its conversation, if there is one."""

    def __init__(
        self,
        reader: Reader,
        caller: Hashable,
        key: bytes,
        regions: Regions,
        last: LastTurn | None,
        why: str,
    ) -> None:
        self._reader, self._caller, self._key = reader, caller, key
        self._difference: Difference | None = None if last is None else compare(last, regions)
        # The digests themselves are not needed any more.
        self._regions = packed_regions(regions)
        self._last = None if last is None else last._replace(digests=())
        self._why = why

    @property
    def bugs(self) -> Bugs:
        """The counter of bugs in this code."""
        return self._reader.bugs

    @bookkeeping(nothing)
    def ended(self, outcome: Outcome) -> CacheLoss | None:
        """Return what was lost of the cache, by the usage in *outcome*, and keep the turn."""
        reader, tokens, now = self._reader, tokens_of(outcome.usage), self._reader.clock()
        if tokens.prompt is None or outcome.seams:
            # The usage is unknown, or is that of two requests.
            return None
        last, difference = self._last, self._difference
        if last is not None and last.sent.provider == outcome.provider:
            _, _, _, prompt, kept = last.sent
            if kept + LEAST < min(tokens.cached or 0, prompt):
                reader.automatic.add(outcome.provider)
                last = last._replace(sent=last.sent._replace(kept=prompt))
        kept = tokens.prompt
        says_written = (outcome.usage or {}).get(CACHE_WRITTEN) is not None
        if tokens.cache_write or (says_written and outcome.provider not in reader.automatic):
            # The provider keeps only what its client has marked.
            kept = min(kept, (tokens.cached or 0) + tokens.cache_write)
        model = crc32(outcome.model.encode())
        sent = Sent(now, outcome.provider, model, tokens.prompt, kept)
        reader.conversations.keep(self._caller, self._key, packed(sent, self._regions), now)
        if last is None or difference is None:
            return None
        pause = max(0.0, outcome.sent_at - last.sent.ended_at)
        longest = reader.longest.get(outcome.provider)
        # An attempt before this one has failed.
        why = SICK if outcome.attempts > 1 else self._why
        loss = judge(last, difference, sent, tokens.cached, pause, longest, why)
        if loss is not None:
            reader.losses.add(loss)
        elif tokens.cached and last.sent[1:3] == sent[1:3]:
            least, before = expected(last, difference)[1], tokens.cached
            if least > LEAST and before >= (1 - SHARE) * least:
                reader.longest[outcome.provider] = max(pause, longest or 0.0)
        return loss

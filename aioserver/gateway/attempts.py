"""The attempts at one request: start, run, and after a fault another attempt or the final fault.

    pass       each candidate of a group that can be asked, one after another without a pause, until
               one answers; at one provider it is one attempt
    backoff    when all have failed, and the fault of one of them allows a retry at the same
               provider (`retry`); the request holds no place meanwhile
    next pass  of these candidates alone: `max_retries` times, within the retry budget of the first
    next group of `llm.fallbacks`, with its own tries

The function `_after` decides what follows a fault: the first row that fits counts.

    the fault                                            next                       counts as
    after the first content, or it may not fail over     raised
    its provider is away, and `when_down: wait`          there, parked              nothing
    a new connection broke before a byte (`once`)        there alone, at once       a retry
    all are dead, and one of them is away with `wait`    there alone, anew          nothing
    a held turn broke off before any of it was shown     there once, at once        a retry
    candidates are left in this pass                     those, at once             a failover
    a fault of this pass may be tried again              those, after the backoff   a retry
    a fallback is left                                   its candidates             a failover
    nothing is left                                      raised: the final fault

Once the client has seen content of the answer, no further attempt is made: it would read two
answers. Held events (providers/holding.py), and a whole answer, are not seen before their end. So
where turns are held, a break is tried again at the same provider, too. provider_errors.py says
which fault allows what. A fallback that is sick comes last but for trials.

This file is one concept: the loop and the decision after each of its turns have one state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec

from aioserver.errors import AioserverError, ResponseNotFound
from aioserver.gateway.affinity import Affinity
from aioserver.gateway.candidates import Candidates
from aioserver.gateway.continuation import announce_repeat, breaks
from aioserver.gateway.groups import Group, sick
from aioserver.gateway.request import Request
from aioserver.limits.deadline import Wait
from aioserver.protocol.regions import Regions
from aioserver.protocol.request_headers import PREAMBLE
from aioserver.provider_errors import (
    CircuitOpen,
    ContextTooLong,
    ProviderFault,
    ProviderRateLimited,
    ReadTimeout,
    RequestNotBridged,
)
from aioserver.providers.breaker import TRIAL_INTERVAL, Breaker
from aioserver.providers.health import KEY_FAULTS, WAIT
from aioserver.providers.provider import Provider
from aioserver.streams.stream import Stream
from aioserver.telemetry.outcome import Outcome
from aioserver.tracebacks import forget_frames

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aioserver.limits.resource import Grant
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.request import Answer

# The faults of a provider that could not have answered.
UNUSABLE = (*KEY_FAULTS, RequestNotBridged)
# Seconds to which the backoff before a retry grows.
MAX_BACKOFF = 30.0
# Seconds of a backoff that a provider may ask for; if it asks for more, its fault is raised
# instead.
MAX_ASKED_BACKOFF = 60.0
# Seconds for which a request is parked at a provider that may be away, before it is tried again.
MAX_PARKED = 2.0
# Stands in a field until its first value is known.
UNKNOWN: Any = None


class Pause(NamedTuple):
    """The *seconds* before the next attempt. *parked*: the request waits meanwhile for its
    provider, which is away.
    """

    seconds: float = 0.0
    parked: bool = False


class Try(NamedTuple):
    """How one attempt has failed, and the `Outcome` after it."""

    fault: ProviderFault
    provider: str
    model: str
    headers: Mapping[str, str]

    @classmethod
    def of(cls, fault: ProviderFault, outcome: Outcome) -> Self:
        """Return the attempt that was made last."""
        return cls(fault, outcome.provider, outcome.model, outcome.headers)

    def raised(self, outcome: Outcome) -> ProviderFault:
        """Return the fault, which ends the request now: *outcome* is about this attempt again."""
        _, outcome.provider, outcome.model, outcome.headers = self
        return self.fault


class Attempts(msgspec.Struct, eq=False):
    """The attempts to have *request* answered by one of *groups*, which are asked in their order.

    Always: once an event of an answer is in *stream*, no further attempt is made.

    *random_number* returns numbers from 0.0 to 1.0, for the jitter of backoffs. *regions* are those
    of the prompt, if they were read.
    """

    _request: Request
    _stream: Stream | None
    # The groups that were not asked yet.
    _groups: list[Group]
    _affinity: Affinity
    _random_number: Callable[[], float]
    # They refer to the body, and are dropped at the first start.
    _regions: Regions | None = None
    # The outcome of the request; the first group; and the candidates of the one that is asked now,
    # with the provider of the first of them.
    _outcome: Outcome = UNKNOWN
    _first_group: Group = UNKNOWN
    _candidates: Candidates = UNKNOWN
    _first: Provider = UNKNOWN
    # For all groups: the largest `max_context` of members that found the request too long; how
    # each group has failed; and the sick groups, which come last, or have failed in a trial.
    _too_small: int = 0
    _ended: tuple[Try, ...] = ()
    _late: tuple[Group, ...] = ()
    # The group that is asked as a trial, or was last; and the breaker of a sick provider whose
    # trial the next attempt is.
    _trial_group: Group | None = None
    _trial: Breaker | None = None
    # For the present group: whether others can be asked instead, whether the last attempt was a
    # trial of a sick provider, and whether the request was sent to it before.
    _fallback: bool = False
    _was_trial: bool = False
    _again: bool = False
    # How many retries it has had, how this pass has failed, and the one before.
    _number: int = 0
    _tries: tuple[Try, ...] = ()
    _previous: Try | None = None
    # The first for whom the request was too long; and the fault for which it was parked.
    _too_long: Try | None = None
    _parked_for: Try | None = None
    # The provider and the code of a break of a held turn, until the next attempt begins.
    _cut: tuple[str, str] | None = None
    # The providers that were asked once more at once.
    _broken: frozenset[Provider] = frozenset()

    def __post_init__(self) -> None:
        """Begin with the first group."""
        self._outcome = self._request.provider_request.outcome
        self._first_group = self._groups[0]

    async def answer(self) -> Answer | None:
        """Return the answer of the attempt that succeeded, None if it is in the log. Cancelling is
        safe.

        Raises:
            ProviderFault: none did; see `final_try`.
        """
        outcome, parked = self._outcome, None
        try:
            self._go_on()
            while True:
                attempt: Attempt | None = None
                pause: Pause | None = Pause()
                try:
                    attempt, grant = await self._start(parked)
                    await self._candidates.run(attempt, grant)
                except ProviderFault as fault:
                    pause = self._after(fault, attempt)
                except ResponseNotFound:
                    # Nothing was sent. Another member may have made what the request continues.
                    outcome.attempts -= 1
                    if not self._candidates.unknown():
                        raise
                except AioserverError as error:
                    # We have raised it ourselves, perhaps since there is no room for the answer.
                    error.paid = outcome.sent_at > 0
                    raise
                else:
                    if self._candidates.placement is not None:
                        self._candidates.answered(attempt)
                    return attempt.answer
                self._end_trial()
                parked = None
                if pause is None:
                    self._go_on()
                elif pause.parked:
                    parked = pause.seconds
                    await self._unsend(parked)
                elif pause.seconds:
                    await self._rest(pause.seconds)
        finally:
            if self._trial is not None:
                self._end_trial()

    async def _start(self, parked: float | None) -> tuple[Attempt, Grant]:
        """Return the next attempt, which may start, and its grant; *parked*: it comes back in so
        many seconds, to a provider that is away.
        """
        candidates = self._candidates
        if candidates.placeable:
            await candidates.find_prefix(self._regions)
        self._regions = None
        if candidates.alone and not self._fallback and candidates.away:
            await self._unsend(0.0)
        attempt, grant = await candidates.start(self._again, self._fallback, parked)
        if self._trial is not None:
            # It is that of the attempt now.
            attempt.trial, self._trial = True, None
        self._was_trial = attempt.trial
        if self._cut is not None and self._stream is not None:
            try:
                announce_repeat(attempt, self._stream, *self._cut)
            except BaseException:
                candidates.give_up(attempt, grant)
                raise
        self._cut = None
        return attempt, grant

    def _go_on(self) -> None:
        """Go on to the candidates of the next group that can be asked.

        Raises:
            ProviderFault: there is none, and this is the fault that says most.
        """
        request, groups = self._request, self._groups
        while groups:
            group, trial = groups.pop(0), False
            if groups:
                self._fallback = any(other.available for other in groups)
                if self._fallback and group not in self._late and _sick(group):
                    self._late += (group,)
                    breaker = group.members[0].provider.health.breaker
                    trial = not self._ended and breaker.start_spared()
                    if not trial:
                        groups.append(group)
                        continue
                    self._trial = breaker
            elif self._fallback:
                self._fallback = False
            first = group is self._first_group
            model = request.route.model if first else group.members[0].model
            try:
                candidates = Candidates(
                    group, request, self._stream, self._affinity, model, self._too_small
                )
            except ProviderFault as fault:
                forget_frames(fault)
                self._ended += (Try.of(fault, self._outcome),)
                self._end_trial()
                continue
            if not candidates.left:
                # None of its members takes more than what was too small.
                self._end_trial()
                continue
            self._candidates = candidates
            member = candidates.left[0]
            if trial:
                candidates.settle(member)
                self._trial_group = group
            elif self._trial_group is not None:
                self._trial_group = None
            if self._again:
                self._begin_anew()
            self._first = member.provider
            self._first.budget.add_request()
            return
        ended = self._ended
        raise (too_long(ended) or final_try(ended)).raised(self._outcome)

    def _end_trial(self) -> None:
        """Give back a trial that no attempt has begun."""
        if (breaker := self._trial) is not None:
            self._trial = None
            breaker.unsure(trial=True)

    def _begin_anew(self) -> None:
        """Begin to count attempts anew: those of others."""
        self._number, self._previous, self._tries, self._again = 0, None, (), False
        self._broken, self._too_long, self._parked_for = frozenset(), None, None

    async def _rest(self, seconds: float) -> None:
        """Wait for so many *seconds* before a retry; nothing is held meanwhile."""
        self._request.provider_request.ticket.free_slot()
        if (bound := self._request.provider_request.bound) is not None:
            bound.wait = Wait(f"the next attempt at {self._outcome.provider} waits", seconds)
        await asyncio.sleep(seconds)

    async def _unsend(self, seconds: float) -> None:
        """Note that no attempt is under way while the provider is away."""
        request, provider = self._request.provider_request, self._candidates.left[0].provider
        if (bound := request.bound) is not None:
            bound.wait = Wait(f"{provider.name} is away", seconds)
        await provider.unsend(self._stream, self._outcome)

    # What follows a fault.

    def _after(self, fault: ProviderFault, attempt: Attempt | None) -> Pause | None:
        """Return the pause after *fault*, by which *attempt* has ended, or by which there was
        none. None: the next group is asked.

        Raises:
            ProviderFault: nothing does, and this is the fault that says most.
        """
        candidates, outcome = self._candidates, self._outcome
        self._again = True
        if attempt is not None and not fault.attempt_outcome:
            # Nothing was sent.
            outcome.attempts -= 1
        fault.request_outcome = outcome
        if begun(self._stream) or not (
            fault.failover or (fault.unknown_there and not candidates.alone)
        ):
            raise fault
        # A fault that is kept here must not lead back to frames, which lead to the body.
        forget_frames(fault)
        if (seconds := self._parks(fault, attempt)) is not None:
            self._parked_for = Try.of(fault, outcome)
            return Pause(seconds, parked=True)
        tried = Try.of(fault, outcome)
        if isinstance(fault, CircuitOpen) and self._parked_for is not None:
            # It fails in another way now, and has died of it.
            tried = self._parked_for
        self._parked_for = None
        once = fault.once
        held = attempt is not None and attempt.status == 200 and attempt.request.hold != PREAMBLE
        if held and breaks(fault):
            # The client has seen nothing of this turn. A provider that has hung hangs again, and
            # one that limits us says when to come back.
            self._cut = outcome.provider, fault.code
            outcome.cuts += (self._cut,)
            once = not isinstance(fault, ReadTimeout | ProviderRateLimited)
            fault.retry = not self._fallback
        if once and candidates.chosen is not None and self._once_more(tried):
            candidates.repeat()
            return Pause()
        self._tries += (tried,)
        if not (self._fallback or candidates.alone) and (member := candidates.awaited(fault)):
            candidates.settle(member)
            self._begin_anew()
            self._first = member.provider
            self._first.budget.add_request()
            return Pause()
        if candidates.failed(tried.fault):
            return Pause()
        try:
            return Pause(self._retry(candidates.next()))
        except ProviderFault as final:
            if begun(self._stream) or not final.failover:
                raise
            self._fail_over(final)
            return None

    def _parks(self, fault: ProviderFault, attempt: Attempt | None) -> float | None:
        """Return the seconds for which the request is parked, since its provider is away; None if
        it does not wait for that.
        """
        candidates = self._candidates
        if self._fallback or not candidates.alone or not candidates.left:
            return None
        (member,) = candidates.left
        provider, ticket = member.provider, self._request.provider_request.ticket
        breaker = provider.health.breaker
        if member.settings.when_down != WAIT:
            return None
        if isinstance(fault, CircuitOpen):
            away = breaker.unreachable
        else:
            # A trial that has waited fails at no cost, if nothing can have been paid for.
            waited = ticket.slot is not None
            away = fault.unreachable or (fault.retry and waited and breaker.unreachable)
        if not away:
            return None
        if attempt is not None and attempt.began:
            # A trial that fails slowly is a part of the wait.
            provider.capacity.add_wait(ticket, provider.clock() - attempt.began)
            attempt.began = 0.0
        seconds = max(min(MAX_PARKED, self._backoff(1, None)), TRIAL_INTERVAL)
        if provider.capacity.waited(ticket) + seconds >= provider.capacity.patience(ticket):
            return None
        return 0.0 if breaker.dead else seconds

    def _once_more(self, tried: Try) -> bool:
        """Return whether the provider that has failed is asked once more at once, and count
        that.
        """
        assert self._candidates.chosen is not None
        first, provider = self._first, self._candidates.chosen.provider
        if (
            self._was_trial
            or provider in self._broken
            or self._number >= first.settings.http_client.max_retries
            or provider.health.breaker.dead
        ):
            return False
        if not first.budget.take_retry():
            first.meter.retries_refused.value += 1
            return False
        self._broken |= {provider}
        self._number += 1
        self._previous = tried
        provider.meter.retries[tried.fault.code].value += 1
        return True

    def _retry(self, again: Sequence[tuple[Provider, str]]) -> float:
        """Return the seconds until the next pass, that of *again*, with the codes of the faults
        that allow it.

        Raises:
            ProviderFault: there is none.
        """
        first, previous = self._first, self._previous
        self._too_long = self._too_long or too_long(self._tries)
        final, self._tries = final_try(self._tries), ()
        if previous is not None and isinstance(final.fault, CircuitOpen):
            # The fault that killed the last of them says more than that it is dead.
            raise self._raised(previous) from None
        self._previous = final
        self._number += 1
        backoff = self._backoff(
            self._number, final.fault.retry_after if final.fault.retry else None
        )
        breakers = [provider.health.breaker for provider, _ in again]
        trial = min((breaker.delay() for breaker in breakers), default=0.0)
        if not self._fallback and backoff < trial < inf:
            # The retry of a lone client would come shortly before the next trial may start.
            backoff = trial
        if (
            not again
            or self._number > first.settings.http_client.max_retries
            or backoff > MAX_ASKED_BACKOFF
            # They ask for a pause, or are dead or sick, and the next group may not be.
            or (
                self._fallback
                and (
                    (self._was_trial and self._candidates.alone)
                    or isinstance(final.fault, ProviderRateLimited)
                    or all(breaker.dead for breaker in breakers)
                )
            )
        ):
            raise self._raised(final) from None
        if backoff > self._request.provider_request.left:
            final.fault.backoff = backoff
            raise self._raised(final) from None
        if not first.budget.take_retry():
            first.meter.retries_refused.value += 1
            raise self._raised(final) from None
        for provider, code in again:
            provider.meter.retries[code].value += 1
        return backoff

    def _raised(self, final: Try) -> ProviderFault:
        """Return the fault that ends the tries of a group, of *final* or of the first for whom the
        request was too long.
        """
        return (self._too_long or final).raised(self._outcome)

    def _fail_over(self, final: ProviderFault) -> None:
        """Record that this group has failed with *final*, and that the next one is asked."""
        candidates = self._candidates
        group = candidates.group
        forget_frames(final)
        self._ended += (Try.of(final, self._outcome),)
        self._too_small = max(self._too_small, candidates.too_small)
        if self._trial_group is group and final.retry:
            self._groups.append(group)
        if self._groups:
            group.members[0].provider.meter.failovers[final.code].value += 1

    def _backoff(self, number: int, retry_after: float | None) -> float:
        """Return the seconds of the backoff before retry *number*, at least *retry_after*.

        Backoffs double, and half of each is random ("equal jitter": Marc Brooker, "Exponential
        Backoff And Jitter", 2015).
        """
        factor = self._first.settings.http_client.backoff_factor
        seconds = min(MAX_BACKOFF, factor * 2.0 ** min(number - 1, 30))
        return max(seconds * (0.5 + self._random_number() / 2), retry_after or 0.0)


def begun(stream: Stream | None) -> bool:
    """Return whether an answer has begun in the log, so that no other may follow."""
    return stream is not None and (stream.answered or stream.ended)


def too_long(tries: Sequence[Try]) -> Try | None:
    """Return the first of *tries* whose provider found the request too long: only that refusal
    tells the caller what to shorten.
    """
    return next((each for each in tries if isinstance(each.fault, ContextTooLong)), None)


def final_try(tries: Sequence[Try]) -> Try:
    """Return the attempt whose fault is raised when all providers have failed: the last of
    *tries*, as a rule.

    The fault of a provider that could not have answered (UNUSABLE) is returned only if there is no
    other. Such a provider refuses our key, has no form of the request, or does not know what the
    request continues. A fault of too many requests is returned only if every usable provider has
    raised one. The `retry_after` is that of the provider that may answer first.
    """
    of_usable = [
        failed
        for failed in tries
        if not (isinstance(failed.fault, UNUSABLE) or failed.fault.unknown_there)
    ] or tries
    others = [failed for failed in of_usable if not isinstance(failed.fault, ProviderRateLimited)]
    final = (others or of_usable)[-1]
    if final.fault.retry_after is not None:
        final.fault.retry_after = min(
            failed.fault.retry_after
            for failed in of_usable
            if failed.fault.retry_after is not None
        )
    return final


def _sick(group: Group) -> bool:
    """Return whether *group* is one provider, which is sick."""
    return len(group.members) == 1 and sick(group.members[0])

"""One request on its way to an answer: it is asked of one provider, or of the members of a group.

    round      each member that can be asked, one after another without a pause, until one
               answers; at one provider it is one attempt
    backoff    when all have failed, and the fault of one of them may be tried again at the same
               provider (`retry`); place and connection are free meanwhile
    next round of those alone: `max_retries` times, within the budget of the first

A new connection that breaks before a byte of the answer is tried once more at once, as a retry
(`once`): most of these are chance.

Once there is content of the answer nothing is asked any more: the client would read two
answers. provider_errors.py says which fault allows what.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Self

from aioserver.errors import AioserverError, ResponseNotFound
from aioserver.limits.deadline import Wait
from aioserver.provider_errors import (
    CircuitOpen,
    ContextTooLong,
    ProviderFault,
    ProviderRateLimited,
    RequestNotBridged,
)
from aioserver.providers.health import KEY_FAULTS
from aioserver.tracebacks import forget_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.gateway.members import Member
    from aioserver.gateway.request import Request
    from aioserver.gateway.rounds import Round
    from aioserver.limits.gate import Place
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.provider import Provider
    from aioserver.providers.request import Answer
    from aioserver.streams.stream import Stream
    from aioserver.telemetry.outcome import Outcome

# The faults of a provider that could not have answered.
UNUSABLE = (*KEY_FAULTS, RequestNotBridged)
# Seconds to which the backoff before a retry grows.
MAX_BACKOFF = 30.0
# Seconds of a backoff that a provider asks for; if it asks for more, its fault is raised instead.
MAX_ASKED_BACKOFF = 60.0
# Seconds for which a request is parked whose provider may be away, before it is tried again.
MAX_PARKED = 2.0


class Asking:
    """*request*, to be asked of *provider* for *model*; or of the members of *round_*, of which it
    is the first.

    *fallback* says that others can be asked instead of all of these. The first attempt is a *trial*
    of a sick provider, if that has begun one; it is not tried again there. *random_number* returns
    numbers from 0.0 to 1.0, for the jitter of backoffs.
    """

    # What most requests never change.
    # The number of this round.
    _number = 0
    # The seconds of its waits at the one provider, and whether it has left that queue for a moment
    # only.
    _waited, _rejoin = 0.0, False
    # How this round has failed so far, and the one before.
    _tries: tuple[Try, ...] = ()
    _previous: Try | None = None
    # The first for whom the request was too long.
    _too_long: Try | None = None
    # The providers that were asked once more at once.
    _broken: frozenset[Provider] = frozenset()
    # Whether the last attempt was a trial.
    _trial = False

    def __init__(
        self,
        request: Request,
        stream: Stream | None,
        provider: Provider,
        model: str | None,
        round_: Round | None = None,
        *,
        fallback: bool = False,
        trial: bool = False,
        random_number: Callable[[], float],
    ) -> None:
        self._request, self._stream = request, stream
        self._outcome = request.provider_request.outcome
        self._provider, self._model, self._round = provider, model, round_
        self._fallback = fallback
        # Whether the next attempt is a trial, of whose end the breaker does not know yet.
        self.trial = trial
        self._random_number = random_number

    async def answer(self) -> Answer | None:
        """Return the answer of the attempt that succeeded, None if it is in the log. Cancelling is
        safe.

        Raises:
            ProviderFault: none did. It is that of the last attempt that was made, or of the first
                if none was.
        """
        outcome, provider = self._outcome, self._provider
        provider.budget.add_request()
        while True:
            attempt: Attempt | None = None
            place: Place | None = None
            round_ = self._round
            try:
                if round_ is None:
                    provider, attempt = self._provider, self._attempt()
                else:
                    retry = self._number > 0 or bool(self._tries)
                    attempt, place = await round_.start(retry=retry, fallback=self._fallback)
                    assert round_.chosen is not None
                    provider = round_.chosen.provider
                    round_.sent()
                outcome.begin_attempt(provider.name, attempt.model or provider.settings.model)
                self._trial = attempt.trial
                await provider.run(attempt, place)
            except ProviderFault as fault:
                if attempt is not None and not fault.attempt_outcome:
                    # Nothing was sent.
                    outcome.attempts -= 1
                fault.request_outcome = outcome
                elsewhere = fault.failover or (round_ is not None and fault.unknown_there)
                if begun(self._stream) or not elsewhere:
                    raise
                backoff = await self._after(fault, attempt)
            except ResponseNotFound:
                # Nothing was sent. Another member may have made what the request continues.
                outcome.attempts -= 1
                if round_ is None or not round_.unknown():
                    raise
                backoff = 0.0
            except AioserverError as error:
                # Raised by us, perhaps since there is no room for the answer that comes.
                error.paid = outcome.sent_at > 0
                raise
            else:
                if round_ is not None:
                    round_.answered(attempt)
                return attempt.answer
            finally:
                if attempt is not None and attempt.trial:
                    # It never began.
                    attempt.trial = False
                    provider.health.breaker.unsure(trial=True)
                try:
                    if place is not None:
                        # It is given back already, unless the attempt never began.
                        place.release(0)
                finally:
                    if attempt is not None and attempt.permit is not None:
                        # So is this.
                        attempt.release_permit()
            if backoff:
                if (bound := self._request.provider_request.bound) is not None:
                    bound.wait = Wait(f"the next attempt at {provider.name} waits", backoff)
                await asyncio.sleep(backoff)

    def _attempt(self) -> Attempt:
        """Return the next attempt at the one provider."""
        request = self._request
        attempt = request.make_attempt(
            self._provider,
            request.provider_request,
            self._stream,
            model=self._model,
            waited=self._waited,
            retry=self._number > 0,
            rejoin=self._rejoin,
            fallback=self._fallback,
        )
        if self.trial:
            attempt.trial, self.trial = True, False
        return attempt

    async def _after(self, fault: ProviderFault, attempt: Attempt | None) -> float:
        """Return the seconds until the next attempt, since *attempt* has failed with *fault*, or
        there could be none.

        Raises:
            ProviderFault: there is no next one.
        """
        round_ = self._round
        if round_ is None:
            assert attempt is not None
            parked = min(MAX_PARKED, self._backoff(1, None))
            # A rest keeps no room in the queue.
            self._rejoin = await self._provider.absence.wait(attempt, fault, parked)
            self._waited = attempt.waited
            if self._rejoin:
                return 0.0
        # A fault that is kept here must not lead back to frames, which lead to the body.
        forget_frames(fault)
        if fault.once and attempt is not None and self._once_more(fault):
            return 0.0
        self._tries += (Try.of(fault, self._outcome),)
        if round_ is None:
            again = fault.retry and not fault.once
            return self._rest([(self._provider, fault.code)] if again else [])
        if round_.chosen is None and not self._fallback and (away := round_.away(fault)):
            self._wait_at(away)
            return 0.0
        return 0.0 if round_.failed(fault) else self._rest(round_.next())

    def _once_more(self, fault: ProviderFault) -> bool:
        """Return whether the provider that has failed with *fault* is asked once more at once."""
        first, round_, provider = self._provider, self._round, self._provider
        if round_ is not None and round_.chosen is not None:
            provider = round_.chosen.provider
        if (
            self._trial
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
        self._previous = Try.of(fault, self._outcome)
        provider.meter.retries[fault.code].value += 1
        if round_ is not None:
            round_.repeat()
        return True

    def _wait_at(self, member: Member) -> None:
        """Go on at *member* alone, which all are waiting for."""
        self._provider, self._model, self._round = member.provider, member.asked_model, None
        self._number, self._previous, self._tries = 0, None, ()
        member.provider.budget.add_request()

    def _rest(self, again: Sequence[tuple[Provider, str]]) -> float:
        """Return the seconds until the next round, that of *again*, with the codes of the faults
        that allow it.

        Raises:
            ProviderFault: there is no next one.
        """
        first, previous = self._provider, self._previous
        self._too_long = self._too_long or too_long(self._tries)
        final, self._tries = final_try(list(self._tries)), ()
        if previous is not None and isinstance(final.fault, CircuitOpen):
            # What killed the last of them says more than that it is dead.
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
            # They ask us to wait, or are dead or sick, and the next one may not be.
            or (
                self._fallback
                and (
                    (self._trial and self._round is None)
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
        """Return the fault that ends the request, of *final* or of the first for whom it was too
        long.
        """
        return (self._too_long or final).raised(self._outcome)

    def _backoff(self, number: int, retry_after: float | None) -> float:
        """Return the seconds of the backoff before retry *number*, at least *retry_after*.

        Backoffs double, and half of each is random ("equal jitter": Marc Brooker, "Exponential
        Backoff And Jitter", 2015).
        """
        factor = self._provider.settings.http_client.backoff_factor
        seconds = min(MAX_BACKOFF, factor * 2.0 ** min(number - 1, 30))
        return max(seconds * (0.5 + self._random_number() / 2), retry_after or 0.0)


def begun(stream: Stream | None) -> bool:
    """Return whether an answer has begun in the log, so that no other may follow."""
    return stream is not None and (stream.answered or stream.ended)


class Try(NamedTuple):
    """How one attempt has failed, and what `Outcome` said of it."""

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


def too_long(tries: Sequence[Try]) -> Try | None:
    """Return the first of *tries* for whom the request was too long: only that refusal tells the
    caller what to shorten.
    """
    return next((each for each in tries if isinstance(each.fault, ContextTooLong)), None)


def final_try(tries: list[Try]) -> Try:
    """Return the attempt whose fault is raised when all providers have failed: the last of
    *tries*, as a rule.

    A provider that refuses our key is not usable, nor is one that has no form of the request, or
    does not know what it continues: their faults are returned only if there is no other. A fault
    of too many requests is returned only if every usable provider has raised one. The
    `retry_after` is that of the provider that may answer first. *tries* is empty afterwards.
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
    tries.clear()
    return final

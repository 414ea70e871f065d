"""The members of a group as one request asks them, round by round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioserver.gateway.homes import measured
from aioserver.provider_errors import CircuitOpen, ContextTooLong, NoProvider, ProviderFault
from aioserver.providers.outage import WAIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioserver.gateway.groups import Group
    from aioserver.gateway.homes import Homes, Placement
    from aioserver.gateway.members import Member
    from aioserver.gateway.request import Request
    from aioserver.limits.gate import Place
    from aioserver.protocol.prefix import Prefix
    from aioserver.providers.attempt import Attempt
    from aioserver.providers.provider import Provider
    from aioserver.streams.stream import Stream


class Round:
    """The members of *group* that *request* is still asked of, *left* in this round.

    *prefix* is that of its prompt, by which *homes* knows where it belongs; None: the group has
    no affinity. What the request continues is *kept_at* a provider: this member is asked alone for
    as long as it is not dead.
    """

    __slots__ = (
        *("_again", "_group", "_heirs", "_homes", "_only", "_placement", "_prefix", "_request"),
        *("_stream", "_waited", "chosen", "left", "too_small"),
    )

    def __init__(
        self,
        group: Group,
        request: Request,
        stream: Stream | None,
        members: Sequence[Member],
        homes: Homes,
        prefix: Prefix | None,
        *,
        kept_at: str | None = None,
    ) -> None:
        self._group, self._request, self._stream = group, request, stream
        self._homes, self._prefix = homes, prefix
        keeping = [member for member in members if member.provider.name == kept_at]
        others = [member for member in members if member not in keeping]
        alone = any(not member.provider.health.breaker.dead for member in keeping)
        self.left: Sequence[Member] = keeping if alone else others or keeping
        # Those that get all of what the request continues, should the one that keeps it die.
        self._heirs: Sequence[Member] = others if alone else ()
        # The one where the request has started; None while it has not.
        self.chosen: Member | None = None
        # The largest `max_context` of those for which it was too long.
        self.too_small = 0
        # The one that is asked next, before the others; None: whichever can start first.
        self._only: Member | None = None
        self._placement: Placement | None = None
        # The members that may be asked again, with the codes of their faults.
        self._again: list[tuple[Member, str]] = []
        # The seconds of its waits at each.
        self._waited: dict[Member, float] = {}

    async def start(self, *, retry: bool, fallback: bool) -> tuple[Attempt, Place]:
        """Wait for a place at one of those that are left; return the attempt there, and the
        place. *retry* and *fallback* are as for `Attempt`. Cancelling is safe.

        Raises:
            ProviderFault: none can start it.
        """
        request, left = self._request, self.left
        self.chosen = only = self._only
        others = fallback or len(left) > 1
        if only is not None:
            self._only, left, fallback = None, [only], others
        attempts = {
            member: request.make_attempt(
                member.provider,
                request.provider_request,
                self._stream,
                model=member.asked_model,
                waited=self._waited.get(member, 0.0),
                retry=retry,
                fallback=others,
            )
            for member in self._group.order(left)
        }
        if self._prefix is not None and only is None:
            self._placement = self._homes.place(self._prefix, left)
        trial = None if retry else self._group.trial(list(attempts))
        try:
            if trial is not None:
                attempts[trial].trial = True
                attempts = {trial: attempts.pop(trial), **attempts}
            member, place = await self._group.start(attempts, self._placement, fallback=fallback)
            self.chosen = member
        finally:
            for each, attempt in attempts.items():
                self._waited[each] = attempt.waited
            if trial is not None and self.chosen is not trial:
                # It has started elsewhere, or nowhere.
                trial.provider.health.breaker.unsure(trial=True)
        return attempts[member], place

    def repeat(self) -> None:
        """Let the member that has failed be asked once more, before the others."""
        self._only = self.chosen

    def sent(self) -> None:
        """Remember where the prompt goes."""
        if self._prefix is not None and self.chosen is not None:
            self._homes.sent(self._prefix, self.chosen)

    def answered(self, attempt: Attempt) -> None:
        """Learn from the first event of *attempt* how fast its member reads a prompt."""
        member, placement = self.chosen, self._placement
        if member is None or placement is None:
            return
        record = attempt.request.record
        seconds = record.first_event_at - record.outcome.sent_at
        if record.first_event_at and seconds > 0:
            unknown = placement.prefix.size - placement.known[member]
            member.reading = measured(member.reading, seconds, unknown)

    def failed(self, fault: ProviderFault) -> bool:
        """Note that the request has failed with *fault* where it has started, or could start
        nowhere; return whether it is asked of others in this round.
        """
        if self._heirs and self._dead(fault):
            self.left, self._heirs, self._again = self._heirs, (), []
            return True
        member = self.chosen
        if member is None:
            self.left = ()
            return False
        if fault.retry and not fault.once:
            self._again.append((member, fault.code))
        self.left = [other for other in self.left if other is not member]
        if isinstance(fault, ContextTooLong):
            # The estimate was wrong: none that takes no more is asked.
            self.too_small = max(self.too_small, member.max_context or 0)
            self.left = [other for other in self.left if other.takes_more_than(member)]
            self._again = [retry for retry in self._again if retry[0].takes_more_than(member)]
        if self.left:
            member.provider.meter.failovers[fault.code].value += 1
        return bool(self.left)

    def _dead(self, fault: ProviderFault) -> bool:
        """Return whether *fault*, of the member that keeps what the request continues, means that
        it will not answer: it is dead, or was removed.
        """
        return isinstance(fault, CircuitOpen | NoProvider) or all(
            member.provider.health.breaker.dead for member in self.left
        )

    def unknown(self) -> bool:
        """Note that the member where the request has started has no use for it, since it is not
        known what it continues; return whether it is asked of others.
        """
        self.left = [other for other in self.left if other is not self.chosen]
        return bool(self.left)

    def away(self, fault: ProviderFault) -> Member | None:
        """Return the member at which the request may wait until it is back, where none is asked
        now; *fault* is what they have refused it with.
        """
        if self._heirs or not isinstance(fault, CircuitOpen):
            return None
        return next(
            (
                member
                for member in self.left
                if member.settings.when_down == WAIT and member.provider.health.breaker.unreachable
            ),
            None,
        )

    def next(self) -> list[tuple[Provider, str]]:
        """Begin the next round, of those that may be asked again; return them with the codes of
        their faults.
        """
        again, self._again = self._again, []
        self.left = [member for member, _ in again]
        return [(member.provider, code) for member, code in again]

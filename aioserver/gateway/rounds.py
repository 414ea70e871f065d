"""The members of a group as one request asks them, round by round."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from aioserver.gateway.homes import measured
from aioserver.provider_errors import (
    CircuitOpen,
    ConnectError,
    ConnectTimeout,
    ContextTooLong,
    NoProvider,
    ProviderFault,
)
from aioserver.providers.outage import WAIT
from aioserver.streams.ending import run_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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

    Where what the request continues is kept at a member, this one is asked alone for as long as it
    is not dead, and takes connections. Members that take no more than *too_small* tokens are not
    asked. A change of the group's members holds at once.

    *prefix* is that of its prompt, by which *homes* knows where it belongs; None: the group has
    no affinity.

    Raises:
        NoProvider: no member can be asked.
    """

    __slots__ = (
        *("_again", "_asked", "_group", "_heirs", "_homes", "_kept_at", "_only", "_placement"),
        *("_regrouped", "_request", "_seen", "_short", "_stream", "_waited", "chosen", "left"),
        *("prefix", "too_small"),
    )

    def __init__(
        self,
        group: Group,
        request: Request,
        stream: Stream | None,
        homes: Homes,
        too_small: int = 0,
    ) -> None:
        self._group, self._request, self._stream, self._homes = group, request, stream, homes
        self.prefix: Prefix | None = None
        keeper = request.keeper
        self._kept_at = None if keeper is None else keeper.kept_at
        # Members that have been asked and will not be again, and those for which it was too long,
        # with the largest `max_context` of these.
        self._asked: set[Member] = set()
        self._short: list[Member] = []
        self.too_small = too_small
        # Members that are still asked, and those that get all of what the request continues, should
        # the one that keeps it die.
        self.left: Sequence[Member] = ()
        self._heirs: Sequence[Member] = ()
        # The version of the group that is known, and whether it has changed in a wait.
        self._seen, self._regrouped = 0, False
        if not self._look():
            raise group.empty()
        # The one where the request has started; None while it has not.
        self.chosen: Member | None = None
        # The one that is asked next, before the others; None: whichever can start first.
        self._only: Member | None = None
        self._placement: Placement | None = None
        # The members that may be asked again, with the codes of their faults.
        self._again: list[tuple[Member, str]] = []
        # The seconds of its waits at each.
        self._waited: dict[Member, float] = {}

    def _usable(self) -> list[Member]:
        """Return the members that can answer the request, as the group has them now."""
        request = self._request
        api, pinned = request.provider_request.api, request.route.pinned
        members = self._group.usable(api, one_model=pinned)
        if any(member.max_context for member in members):
            body = request.provider_request.body(members[0].settings, members[0].model)
            members = self._group.fitting(members, len(body))
        return members

    def _look(self) -> bool:
        """Take those that can be asked in this round, as the group has them now; return whether
        any member can be asked for such a request.
        """
        self._seen = self._group.version
        usable = self._usable()
        members = [
            member
            for member in usable
            if member not in self._asked
            and (member.max_context is None or member.max_context > self.too_small)
            and all(member.takes_more_than(short) for short in self._short)
        ]
        keeping = [member for member in members if member.provider.name == self._kept_at]
        others = [member for member in members if member not in keeping]
        if any(not member.provider.health.breaker.dead for member in keeping):
            self.left, self._heirs = keeping, others
        else:
            self.left, self._heirs = others or keeping, ()
        return bool(usable)

    async def start(self, *, retry: bool, fallback: bool) -> tuple[Attempt, Place]:
        """Wait for a place at one of those that are left; return the attempt there, and the
        place. *retry* and *fallback* are as for `Attempt`. Cancelling is safe.

        Raises:
            ProviderFault: none can start it.
        """
        if self._group.version != self._seen:
            self._look()
        left = self.left
        self.chosen = only = self._only if self._only in left else None
        self._only, others = None, fallback or len(left) > 1
        if only is not None:
            left, fallback = [only], others

        def attempt(member: Member, *, others: bool = others) -> Attempt:
            return self._request.make_attempt(
                member.provider,
                self._request.provider_request,
                self._stream,
                model=member.asked_model,
                waited=self._waited.get(member, 0.0),
                retry=retry,
                fallback=others,
            )

        attempts = {member: attempt(member) for member in self._group.order(left)}

        def more() -> Mapping[Member, Attempt]:
            self._look()
            self._regrouped = True
            new = {
                member: attempt(member, others=True)
                for member in self._group.order(self.left)
                if member not in attempts
            }
            attempts.update(new)
            return new

        if self.prefix is not None and only is None:
            self._placement = self._homes.place(self.prefix, left)
        trial = None if retry else self._group.trial(list(attempts))
        try:
            if trial is not None:
                attempts[trial].trial = True
                attempts = {trial: attempts.pop(trial), **attempts}
            member, place = await self._group.start(
                attempts, self._placement, more=more, fallback=fallback
            )
            self.chosen = member
        finally:
            held: list[Callable[[], object]] = []
            for each, made in attempts.items():
                self._waited[each] = made.waited
                if made.permit is not None and each is not self.chosen:
                    held.append(made.release_permit)
            if trial is not None and self.chosen is not trial:
                # It has started elsewhere, or nowhere.
                held.append(partial(trial.provider.health.breaker.unsure, trial=True))
            if held:
                run_all(held)
        return attempts[member], place

    def repeat(self) -> None:
        """Let the member that has failed be asked once more, before the others."""
        self._only = self.chosen

    def sent(self) -> None:
        """Remember where the prompt goes."""
        if self.prefix is not None and self.chosen is not None:
            self._homes.sent(self.prefix, self.chosen)

    def answered(self, attempt: Attempt) -> None:
        """Learn from the first content of *attempt* how fast its member reads a prompt."""
        member, placement = self.chosen, self._placement
        if member is None or placement is None:
            return
        record = attempt.request.record
        seconds = record.first_event_at - record.outcome.sent_at
        if record.first_event_at and seconds > 0:
            unknown = placement.prefix.size - placement.known.get(member, 0)
            member.reading = measured(member.reading, seconds, unknown)

    def failed(self, fault: ProviderFault) -> bool:
        """Note that the request has failed with *fault* where it has started, or could start
        nowhere; return whether it is asked of others in this round.
        """
        member = self.chosen
        if member is not None:
            self._leave(member, fault)
        if self._regrouped or self._group.version != self._seen:
            self._regrouped = False
            self._look()
        elif self._heirs and (
            isinstance(fault, CircuitOpen | NoProvider | ConnectError | ConnectTimeout)
            or (member is not None and member.provider.health.breaker.dead)
        ):
            # The member that keeps what the request continues will not answer: it is dead, or
            # there is no connection to it, which is known long before.
            self.left, self._heirs, self._again = self._heirs, (), []
        elif member is None:
            self.left = ()
        if self.left and member is not None:
            member.provider.meter.failovers[fault.code].value += 1
        return bool(self.left)

    def _leave(self, member: Member, fault: ProviderFault) -> None:
        """Ask *member*, which has failed with *fault*, no more in this round."""
        self._asked.add(member)
        if fault.retry and not fault.once:
            self._again.append((member, fault.code))
        self.left = [other for other in self.left if other is not member]
        if isinstance(fault, ContextTooLong):
            # The estimate was wrong: none that takes no more is asked.
            self.too_small = max(self.too_small, member.max_context or 0)
            self._short.append(member)
            self.left = [other for other in self.left if other.takes_more_than(member)]
            self._again = [retry for retry in self._again if retry[0].takes_more_than(member)]

    def unknown(self) -> bool:
        """Note that the member where the request has started has no use for it, since it is not
        known what it continues; return whether it is asked of others.
        """
        if self.chosen is not None:
            self._asked.add(self.chosen)
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
        """Begin the next round, of those that may be asked again, and are members still; return
        them with the codes of their faults.
        """
        again = [each for each in self._again if each[0] in self._group.members]
        self._again = []
        self.left = [member for member, _ in again]
        self._asked.difference_update(self.left)
        return [(member.provider, code) for member, code in again]

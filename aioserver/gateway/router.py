"""The router: it chooses the provider that a request goes to, and says how often it is asked, and
who instead.

This file is one concept: the table of providers by which a first one is chosen is that of those
which may follow it.

    the request has                  the router asks
    a `provider` (chats only)        that provider, pinned; the request's model, or its own
    no model                         the active provider, with its own model
    a provider's name as model       that provider, pinned, with its own model
    "groq/llama-…", groq configured  groq, pinned; the rest is the model
    another model                    the active provider, with the model unchanged

A request of an API that some providers alone speak (providers/api.py) goes only to those: the
active one stands then for the first of the active provider and the fallbacks that does.

A fault that came before the first event of an answer may be tried again at the same provider
(`retry`: `max_retries` times, with `backoff_factor`, within the budget), or at another
(`failover`: `llm.fallbacks` in their order, each with its own model; never for a pinned provider).
Place and connection are free meanwhile. provider_errors.py says which fault allows what.

Where there is another provider, one that is sick comes last, and one that is dead is passed over
(providers/breaker.py).
"""

from __future__ import annotations

import asyncio
import random
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Self

from aioserver.config.hints import nearest
from aioserver.config.models import PASS, PREFIX
from aioserver.config.schema import show
from aioserver.errors import AioserverError, ModelNotFound
from aioserver.gateway.groups import Group
from aioserver.gateway.homes import Homes, measured
from aioserver.gateway.members import LABELS, Member, passed_over
from aioserver.gateway.request import Route
from aioserver.protocol.prefix import prefix_of
from aioserver.provider_errors import (
    CircuitOpen,
    NoProvider,
    ProviderFault,
    ProviderRateLimited,
    RequestNotBridged,
)
from aioserver.providers.api import CHAT, Api
from aioserver.providers.health import KEY_FAULTS
from aioserver.providers.outage import WAIT
from aioserver.providers.passthrough import PassedAttempt, PassedRequest
from aioserver.telemetry.counters import Counter
from aioserver.tracebacks import forget_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioserver.config import settings
    from aioserver.config.settings import Llm
    from aioserver.gateway.homes import Placement
    from aioserver.gateway.request import Request
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


class Router:
    """Chooses providers for a request, and has them answer it: one of *providers* is *active*,
    others are its *fallbacks*.

    Always: once an event of an answer is in a log, no further attempt is made for it.

    *random_number* returns numbers from 0.0 to 1.0, for the jitter of backoffs. *starts* counts the
    requests that start at members of groups, by group, provider and home. *alone* False: other
    instances ask the same providers.
    """

    def __init__(
        self,
        providers: Mapping[str, Provider],
        llm: Llm,
        random_number: Callable[[], float] = random.random,
        starts: dict[tuple[str, ...], Counter] | None = None,
        *,
        alone: bool = True,
    ) -> None:
        self._random_number = random_number
        self._homes = Homes(alone=alone)
        self._starts = {} if starts is None else starts
        self._groups: dict[str, Group] = {}
        self.apply(providers, llm)

    def apply(self, providers: Mapping[str, Provider], llm: Llm) -> None:
        """Choose among *providers* by the settings *llm* from now on; requests under way stay
        where they are.
        """
        self._providers, self._llm = providers, llm
        self._groups = {
            name: self._group(name, configured) for name, configured in llm.models.items()
        }
        # Names that end with `*`, the longest first.
        self._stems = sorted(
            (name[:-1] for name in self._groups if name.endswith("*")), key=len, reverse=True
        )
        self._active = self._target(llm.active)
        self._fallbacks = [self._target(name) for name in llm.fallbacks]
        self._listed = self._implied()
        # Whether a name may lead elsewhere than to the provider that it names, or the active one.
        self._names_lead = bool(self._groups or self._listed or llm.unknown_models != PASS)
        # The client headers that any provider is passed, in lower case.
        self.passed_headers = frozenset(
            name for provider in providers.values() for name in provider.settings.pass_headers
        )

    def _group(self, name: str, configured: settings.Group) -> Group:
        """Return the group *name*, which goes on counting if it is there already."""
        members = [
            Member(
                self._providers[member.provider],
                member.model,
                member.weight or 1,
                member.max_context,
                {
                    label: self._starts.setdefault((name, member.provider, label), Counter())
                    for label in (LABELS if configured.affinity == PREFIX else LABELS[:1])
                },
            )
            for member in configured.members
        ]
        group = self._groups.get(name)
        if group is None:
            return Group(name, members, configured.choose, configured.affinity)
        group.apply(members, configured.choose, configured.affinity)
        return group

    def _target(self, name: str) -> Group:
        """Return the group *name*, or one of the provider *name* alone."""
        return self._groups.get(name) or Group("", [Member(self._providers[name])])

    def _implied(self) -> dict[str, Group]:
        """Return, by the name of a model that providers list, the group of these in their order.

        A provider's own `model` is not enough: whoever names it has not asked for that provider.
        """
        listing: dict[str, list[Member]] = {}
        for provider in self._providers.values():
            for model in dict.fromkeys(provider.settings.models):
                listing.setdefault(model, []).append(Member(provider, model))
        return {model: Group("", members) for model, members in listing.items()}

    @property
    def providers(self) -> Mapping[str, Provider]:
        """All providers that are configured, by name."""
        return self._providers

    @property
    def groups(self) -> Mapping[str, Group]:
        """The groups that are configured, by name."""
        return self._groups

    @property
    def listed(self) -> Mapping[str, Group]:
        """The names of models that providers list, with those that do."""
        return self._listed

    @property
    def active(self) -> Provider:
        """The provider that is asked first if a request names none."""
        members = self._active.members
        usable = (member for member in members if member.settings.usable)
        return next(usable, members[0]).provider

    @property
    def fallbacks(self) -> list[str]:
        """The names of those that are asked where the active provider or group fails."""
        return [
            group.name or group.members[0].provider.name
            for group in self._others(self._active, CHAT)
        ]

    @property
    def usable(self) -> bool:
        """Whether the active provider, or a member of the active group, can be asked."""
        return self.active.settings.usable

    def route(self, model: str | None, provider: str | None = None, *, api: Api = CHAT) -> Route:
        """Return where a request of *api* with this *model* and *provider* goes.

        Raises:
            ModelNotFound: the request names a provider that is not configured, or not usable; or a
                model that nobody has, where these are refused; or who is named does not speak
                *api*, or none that may be asked does.
            NoProvider: the request names none, and the active provider is not usable.
        """
        if provider is not None:
            if (group := self._groups.get(provider)) is not None:
                return self._to(group, api)
            return Route(self._named(provider), model)
        route = None if model is None else self._by_name(model, api)
        if route is None:
            active = self._active.members[0].provider
            if not self._active.name and active.settings.usable and api.speaks(active.settings):
                return Route(
                    active, model, self._active if self._fallbacks else None, fallbacks=True
                )
            group = self._first(api)
            route = self._to(group, api)
            route.fallbacks = True
            if not group.name:
                # The name of the model goes on unchanged, whether the provider knows it or not.
                route.model = model
        if not api.speaks(route.provider.settings):
            raise ModelNotFound(
                f"the provider {route.provider.name} does not speak {api.name}: "
                f"{self._speaking(api)}"
            )
        return route

    def _by_name(self, model: str, api: Api) -> Route | None:
        """Return where a request of *api* for *model* goes, if that name leads anywhere; otherwise
        None.

        Raises:
            ModelNotFound: it leads to none that is usable; or nowhere, and unknown models are
                refused.
        """
        if model in self._providers:
            return Route(self._named(model), None)
        prefix, slash, rest = model.partition("/")
        if slash and rest and prefix in self._providers:
            return Route(self._named(prefix), rest)
        if not self._names_lead:
            return None
        if (group := self._group_of(model)) is not None:
            return self._to(group, api)
        active = self._llm.providers.get(self._llm.active)
        if active is not None and (model == active.model or model in active.models):
            return None
        listed = self._listed.get(model)
        if listed is not None and listed.usable(api):
            return self._to(listed, api)
        if self._llm.unknown_models != PASS:
            raise ModelNotFound(f"no model is named {show(model)}{nearest(model, self._names())}")
        return None

    def _group_of(self, model: str) -> Group | None:
        """Return the group of that name, or of the longest that *model* begins with."""
        if (group := self._groups.get(model)) is not None and not model.endswith("*"):
            return group
        stem = next((stem for stem in self._stems if model.startswith(stem)), None)
        return None if stem is None else self._groups[f"{stem}*"]

    def _names(self) -> list[str]:
        """Return the names that lead somewhere."""
        active = self._llm.providers.get(self._llm.active)
        own = [] if active is None else [active.model, *active.models]
        groups = (name for name in self._groups if not name.endswith("*"))
        return [*groups, *self._providers, *own, *self._listed]

    def _to(self, group: Group, api: Api) -> Route:
        """Return the route to *group*.

        Raises:
            ModelNotFound: none of its members can be asked.
        """
        members = group.usable(api)
        if not members:
            if any(member.settings.usable for member in group.members):
                raise ModelNotFound(
                    f"no provider of {group.name} speaks {api.name}: {self._speaking(api)}"
                )
            raise ModelNotFound(f"no provider of {group.name} is usable")
        first = members[0]
        return Route(first.provider, first.model, group)

    def _first(self, api: Api) -> Group:
        """Return the first, of the active provider or group and the fallbacks, that speaks *api*.

        Raises:
            ModelNotFound: none does.
            NoProvider: the active one does, and is not usable.
        """
        active = self._active
        if active.usable(api):
            return active
        if any(api.speaks(member.settings) for member in active.members):
            raise NoProvider(f"the active provider {self._llm.active} is not usable")
        others = self._others(active, api)
        if not others:
            raise ModelNotFound(
                f"the active provider {self._llm.active} does not speak {api.name}, nor does a "
                f"fallback: {self._speaking(api)}"
            )
        return others[0]

    def _speaking(self, api: Api) -> str:
        """Return what to do where a provider does not speak *api*."""
        names = [
            name
            for name, provider in self._providers.items()
            if api.speaks(provider.settings) and provider.settings.usable
        ]
        if not names:
            return f"no provider does, by its setting `{api.setting}`"
        return f"the model may name one that does: {', '.join(names)}"

    def _others(self, first: Group, api: Api) -> list[Group]:
        """Return the fallbacks that may be asked instead of *first*, in their order: those that
        speak *api*.
        """
        return [
            group
            for group in self._fallbacks
            if group is not first and not _same(group, first) and group.usable(api)
        ]

    def _named(self, name: str) -> Provider:
        """Return the provider *name*.

        Raises:
            ModelNotFound: it is not configured, or not usable.
        """
        provider = self._providers.get(name)
        if provider is None or not provider.settings.usable:
            usable = ", ".join(
                other_name
                for other_name, other in self._providers.items()
                if other.settings.usable
            )
            raise ModelNotFound(f"no usable provider is named {name[:64]!r}; there are: {usable}")
        return provider

    async def fill(self, request: Request, stream: Stream) -> None:
        """Fill *stream* from the first provider that starts to answer.

        Once an event is in the log there is no second attempt: the client would read two answers.

        Raises:
            ProviderFault: no provider answered.
        """
        if (keeper := request.keeper) is None:
            await self._ask(request, stream)
            return
        await keeper.begin()
        stream.keeper = keeper
        try:
            await self._ask(request, stream)
            await stream.finished()
        except asyncio.CancelledError:
            stream.close_fast_path()
            if not (stream.ended or stream.ending):
                kept = keeper.cut(stream)
                if kept is not None:
                    await kept
            raise
        finally:
            stream.keeper = None

    async def call(self, request: Request, stream: Stream | None = None) -> Answer:
        """Return an answer that is not streamed; *stream* is the log that will keep it, if any.

        Raises:
            ProviderFault: no provider answered.
        """
        keeper = request.keeper
        if keeper is not None:
            await keeper.begin()
        attempt = await self._ask(request, stream)
        answer = attempt.answer
        assert answer is not None, "a whole answer was asked for"
        if keeper is not None and (kept := keeper.keep(answer)) is not None:
            await kept
        return answer

    async def pass_on(self, request: Request) -> Answer:
        """Pass a `PassedRequest` on to its provider, once; return its answer, whose body has been
        handed over.

        Raises:
            ProviderFault: there is no good answer, or not all of it.
            AioserverError: the client does not send its body.
        """
        route, passed = request.route, request.provider_request
        assert isinstance(passed, PassedRequest)
        outcome, provider, place = passed.outcome, route.provider, None
        attempt = PassedAttempt(provider, passed, passed.model)
        try:
            if passed.upload is not None:
                await passed.upload.begin()
            if (group := route.group) is not None and len(group.members) > 1:
                attempts = {
                    member: PassedAttempt(member.provider, passed, member.asked_model)
                    for member in group.order(group.usable(passed.api, one_model=route.pinned))
                }
                member, place = await group.start(attempts)
                provider, attempt = member.provider, attempts[member]
            outcome.begin_attempt(provider.name, attempt.model or "")
            await provider.run(attempt, place)
        except ProviderFault as fault:
            outcome.attempts = int(bool(fault.attempt_outcome))
            fault.request_outcome = outcome
            raise
        except AioserverError as error:
            error.paid = outcome.sent_at > 0
            raise
        finally:
            if place is not None:
                # It is given back already, unless the attempt never began.
                place.release()
        assert attempt.answer is not None
        return attempt.answer

    async def _ask(self, request: Request, stream: Stream | None) -> Attempt:
        """Return the attempt that succeeded, at the first provider that gave an answer.

        Raises:
            ProviderFault: no provider answered.
        """
        route, provider_request = request.route, request.provider_request
        first = route.group
        if first is None:
            return await self._ask_provider(
                route.provider, request, stream, route.model, fallback=False
            )
        groups = [first]
        if self._fallbacks and route.fallbacks and not route.pinned:
            # A fallback uses its own model.
            groups = _sick_last([first, *self._others(first, provider_request.api)])
        outcome = provider_request.outcome
        tries: list[Try] = []
        while True:
            group = groups.pop(0)
            fallback = bool(groups) and any(group.available for group in groups)
            try:
                if len(group.members) > 1:
                    return await self._ask_group(group, request, stream, fallback=fallback)
                # A group of one is its member.
                (member,) = group.members
                if group.name:
                    group.started(member, ())
                model = route.model if group is first else member.model
                return await self._ask_provider(
                    member.provider, request, stream, model, fallback=fallback
                )
            except ProviderFault as fault:
                if _begun(stream) or not fault.failover:
                    raise
                # A fault that is kept here must not lead back to this frame, which leads to the
                # body.
                forget_frames(fault)
                tries.append(Try.of(fault, outcome))
                if not groups:
                    raise _final_try(tries).raised(outcome) from None
                group.members[0].provider.meter.failovers[fault.code].value += 1

    async def _ask_group(
        self, group: Group, request: Request, stream: Stream | None, *, fallback: bool
    ) -> Attempt:
        """Return the attempt that succeeded, at the first member of *group* that gave an answer.

        A fault at one member leads to the next at once. When all have failed, those that may be
        asked again are, after a backoff. *fallback* says that others can be asked instead.

        Raises:
            ProviderFault: no member answered.
        """
        provider_request = request.provider_request
        outcome, number = provider_request.outcome, 0
        members = self._members(group, request)
        limits = members[0].settings.http_client
        members[0].provider.budget.add_request()
        prefix = None
        if group.affinity == PREFIX and not request.route.pinned:
            body = provider_request.body(members[0].settings, members[0].asked_model)
            prefix = await prefix_of(body, group.name)
        waited: dict[Member, float] = {}
        previous: Try | None = None
        while True:
            tries: list[Try] = []
            # The members that may be asked again, with the codes of their faults.
            again: dict[Member, str] = {}
            left = members
            while left:
                attempts = {
                    member: request.make_attempt(
                        member.provider,
                        provider_request,
                        stream,
                        model=member.asked_model,
                        waited=waited.get(member, 0.0),
                        retry=number > 0 or bool(tries),
                        fallback=fallback or len(left) > 1,
                    )
                    for member in group.order(left)
                }
                member: Member | None = None
                place: Place | None = None
                placement = None if prefix is None else self._homes.place(prefix, left)
                try:
                    member, place = await group.start(attempts, placement, fallback=fallback)
                    attempt = attempts[member]
                    if prefix is not None:
                        self._homes.sent(prefix, member)
                    outcome.begin_attempt(member.provider.name, member.asked_model)
                    await member.provider.run(attempt, place)
                except ProviderFault as fault:
                    if member is not None and not fault.attempt_outcome:
                        # Nothing was sent.
                        outcome.attempts -= 1
                    if _begun(stream) or not fault.failover:
                        fault.request_outcome = outcome
                        raise
                    forget_frames(fault)  # as in `_ask`
                    fault.request_outcome = outcome
                    tries.append(Try.of(fault, outcome))
                    if member is None:
                        away = None if fallback else _away(left, fault)
                        if away is not None:
                            return await self._ask_provider(
                                away.provider, request, stream, away.asked_model, fallback=False
                            )
                        left = []
                        continue
                    if fault.retry:
                        again[member] = fault.code
                    left = [other for other in left if other is not member]
                    if left:
                        member.provider.meter.failovers[fault.code].value += 1
                except AioserverError as error:
                    # Raised by us, perhaps since there is no room for the answer that comes.
                    error.paid = outcome.sent_at > 0
                    raise
                else:
                    if placement is not None:
                        _measure(placement, member, attempt)
                    return attempt
                finally:
                    if place is not None:
                        # It is given back already, unless the attempt never began.
                        place.release()
                    for other, one in attempts.items():
                        waited[other] = one.waited
            number += 1
            final = _final_try(tries)
            if previous is not None and isinstance(final.fault, CircuitOpen):
                # What killed the last of them says more than that it is dead.
                raise previous.raised(outcome) from None
            previous = final
            backoff = self._backoff(
                number,
                limits.backoff_factor,
                final.fault.retry_after if final.fault.retry else None,
            )
            first = members[0].provider
            if (
                not again
                or number > limits.max_retries
                or backoff > MAX_ASKED_BACKOFF
                or (fallback and isinstance(final.fault, ProviderRateLimited))
            ):
                raise final.raised(outcome) from None
            if not first.budget.take_retry():
                first.meter.retries_refused.value += 1
                raise final.raised(outcome) from None
            for failed, code in again.items():
                failed.provider.meter.retries[code].value += 1
            members = list(again)
            await asyncio.sleep(backoff)

    def _members(self, group: Group, request: Request) -> list[Member]:
        """Return the members of *group* that can be asked for *request*.

        Raises:
            NoProvider: there are none any more.
        """
        provider_request = request.provider_request
        members = group.usable(provider_request.api, one_model=request.route.pinned)
        if not members:
            raise NoProvider(f"no provider of {group.name} is usable")
        if any(member.max_context for member in members):
            body = provider_request.body(members[0].settings, members[0].model)
            members = group.fitting(members, len(body))
        return members

    async def _ask_provider(
        self,
        provider: Provider,
        request: Request,
        stream: Stream | None,
        model: str | None,
        *,
        fallback: bool,
    ) -> Attempt:
        """Return the attempt at *provider* that succeeded, the first or a retry.

        *fallback* says that another provider can be asked instead.

        Raises:
            ProviderFault: of the last attempt that was made, or of the first if none was.
        """
        outcome = request.provider_request.outcome
        limits = provider.settings.http_client
        provider.budget.add_request()
        number, waited, rejoin = 0, 0.0, False
        previous: list[Try] = []
        while True:
            attempt = request.make_attempt(
                provider,
                request.provider_request,
                stream,
                model=model,
                waited=waited,
                retry=number > 0,
                rejoin=rejoin,
                fallback=fallback,
            )
            outcome.begin_attempt(provider.name, model or provider.settings.model)
            try:
                await provider.run(attempt)
            except ProviderFault as fault:
                if not fault.attempt_outcome:
                    # Nothing was sent.
                    outcome.attempts -= 1
                if not _begun(stream):
                    parked = min(MAX_PARKED, self._backoff(1, limits.backoff_factor, None))
                    if await provider.absence.wait(attempt, fault, parked):
                        waited, rejoin = attempt.waited, True
                        continue
                waited, rejoin = attempt.waited, False  # a rest keeps no room in the queue
                if previous and isinstance(fault, CircuitOpen):
                    # What killed the provider says more than that it is dead.
                    raise previous.pop().raised(outcome) from None
                fault.request_outcome = outcome
                forget_frames(fault)  # as in `_ask`
                previous[:] = (Try.of(fault, outcome),)
                number += 1
                backoff = self._backoff(number, limits.backoff_factor, fault.retry_after)
                breaker, limited = provider.health.breaker, isinstance(fault, ProviderRateLimited)
                if not fallback and backoff < (trial := breaker.delay()) < inf:
                    # The retry of a lone client would come shortly before the next trial may
                    # start.
                    backoff = trial
                if (
                    _begun(stream)
                    or not fault.retry
                    or number > limits.max_retries
                    or backoff > MAX_ASKED_BACKOFF
                    # The provider asks us to wait, or is dead, and the next one may not be.
                    or (fallback and (limited or breaker.dead))
                ):
                    raise
                if not provider.budget.take_retry():
                    provider.meter.retries_refused.value += 1
                    raise
                provider.meter.retries[fault.code].value += 1
            except AioserverError as error:
                # Raised by us, perhaps since there is no room for the answer that comes.
                error.paid = outcome.sent_at > 0
                raise
            else:
                return attempt
            await asyncio.sleep(backoff)

    def _backoff(self, number: int, factor: float, retry_after: float | None) -> float:
        """Return the seconds of the backoff before retry *number*, at least *retry_after*.

        Backoffs double, and half of each is random ("equal jitter": Marc Brooker, "Exponential
        Backoff And Jitter", 2015).
        """
        seconds = min(MAX_BACKOFF, factor * 2.0 ** min(number - 1, 30))
        return max(seconds * (0.5 + self._random_number() / 2), retry_after or 0.0)


def _begun(stream: Stream | None) -> bool:
    """Return whether an answer has begun in the log, so that no other may follow."""
    return stream is not None and (stream.answered or stream.ended)


def _measure(placement: Placement, member: Member, attempt: Attempt) -> None:
    """Learn from the first event of *attempt* how fast its *member* reads a prompt."""
    record = attempt.request.record
    seconds = record.first_event_at - record.outcome.sent_at
    if record.first_event_at and seconds > 0:
        unknown = placement.prefix.size - placement.known[member]
        member.reading = measured(member.reading, seconds, unknown)


def _away(members: list[Member], fault: ProviderFault) -> Member | None:
    """Return the one of *members*, none of which is asked now, at which a request may wait until
    it is back.

    *fault* is what they have been refused with.
    """
    if not isinstance(fault, CircuitOpen):
        return None
    return next(
        (
            member
            for member in members
            if member.settings.when_down == WAIT and member.provider.health.breaker.unreachable
        ),
        None,
    )


def _same(group: Group, other: Group) -> bool:
    """Return whether both stand for one provider."""
    names = {member.provider.name for member in (*group.members, *other.members)}
    return not (group.name or other.name) and len(names) == 1


def _sick_last(groups: list[Group]) -> list[Group]:
    """Return *groups* in the order in which they are asked: their own, but sick providers last.

    Each twentieth request meets a sick provider in its place, so that it can get well.
    """
    sick = [group for group in groups if len(group.members) == 1 and passed_over(group.members[0])]
    return [group for group in groups if group not in sick] + sick


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


def _final_try(tries: list[Try]) -> Try:
    """Return the attempt whose fault is raised when all providers have failed: the last of
    *tries*, as a rule.

    A provider that refuses our key is not usable, nor is one that has no form of the request:
    their faults are returned only if there is no other. A fault of too many requests is returned
    only if every usable provider has raised one. The `retry_after` is that of the provider that
    may answer first. *tries* is empty afterwards.
    """
    of_usable = [failed for failed in tries if not isinstance(failed.fault, UNUSABLE)] or tries
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

"""The router: it chooses the provider that a request goes to, and the ones that are asked instead.

This file is one concept: one table of providers has the first one, and those that may follow it.

    the request has                  the router asks
    a `provider` (chats only)        that provider, pinned; the request's model, or its own
    no model                         the active provider, with its own model
    a provider's name as model       that provider, pinned, with its own model
    "groq/llama-…", groq configured  groq, pinned; the rest is the model
    another model                    the active provider, with the model unchanged

A request of an API that only some providers speak (providers/request.py) goes only to those; then
*active* means the first provider, among the active one and the fallbacks, that speaks the API.

A fault before the first content of an answer may be followed by a retry at the same provider
(attempts.py), or by a failover to another. Failovers go to `llm.fallbacks` in their order, each
with its own model; a pinned provider has none. provider_errors.py says which fault allows what.

An answer that breaks off later may be continued, by the same provider or another
(continuation.py).

If there is another provider, a sick one comes last except for trials, and a dead one is passed
over (providers/breaker.py). After a failed trial the others are tried at once, and then the sick
one again.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from aioserver.config.hints import nearest
from aioserver.config.llm import NO_CONTINUATION
from aioserver.config.models import PASS
from aioserver.config.schema import quoted
from aioserver.errors import AioserverError, ModelNotFound
from aioserver.gateway.affinity import Affinity
from aioserver.gateway.attempts import Attempts
from aioserver.gateway.candidates import Candidates
from aioserver.gateway.continuation import request_rest, structured
from aioserver.gateway.groups import Group, Member, Modalities
from aioserver.gateway.request import Route
from aioserver.protocol.model_body import check_sole
from aioserver.protocol.request_headers import CALLS
from aioserver.provider_errors import NoProvider, ProviderFault
from aioserver.providers.passthrough import PassedRequest
from aioserver.providers.request import CHAT, Api
from aioserver.providers.sinks import end_with_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aioserver.auth.callers import Caller
    from aioserver.config.settings import Llm
    from aioserver.gateway.contracts.caches import Caches
    from aioserver.gateway.contracts.hooks import Hooks
    from aioserver.gateway.request import Request
    from aioserver.providers.provider import Provider
    from aioserver.providers.request import Answer
    from aioserver.streams.stream import Stream


# The most names in the message of a refusal.
MAX_NAMED = 8


class Router:
    """Chooses providers for a request, and gets its answer: one of *providers* is *active*, others
    are its *fallbacks*.

    Always: once an event of an answer is in a log, no further attempt is made for it.

    *random_number* returns numbers from 0.0 to 1.0, for the jitter of backoffs. *alone* False:
    other instances use the same providers. *hooks* see each request, and *caches* find what the
    caches of providers have lost; None if there are none.
    """

    def __init__(
        self,
        providers: Mapping[str, Provider],
        llm: Llm,
        random_number: Callable[[], float] = random.random,
        *,
        alone: bool = True,
        hooks: Hooks | None = None,
        caches: Caches | None = None,
    ) -> None:
        self._random_number = random_number
        self._hooks = hooks
        self._all_caches = caches
        self._affinity = Affinity(alone=alone)
        # The configured groups, by name.
        self.groups: dict[str, Group] = {}
        self.apply(providers, llm)

    def apply(self, providers: Mapping[str, Provider], llm: Llm) -> None:
        """Choose among *providers* by the settings *llm* from now on; requests under way stay
        where they are.
        """
        # All configured providers, by name.
        self.providers, self._llm = providers, llm
        self._caches = self._all_caches if llm.cache_losses else None
        # For each provider, the group that has it as its only member.
        self._own = {name: Group("", [Member(provider)]) for name, provider in providers.items()}
        groups: dict[str, Group] = {}
        self.groups = {name: self._group(llm.aliased(name), groups) for name in llm.models}
        for name, group in groups.items():
            group.fallbacks = [self._target(link) for link in llm.chain(name)[1:]]
        # Names that end with `*`, the longest first.
        self._stems = sorted(
            (name[:-1] for name in self.groups if name.endswith("*")), key=len, reverse=True
        )
        self._active = self._target(llm.active)
        self._fallbacks = [self._target(name) for name in llm.fallbacks]
        # The active provider, if it is not a group and is available.
        active = self.active
        self._alone = active if not self._active.name and active.settings.usable else None
        # The model names that providers list, with those providers.
        self.listed = self._implied()
        self._continuing = any(
            provider.settings.continuation != NO_CONTINUATION for provider in providers.values()
        )
        # The client headers that at least one provider receives, in lower case.
        self.passed_headers = frozenset(
            name for provider in providers.values() for name in provider.settings.pass_headers
        )

    def _group(self, name: str, made: dict[str, Group]) -> Group:
        """Return the group *name*, which keeps its counts if it exists already; *made* has those
        that the present settings have made.
        """
        if name in made:
            return made[name]
        llm, parts = self._llm, list[Member | Group]()
        configured = llm.models[name]
        for entry in configured.members:
            inner = llm.group_in(entry)
            if inner is not None:
                parts.append(self._group(llm.aliased(inner), made))
                continue
            provider, weight = self.providers[entry.provider], entry.weight or 1
            modalities = Modalities(entry.input_modalities, entry.output_modalities)
            parts.append(Member(provider, entry.model, weight, entry.max_context, modalities))
        group = self.groups.get(name)
        if group is None or group.name != name:
            group = Group(name, parts, configured.choose, configured.affinity)
        else:
            group.apply(parts, configured.choose, configured.affinity)
        made[name] = group
        return group

    def _target(self, name: str) -> Group:
        """Return the group *name*, or the group of the provider *name* alone."""
        return self.groups.get(name) or self._own[name]

    def _implied(self) -> dict[str, Group]:
        """Return, by each model name that providers list, the group of these providers in order.

        A provider's own `model` does not count: a client that names it has not asked for that
        provider.
        """
        listing: dict[str, list[Member]] = {}
        for provider in self.providers.values():
            for model in dict.fromkeys(provider.settings.models):
                listing.setdefault(model, []).append(Member(provider, model))
        return {model: Group("", members) for model, members in listing.items()}

    @property
    def active(self) -> Provider:
        """The provider that is asked first if a request names none."""
        groups = (self._active, *self._active.fallbacks)
        usable = (member for group in groups for member in group.members if member.settings.usable)
        return next(usable, self._active.members[0]).provider

    @property
    def active_group(self) -> str | None:
        """The group that is asked first if a request names no model; None if it is a provider."""
        return self._active.name or None

    @property
    def fallbacks(self) -> list[str]:
        """The names of the fallbacks of the active provider or group."""
        return [
            group.name or group.members[0].provider.name
            for group in self._others(self._active, CHAT, self._active.fallbacks)
        ]

    @property
    def usable(self) -> bool:
        """Whether the active provider, or a member of the active group, is available."""
        return self.active.settings.usable

    def route(
        self,
        model: str | None,
        provider: str | None = None,
        *,
        caller: Caller,
        api: Api = CHAT,
        body: bytes = b"{}",
        unread: bool = False,
    ) -> Route:
        """Return the route of a request of *api* with this *model* and *provider*.

        *body* is the JSON of which the provider gets something as the client has written it.
        *unread* says that the model was not read, since it is in a body that passes, or since the
        provider chooses it: it may be any.

        Raises:
            InvalidRequest: *caller* may not use all models, and *body* could be read as naming
                another model: see `check_sole`.
            ModelNotFound: *caller* may not use it; the request names a provider that is not
                configured or not usable, or an unknown model while these are refused; or the
                named provider, or every possible one, does not speak *api*.
            NoProvider: the request names none, and the active provider is not usable.
        """
        if caller.models is not None:
            self._check_allowed(caller, model, provider, unread=unread)
            check_sole(body)
        if provider is not None:
            if (group := self.groups.get(provider)) is not None:
                return self._to(group, api)
            return self._pinned(provider, model)
        route = None if model is None else self._by_name(model, api)
        if route is None:
            active = self._alone
            if active is not None and api.speaks(active.settings):
                return Route(active, model, self._active, fallbacks=True)
            group = self._first(api)
            route = self._to(group, api)
            route.fallbacks = True
            if not group.name:
                # The model's name is passed unchanged, whether the provider knows it or not.
                route.model = model
        if not api.speaks(route.provider.settings):
            raise ModelNotFound(
                f"the provider {route.provider.name} does not speak {api.name}: "
                f"{self._speaking(api)}"
            )
        return route

    def _check_allowed(
        self, caller: Caller, model: str | None, provider: str | None, *, unread: bool
    ) -> None:
        """Refuse the request if *caller* may not use its model or provider.

        Raises:
            ModelNotFound: *caller* may not.
        """
        target = self._llm.active if provider is None and (model is None or unread) else provider
        group = None if target is None else self.groups.get(target)
        if target is None:
            names = [model or ""]
        elif unread:
            groups = () if group is None else (group, *group.fallbacks)
            asked = [member.provider.name for each in groups for member in each.members]
            names = [f"{name}/" for name in dict.fromkeys(asked or [target])]
        elif group is not None:
            names = [target]
        else:
            known = self.providers.get(target)
            own = None if known is None else known.settings.model
            names = [f"{target}/{model or own}"]
            if model in {None, own}:
                # The name of a provider stands for its own model.
                names.insert(0, target)
        if all(map(caller.may_ask_all, names)) if unread else any(map(caller.may_ask, names)):
            return
        refused = f"every model of {names[0]}" if unread else quoted(names[0])
        allowed = ", ".join((caller.models or ())[:MAX_NAMED])
        raise ModelNotFound(f"this key may not use {refused}: it may use {allowed}")

    def _by_name(self, model: str, api: Api) -> Route | None:
        """Return the route of a request of *api* for *model*, if that name is configured;
        otherwise None.

        Raises:
            ModelNotFound: it leads to no usable provider; or it is unknown, and unknown models
                are refused.
        """
        if model in self.providers:
            return self._pinned(model, None)
        if "/" in model:
            prefix, _, rest = model.partition("/")
            if rest and prefix in self.providers:
                return self._pinned(prefix, rest)
        if self.groups and (group := self._group_of(model)) is not None:
            return self._to(group, api)
        active = self._llm.providers.get(self._llm.active)
        if active is not None and (model == active.model or model in active.models):
            return None
        listed = self.listed.get(model)
        if listed is not None and listed.usable(api):
            return self._to(listed, api)
        if self._llm.unknown_models != PASS:
            raise ModelNotFound(
                f"no model is named {quoted(model)}{nearest(model, self._names())}"
            )
        return None

    def _group_of(self, model: str) -> Group | None:
        """Return the group of that name, or the group with the longest prefix of *model*."""
        if (group := self.groups.get(model)) is not None and not model.endswith("*"):
            return group
        stem = next((stem for stem in self._stems if model.startswith(stem)), None)
        return None if stem is None else self.groups[f"{stem}*"]

    def _names(self) -> list[str]:
        """Return the names that lead to a provider."""
        active = self._llm.providers.get(self._llm.active)
        own = [] if active is None else [active.model, *active.models]
        groups = (name for name in self.groups if not name.endswith("*"))
        return [*groups, *self.providers, *own, *self.listed]

    def _to(self, group: Group, api: Api) -> Route:
        """Return the route to *group*.

        Raises:
            ModelNotFound: neither its members nor its fallbacks are available.
        """
        for index, each in enumerate((group, *group.fallbacks)):
            if members := each.usable(api):
                first, then = members[0], group.fallbacks[index:]
                return Route(first.provider, first.model, each, then=then)
        if any(member.settings.usable for member in group.members):
            raise ModelNotFound(
                f"no provider of {group.name} speaks {api.name}: {self._speaking(api)}"
            )
        raise ModelNotFound(f"no provider of {group.name} is usable")

    def _first(self, api: Api) -> Group:
        """Return the first, of the active provider or group and the fallbacks, that speaks *api*.

        Raises:
            ModelNotFound: none does.
            NoProvider: the active one speaks it, and is not usable.
        """
        active = self._active
        if active.usable(api) or any(group.usable(api) for group in active.fallbacks):
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
        """Return the advice for a provider that does not speak *api*."""
        names = [
            name
            for name, provider in self.providers.items()
            if api.speaks(provider.settings) and provider.settings.usable
        ]
        if not names:
            return f"no provider does, by its setting `{api.setting}`"
        return f"the model may name one that does: {', '.join(names)}"

    def _others(self, first: Group, api: Api, then: Sequence[Group] = ()) -> list[Group]:
        """Return *then* and the fallbacks that may be asked after *first*, in order: those that
        speak *api*.
        """
        others: list[Group] = []
        links = [link for group in self._fallbacks for link in (group, *group.fallbacks)]
        for group in (*then, *links):
            known = (first, *others)
            if not any(group is other or _same(group, other) for other in known) and (
                group.usable(api)
            ):
                others.append(group)
        return others

    def _after(self, route: Route, api: Api) -> list[Group]:
        """Return the groups that may be asked once that of *route* has no member left."""
        if route.pinned:
            return []
        if route.fallbacks:
            return self._others(route.group, api, route.then)
        return [group for group in route.then if group.usable(api)]

    def _pinned(self, name: str, model: str | None) -> Route:
        """Return the route to the provider *name* alone, with *model*.

        Raises:
            ModelNotFound: the provider is not configured, or not usable.
        """
        provider = self.providers.get(name)
        if provider is None or not provider.settings.usable:
            usable = ", ".join(
                other_name for other_name, other in self.providers.items() if other.settings.usable
            )
            raise ModelNotFound(f"no usable provider is named {quoted(name)}; there are: {usable}")
        return Route(provider, model, self._own[name])

    async def fill(self, request: Request, stream: Stream) -> None:
        """Fill *stream* from the first provider that starts to answer.

        Once there is content in the log no second answer follows; but an answer that breaks off
        may be continued.

        Raises:
            ProviderFault: no provider answered.
            AioserverError: as `Hooks.ask`.
        """
        hooks, keeper = self._hooks, request.keeper
        if keeper is not None:
            await keeper.begin()
        if hooks is not None and hooks.present:
            await hooks.ask(request, stream)
        if keeper is None:
            await self._answer(request, stream)
            return
        stream.keeper = keeper
        try:
            await self._answer(request, stream)
            await stream.finished()
        except asyncio.CancelledError:
            stream.close_fast_path()
            # Only its client may keep half of an answer: an answer that a hook has refused or a
            # deadline has cut is an error, and no turn.
            own = stream.cancelled_by_client and stream.cancel_reason is None
            if own and not (stream.ended or stream.ending):
                kept = keeper.cut(stream)
                if kept is not None:
                    await kept
            raise
        finally:
            stream.keeper = None

    async def _answer(self, request: Request, stream: Stream) -> None:
        """Fill *stream* from the first provider that starts to answer; if the answer breaks off,
        from those that continue it.

        Raises:
            ProviderFault: no provider answered, or none has continued the answer.
        """
        provider_request = request.provider_request
        if self._continuing and provider_request.streamed:
            provider_request.continues = provider_request.keeps_body = any(
                provider.settings.continuation != NO_CONTINUATION
                for provider, _model in self._order(request)
            )
        if provider_request.hold == CALLS and provider_request.streamed:
            # Behind reasoning the request is sent again as it was.
            provider_request.keeps_body = True
            route = request.route
            body = provider_request.body(route.provider.settings, route.model)
            provider_request.structured = await structured(body)
        try:
            await self._ask(request, stream)
        except ProviderFault as fault:
            if stream.transcript is None or not stream.answered:
                raise
            try:
                await request_rest(request, stream, fault, self._order(request))
            except ProviderFault as broken:
                if not broken.event or stream.ended:
                    raise
                end_with_error(stream, broken.event, broken)

    def _order(self, request: Request) -> list[tuple[Provider, str | None]]:
        """Return the providers that may answer *request*, in order, each with its model."""
        route, api = request.route, request.provider_request.api
        first = route.group
        groups = [first, *self._after(route, api)]
        alone = len(first.members) == 1
        return [
            (member.provider, route.model if alone and group is first else member.model)
            for group in groups
            for member in group.usable(api, one_model=route.pinned and not alone)
        ]

    async def call(self, request: Request, stream: Stream | None = None) -> Answer:
        """Return an answer that is not streamed; *stream* is the log that will keep it, if any.

        Raises:
            ProviderFault: no provider answered.
            AioserverError: as `Hooks.ask` and `Hooks.answered`.
        """
        keeper, hooks = request.keeper, self._hooks
        if hooks is not None and not hooks.present:
            hooks = None
        if keeper is not None:
            await keeper.begin()
        if hooks is not None:
            await hooks.ask(request)
        answer = await self._ask(request, stream)
        assert answer is not None, "a whole answer was asked for"
        if hooks is not None:
            # The hooks may take their time.
            request.provider_request.let_body_go()
            await hooks.answered(request, answer)
        if keeper is not None and (kept := keeper.keep(answer)) is not None:
            request.provider_request.let_body_go()
            await kept
        return answer

    async def pass_on(self, request: Request) -> Answer:
        """Pass a `PassedRequest` on to its provider, once; return its answer, whose body was
        handed over.

        Raises:
            ProviderFault: there is no good answer, or not all of it.
            AioserverError: the client does not send its body.
        """
        route, passed = request.route, request.provider_request
        assert isinstance(passed, PassedRequest)
        if self._hooks is not None and self._hooks.present:
            await self._hooks.ask(request)
        outcome = passed.outcome
        candidates = Candidates(route.group, request, None, self._affinity, passed.model)
        try:
            if passed.upload is not None:
                await passed.upload.begin()
            attempt, grant = await candidates.start(once=True)
            await candidates.run(attempt, grant)
        except ProviderFault as fault:
            outcome.attempts = int(bool(fault.attempt_outcome))
            fault.request_outcome = outcome
            raise
        except AioserverError as error:
            error.paid = outcome.sent_at > 0
            raise
        assert attempt.answer is not None
        return attempt.answer

    async def _ask(self, request: Request, stream: Stream | None) -> Answer | None:
        """Return the answer of the first provider that gave one, None if it is in the log.

        Raises:
            ProviderFault: no provider answered.
        """
        route, regions = request.route, None
        if self._caches is not None:
            conversation = None if stream is None else stream.conversation_id
            regions = await self._caches.read(request, conversation, self.providers)
        groups = [route.group]
        if route.then or (self._fallbacks and route.fallbacks):
            # A fallback uses its own model.
            groups += self._after(route, request.provider_request.api)
        attempts = Attempts(request, stream, groups, self._affinity, self._random_number, regions)
        return await attempts.answer()


def _same(group: Group, other: Group) -> bool:
    """Return whether both stand for one provider."""
    names = {member.provider.name for member in (*group.members, *other.members)}
    return not (group.name or other.name) and len(names) == 1

"""The settings of `llm`: everything on the providers' side.

Durations are seconds, sizes are bytes. Settings that have the name of an httpx option
(`max_connections`, `keepalive_expiry` and the timeouts) have its meaning.

This file is one concept: the settings of a provider, and the rules between them.
"""

from __future__ import annotations

from dataclasses import field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from aioserver.config import models, shipped
from aioserver.config.hints import nearest
from aioserver.config.models import LEAST_BUSY, WEIGHTED, Group, Member
from aioserver.config.schema import (
    FAULTY,
    BrokenRule,
    Secret,
    SettingsClass,
    check_rules,
    compare,
    group,
    section,
    setting,
    show,
)
from aioserver.config.validators import (
    api,
    boolean,
    boolean_or,
    count,
    count_or_0,
    header,
    label,
    latin,
    line,
    list_of,
    mapping_of,
    one_of,
    optional,
    passed_header,
    passed_path,
    proxy,
    ratio,
    seconds,
    secret,
    variable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# The least default of requests that may wait for a provider: fifty agents at four places.
MIN_QUEUE_SIZE = 64
# The values of `messages` beside true and false.
AUTO, BRIDGE = "auto", "bridge"
# The ways of asking a provider for the rest of an answer.
NO_CONTINUATION, PREFILL, PREFIXED, FINAL_MESSAGE, INSTRUCT = CONTINUATIONS = (
    "none",
    "prefill",
    "prefix",
    "final_message",
    "instruct",
)
# For each provider name: the variable with its key, if no setting says where the key is.
KEY_VARIABLES = {
    name: f"{name.upper()}_API_KEY" for name in ("openai", "groq", "openrouter", "anthropic")
}


class HttpClient(SettingsClass):
    """Connections, timeouts, rates and queue of one provider."""

    SHIPPED: ClassVar = shipped.values("llm.providers.openai.http_client")

    max_connections: int = setting(
        count, "connections open to the provider at once; beyond: requests wait for one"
    )
    max_keepalive: int = setting(
        count_or_0, "idle connections kept for later requests; <= max_connections"
    )
    keepalive_expiry: float = setting(seconds, "seconds that an idle connection is kept")
    connect_timeout: float = setting(seconds, "seconds for DNS, TCP and TLS together; beyond: 504")
    read_timeout: float = setting(seconds, "seconds without a byte of the answer; beyond: 504")
    first_token_timeout: float | None = setting(
        optional(seconds),
        "seconds from the request's last byte to the first content of a streamed answer; "
        "beyond: 504, and the next provider; null: no bound",
        None,
    )
    write_timeout: float = setting(
        seconds, "seconds without progress in sending the request; beyond: 504"
    )
    pool_timeout: float = setting(
        seconds, "seconds that a request may wait for a pooled connection; beyond: 503"
    )
    requests_per_minute: int = setting(
        count,
        "requests started per minute, evenly spread; beyond: they wait in the provider's queue",
    )
    concurrent_requests: int = setting(
        count,
        "requests in flight at once; <= max_connections; beyond: "
        "they wait in the provider's queue",
    )
    max_retries: int = setting(
        count_or_0, "retries of one request; none after the first content of its answer"
    )
    backoff_factor: float = setting(
        ratio, "seconds of backoff before the first retry; doubled for each later one"
    )
    queue_size: int = setting(
        count,
        "requests that may wait for this provider; beyond: 503",
        None,
        default_text="10 x concurrent_requests, at least 64",
    )
    queue_timeout: float = setting(
        seconds,
        "seconds that one request may wait for this provider, over all attempts; beyond: 503",
        None,
        default_text="read_timeout",
    )
    tokens_per_minute: int = setting(
        count_or_0,
        "tokens spent per minute; beyond: requests wait in the provider's queue; 0: no limit",
        0,
    )

    def __post_init__(self) -> None:
        if self.queue_size is None:
            # An agent needs a place in a queue; a refusal may end it.
            queue_size = max(MIN_QUEUE_SIZE, 10 * self.concurrent_requests)
            object.__setattr__(self, "queue_size", queue_size)
        if self.queue_timeout is None:
            object.__setattr__(self, "queue_timeout", self.read_timeout)
        check_rules(
            self,
            compare(self, "max_keepalive", "<=", "max_connections"),
            compare(self, "concurrent_requests", "<=", "max_connections"),
        )


class Provider(SettingsClass):
    """One LLM API, and what is sent to it."""

    # The key of the section. Configuration.load fills it in.
    name: str = field(default="")
    like: str | None = setting(
        optional(label),
        "name of a provider whose settings count here, but for those that this one sets itself",
        None,
    )
    base_url: str = setting(
        optional(api, ""), "URL of the OpenAI-compatible API, up to and including /v1", ""
    )
    simulated: bool = setting(
        boolean, "whether the simulator inside the process answers, instead of base_url", False
    )
    api_key: Secret | None = setting(
        optional(secret),
        "API key itself; better kept outside the file, by api_key_env or api_key_file",
        None,
        secret=True,
    )
    api_key_env: str | None = setting(
        optional(variable),
        "name of the environment variable that holds the API key",
        None,
        default_text="OPENAI_API_KEY for openai; likewise groq, openrouter, anthropic",
    )
    api_key_file: str | None = setting(
        optional(line),
        "file that holds the API key; looked for in $CREDENTIALS_DIRECTORY first",
        None,
    )
    model: str = setting(line, "model of a request that names none")
    models: tuple[str, ...] = setting(
        list_of(line), "further models that GET /v1/models lists, and whose names lead here", ()
    )
    temperature: float | None = setting(
        optional(ratio),
        "temperature of a WebSocket or SSE chat that sets none; null: not sent",
        None,
    )
    max_tokens: int | None = setting(
        optional(count),
        "tokens of an answer to a WebSocket or SSE chat that sets no bound; null: not sent",
        None,
    )
    top_p: float | None = setting(
        optional(ratio), "top_p of a WebSocket or SSE chat that sets none; null: not sent", None
    )
    choice_index: int = setting(
        count_or_0,
        "index of the choice that WebSocket and SSE clients get, where an answer has several",
        0,
    )
    headers: Mapping[str, str] = setting(
        mapping_of(header, latin),
        "HTTP headers added to every request to the provider",
        {},
        secret=True,
    )
    pass_headers: tuple[str, ...] = setting(
        list_of(passed_header),
        "names of client headers that are passed on to the provider, "
        "beside traceparent and tracestate",
        (),
    )
    proxy: str | None = setting(
        optional(proxy), "URL of the HTTP proxy to the provider; null: none", None, secret=True
    )
    ca_file: str | None = setting(
        optional(line),
        "PEM file of the certificates to trust; null: those of the system",
        None,
    )
    client_cert_file: str | None = setting(
        optional(line),
        "PEM file of the certificate that is presented to the provider, with its intermediates "
        "behind it; null: none",
        None,
    )
    client_key_file: str | None = setting(
        optional(line),
        "PEM file of its key, not encrypted, looked for in $CREDENTIALS_DIRECTORY first; "
        "null: `client_cert_file` has it, too",
        None,
    )
    messages: bool | str = setting(
        boolean_or(AUTO, BRIDGE),
        "whether it speaks Anthropic's Messages API, below the same base_url; false: requests for "
        "that API never go to it; auto: it is asked until it answers 404, 405 or 501 there, and "
        "requests are translated to chat completions from then on; bridge: they always are",
        AUTO,
    )
    responses: bool = setting(
        boolean,
        "whether it has /v1/responses; false: requests for it are translated to chat completions, "
        "as they are for a provider that answers 404, 405 or 501 there",
        True,
    )
    stream_usage: bool = setting(
        boolean,
        "whether it is asked for the usage of a stream on /v1/chat/completions and /v1/completions "
        "whose client does not ask; that client is not shown it then",
        True,
    )
    when_down: str = setting(
        one_of("fail", "wait"),
        "what requests do while the provider cannot be reached and no fallback can answer: fail "
        "at once, or wait in its queue, for queue_timeout at most, until it is back",
        "fail",
    )
    continuation: str = setting(
        one_of(*CONTINUATIONS),
        "how it is asked for the rest of an answer that broke off after text, its own or another "
        "provider's: none, never; prefill, by the assistant's message at the end; prefix, the same "
        "with prefix: true; final_message, the same with continue_final_message: true; instruct, by "
        "asking for the last words and the rest",
        NO_CONTINUATION,
    )
    account_paths: bool = setting(
        boolean,
        "whether admins may use the objects of the account that the API key belongs to: files, "
        "batches, vector_stores and every other path of the API",
        False,
    )
    pass_paths: tuple[str, ...] = setting(
        list_of(passed_path),
        "paths below /v1, with all below them, that are passed on for every key: decisions, videos",
        (),
    )
    http_client: HttpClient = group(HttpClient)

    def __post_init__(self) -> None:
        configured = {name.lower() for name in self.headers}
        check_rules(
            self,
            *(
                (("pass_headers", index), f"{name} is set by `headers` already")
                for index, name in enumerate(self.pass_headers)
                if name in configured
            ),
        )
        if not self.base_url and not self.simulated:
            check_rules(self, (("base_url",), "required key is missing"))
        if self.base_url and self.simulated is True:
            check_rules(self, (("simulated",), "a simulated provider has no base_url"))

    def variable(self, name: str) -> str | None:
        """Return the variable that holds the key of the provider *name*, if any.

        A name in KEY_VARIABLES has a variable by default, unless a setting says where the key is.
        """
        configured = (self.simulated, self.api_key, self.api_key_env, self.api_key_file)
        return self.api_key_env if any(configured) else KEY_VARIABLES.get(name)

    @cached_property
    def usable(self) -> bool:
        """Whether requests can be sent: the key was found, or none is needed."""
        return self.missing_key is None

    @property
    def missing_key(self) -> str | None:
        """The variable, or else the file, that should hold the key and does not."""
        if self.simulated or self.api_key is not None:
            return None
        return self.api_key_env or self.api_key_file


class Llm(SettingsClass):
    """Everything on the providers' side."""

    active: str = setting(line, "name of the provider, or in `models`, that is asked first")
    fallbacks: tuple[str, ...] = setting(
        list_of(line),
        "names of providers, or in `models`, that are asked next, in this order",
        (),
    )
    unknown_models: str = setting(
        one_of(models.PASS, models.REFUSE),
        "what becomes of a model that nobody here has: pass it to the active provider, or refuse it (404)",
        models.PASS,
    )
    cache_losses: bool = setting(
        boolean,
        "find what the provider's cache has lost of each turn, and at which byte of the prompt",
        False,
    )
    models: Mapping[str, Group] = setting(mapping_of(models.name, models.group), "", {})
    providers: Mapping[str, Provider] = setting(mapping_of(label, section(Provider)), "")

    def __post_init__(self) -> None:
        known = [*self.providers, *self.models]
        text = f"is not among llm.providers ({', '.join(self.providers)})"
        if self.models:
            text += " or in llm.models"
        names: dict[tuple[str | int, ...], str] = {("active",): self.active}
        names |= {("fallbacks", index): name for index, name in enumerate(self.fallbacks)}
        names |= {
            ("models", model, "fallbacks", index): name
            for model, configured in self.models.items()
            for index, name in enumerate(configured.fallbacks)
        }
        check_rules(
            self,
            *(
                (path, f"{show(name)} {text}{nearest(name, known)}")
                for path, name in names.items()
                if name not in self.providers and name not in self.models
            ),
            *_broken_rules(self),
        )

    def group_in(self, member: Member) -> str | None:
        """Return the name of the group that *member* of a group refers to; None: it is
        a provider.
        """
        name = member.written
        return name if member.provider not in self.providers and name in self.models else None

    def aliased(self, name: str) -> str:
        """Return the name that *name* is an alias of, or *name* itself."""
        while (found := self.models.get(name)) is not None and found.written is None:
            other = self.group_in(found.members[0])
            if other is None:
                break
            name = other
        return name

    def members(self, name: str) -> tuple[Member, ...]:
        """Return the members that answer for *name*: those of its group, where the members of a
        group that is itself a member stand in its place; or the provider of that name.
        """
        if name in self.providers:
            return (Member(provider=name),)
        members: dict[tuple[str, str], Member] = {}
        for entry in self.models[name].members:
            inner = self.group_in(entry)
            for member in (entry,) if inner is None else self.members(inner):
                if inner is not None:
                    # Its weight counts within its own group.
                    member = replace(member, weight=None)  # noqa: PLW2901
                model = member.model or self.providers[member.provider].model
                members.setdefault((member.provider, model), member)
        return tuple(members.values())

    def chain(self, name: str) -> tuple[str, ...]:
        """Return *name*, or the name it is an alias of, followed by its fallbacks, each with its
        own fallbacks.
        """
        name = self.aliased(name)
        chain = {name: None}
        for fallback in self.models[name].fallbacks if name in self.models else ():
            chain |= dict.fromkeys(self.chain(fallback))
        return tuple(chain)

    def usable(self, name: str) -> list[Provider]:
        """Return the providers that answer for *name*, and to which requests can be sent."""
        providers = [
            self.providers[member.provider]
            for link in self.chain(name)
            for member in self.members(link)
        ]
        return [provider for provider in providers if provider.usable]

    def groups(self) -> dict[str, Group]:
        """Return the groups by their names, without aliases, each with all its members."""
        return {
            name: replace(configured, members=self.members(name))
            for name, configured in self.models.items()
            if self.aliased(name) == name
        }

    def bare_routes(self) -> dict[tuple[str, ...], list[str]]:
        """Return the models that go to other providers by their name alone, since these list them.
        The keys are the names of the providers, in the order in which they are asked.
        """
        listing: dict[str, list[str]] = {}
        for name, provider in self.providers.items():
            for model in dict.fromkeys(provider.models if provider.usable else ()):
                listing.setdefault(model, []).append(name)
        routes: dict[tuple[str, ...], list[str]] = {}
        for model, names in listing.items():
            if not self._leads_elsewhere(model):
                routes.setdefault(tuple(names), []).append(model)
        return routes

    def _leads_elsewhere(self, model: str) -> bool:
        """Return whether *model* goes to a provider of that name, to a group, or to the active
        provider, even if others list it.
        """
        active = self.providers.get(self.active)
        provider, slash, rest = model.partition("/")
        return (
            model in self.providers
            or bool(slash and rest and provider in self.providers)
            or model in self.models
            or any(name.endswith("*") and model.startswith(name[:-1]) for name in self.models)
            or (active is not None and (model == active.model or model in active.models))
        )


def _broken_rules(llm: Llm) -> Iterator[BrokenRule]:
    """Yield the rules between groups and providers that *llm* breaks, by paths from `llm`."""
    groups = list(llm.models.items())
    if len(groups) > models.MAX_NAMES:
        yield ("models",), f"has more than {models.MAX_NAMES} names"
    for model, one in groups:
        first, slash, _ = model.partition("/")
        if model in llm.providers:
            yield ("models", model), "a provider has this name, which pins it"
        elif slash and first in llm.providers:
            yield ("models", model), f"begins with the name of the provider {first}, which pins it"
        yield from _broken_members(llm, ("models", model), one)
    yield from _broken_ways(llm)


def _broken_members(llm: Llm, path: tuple[str | int, ...], one: Group) -> Iterator[BrokenRule]:
    seen: set[tuple[str, str]] = set()
    for index, entry in enumerate(one.members):
        if not isinstance(entry.provider, str):
            continue  # it is faulty
        at = (*path, *one.path(index))
        provider = llm.providers.get(entry.provider)
        if llm.group_in(entry) is not None:
            if one.choose in {LEAST_BUSY, WEIGHTED}:
                yield at, f"{entry.written} is a group, a member with `choose: ordered` only"
            elif entry.max_context is not None:
                yield at, f"{entry.written} is a group, whose members have a max_context each"
            elif entry.input_modalities or entry.output_modalities:
                yield at, f"{entry.written} is a group, whose members have modalities each"
            asked = entry.written, ""
        elif provider is None:
            known = llm.providers
            hint = nearest(entry.provider, [*known, *llm.models])
            text = f"is not among llm.providers ({', '.join(known)}) or in llm.models"
            yield at, f"{show(entry.provider)} {text}{hint}"
            continue
        else:
            asked = entry.provider, entry.model or provider.model
        if FAULTY not in asked and asked in seen:
            yield at, "this member appears twice"
        seen.add(asked)


def _broken_ways(llm: Llm) -> Iterator[BrokenRule]:
    """Yield the references by which groups form a circle, or lead to too many others."""
    # For each group: the depth of groups below it, and the number of all its members.
    known: dict[str, tuple[int, int]] = {}
    broken: list[BrokenRule] = []

    def follow(name: str, above: tuple[str, ...]) -> tuple[int, int]:
        if name in known or len(above) > models.MAX_DEPTH:
            return known.get(name, (0, 0))
        above, depth, size = (*above, name), 0, len(tuple(llm.models[name].members))
        for path, other in _ways(llm, name):
            if other in above:
                circle = " → ".join([*above[above.index(other) :], other])
                broken.append((path, f"leads in a circle: {circle}"))
                continue
            below, members = follow(other, above)
            depth = max(depth, below)
            if "fallbacks" not in path[2:]:
                size += members - 1
        known[name] = depth + 1, size
        return known[name]

    for name in llm.models:
        depth, size = follow(name, ())
        if depth > models.MAX_DEPTH:
            broken.append((("models", name), f"leads through more than {models.MAX_DEPTH} groups"))
        elif size > models.MAX_MEMBERS >= len(tuple(llm.models[name].members)):
            message = f"has more than {models.MAX_MEMBERS} members, with those of its groups"
            broken.append((("models", name), message))
    yield from broken


def _ways(llm: Llm, name: str) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield the groups to which the group *name* refers, each with the path of the reference from
    `llm`.
    """
    one = llm.models[name]
    for index, entry in enumerate(one.members):
        if (other := llm.group_in(entry)) is not None:
            yield ("models", name, *one.path(index)), other
    for index, fallback in enumerate(one.fallbacks):
        if fallback in llm.models:
            yield ("models", name, "fallbacks", index), fallback

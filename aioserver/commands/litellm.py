"""A configuration that is made from one of LiteLLM (`aioserver init --from FILE`).

A deployment becomes a member of a group, and deployments of one account share a provider, since
a provider has one pool, one pace and one queue. What has no counterpart is not guessed: each such
line is a `Remark`.

This file is one concept: how each word of that file is said here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from aioserver.config.hints import OTHER_WORDS

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence

    Path = tuple[str | int, ...]

ENVIRONMENT = "os.environ/"


class Api(NamedTuple):
    """An API with OpenAI's or Anthropic's format: its URL, and the variable with its key.

    An API without a *url* needs an `api_base`, behind which *suffix* is added if it is missing.
    """

    url: str = ""
    variable: str | None = None
    suffix: str = ""


# By the prefix of a model in LiteLLM's file, as its documentation lists them.
APIS = {
    "openai": Api("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "text-completion-openai": Api("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": Api("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY", "/v1"),
    "azure": Api("", "AZURE_API_KEY", "/openai/v1"),
    "cerebras": Api("https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    "deepinfra": Api("https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    "deepseek": Api("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "fireworks_ai": Api("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY"),
    "gemini": Api("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "groq": Api("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": Api("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "nvidia_nim": Api("https://integrate.api.nvidia.com/v1", "NVIDIA_NIM_API_KEY"),
    "openrouter": Api("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "perplexity": Api("https://api.perplexity.ai", "PERPLEXITYAI_API_KEY"),
    "sambanova": Api("https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY"),
    "together_ai": Api("https://api.together.xyz/v1", "TOGETHERAI_API_KEY"),
    "xai": Api("https://api.x.ai/v1", "XAI_API_KEY"),
    "ollama": Api("http://localhost:11434/v1", None, "/v1"),
    "ollama_chat": Api("http://localhost:11434/v1", None, "/v1"),
    **dict.fromkeys(("hosted_vllm", "lm_studio", "llamafile", "litellm_proxy"), Api()),
    **dict.fromkeys(("custom_openai", "openai_like"), Api()),
}
# Settings of a deployment that are settings of a provider's `http_client`.
RATES = {
    word: OTHER_WORDS.get(word, word)
    for word in ("rpm", "tpm", "max_parallel_requests", "timeout", "stream_timeout", "max_retries")
} | {"num_retries": "max_retries"}
# Settings of a deployment that count for chats over WebSocket and SSE.
DEFAULTS = ("temperature", "max_tokens", "top_p")
# Strategies that are here as well: weights, or the fewest requests. Any other one is the second.
STRATEGIES = {"simple-shuffle", "least-busy"}
# What needs no setting, and why.
NEEDLESS = {
    "drop_params": "a parameter that a provider refuses by name is learned, and left out",
    "allowed_fails": "a provider that fails is asked last, or left alone",
    "cooldown_time": "a provider that answers 429 rests for as long as it says",
    "retry_after": "retries wait by `backoff_factor`, or for as long as the provider says",
    "enable_pre_call_checks": "a member with `max_context` gets no prompt that is too long",
    "database_connection_pool_limit": "there is no database",
    "store_model_in_db": "there is no database",
    "telemetry": "nothing is sent anywhere",
    "set_verbose": "the log's level is `logging.level`",
    "json_logs": "the log is JSON with `logging.json`",
    "health_check_interval": "a provider is known to be dead by its answers",
}
# Settings that have no counterpart here, each with the closest one.
ABSENT = {
    "cache": "answers are not cached; `affinity: prefix` keeps a conversation at one engine",
    "cache_params": "answers are not cached",
    "database_url": "keys are in a file: see docs/from-litellm.md for how to take them along",
    "callbacks": "see docs/from-litellm.md for hooks, traces and metrics",
    "success_callback": "see docs/from-litellm.md for usage, traces and metrics",
    "failure_callback": "see docs/from-litellm.md for logs and traces",
    "guardrails": "see docs/hooks.md: a program of yours allows, changes or refuses a request",
    "max_budget": "budgets are in tokens: `tokens_per_day` of a key",
    "include": "convert each file, and put the parts together",
}
NO_COUNTERPART = "no counterpart"


class Remark(NamedTuple):
    """A line of LiteLLM's file that the new file does not have, and the reason."""

    line: int
    what: str
    why: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what}: {self.why}"


class NotLiteLLM(ValueError):
    """The text is no configuration of LiteLLM."""


class _Section:
    """A mapping of the file, of which each key is taken once; the others are remarks."""

    def __init__(self, file: _File, value: Any, path: Path) -> None:
        self.file, self.path = file, path
        self.rest: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {}

    def take(self, *names: str) -> Any:
        """Return the value of the first of *names* that has one; None if none has."""
        values = [self.rest.pop(name, None) for name in names]
        return next((value for value in values if value is not None), None)

    def remark(self, key: str | int | None, why: str) -> None:
        """Note that *key*, or the whole section, is left out."""
        path = self.path if key is None else (*self.path, key)
        self.file.remark(path, why)

    def finish(self) -> None:
        """Make a remark of each key that nothing has taken."""
        for key in self.rest:
            needless = NEEDLESS.get(key)
            why = ABSENT.get(key, NO_COUNTERPART)
            self.remark(key, why if needless is None else f"not needed: {needless}")
        self.rest = {}


class _File:
    """The file's sections, the line of each key, and the remarks."""

    def __init__(self, text: str) -> None:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise NotLiteLLM(f"not YAML: {error}") from None
        if not isinstance(value, Mapping) or not isinstance(value.get("model_list"), list):
            raise NotLiteLLM("it has no model_list")
        self._lines = dict(_lines(node, ()))
        self.remarks: list[Remark] = []
        self.root = _Section(self, value, ())

    def remark(self, path: Path, why: str) -> None:
        """Note that what stands at *path* is left out."""
        # What a merge key brings in stands elsewhere.
        at = path
        while at and at not in self._lines:
            at = at[:-1]
        self.remarks.append(Remark(self._lines.get(at, 1), ".".join(map(str, path)), why))

    def section(self, name: str) -> _Section:
        """Return the section *name*, which may be missing."""
        return _Section(self, self.root.take(name), (name,))


def _lines(node: yaml.Node | None, path: Path) -> Iterator[tuple[Path, int]]:
    """Yield the paths of all keys and entries of *node*, each with its line."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            at = (*path, str(key.value))
            yield at, key.start_mark.line + 1
            yield from _lines(value, at)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value.start_mark.line + 1
            yield from _lines(value, (*path, index))


class _Deployment(NamedTuple):
    """An entry of `model_list`: the name for clients, the settings of the account, and the model
    that the account is asked for; "*": the one that the client names.
    """

    path: Path
    name: str
    account: dict[str, Any]
    # What its provider may be called.
    hint: str
    model: str
    order: int
    weight: int | None
    max_context: int | None
    sees: bool

    @property
    def pattern(self) -> bool:
        """Whether it stands for all models of its account."""
        return self.model == "*"


def converted(text: str) -> tuple[dict[str, Any], list[Remark]]:
    """Return the settings that *text*, a configuration of LiteLLM, comes to, and what they leave
    out, by lines.

    Raises:
        NotLiteLLM: it is no configuration of LiteLLM, or no deployment of it has a counterpart.
    """
    file = _File(text)
    common, router = file.section("litellm_settings"), file.section("router_settings")
    general = file.section("general_settings")
    retries = _first(common.take("num_retries"), router.take("num_retries"))
    seconds = _first(common.take("request_timeout"), router.take("timeout"))
    shared = {"max_retries": retries, "read_timeout": seconds}
    deployments = list(_deployments(file, {k: v for k, v in shared.items() if v is not None}))
    if not deployments:
        raise NotLiteLLM("none of its deployments has a counterpart")
    llm = _llm(file, deployments, _choose(router, deployments))
    _fallbacks(llm, (common, router))
    for alias, target in (router.take("model_group_alias") or {}).items():
        name = target.get("model") if isinstance(target, Mapping) else target
        if isinstance(name, str) and name in llm["models"] and alias not in llm["models"]:
            llm["models"][alias] = name
        else:
            router.remark("model_group_alias", f"{alias} leads to no name that is left")
    settings: dict[str, Any] = {"llm": llm, "auth": _auth(general)}
    _redis(router, settings)
    for section in (common, router, general, file.root):
        section.finish()
    return settings, sorted(set(file.remarks))


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _deployments(file: _File, shared: Mapping[str, Any]) -> Iterator[_Deployment]:
    for index, entry in enumerate(file.root.take("model_list")):
        outer = _Section(file, entry, ("model_list", index))
        parameters = _Section(file, outer.take("litellm_params"), (*outer.path, "litellm_params"))
        info = _Section(file, outer.take("model_info"), (*outer.path, "model_info"))
        name, written = outer.take("model_name"), parameters.take("model")
        if not isinstance(name, str) or not isinstance(written, str):
            outer.remark(None, "it has no model_name, or no model")
            continue
        for key in ("rpm", "tpm"):
            # Both stand here in older files.
            if (value := outer.take(key)) is not None:
                parameters.rest.setdefault(key, value)
        account, why, hint, model = _account(parameters, written, shared)
        if why is not None:
            outer.remark(None, f"{name}: {why}")
            continue
        if not name.isprintable() or " " in name:
            outer.remark(None, f"{name!r}: expected a name without spaces")
            continue
        if "*" in name + model and (model != "*" or name not in {"*", f"{hint}/*"}):
            outer.remark(None, f"{name}: list the models; * stands for all of a provider only")
            continue
        order, weight = parameters.take("order"), parameters.take("weight")
        context, sees = info.take("max_input_tokens"), info.take("supports_vision")
        # What LiteLLM knows of a model, and how clients see it, costs nothing here.
        for key in ("id", "mode", "base_model", "description", "supports_function_calling"):
            info.take(key)
        for section in (outer, parameters, info):
            section.finish()
        yield _Deployment(
            outer.path,
            name,
            account,
            hint,
            model,
            order if isinstance(order, int) else 1,
            weight if isinstance(weight, int) and 1 <= weight <= 100 else None,
            context if isinstance(context, int) and context > 0 else None,
            sees is True,
        )


def _account(
    parameters: _Section, written: str, shared: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None, str, str]:
    """Return the settings of the provider that answers for *written*, or why there is none; and
    how it may be called, and the model that it is asked for.
    """
    prefix, slash, model = written.partition("/")
    known = parameters.take("custom_llm_provider") or (prefix if slash else "openai")
    if known != prefix or not slash:
        prefix, model = known, written
    if prefix == "openai" and not slash and written.startswith("claude"):
        prefix = "anthropic"
    api = APIS.get(prefix)
    base = parameters.take("api_base", "base_url")
    if api is None:
        return {}, f"{prefix} has neither OpenAI's nor Anthropic's API", "", ""
    if base is not None and str(base).startswith(ENVIRONMENT):
        return {}, f"write its api_base, which is in {str(base)[len(ENVIRONMENT) :]}", "", ""
    url = str(base).rstrip("/") if base else api.url
    if not url:
        return {}, f"{prefix} needs an api_base", "", ""
    if base and api.suffix and not url.endswith(api.suffix):
        url += api.suffix
    account: dict[str, Any] = {"base_url": url}
    _credentials(parameters, account, api.variable, given=base is not None)
    if prefix == "anthropic":
        account["messages"] = True
    if prefix == "azure" and parameters.take("api_version") is not None:
        parameters.remark("api_version", "not needed: the path /openai/v1 has no versions")
    headers = dict(parameters.take("extra_headers", "headers") or {})
    if (organization := parameters.take("organization")) is not None:
        headers["OpenAI-Organization"] = organization
    if headers:
        account["headers"] = headers
    for key in DEFAULTS:
        if (value := parameters.take(key)) is not None:
            account[key] = value
            parameters.remark(key, "it counts for chats over WebSocket and SSE only")
    account["http_client"] = _http_client(parameters, shared)
    return {key: value for key, value in account.items() if value != {}}, None, prefix, model


def _credentials(
    parameters: _Section, account: dict[str, Any], variable: str | None, *, given: bool
) -> None:
    """Put the key of a deployment into *account*; without one it is in *variable*, unless the
    address was *given*.
    """
    key = parameters.take("api_key")
    if isinstance(key, str) and key.startswith(ENVIRONMENT):
        account["api_key_env"] = key[len(ENVIRONMENT) :]
    elif key is not None and str(key).strip() and str(key).lower() != "none":
        account["api_key"] = str(key)
    elif variable is not None and (not given or variable == "AZURE_API_KEY"):
        account["api_key_env"] = variable


def _http_client(parameters: _Section, shared: Mapping[str, Any]) -> dict[str, Any]:
    rates = dict(shared)
    for key, name in RATES.items():
        value = parameters.take(key)
        if isinstance(value, (int, float)) and value > 0:
            rates[name] = float(value) if name.endswith("timeout") else int(value)
        elif value is not None:
            parameters.remark(key, f"expected a number, not {type(value).__name__}")
    if (most := rates.get("concurrent_requests")) is not None:
        rates |= {"max_connections": most, "max_keepalive": min(20, most)}
    return rates


def _providers(deployments: Iterable[_Deployment]) -> list[str]:
    """Return a name of a provider for each deployment: the same for those of one account."""
    deployments = list(deployments)
    asked = {each.name for each in deployments}
    names: dict[Hashable, str] = {}
    # PROVIDER/MODEL leads to a provider by its name, so a pattern decides how one is called.
    for each in sorted(deployments, key=lambda each: not each.pattern):
        identity = yaml.safe_dump(each.account)
        if identity not in names:
            stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", each.hint)
            names[identity] = next(
                name
                for name in (stem, *(f"{stem}-{number}" for number in range(1, 10_000)))
                if name not in names.values() and _free(name, asked)
            )
    return [names[yaml.safe_dump(each.account)] for each in deployments]


def _free(name: str, asked: Collection[str]) -> bool:
    """Return whether a provider may be called *name*: no name of a model is its name, or begins
    with it, unless a pattern stands for all of its models.
    """
    beginning = any(each.startswith(f"{name}/") for each in asked)
    return name not in asked and (f"{name}/*" in asked or not beginning)


def _llm(file: _File, deployments: Sequence[_Deployment], choose: str) -> dict[str, Any]:
    names = _providers(deployments)
    providers: dict[str, Any] = {}
    members: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    active = None
    for each, name in zip(deployments, names, strict=True):
        provider = providers.setdefault(name, {"model": each.model, **each.account})
        if each.name == "*":
            active = active or name
        elif each.pattern and name != each.hint:
            file.remark(each.path, f"{each.name}: another account has this pattern already")
        elif not each.pattern and not each.name.startswith(f"{name}/"):
            member = {
                "provider": name,
                "model": each.model,
                "weight": each.weight,
                "max_context": each.max_context,
                "input_modalities": ["text", "image"] if each.sees else None,
            }
            # Two deployments that differ by what has no counterpart are one.
            same = [(one["provider"], one["model"]) for _, one in members.get(each.name, [])]
            if (name, each.model) not in same:
                members.setdefault(each.name, []).append((each.order, member))
        elif each.name != f"{name}/{each.model}":
            file.remark(each.path, f"{each.name}: a pattern leads this name to another model")
        if provider["model"] == "*":
            provider["model"] = each.model
    for provider in providers.values():
        if provider["model"] == "*":
            # Clients name the model; the API refuses a request that names none.
            provider["model"] = "unknown"
    return {
        "active": active or next(iter(members), None) or names[0],
        "unknown_models": "refuse" if active is None else "pass",
        "models": {name: _group(entries, choose) for name, entries in members.items()},
        "providers": providers,
    }


def _group(entries: list[tuple[int, dict[str, Any]]], choose: str) -> Any:
    """Return a group as its settings are written: shortly where that says all."""
    if ordered := len({order for order, _member in entries}) > 1:
        choose = "ordered"
    members: list[Any] = []
    for _order, member in sorted(entries, key=lambda entry: entry[0]):
        if ordered or choose != "weighted" or len(entries) == 1:
            member["weight"] = None
        short = {key: value for key, value in member.items() if value is not None}
        plain = short.keys() == {"provider", "model"}
        members.append(f"{member['provider']}/{member['model']}" if plain else short)
    if len(members) == 1:
        return members[0] if isinstance(members[0], str) else members
    return members if choose == "ordered" else {"members": members, "choose": choose}


def _choose(router: _Section, deployments: Iterable[_Deployment]) -> str:
    strategy = router.take("routing_strategy") or "simple-shuffle"
    router.take("routing_strategy_args")
    if strategy not in STRATEGIES:
        router.remark("routing_strategy", f"{strategy} is not there; it is least_busy")
    weighted = any(each.weight is not None for each in deployments)
    return "weighted" if strategy == "simple-shuffle" and weighted else "least_busy"


def _fallbacks(llm: dict[str, Any], sections: Iterable[_Section]) -> None:
    """Give groups their fallbacks, and the active one the default ones."""
    models = llm["models"]
    chosen: dict[str, list[str]] = {}
    for section in sections:
        for key in ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks"):
            for entry in section.take(key) or ():
                for name, others in entry.items() if isinstance(entry, Mapping) else ():
                    found = [other for other in others if other in models and other != name]
                    if name in models and found:
                        known = chosen.setdefault(name, [])
                        known.extend(other for other in found if other not in known)
                    else:
                        section.remark(key, f"{name}: it leads to no name that is left")
        default = section.take("default_fallbacks") or []
        if found := [name for name in default if name in models and name != llm["active"]]:
            llm["fallbacks"] = found
    members = {name: _members(group) for name, group in models.items()}
    for name, others in chosen.items():
        group = models[name] if isinstance(models[name], dict) else {"members": members[name]}
        models[name] = group
        for other in others:
            # Fallbacks are followed further here, so that two names cannot be each other's.
            circle = name in _reached(models, other)
            if circle:
                models[f"{other}-alone"] = list(members[other])
            group.setdefault("fallbacks", []).append(f"{other}-alone" if circle else other)


def _members(group: Any) -> list[Any]:
    written = group["members"] if isinstance(group, dict) else group
    return written if isinstance(written, list) else [written]


def _reached(models: Mapping[str, Any], name: str) -> set[str]:
    """Return the names to which the fallbacks of *name* lead."""
    group = models[name]
    reached: set[str] = set()
    for other in group.get("fallbacks", ()) if isinstance(group, dict) else ():
        reached |= {other, *_reached(models, other)}
    return reached


def _auth(general: _Section) -> dict[str, Any]:
    key = general.take("master_key")
    if key is None:
        return {"open": True}
    limits = {"name": "master", "admin": True}
    if str(key).startswith(ENVIRONMENT):
        return {"keys": [{**limits, "key_env": str(key)[len(ENVIRONMENT) :]}]}
    return {"keys": [{**limits, "sha256": hashlib.sha256(str(key).encode()).hexdigest()}]}


def _redis(router: _Section, settings: dict[str, Any]) -> None:
    host, port = router.take("redis_host"), router.take("redis_port") or 6379
    url, password = router.take("redis_url"), router.take("redis_password")
    if url is None and host is not None:
        url = f"redis://{host}:{port}"
    if url is None:
        return
    if password is not None or any(ENVIRONMENT in str(part) for part in (url, port)):
        router.remark(None, "write cluster.redis_url: redis://:PASSWORD@HOST:PORT")
    else:
        settings["cluster"] = {"redis_url": str(url)}

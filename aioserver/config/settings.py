"""The settings of a whole configuration.

The classes of all its sections can be imported from here.

The keys, types and rules are those of the system that aioserver replaces: a key that the old
system requires has no default here, and a key that it lacks is optional. A settings object is
never changed: a reload makes a new one. Durations are seconds, sizes are bytes.

This file is one concept: the sections beside `chat` and `llm`, each as a class.
"""

from __future__ import annotations

from datetime import datetime
from math import inf
from typing import TYPE_CHECKING, ClassVar

from aioserver.config.chat import (
    Chat,
    Concurrency,
    Context,
    Persistence,
    Repository,
    Service,
    Sse,
    Streaming,
    Streams,
    Tls,
    Uvicorn,
    WebSocket,
)
from aioserver.config.llm import HttpClient, Llm, Provider
from aioserver.config.models import Group, Member, asked
from aioserver.config.schema import (
    FAULTY,
    BrokenRule,
    SettingsClass,
    check_rules,
    group,
    repeated,
    section,
    setting,
)
from aioserver.config.validators import (
    api,
    boolean,
    claim,
    count,
    count_or_0,
    digest,
    header,
    jwks,
    label,
    latin,
    line,
    list_of,
    log_format,
    log_level,
    mapping_of,
    moment,
    network,
    one_of,
    optional,
    optional_line,
    peer_address,
    peer_ports,
    python_class,
    redis,
    seconds,
    variable,
    weight,
)
from aioserver.limits.fair_queue import BATCH, INTERACTIVE
from aioserver.protocol.request_headers import AGENTS, HOLDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = [
    "SETTINGS",
    "Auth",
    "Chat",
    "ClientKey",
    "Cluster",
    "Concurrency",
    "Context",
    "Group",
    "Hook",
    "HttpClient",
    "Jwt",
    "Limits",
    "Llm",
    "Logging",
    "Member",
    "Persistence",
    "Provider",
    "Repository",
    "Role",
    "Service",
    "Settings",
    "Sse",
    "Streaming",
    "Streams",
    "Tls",
    "Tracing",
    "Usage",
    "Uvicorn",
    "WebSocket",
]

# The two subjects of a hook; and the outcome if the hook does not decide.
REQUEST, ANSWER = "request", "answer"
CLOSED, OPEN = "closed", "open"
# Hooks are asked one after the other, so their waits add up.
MAX_HOOKS = 4


# The budgets of a caller for periods of the calendar, the shortest first.
CALENDAR = ("tokens_per_day", "tokens_per_week", "tokens_per_month")


class Limits(SettingsClass):
    """The limits of one caller."""

    max_concurrent: int = setting(
        count, "answers that the caller may have queued or running at once; beyond: 429", 20
    )
    max_connections: int = setting(
        count_or_0,
        "connections that the caller may have open or waiting at once; beyond: 429; "
        "0: no bound of its own",
        0,
    )
    requests_per_minute: int = setting(
        count, "answers and deletions that the caller may begin per minute; beyond: 429", 300
    )
    tokens_per_minute: int = setting(
        count_or_0,
        "tokens that the answers of the caller may cost per minute, asked and answered together; "
        "beyond: 429; 0: no budget",
        0,
    )
    tokens_per_day: int = setting(
        count_or_0,
        "the same for a day from 00:00 UTC; >= tokens_per_minute; 0: no budget",
        0,
    )
    tokens_per_week: int = setting(
        count_or_0,
        "the same for a week from Monday; 0: no budget",
        0,
    )
    tokens_per_month: int = setting(
        count_or_0,
        "the same for a month of the calendar; 0: no budget",
        0,
    )
    queue_size: int = setting(
        count_or_0,
        "requests that may wait until another one of the caller has ended, or its minute allows "
        "them; beyond: 429; 0: none waits",
        0,
    )
    priority: int = setting(
        weight, "weight of the caller in a provider's queue: 2 gets twice the work of 1", 1
    )
    class_: str = setting(
        one_of(INTERACTIVE, BATCH),
        "interactive; or batch: its requests use what interactive ones leave of a provider",
        INTERACTIVE,
    )
    admin: bool = setting(
        boolean,
        "whether the caller may read /stats, /events and /metrics, "
        "and use account_paths of a provider",
        False,
    )
    models: tuple[str, ...] | None = setting(
        optional(list_of(asked)),
        "names of models that the caller may ask for, each as its requests write it; one that ends "
        "with * stands for all that begin so; any other: 404; null: all",
        None,
    )
    hold: str | None = setting(
        optional(one_of(*HOLDS, AGENTS)),
        "what of a streamed answer is held for the caller, as in chat.streams; null: as there",
        None,
    )
    expires: str | None = setting(
        optional(moment),
        "time at which the caller is no longer admitted, as 2027-01-31T18:00:00Z; a date alone is "
        "its first second; UTC where no other offset is written; null: never",
        None,
    )

    @property
    def expires_at(self) -> float:
        """When the caller is no longer admitted, in seconds of wall time; inf: never."""
        return inf if self.expires is None else datetime.fromisoformat(self.expires).timestamp()

    def __post_init__(self) -> None:
        broken: list[BrokenRule] = []
        shorter, least = "tokens_per_minute", self.tokens_per_minute
        for name in CALENDAR:
            if limit := getattr(self, name):
                if limit < least:
                    message = f"must be 0 or >= {shorter} ({least}), not {limit}"
                    broken.append(((name,), message))
                shorter, least = name, limit
        if self.models == ():
            broken.append(
                (("models",), "needs a name (without this list the caller may ask for all)")
            )
        check_rules(self, *broken)


class ClientKey(Limits):
    """One key of a client, and its limits. Exactly one of key_env, key_file and sha256 is set."""

    name: str = setting(label, "name of the caller, in logs and metrics; no two are the same")
    key_env: str | None = setting(
        optional(variable), "name of the environment variable that holds the key", None
    )
    key_file: str | None = setting(
        optional(line),
        "file that holds the key; looked for in $CREDENTIALS_DIRECTORY first",
        None,
    )
    sha256: str | None = setting(
        optional(digest), "hash of the key, made by `aioserver key NAME`", None, secret=True
    )


class Role(Limits):
    """The limits of each caller whose token has this role; `default` is for those without any."""


DEFAULT_ROLE = "default"


class Jwt(SettingsClass):
    """Tokens of an issuer (RFC 7519), accepted beside keys. Needs the extra `jwt`."""

    issuer: str = setting(line, "`iss` of a token; it must equal this text")
    audience: str = setting(line, "one of `aud` of a token must equal this text")
    jwks_url: str | None = setting(
        optional(jwks), "where the issuer has its keys: https, or http to a loopback address", None
    )
    jwks_file: str | None = setting(
        optional(line), "file with the issuer's keys instead; its changes are seen", None
    )
    caller: str = setting(
        claim, "claim that names the caller; dots lead into objects, as in `user.id`", "sub"
    )
    roles: str = setting(
        claim,
        "claim with the roles of the caller: a list of texts, or one text of words as in `scope`",
        "roles",
    )
    limits: dict[str, Role] = setting(
        mapping_of(line, section(Role)),
        "",
        {DEFAULT_ROLE: Role()},
        default_text="{default: {}}",
    )

    def __post_init__(self) -> None:
        broken: list[BrokenRule] = []
        if (self.jwks_url is None) == (self.jwks_file is None):
            broken.append(((), "needs exactly one of jwks_url, jwks_file"))
        if not self.limits:
            broken.append((("limits",), "without any role every token is refused"))
        check_rules(self, *broken)


class Auth(SettingsClass):
    """Access for clients. Without this section only clients on the same machine have it."""

    keys: tuple[ClientKey, ...] | None = setting(list_of(section(ClientKey)), "", None)
    keys_file: str | None = setting(
        line,
        "file with more keys, made and changed by `aioserver key NAME --add FILE`; its changes "
        "are seen within seconds",
        None,
        default_text="none",
    )
    jwt: Jwt | None = setting(section(Jwt), "", None)
    trusted_proxies: tuple[str, ...] = setting(
        list_of(network),
        "proxies whose X-Forwarded-For is believed; unix: those that connect by a UNIX socket",
        (),
    )
    open: bool = setting(
        boolean,
        "whether every address is served without keys, "
        "because a proxy in front checks its clients",
        False,
    )
    allowed_hosts: tuple[str, ...] = setting(
        list_of(line), "`Host` values answered without keys, beside those of this machine", ()
    )

    # The keys that are in `keys_file`.
    file_keys: tuple[ClientKey, ...] = ()

    @property
    def guarded(self) -> bool:
        """Whether a client needs a key or a token, though none may be configured."""
        some = (self.keys, self.keys_file, self.jwt)
        return not self.open and any(each is not None for each in some)

    @property
    def all_keys(self) -> tuple[ClientKey, ...]:
        """The keys of both places."""
        return (self.keys or ()) + self.file_keys

    def __post_init__(self) -> None:
        broken: list[BrokenRule] = []
        keys = self.keys or ()
        for index, name in repeated(key.name for key in keys):
            broken.append((("keys", index, "name"), f"another key is named {name} as well"))
        for index, key in enumerate(keys):
            sources = [key.key_env, key.key_file, key.sha256]
            if FAULTY not in sources and sources.count(None) != len(sources) - 1:
                message = "needs exactly one of key_env, key_file, sha256"
                broken.append((("keys", index), message))
        if self.open is True and [*keys]:
            broken.append((("open",), "cannot be open and have keys"))
        for name, beside in (("keys_file", self.keys_file), ("jwt", self.jwt)):
            if self.open is True and beside is not None:
                broken.append((("open",), f"cannot be open and have {name}"))
        check_rules(self, *broken)


class PeerTls(SettingsClass):
    """TLS between the instances of a cluster: each presents a certificate of one authority, and
    names in certificates are not checked. Without this section their connections are plain.
    """

    cert_file: str = setting(
        line, "PEM file of the instance's certificate, with its intermediates behind it"
    )
    key_file: str | None = setting(
        optional(line), "PEM file of its key, not encrypted; null: `cert_file` has it, too", None
    )
    ca_file: str = setting(line, "PEM file of the authority that has signed them all")


class Cluster(SettingsClass):
    """What several processes or machines share, as instances of one cluster."""

    redis_url: str | None = setting(
        optional(redis),
        "URL of the Redis or Valkey server through which instances share limits and streams; "
        "null: workers of one parent have a server of their own, and one process needs none",
        None,
        secret=True,
    )
    name: str = setting(
        label,
        "name of the cluster: instances with the same name at the same server share",
        "aioserver",
    )
    listen: str | None = setting(
        optional(peer_ports),
        "address on which this instance listens for the other ones, as HOST:PORT or "
        "HOST:FIRST-LAST, of which it takes the first free port; null: any port of the address "
        "from which it reaches `redis_url`",
        None,
    )
    advertise: str | None = setting(
        optional(peer_address),
        "address by which the other instances reach this one, as HOST or HOST:PORT; null: where "
        "it listens",
        None,
    )
    tls: PeerTls | None = setting(optional(section(PeerTls)), "", None)

    def __post_init__(self) -> None:
        """Check the ports."""
        broken: list[BrokenRule] = []
        for name, text in (("listen", self.listen), ("advertise", self.advertise)):
            ports = [] if text is None else text.rpartition("]")[2].partition(":")[2].split("-")
            numbers = [int(port) for port in ports if port]
            if numbers != sorted(numbers) or any(number > 65535 for number in numbers):
                broken.append(((name,), "has no port from 1 to 65535, or no range of such ports"))
        check_rules(self, *broken)


class Tracing(SettingsClass):
    """Traces of requests, for OpenTelemetry."""

    otlp_endpoint: str | None = setting(
        optional(api),
        "base URL of the collector that gets the spans by OTLP over HTTP, such as "
        "http://127.0.0.1:4318; null: no spans are made",
        None,
    )
    service_name: str = setting(
        line,
        "`service.name` of the spans, by which a tracing system lists this server",
        "aioserver",
    )
    gen_ai_metrics: bool = setting(
        boolean,
        "/metrics has those of OpenTelemetry's conventions for generative AI, too",
        False,
    )


class Hook(SettingsClass):
    """A hook is asked about each request, or shown each answer. Exactly one of url and python is
    set.
    """

    name: str = setting(label, "name of the hook, in logs and metrics; no two are the same")
    url: str | None = setting(
        optional(api), "URL that gets a POST for each request, and for each answer", None
    )
    python: str | None = setting(
        optional(python_class),
        "package.module:Class, made once in each process and at a reload",
        None,
    )
    on: tuple[str, ...] = setting(
        list_of(one_of(REQUEST, ANSWER)),
        "what it is shown: request, before a provider is asked; answer, beside its way to the "
        "client",
        (REQUEST,),
    )
    timeout: float = setting(seconds, "seconds for one decision; beyond it there is none", 1.0)
    fail: str = setting(
        one_of(CLOSED, OPEN),
        "what happens without a decision: closed, the request is refused, or the answer ends; "
        "open, it passes, and is counted",
        CLOSED,
    )
    headers: Mapping[str, str] = setting(
        mapping_of(header, latin), "HTTP headers sent with each call", {}, secret=True
    )

    @property
    def closed(self) -> bool:
        """Whether a request is refused if the hook cannot decide."""
        return self.fail == CLOSED

    def __post_init__(self) -> None:
        broken: list[BrokenRule] = []
        if (self.url is None) == (self.python is None):
            broken.append(((), "needs exactly one of url, python"))
        if not self.on:
            broken.append((("on",), "needs request, answer, or both"))
        check_rules(self, *broken)


class Logging(SettingsClass):
    """The log."""

    level: str = setting(log_level, "lowest level that is logged", "INFO")
    format: str = setting(
        log_format, "format of log lines: json for machines, console for people", "json"
    )
    service_name: str = setting(line, "value of `service` in every log line", "aioserver")
    service_version: str = setting(optional_line, "value of `version` in every log line", "")


class Usage(SettingsClass):
    """The ledger of what attempts have cost."""

    path: str | None = setting(
        optional(line),
        "directory of the ledger, which gets a line of JSON for each attempt that may have cost "
        "tokens, in files by day; made if it is missing; null: no ledger",
        None,
    )


class Settings(SettingsClass):
    """The whole configuration."""

    IGNORED: ClassVar = {
        "mcp": "the client runs the tools that it names in its request",
        "chat_store": "chat.service.repository says where conversations are kept",
    }

    chat: Chat = group(Chat)
    llm: Llm = group(Llm)
    auth: Auth | None = setting(optional(section(Auth)), "", None)
    cluster: Cluster = group(Cluster)
    tracing: Tracing = group(Tracing)
    usage: Usage = group(Usage)
    hooks: tuple[Hook, ...] = setting(list_of(section(Hook)), "", ())
    logging: Logging = group(Logging)

    def __post_init__(self) -> None:
        workers = self.chat.websocket.concurrency.uvicorn.workers
        message = (
            f"must be >= uvicorn.workers ({workers}), "
            "each of which needs one when it is alone, not "
        )
        check_rules(
            self,
            *(
                (
                    ("llm", "providers", name, "http_client", "concurrent_requests"),
                    f"{message}{places}",
                )
                for name, provider in self.llm.providers.items()
                if (places := provider.http_client.concurrent_requests) < workers
            ),
            *_broken_hooks(self.hooks),
        )


def _broken_hooks(hooks: Iterable[Hook]) -> Iterator[BrokenRule]:
    names = [hook.name for hook in hooks]
    for index, name in repeated(names):
        yield ("hooks", index, "name"), f"another hook is named {name} as well"
    if (number := len(names)) > MAX_HOOKS:
        yield ("hooks",), f"must have {MAX_HOOKS} entries at most, not {number}"


SETTINGS = section(Settings)

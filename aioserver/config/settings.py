"""Every setting, one line each: check, meaning, default. `config.py` fills them from YAML.

The names, types and rules are those of the system that aioserver replaces (CONTRACT.md 4): what it
requires has no default here, what it lacks has one. A settings object is replaced, never changed.
Durations are seconds, sizes bytes.
"""

# ruff: noqa: RUF009 - setting() and group() are dataclasses.field()

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from aioserver.config.schema import Rule, Secret, compare, group, rows, rules, section, setting
from aioserver.config.validators import (
    api,
    count,
    count_or_0,
    digest,
    header,
    label,
    latin,
    line,
    listed,
    log_format,
    log_level,
    mapped,
    maybe,
    network,
    number,
    one_of,
    origin,
    port_number,
    prose,
    proxy,
    ratio,
    redis,
    route,
    seconds,
    seconds_or_0,
    secret,
    short,
    size,
    variable,
    whole,
    yes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY_VARIABLES = {name: f"{name.upper()}_API_KEY" for name in ("openai", "groq", "openrouter")}
LOCAL_ORIGINS = ("http://localhost:8000", "http://127.0.0.1:8000")

days = number(0, "days > 0", above=True)
retention = one_of("token_limit", "message_count", "time_based", "unlimited")


@dataclass(frozen=True, slots=True, kw_only=True)
class Uvicorn:
    """`chat.websocket.concurrency.uvicorn`: the name is uvicorn's, the aiohttp site obeys it."""

    backlog: int = setting(count, "connections the kernel holds until they are accepted")
    workers: int = setting(count, "processes that serve the port", later=True, neutral=1)
    access_log: bool = setting(yes, "log every finished request")
    keepalive_timeout: float = setting(seconds, "an idle HTTP connection, or half a head, lives")
    max_keepalive_requests: int = setting(count, "requests on one HTTP connection")
    h11_max_incomplete_event_size: int = setting(size, "one unfinished header field")
    h11_max_request_line_size: int = setting(size, "the request line; beyond: 414")
    h11_max_header_size: int = setting(size, "all headers of a request together; beyond: 431")


@dataclass(frozen=True, slots=True, kw_only=True)
class Concurrency:
    """`chat.websocket.concurrency`: how many clients at once."""

    max_connections: int = setting(count, "sockets, streams and calls served at once")
    connection_queue_size: int = setting(count, "that wait for a place")
    queue_timeout: float = setting(seconds_or_0, "such a wait; 0: none, reject when full", 0.0)
    max_body_bytes: int = setting(size, "bodies being read, together; beyond: 503", 2**28)
    uvicorn: Uvicorn = group(Uvicorn)

    def __post_init__(self) -> None:
        rules(
            self,
            compare(self, "connection_queue_size", ">=", "max_connections"),
            compare(self, "uvicorn.backlog", ">=", "connection_queue_size"),
            compare(self, "uvicorn.workers", "<=", "max_connections"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSocket:
    """`chat.websocket`: the address, and what a client may send."""

    host: str = setting(line, "to listen on; beyond loopback: `auth`", "localhost")
    port: int = setting(port_number, "port to listen on; 0: any", 8000)
    endpoint: str = setting(route, "path of the WebSocket face", "/ws/chat")
    allow_origins: tuple[str, ...] = setting(
        listed(origin), "of pages that may connect", LOCAL_ORIGINS
    )
    allow_credentials: bool = setting(yes, "CORS: a page may send cookies and keys", True)
    max_message_size: int = setting(size, "one message or request body, inclusive", 2**24)
    ping_interval: float = setting(seconds, "between pings; also the heartbeat of streams", 20.0)
    ping_timeout: float = setting(seconds, "without a pong: the connection is dead", 10.0)
    idle_timeout: float = setting(seconds_or_0, "without a request; 0: never closed", 0.0)
    shutdown_timeout: float = setting(seconds, "that running streams get on a stop", 30.0)
    drain_delay: float = setting(
        seconds_or_0, "not ready, but still listening, before a stop", 0.0
    )
    concurrency: Concurrency = group(Concurrency)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sse:
    """`chat.sse`."""

    endpoint: str = setting(route, "path of the SSE face", "/sse/chat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """`chat.service.streaming`."""

    IGNORED: ClassVar = ("backoff", "delta_batch_size")

    enabled: bool = setting(yes, "stream the answer when a request does not say", True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Persistence:
    """`chat.service.repository.persistence`: what is kept of a conversation."""

    enabled: bool = setting(yes, "keep conversations over a restart (type: sql)", True)
    retention_policy: str = setting(retention, "which of the bounds below holds", "token_limit")
    max_tokens_per_conversation: int = setting(count, "bound of token_limit", 8000)
    max_messages_per_conversation: int = setting(count, "bound of message_count", 100)
    retention_days: float = setting(days, "bound of time_based, in days", 30.0)
    clear_on_startup: bool = setting(yes, "forget everything at a start", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """`chat.service.repository`: where conversations are kept."""

    IGNORED: ClassVar = ("connection_pool",)

    type: str = setting(one_of("memory", "sql"), "of conversations", "memory", later=True)
    path: str = setting(line, "file of the SQLite database", "events.db")
    persistence: Persistence = group(Persistence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """`chat.service.context`: how much history goes in front of a new turn."""

    IGNORED: ClassVar = ("conversation_limits", "response_tokens")

    max_tokens: int = setting(count, "history and new turn together", 4000)
    reserve_tokens: int = setting(count_or_0, "of them kept free for the answer", 500)
    preserve_recent: int = setting(count_or_0, "latest messages that are always sent", 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """`chat.service`."""

    IGNORED: ClassVar = ("max_tool_hops", "tool_notifications", "logging")

    system_prompt: str = setting(prose, "put in front of `text` chats; never on /v1", "")
    streaming: Streaming = group(Streaming)
    repository: Repository = group(Repository)
    context: Context = group(Context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """`chat.streams`: how long, and how much of, an answer is kept."""

    resume_window: float = setting(seconds_or_0, "an answer can be resumed; 0: never", 30.0)
    max_stream_bytes: int = setting(size, "kept of one answer", 2**22)
    max_kept_bytes: int = setting(size, "kept of all answers", 2**28)
    max_detached: int = setting(count, "answers that run without a reader", 100)
    max_response_bytes: int = setting(size, "one answer of a provider", 2**26)
    send_timeout: float = setting(seconds, "a write without progress: the client is dropped", 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """`chat`: everything on the clients' side."""

    websocket: WebSocket = group(WebSocket)
    sse: Sse = group(Sse)
    service: Service = group(Service)
    streams: Streams = group(Streams)

    def __post_init__(self) -> None:
        if self.sse.endpoint == self.websocket.endpoint:
            rules(self, (("sse", "endpoint"), "must differ from chat.websocket.endpoint"))


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpClient:
    """`llm.providers.<name>.http_client`: names and meanings are httpx's."""

    max_connections: int = setting(count, "connections open to the provider at most")
    max_keepalive: int = setting(count_or_0, "idle ones kept; <= max_connections")
    keepalive_expiry: float = setting(seconds, "an idle connection is kept")
    connect_timeout: float = setting(seconds, "for DNS, TCP and TLS together")
    read_timeout: float = setting(seconds, "without a byte of the answer")
    write_timeout: float = setting(seconds, "without progress in sending the request")
    pool_timeout: float = setting(seconds, "of waiting for a pooled connection")
    requests_per_minute: int = setting(count, "starts a minute, evenly spread")
    concurrent_requests: int = setting(count, "requests in flight at most; <= max_connections")
    max_retries: int = setting(count_or_0, "further tries, before the first event")
    backoff_factor: float = setting(ratio, "seconds of pause: times 2^(n-1)")
    queue_size: int = setting(count, "that wait for it", None, shown="10 x concurrent_requests")
    queue_timeout: float = setting(seconds, "that they wait", None, shown="read_timeout")
    tokens_per_minute: int = setting(count_or_0, "spent a minute; 0: not paced", 0)

    def __post_init__(self) -> None:
        if self.queue_size is None:
            object.__setattr__(self, "queue_size", 10 * self.concurrent_requests)
        if self.queue_timeout is None:
            object.__setattr__(self, "queue_timeout", self.read_timeout)
        rules(
            self,
            compare(self, "max_keepalive", "<=", "max_connections"),
            compare(self, "concurrent_requests", "<=", "max_connections"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """`llm.providers.<name>`. `config.py` gives it its name and the key it finds."""

    name: str = field(default="")  # the key of its section
    base_url: str = setting(maybe(api, ""), "its API, up to /v1", "")
    simulated: bool = setting(yes, "instead of base_url: the simulator in this process", False)
    api_key: Secret | None = setting(maybe(secret), "the key itself", None, secret=True)
    api_key_env: str | None = setting(
        maybe(variable), "variable with it", None, shown="by name, as OPENAI_API_KEY"
    )
    api_key_file: str | None = setting(maybe(line), "or in $CREDENTIALS_DIRECTORY", None)
    model: str = setting(line, "sent when a request names no model")
    models: tuple[str, ...] = setting(listed(line), "further names for /v1/models", ())
    temperature: float | None = setting(maybe(ratio), "of `text` chats; null: not sent", None)
    max_tokens: int | None = setting(maybe(count), "of `text` chats; null: not sent", None)
    top_p: float | None = setting(maybe(ratio), "of `text` chats; null: not sent", None)
    choice_index: int = setting(count_or_0, "which of several choices is the answer", 0)
    headers: Mapping[str, str] = setting(
        mapped(header, latin), "of every request", {}, secret=True
    )
    proxy: str | None = setting(maybe(proxy), "HTTP proxy on the way", None, secret=True)
    ca_file: str | None = setting(maybe(line), "PEM file of the certificates to trust", None)
    http_client: HttpClient = group(HttpClient)

    def __post_init__(self) -> None:
        if not self.base_url and not self.simulated:
            rules(self, (("base_url",), "required key is missing"))
        if self.base_url and self.simulated is True:
            rules(self, (("simulated",), "a simulated provider has no base_url"))

    def variable(self, name: str) -> str | None:
        """Where its key is under the name *name*: a known one has a variable by default."""
        given = (self.simulated, self.api_key, self.api_key_env, self.api_key_file)
        return self.api_key_env if any(given) else KEY_VARIABLES.get(name)

    @property
    def usable(self) -> bool:
        """Whether it can be asked: its key is there, or it needs none."""
        return self.missing_key is None

    @property
    def missing_key(self) -> str | None:
        """The variable, or else the file, that should hold its key and does not."""
        if self.simulated or self.api_key is not None:
            return None
        return self.api_key_env or self.api_key_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Llm:
    """`llm`: everything on the providers' side."""

    active: str = setting(line, "name of the provider that is asked first")
    fallbacks: tuple[str, ...] = setting(listed(line), "asked instead, in order", ())
    providers: Mapping[str, Provider] = setting(mapped(label, section(Provider)), "")

    def __post_init__(self) -> None:
        known = f"is not among llm.providers ({', '.join(self.providers)})"
        named: dict[tuple[str | int, ...], str] = {("active",): self.active}
        named |= {("fallbacks", at): given for at, given in enumerate(self.fallbacks)}
        rules(self, *((at, known) for at, given in named.items() if given not in self.providers))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientKey:
    """One of `auth.keys`. `config.py` turns `key_env` and `key_file` into `sha256`."""

    name: str = setting(label, "of the caller, for logs and metrics")
    key_env: str | None = setting(maybe(variable), "variable with the key", None)
    key_file: str | None = setting(maybe(line), "or in $CREDENTIALS_DIRECTORY", None)
    sha256: str | None = setting(maybe(digest), "or its hash: `aioserver key`", None, secret=True)
    max_concurrent: int = setting(count, "answers queued or running", 20)
    requests_per_minute: int = setting(count, "new answers a minute", 300)
    priority: int = setting(whole(1, 10, "1 to 10"), "weight in the queue of a provider", 1)
    admin: bool = setting(yes, "may read /stats, /events, /metrics", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Auth:
    """`auth`: who may come in. Absent: loopback only."""

    keys: tuple[ClientKey, ...] = setting(listed(section(ClientKey)), "", ())
    trusted_proxies: tuple[str, ...] = setting(
        listed(network), "whose X-Forwarded-For is believed", ()
    )
    open: bool = setting(yes, "no keys, any address: a proxy guards the door", False)
    allowed_hosts: tuple[str, ...] = setting(
        listed(line), "further `Host` values answered without keys", ()
    )

    def __post_init__(self) -> None:
        broken: list[Rule] = []
        names: set[str] = set()
        for at, key in enumerate(self.keys):
            if key.name in names:
                broken.append((("keys", at, "name"), "another key has this name"))
            if [key.key_env, key.key_file, key.sha256].count(None) != 2:
                broken.append((("keys", at), "needs one of key_env, key_file, sha256"))
            names.add(key.name)
        if self.open is True and names:
            broken.append((("open",), "cannot be open and have keys"))
        rules(self, *broken)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`cluster`: what several instances share."""

    redis_url: str | None = setting(maybe(redis), "null: alone", None, secret=True, later=True)
    name: str = setting(label, "instances with the same name share", "aioserver")


@dataclass(frozen=True, slots=True, kw_only=True)
class Logging:
    """`logging`: one line for each finished request, and what goes wrong."""

    level: str = setting(log_level, "the least level that is logged", "INFO")
    format: str = setting(log_format, "json for machines, console for people", "json")
    service_name: str = setting(line, "`service` in every line", "aioserver")
    service_version: str = setting(short, "`version` in every line", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The whole configuration."""

    IGNORED: ClassVar = ("mcp", "chat_store")

    chat: Chat = group(Chat)
    llm: Llm = group(Llm)
    auth: Auth | None = setting(maybe(section(Auth)), "", None)
    cluster: Cluster = group(Cluster)
    logging: Logging = group(Logging)

    def __post_init__(self) -> None:
        workers = self.chat.websocket.concurrency.uvicorn.workers
        why = f"must be >= uvicorn.workers ({workers}), which share it out"
        rules(
            self,
            *(
                (("llm", "providers", key, "http_client", "concurrent_requests"), why)
                for key, provider in self.llm.providers.items()
                if provider.http_client.concurrent_requests < workers
            ),
        )


SETTINGS = section(Settings)


def table() -> str:
    """The README's table of settings, in Markdown."""
    head = [("key", "type", "default", "meaning"), ("---", "---", "---", "---")]
    return "\n".join(f"| {' | '.join(row)} |" for row in (*head, *rows(Settings))) + "\n"

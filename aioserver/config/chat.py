"""The settings of `chat`: everything on the clients' side.

Durations are seconds, sizes are bytes.
"""

from __future__ import annotations

from typing import ClassVar

from aioserver.config import shipped
from aioserver.config.schema import SettingsClass, check_rules, compare, group, section, setting
from aioserver.config.validators import (
    boolean,
    count,
    count_or_0,
    days,
    line,
    list_of,
    listening,
    one_of,
    optional,
    origin,
    port_number,
    prose,
    retention,
    route,
    seconds,
    seconds_or_0,
    size,
)
from aioserver.protocol.request_headers import AGENTS, HOLDS

LOCAL_ORIGINS = ("http://localhost:8000", "http://127.0.0.1:8000")


class Uvicorn(SettingsClass):
    """The listening socket and HTTP connections. The section is named after an earlier server."""

    SHIPPED: ClassVar = shipped.values("chat.websocket.concurrency.uvicorn")

    backlog: int = setting(
        count,
        "connections that the kernel holds until they are accepted; >= connection_queue_size",
    )
    workers: int = setting(
        count,
        "processes that serve the port together, and share all limits; <= max_connections",
    )
    access_log: bool = setting(boolean, "whether every HTTP request is written to the access log")
    keepalive_timeout: float = setting(
        seconds, "seconds that an idle HTTP connection, or an unfinished request head, is kept"
    )
    max_keepalive_requests: int = setting(
        count, "requests served on one HTTP connection; beyond: it is closed"
    )
    h11_max_incomplete_event_size: int = setting(size, "bytes of one header field; beyond: 431")
    h11_max_request_line_size: int = setting(size, "bytes of the request line; beyond: 414")
    h11_max_header_size: int = setting(
        size, "bytes of all header fields of one request together; beyond: 431"
    )


class Concurrency(SettingsClass):
    """Bounds on the clients that are served at once, and on those that wait."""

    SHIPPED: ClassVar = shipped.values("chat.websocket.concurrency")

    max_connections: int = setting(
        count,
        "WebSockets, SSE streams and API calls served at once; beyond: they wait for a place",
    )
    connection_queue_size: int = setting(
        count,
        "connections that may wait for a place; >= max_connections; "
        "beyond: 503, or close code 1013",
    )
    queue_timeout: float = setting(
        seconds_or_0,
        "seconds that a connection may wait for a place; beyond: 503, or close code 1013; "
        "0: a full server refuses at once",
        0.0,
    )
    max_body_bytes: int = setting(
        size,
        "bytes of all request bodies together, until each was sent for the last time; beyond: 503",
        2**28,
    )
    uvicorn: Uvicorn = group(Uvicorn)

    def __post_init__(self) -> None:
        check_rules(
            self,
            compare(self, "connection_queue_size", ">=", "max_connections"),
            compare(self, "uvicorn.backlog", ">=", "connection_queue_size"),
            compare(self, "uvicorn.workers", "<=", "max_connections"),
        )


class Tls(SettingsClass):
    """TLS on the TCP sockets of the server. Without this section they are plain."""

    cert_file: str = setting(
        line, "PEM file of the server's certificate, with its intermediates behind it"
    )
    key_file: str | None = setting(
        optional(line),
        "PEM file of its key, not encrypted, looked for in $CREDENTIALS_DIRECTORY first; "
        "null: `cert_file` has it, too",
        None,
    )
    client_ca_file: str | None = setting(
        optional(line),
        "PEM file of authorities; with it every client must present a certificate that one of "
        "them has signed",
        None,
    )

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the section names."""
        names = (self.cert_file, self.key_file, self.client_ca_file)
        return tuple(name for name in names if name is not None)


class WebSocket(SettingsClass):
    """The address of the server, and settings for its clients on every face."""

    host: str = setting(
        listening,
        "address to listen on; beyond loopback: needs auth.keys or auth.open",
        "localhost",
    )
    port: int = setting(port_number, "TCP port to listen on; 0: any free port", 8000)
    endpoint: str = setting(route, "path of the WebSocket face", "/ws/chat")
    allow_origins: tuple[str, ...] = setting(
        list_of(origin),
        'origins of the pages that may connect, by WebSocket or CORS; "*": every origin',
        LOCAL_ORIGINS,
    )
    allow_credentials: bool = setting(
        boolean, "whether CORS lets pages of `allow_origins` send cookies and keys", True
    )
    max_message_size: int = setting(
        size,
        "bytes of one message or request body, inclusive; beyond: 413, or close code 1009",
        2**24,
    )
    ping_interval: float = setting(
        seconds, "seconds between pings of a WebSocket, and between heartbeats of a stream", 20.0
    )
    ping_timeout: float = setting(
        seconds, "seconds that a WebSocket may take to answer a ping; beyond: it is closed", 10.0
    )
    idle_timeout: float = setting(
        seconds_or_0,
        "seconds that a WebSocket may be without a request; beyond: it is closed; 0: no limit",
        0.0,
    )
    shutdown_timeout: float = setting(
        seconds,
        "seconds that running streams have to finish on a stop; beyond: `server_shutdown`",
        30.0,
    )
    replace_timeout: float = setting(
        seconds_or_0,
        "seconds that a worker which is replaced keeps its answers; beyond: as on a stop",
        600.0,
    )
    drain_delay: float = setting(
        seconds_or_0,
        "seconds that the server still listens on a stop, after /ready has turned to 503",
        0.0,
    )
    tls: Tls | None = setting(optional(section(Tls)), "", None)
    concurrency: Concurrency = group(Concurrency)

    @property
    def scheme(self) -> str:
        """The scheme in the address of the TCP sockets."""
        return "http" if self.tls is None else "https"


class Sse(SettingsClass):
    """The SSE face."""

    endpoint: str = setting(
        route, "path of the SSE face; not that of the WebSocket face", "/sse/chat"
    )


class Streaming(SettingsClass):
    """The streaming of answers."""

    IGNORED: ClassVar = {
        "backoff": "each event goes to its client at once; http_client.backoff_factor is for retries",
        "delta_batch_size": "each event goes to its client at once",
    }

    enabled: bool = setting(
        boolean, "whether an answer is streamed when its request does not say", True
    )


class Persistence(SettingsClass):
    """Bounds on the stored turns of one conversation."""

    enabled: bool = setting(
        boolean,
        "whether conversations outlive a restart (with `type: sql`); false: "
        "as with `type: memory`",
        True,
    )
    retention_policy: str = setting(
        retention,
        "policy that bounds what is kept of one conversation; unlimited: 1 MiB of text",
        "token_limit",
    )
    max_tokens_per_conversation: int = setting(
        count,
        "tokens kept of one conversation under `token_limit`; beyond: "
        "its oldest turns are deleted",
        8000,
    )
    max_messages_per_conversation: int = setting(
        count,
        "messages kept of one conversation under `message_count`; beyond: "
        "its oldest turns are deleted",
        100,
    )
    retention_days: float = setting(
        days, "days that a message is kept under `time_based`; beyond: it is deleted", 30.0
    )
    clear_on_startup: bool = setting(
        boolean,
        "whether a start deletes all conversations; of a cluster: that of its first instance; "
        "of several workers: that of their parent",
        False,
    )


class Repository(SettingsClass):
    """The storage of conversations."""

    IGNORED: ClassVar = {"connection_pool": "one thread writes the file, and another one reads it"}

    type: str = setting(
        one_of("memory", "sql"),
        "storage of conversations: memory, or an SQLite file",
        "memory",
    )
    path: str = setting(line, "path of the SQLite file (with `type: sql`)", "events.db")
    persistence: Persistence = group(Persistence)

    @property
    def in_file(self) -> bool:
        """Whether conversations are kept in the file."""
        return self.type == "sql" and self.persistence.enabled


class Context(SettingsClass):
    """Bounds on the history that is sent to a provider in front of a new message."""

    IGNORED: ClassVar = {
        "conversation_limits": "max_tokens beside it bounds what is sent of every conversation",
        "response_tokens": "max_tokens of the provider, or in the options of a question",
    }

    max_tokens: int = setting(
        count,
        "tokens of history, new message and answer together; beyond: "
        "the oldest turns are not sent",
        4000,
    )
    reserve_tokens: int = setting(
        count_or_0, "tokens of `max_tokens` that are left free for the answer", 500
    )
    preserve_recent: int = setting(
        count_or_0, "latest messages that are sent even if they exceed `max_tokens`", 5
    )


class Service(SettingsClass):
    """The way from a chat to a request to a provider."""

    IGNORED: ClassVar = {
        "max_tool_hops": "the client runs the tools, as often as it wants to",
        "tool_notifications": "the client runs the tools: it gets the calls as tool_calls",
        "logging": "no text of a chat is logged; the log of requests has their numbers",
    }

    system_prompt: str = setting(
        prose, "system message in front of chats that are sent as `text`; never on /v1", ""
    )
    streaming: Streaming = group(Streaming)
    repository: Repository = group(Repository)
    context: Context = group(Context)


class Streams(SettingsClass):
    """Bounds on how long answers are kept, and on how many bytes of them are kept."""

    resume_window: float = setting(
        seconds_or_0,
        "seconds that an answer runs on without a reader, and that a finished one is kept; "
        "0: no answer can be resumed",
        30.0,
    )
    hold: str = setting(
        one_of(*HOLDS, AGENTS),
        "what of a streamed answer is held: what comes before its content; from the first piece "
        "of a tool call on, all until the model has finished; the whole turn; or, with agents, "
        "the turn of a subagent, the calls of another agent, and else the preamble",
        AGENTS,
    )
    max_stream_bytes: int = setting(
        size,
        "bytes kept of one answer; beyond: its oldest events are dropped; "
        "an event larger than that: 502",
        2**22,
    )
    max_kept_bytes: int = setting(
        size,
        "bytes kept of all answers and stored responses together, all that belongs to them "
        "counted; beyond: of the key that keeps most the oldest that have ended are dropped, "
        "then readers that are behind, then events that every reader of an answer has "
        "passed, then answers that nobody reads, then new requests get 503",
        2**28,
    )
    max_detached: int = setting(
        count,
        "answers that run without a reader; beyond: the oldest of who has most is cancelled. "
        "Half as many may run, or wait to, in the background; beyond: 503",
        100,
    )
    store_window: float = setting(
        seconds_or_0,
        "seconds that a stored response can be continued by its id (`previous_response_id`) and "
        "read, and that an answer is kept that has run in the background; 0: none is stored, and "
        "such an answer is kept for `resume_window`",
        3600.0,
    )
    max_response_bytes: int = setting(
        size, "bytes of one answer that a provider does not stream; beyond: 502", 2**26
    )
    send_timeout: float = setting(
        seconds,
        "seconds without progress in writing to a client; beyond: the client is dropped",
        10.0,
    )


class Chat(SettingsClass):
    """Everything on the clients' side."""

    SHIPPED: ClassVar = shipped.values("chat")

    websocket: WebSocket = group(WebSocket)
    sse: Sse = group(Sse)
    service: Service = group(Service)
    streams: Streams = group(Streams)

    def __post_init__(self) -> None:
        if self.sse.endpoint == self.websocket.endpoint:
            message = f"must differ from chat.websocket.endpoint ({self.websocket.endpoint})"
            check_rules(self, (("sse", "endpoint"), message))

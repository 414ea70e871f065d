"""The servers that can be measured: one `Peer` each. To compare with another, add it to `PEERS`."""

from dataclasses import dataclass

AIOSERVER = """\
chat:
  websocket:
    host: 127.0.0.1
    port: $port
    endpoint: /ws/chat
    allow_origins: ["*"]
    allow_credentials: true
    max_message_size: 16777216
    ping_interval: 20
    ping_timeout: 10
    concurrency:
      max_connections: 4000
      connection_queue_size: 4000
      queue_timeout: 5.0
      uvicorn:
        backlog: 4096
        workers: 1
        access_log: false
        keepalive_timeout: 75
        max_keepalive_requests: 100000000
        h11_max_incomplete_event_size: 16384
        h11_max_request_line_size: 8192
        h11_max_header_size: 32768
llm:
  active: local
  providers:
    local:
      base_url: http://127.0.0.1:$provider/v1
      model: mock-model
      http_client:
        max_connections: 4000
        max_keepalive: 4000
        keepalive_expiry: 30.0
        connect_timeout: 10.0
        read_timeout: 60.0
        write_timeout: 10.0
        pool_timeout: 5.0
        requests_per_minute: 100000000
        concurrent_requests: 4000
        max_retries: 0
        backoff_factor: 0.5
logging:
  level: WARNING
  format: json
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server under load: OpenAI's `POST /v1/chat/completions`, and perhaps our WebSocket.

    In `command` and `config` stand for what differs from start to start: `$python`, `$here` (this
    folder), `$port` (to listen on), `$provider` (the mock provider's port), `$loop`, and
    `$config`, the file that `config` is written to.
    """

    name: str
    command: tuple[str, ...]
    config: str = ""
    headers: tuple[str, ...] = ()  # of every request, as "Name: value"
    path: str = "/v1/chat/completions"
    websocket: str | None = None  # path of a WebSocket that speaks aioserver's frames
    patience: float = 30.0  # seconds that a start may take


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="aioserver",
            command=(
                *("$python", "-m", "aioserver", "serve"),
                *("--config", "$config", "--port", "$port", "--loop", "$loop"),
            ),
            config=AIOSERVER,
            websocket="/ws/chat",
        ),
        Peer(
            name="bare",
            command=(
                *("$python", "$here/bare.py", "--port", "$port", "--loop", "$loop"),
                *("--provider", "http://127.0.0.1:$provider"),
            ),
            websocket="/ws/chat",
        ),
    )
}
BASELINE = "bare"  # the ratios of all others are to this one

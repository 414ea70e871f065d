"""The servers that can be measured: one `Peer` each.

To compare with another, add it to `PEERS`.
"""

import hashlib
import secrets
from dataclasses import dataclass

import virtual

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
      max_connections: 12000
      connection_queue_size: 12000
      queue_timeout: 5.0
      uvicorn:
        backlog: 12000
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
      base_url: $origin/v1
      ca_file: $authority
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

# The same, with answers that are continued where they break off.
CONTINUED = AIOSERVER.replace(
    "model: mock-model\n", "model: mock-model\n      continuation: prefill\n"
)

# Of two clients, as long as each other: half of all connections have the one, half the other.
KEYS = ("aio-one-" + "0123456789abcdef" * 2, "aio-two-" + "fedcba9876543210" * 2)
AUTH = """\
auth:
  keys:
""" + "".join(
    f"""\
    - name: client{number}
      sha256: {hashlib.sha256(key.encode()).hexdigest()}
      max_concurrent: 12000
      requests_per_minute: 100000000
"""
    for number, key in enumerate(KEYS)
)

# 200 places, and who finds none is refused at once; clients have keys, whose own limits are out of
# reach.
TIGHT = AUTH + (
    AIOSERVER.replace("max_connections: 12000", "max_connections: 200")
    .replace("connection_queue_size: 12000", "connection_queue_size: 200")
    .replace("queue_timeout: 5.0", "queue_timeout: 0")
)

NGINX = """\
daemon off;
master_process off;
worker_processes 1;
pid $folder/nginx-$port.pid;
error_log stderr error;
events { worker_connections 9000; }
http {
  access_log off;
  client_body_temp_path $folder/nginx-body;
  proxy_temp_path $folder/nginx-proxy;
  fastcgi_temp_path $folder/nginx-fastcgi;
  uwsgi_temp_path $folder/nginx-uwsgi;
  scgi_temp_path $folder/nginx-scgi;
  keepalive_requests 100000000;
  upstream provider {
    server 127.0.0.1:$provider max_fails=0;
    keepalive 4096;
    keepalive_requests 100000000;
  }
  server {
    listen 127.0.0.1:$port backlog=4096;
    location / {
      proxy_pass $scheme://provider;
      proxy_ssl_trusted_certificate $authority;
      proxy_ssl_verify on;
      proxy_ssl_name localhost;  # it knows no addresses in certificates
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }
  }
}
"""

HAPROXY = """\
global
  nbthread 1
  maxconn 9000
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  option http-no-delay
  http-reuse always
frontend clients
  bind 127.0.0.1:$port backlog 4096
  default_backend provider
backend provider
  server mock 127.0.0.1:$provider pool-max-conn 4096 $haproxy_tls
"""

LITELLM_KEY = "sk-" + secrets.token_hex(32)  # it does not start without a strong one
LITELLM = """\
model_list:
  - model_name: mock-model
    litellm_params:
      model: openai/mock-model
      api_base: $origin/v1
      api_key: none
      max_retries: 0
general_settings:
  disable_spend_logs: true
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server under load: OpenAI's `POST /v1/chat/completions`, and perhaps our WebSocket.

    In `command` and `config` stand for what differs from start to start: `$python`, `$here` (this
    folder), `$port` (to listen on), `$loop`, `$config`, the file that `config` is written to, and
    `$folder`, one for files that may be forgotten. Of the mock provider: `$provider`, its port;
    `$scheme`, `http` or `https`; `$origin`, its URL; `$authority`, a file with the certificate
    that its own is checked against; `$haproxy_tls`, the words that HAProxy needs for TLS.
    """

    name: str
    command: tuple[str, ...]
    config: str = ""
    headers: tuple[str, ...] = ()  # of every request, as "Name: value"
    keys: tuple[str, ...] = (
        KEYS  # of its clients, as bearer tokens in turn; most servers do not look
    )
    path: str = "/v1/chat/completions"
    websocket: str | None = None  # path of a WebSocket that speaks aioserver's frames
    responses: str = ""  # path of a WebSocket that speaks OpenAI's Responses API
    events: str = ""  # path of an event stream with the server's state
    patience: float = 30.0  # seconds that a start may take
    tight: str = ""  # a configuration with 200 places and no waiting
    tls: bool = False  # its clients speak TLS with it
    restarts: bool = False  # a stop ends what runs first: `restart` is measured
    steps: tuple[str, ...] = ()  # the only ones it gets; none named: all
    program: str = ""  # where that is not installed, there is no such column
    requirement: str = ""  # of pip, into an environment of its own: measured with --peers only


# What a relay that knows no WebSocket chat is measured at. (1,000 streams: `held` says that.)
RELAYED = (
    "plain",
    "fast",
    "fast10",
    "sse500",
    "tlsplain",
    "tls500",
    "first",
    "leave",
    "memory",
    "held",
    "curve",
)
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
            tight=TIGHT,
            websocket="/ws/chat",
            responses="/v1/responses",
            events="/events",
            restarts=True,
        ),
        Peer(
            name="bare",
            command=(
                *("$python", "$here/bare.py", "--port", "$port", "--loop", "$loop"),
                *("--provider", "$origin", "--authority", "$authority"),
            ),
            websocket="/ws/chat",
            restarts=True,
        ),
        Peer(
            name="nginx",
            command=("nginx", "-p", "$folder", "-c", "$config"),
            config=NGINX,
            steps=RELAYED,
            program="nginx",
        ),
        Peer(
            name="haproxy",
            command=("haproxy", "-db", "-f", "$config"),
            config=HAPROXY,
            steps=RELAYED,
            program="haproxy",
        ),
        Peer(
            name="litellm",
            command=(
                *("env", "LITELLM_MODE=PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP=True"),
                *("LITELLM_LOG=ERROR", f"LITELLM_MASTER_KEY={LITELLM_KEY}"),
                *(str(virtual.program("litellm")), "--config", "$config"),
                *("--host", "127.0.0.1", "--port", "$port", "--num_workers", "1"),
            ),
            config=LITELLM,
            keys=(LITELLM_KEY,),
            steps=("plain", "fast", "curve"),
            patience=120.0,
            requirement="litellm[proxy]",
        ),
    )
}
OURS = "aioserver"
BASELINE = "bare"  # the ratios of all others are to this one
DIRECT = Peer(name="direct", command=())  # no server: the load goes to the mock provider itself

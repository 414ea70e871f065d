"""The shapes of a snapshot: the JSON object of `/stats`, and what it consists of.

The meaning of each field is in docs/monitoring.md.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

Percentiles = dict[str, float]


class ConnectionsState(TypedDict):
    """The connections that are admitted, or wait to be."""

    active: int
    limit: int
    waiting: int
    queue_size: int
    oldest_wait: float
    active_by_face: dict[str, int]
    waiting_by_face: dict[str, int]
    opened: int
    rejected: int
    rejected_per_second: float


class RequestsState(TypedDict):
    """The requests for an answer."""

    total: int
    per_second: float
    running: int
    outcomes: dict[str, int]


class BugsState(TypedDict):
    """The requests that met a bug of the server, since the start and in the last minute."""

    total: int
    last_minute: int


class StreamsState(TypedDict):
    """The streams that are kept."""

    detached: int
    max_detached: int
    finished: int
    responses: int
    bytes: int
    max_bytes: int


class HistoryTrouble(TypedDict):
    """A fault of the storage of conversations, since when it is there (Unix time), and what to do."""

    kind: str
    since: float
    text: str
    advice: str


class HistoryState(TypedDict):
    """The storage of conversations: `memory`, `sql` or `redis`; turns that wait to be written, were, and were lost."""

    storage: str
    waiting: int
    written: int
    lost: int
    trouble: HistoryTrouble | None


class PoolState(TypedDict):
    """The connections to one provider."""

    open: int
    idle: int
    limit: int
    waiting: int


class PaceState(TypedDict):
    """The pace of one provider; *cooling* in seconds."""

    per_minute: int
    left: int
    cooling: float


class RetryBudgetState(TypedDict):
    """The budget of retries: *used* of *limit* in the last ten seconds; *refused* since the start."""

    used: int
    limit: int
    refused: int


class SilenceState(TypedDict):
    """The silence of a provider: see providers/stall.py; *longest* in seconds."""

    longest: float
    stalled: int
    unanswered: int
    under_way: int


class Trouble(TypedDict):
    """The trouble of a provider: see troubles.py; *since* is Unix time in seconds."""

    kind: str
    word: str
    since: float
    text: str
    detail: str
    advice: str
    severity: str


class Verdict(TypedDict):
    """The state of the whole server in words: see verdict.py."""

    level: str
    state: str
    word: str
    text: str
    detail: str
    advice: str
    about: str


class ProviderState(TypedDict):
    """One provider."""

    usable: bool
    active: bool
    model: str
    in_flight: int
    limit: int
    waiting: int
    queue_size: int
    oldest_wait: float
    pool: PoolState
    pace: PaceState
    state: str
    next_try: float | None
    flagged: bool
    retries: int
    retry_budget: RetryBudgetState
    failovers: int
    requests: int
    cancelled: int
    faults: dict[str, int]
    requests_per_second: float
    tokens_per_second: float
    first_token: Percentiles | None
    silence: Percentiles | None
    silent: SilenceState
    trouble: Trouble | None


class LoopState(TypedDict):
    """How late the event loop was in the last interval, in seconds."""

    lag: float
    lag_max: float


class ProcessState(TypedDict):
    """The resources that the process uses; *cpu* is the share of one core."""

    open_fds: int | None
    max_fds: int
    rss_bytes: int | None
    tasks: int
    cpu: float


class ClusterState(TypedDict):
    """How an instance, or the worst of several, stands with the cluster's server, and what went to and fro.

    *state*: `joined`, `unheard` or `alone` (wings/cluster/leases.py). *calls* and *failed_calls* are those about limits. *links* are
    logs of this instance that are read elsewhere, *mirrors* those of others that are read here. *unclaimed* requests with an
    id were answered though the server did not say in time whether another instance has it. *lost* messages found too many
    others waiting.
    """

    state: str
    calls: int
    failed_calls: int
    links: int
    mirrors: int
    unclaimed: int
    lost: int


class InstanceState(TypedDict):
    """One instance of a cluster by itself; *places* are those of each provider that it has in hand."""

    ready: bool
    uptime: float
    version: str
    level: str
    connections: int
    connections_limit: int
    waiting: int
    running: int
    requests_per_second: float
    tokens_per_second: float
    in_flight: dict[str, int]
    places: dict[str, int]
    lag_max: float
    cpu: float
    rss_bytes: int | None
    cluster: str


class Snapshot(TypedDict):
    """The whole state: the JSON object of `/stats`.

    *cluster* and *instances* are there in a cluster only; the value of an instance that has not answered is None.
    """

    time: float
    name: str
    version: str
    uptime: float
    ready: bool
    verdict: Verdict
    active_provider: str
    fallbacks: list[str]
    connections: ConnectionsState
    rejections: dict[str, int]
    requests: RequestsState
    bugs: BugsState
    first_token: Percentiles | None
    tokens_per_second: float
    delay: dict[str, Percentiles | None]
    streams: StreamsState
    history: HistoryState
    slow_clients: int
    auth_failures: dict[str, int]
    providers: dict[str, ProviderState]
    loop: LoopState
    process: ProcessState
    watchers: int
    endpoints: dict[str, str]
    cluster: NotRequired[ClusterState]
    instances: NotRequired[dict[str, InstanceState | None]]


class Incident(TypedDict):
    """The data of an `incident` event; *time* is Unix time in seconds, *advice* may be empty.

    *instance* is there if another instance of a cluster has reported it.
    """

    time: float
    kind: str
    severity: str
    text: str
    provider: str | None
    advice: str
    instance: NotRequired[str]


class History(TypedDict):
    """The `history` event: the values of each series at each *time*, and incidents."""

    interval: float
    time: list[float]
    series: dict[str, list[float | None]]
    providers: dict[str, dict[str, list[float | None]]]
    incidents: list[Incident]

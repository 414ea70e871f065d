"""The shape of a snapshot: the JSON object of `/stats`, its parts, and how each field adds up.

In a cluster, `fold` (fold.py) combines the snapshots of all instances into one. Each field declares
the rule for it: counts are added; of waits, silences and ages the longest counts; a value that is
the same everywhere is taken from the instance that is asked.

The meaning of each field is in docs/monitoring.md. This file is long, but it is one concept: a
field without its rule could not be added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NotRequired, TypedDict

# A rule makes one value from the values of several instances. The first of them is the value of the
# instance that is asked.
Rule = Callable[[Sequence[Any]], Any]


def _sum(values: Sequence[float]) -> float:
    """Add up; shares and rates have three decimals at most."""
    return round(sum(values), 3)


def _sum_of_known(values: Sequence[float | None]) -> float | None:
    """Add up the values that an instance knows."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _earliest(values: Sequence[float | None]) -> float | None:
    """Return the smallest value, if there is one."""
    return min((value for value in values if value is not None), default=None)


def _together(values: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the entries of all."""
    return [entry for entries in values for entry in entries]


def _by_name(values: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Add up by name; a name that only one instance has is kept."""
    total: Counter[str] = Counter()
    for counts in values:
        total.update(counts)
    return dict(total)


def _first(values: Sequence[Any]) -> Any:
    """Return the value of the instance that is asked."""
    return values[0]


def _worst(order: Sequence[str]) -> Rule:
    """Return the rule that chooses the value that stands first in *order*."""
    return lambda values: min(values, key=order.index)


SUM: Rule = _sum
MAX: Rule = max
ANY: Rule = any
COUNTS: Rule = _by_name
ENTRIES: Rule = _together
KNOWN: Rule = _sum_of_known
EARLIEST: Rule = _earliest
OWN: Rule = _first
# `Fold` computes these fields itself, as it needs more than the values of the field: percentiles,
# the worst trouble, the verdict.
MADE = OWN
# The states of a provider, and the states of an instance in its cluster: the worst first.
STATES = ("dead", "sick", "well")
STANDINGS = ("alone", "unheard", "joined")

Percentiles = dict[str, float]


class ConnectionsState(TypedDict):
    """The connections that are admitted, or wait to be."""

    active: Annotated[int, SUM]
    limit: Annotated[int, SUM]
    waiting: Annotated[int, SUM]
    queue_size: Annotated[int, SUM]
    oldest_wait: Annotated[float, MAX]
    active_by_face: Annotated[dict[str, int], COUNTS]
    waiting_by_face: Annotated[dict[str, int], COUNTS]
    opened: Annotated[int, SUM]
    rejected: Annotated[int, SUM]
    rejected_per_second: Annotated[float, SUM]


class RequestsState(TypedDict):
    """The requests for an answer."""

    total: Annotated[int, SUM]
    per_second: Annotated[float, SUM]
    running: Annotated[int, SUM]
    outcomes: Annotated[dict[str, int], COUNTS]


class BugsState(TypedDict):
    """The requests that met a bug of the server, since the start and in the last minute."""

    total: Annotated[int, SUM]
    last_minute: Annotated[int, SUM]


class HeldState(TypedDict):
    """Answers that wait for the end of their turn, and their bytes."""

    answers: Annotated[int, SUM]
    bytes: Annotated[int, SUM]


class StreamsState(TypedDict):
    """The streams that are kept."""

    detached: Annotated[int, SUM]
    max_detached: Annotated[int, SUM]
    background: Annotated[int, SUM]
    finished: Annotated[int, SUM]
    responses: Annotated[int, SUM]
    held: HeldState
    bytes: Annotated[int, SUM]
    max_bytes: Annotated[int, SUM]


class PoolState(TypedDict):
    """The connections to one provider."""

    open: Annotated[int, SUM]
    idle: Annotated[int, SUM]
    limit: Annotated[int, OWN]
    waiting: Annotated[int, SUM]


class BackgroundState(TypedDict):
    """The answers in the background at one provider: those that have a place or are the next to
    get one, and those that wait until others have ended.
    """

    running: Annotated[int, SUM]
    waiting: Annotated[int, SUM]


class PaceState(TypedDict):
    """The pace of one provider; *cooling* in seconds."""

    per_minute: Annotated[int, OWN]
    left: Annotated[int, SUM]
    cooling: Annotated[float, MAX]


class RetryBudgetState(TypedDict):
    """The budget of retries: *used* of *limit* in the last ten seconds.

    *refused* counts the retries that were refused since the start.
    """

    used: Annotated[int, SUM]
    limit: Annotated[int, SUM]
    refused: Annotated[int, SUM]


class ContinuedState(TypedDict):
    """The answers that this provider has continued, since the start and in the last minute."""

    total: Annotated[int, SUM]
    last_minute: Annotated[int, SUM]


class SilenceState(TypedDict):
    """The silence of a provider: see providers/silence.py; *longest* in seconds."""

    longest: Annotated[float, MAX]
    stalled: Annotated[int, SUM]
    unanswered: Annotated[int, SUM]
    under_way: Annotated[int, SUM]


class Alert(TypedDict):
    """The alert of a provider: see alerts.py; *since* is Unix time in seconds."""

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


class TrialState(TypedDict):
    """The trials of a sick provider at this instance: the seconds between failed trials, how many
    trials have succeeded in a row, and how many successes end the sickness.
    """

    interval: float
    row: int
    needed: int


class LearnedState(TypedDict):
    """The knowledge of the APIs of a provider, at this instance.

    *messages*: `speaks`, `bridge`, `unknown` or `no`. *context_limit* has tokens by model.
    """

    messages: str
    refused_words: list[str]
    context_limit: dict[str, int]
    tokens_per_byte: float


class ProviderState(TypedDict):
    """One provider."""

    usable: Annotated[bool, ANY]
    active: Annotated[bool, OWN]
    model: Annotated[str, OWN]
    learned: Annotated[LearnedState, OWN]
    in_flight: Annotated[int, SUM]
    limit: Annotated[int, MADE]
    waiting: Annotated[int, SUM]
    waiting_by_class: Annotated[dict[str, int], COUNTS]
    queue_size: Annotated[int, SUM]
    oldest_wait: Annotated[float, MAX]
    pool: PoolState
    pace: PaceState
    state: Annotated[str, _worst(STATES)]
    next_try: Annotated[float | None, EARLIEST]
    trial: Annotated[TrialState | None, OWN]
    flagged: Annotated[bool, ANY]
    retries: Annotated[int, SUM]
    retry_budget: RetryBudgetState
    background: BackgroundState
    failovers: Annotated[int, SUM]
    continued: ContinuedState
    rescued: Annotated[int, SUM]
    requests: Annotated[int, SUM]
    cancelled: Annotated[int, SUM]
    faults: Annotated[dict[str, int], COUNTS]
    requests_per_second: Annotated[float, SUM]
    tokens_per_second: Annotated[float, SUM]
    first_token: Annotated[Percentiles | None, MADE]
    silence: Annotated[Percentiles | None, MADE]
    silent: SilenceState
    trouble: Annotated[Alert | None, MADE]


class MemberState(TypedDict):
    """One member of a group. All numbers but *starts* are those of its provider.

    *state* is a word of groups.py.
    """

    provider: str
    model: str
    state: str
    in_flight: int
    limit: int
    starts: int


def _members(values: Sequence[Sequence[MemberState]]) -> list[MemberState]:
    """Add up the starts of each member. `Fold` sets the fields that come from its provider."""
    starts: Counter[tuple[str, str]] = Counter()
    for members in values:
        starts.update({(each["provider"], each["model"]): each["starts"] for each in members})
    return [{**each, "starts": starts[each["provider"], each["model"]]} for each in values[0]]


class GroupState(TypedDict):
    """One name of `llm.models`."""

    choose: Annotated[str, OWN]
    affinity: Annotated[str, OWN]
    members: Annotated[list[MemberState], _members]
    waiting: Annotated[int, SUM]
    oldest_wait: Annotated[float, MAX]
    held_back: Annotated[int, SUM]
    homes: Annotated[dict[str, int], COUNTS]
    known_share: Annotated[float | None, MADE]
    cached_share: Annotated[float | None, MADE]


class KeyBudgetState(TypedDict):
    """A budget of a key, in tokens; *reset* are the seconds until all of it is available again."""

    limit: int
    used: int
    reserved: int
    remaining: int
    reset: float


def _budgets(values: Sequence[Mapping[str, KeyBudgetState]]) -> dict[str, KeyBudgetState]:
    """Return the budgets of the instance that knows of the largest spending.

    Each instance knows what all instances have used, but only its own reservations.
    """
    total: dict[str, KeyBudgetState] = {}
    for name, first in values[0].items():
        each = [budgets[name] for budgets in values if name in budgets]
        taken = max(budget["used"] + budget["reserved"] for budget in each)
        reserved = min(taken, sum(budget["reserved"] for budget in each))
        total[name] = {
            "limit": first["limit"],
            "used": taken - reserved,
            "reserved": reserved,
            "remaining": max(0, first["limit"] - taken),
            "reset": max(budget["reset"] for budget in each),
        }
    return total


class KeyState(TypedDict):
    """One key: its *running* answers and their *limit*, its *waiting* requests and their
    *queue_size*, the tokens of today since the start, and its budgets by their settings.
    """

    running: Annotated[int, SUM]
    limit: Annotated[int, MAX]
    waiting: Annotated[int, SUM]
    queue_size: Annotated[int, SUM]
    tokens_today: Annotated[int, SUM]
    budgets: Annotated[dict[str, KeyBudgetState], _budgets]


class LoopState(TypedDict):
    """How late the event loop was in the last interval, in seconds."""

    lag: Annotated[float, MAX]
    lag_max: Annotated[float, MAX]


class ProcessState(TypedDict):
    """The resources that the process uses; *cpu* is the share of one core."""

    open_fds: Annotated[int | None, KNOWN]
    max_fds: Annotated[int, SUM]
    rss_bytes: Annotated[int | None, KNOWN]
    tasks: Annotated[int, SUM]
    cpu: Annotated[float, SUM]


class ClusterState(TypedDict):
    """The state of an instance in its cluster, or the worst state of several, and their traffic.

    *state* is `joined`, `unheard` or `alone` (wings/cluster/limits/leases.py). *calls* and *failed_calls*
    count the calls about limits. *links* are answers of this instance that other instances read,
    and *tunnels* are answers of other instances that this one passes on. *unclaimed* counts requests
    with an id that were answered although Redis did not say in time whether another instance has
    that id.
    """

    state: Annotated[str, _worst(STANDINGS)]
    calls: Annotated[int, SUM]
    failed_calls: Annotated[int, SUM]
    links: Annotated[int, SUM]
    tunnels: Annotated[int, SUM]
    unclaimed: Annotated[int, SUM]


class InstanceState(TypedDict):
    """One instance of a cluster; *places* are the places that it holds now, by provider."""

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


class FormerState(TypedDict):
    """A process that was replaced, and still has *answers*, the *longest* for so many seconds.

    *worker* is its slot; *since* and *until*, when the last of them ends at the latest, are Unix
    times in seconds.
    """

    worker: int | None
    version: str
    since: float
    until: float
    answers: int
    longest: float


class Snapshot(TypedDict):
    """The whole state: the JSON object of `/stats`.

    The state of each section (section.py) is in it, too, under the section's key. *cluster* and
    *instances* are there in a cluster only; the value of an instance that has not answered is
    None.
    """

    time: Annotated[float, OWN]
    name: Annotated[str, OWN]
    version: Annotated[str, OWN]
    uptime: Annotated[float, MAX]
    ready: Annotated[bool, ANY]
    verdict: Annotated[Verdict, MADE]
    active_provider: Annotated[str, OWN]
    active_group: Annotated[str | None, OWN]
    fallbacks: Annotated[list[str], OWN]
    connections: ConnectionsState
    rejections: Annotated[dict[str, int], COUNTS]
    requests: RequestsState
    bugs: BugsState
    first_token: Annotated[Percentiles | None, MADE]
    tokens_per_second: Annotated[float, SUM]
    delay: Annotated[dict[str, Percentiles | None], MADE]
    streams: StreamsState
    slow_clients: Annotated[int, SUM]
    auth_failures: Annotated[dict[str, int], COUNTS]
    providers: dict[str, ProviderState]
    groups: dict[str, GroupState]
    keys: dict[str, KeyState]
    loop: LoopState
    process: ProcessState
    watchers: Annotated[int, SUM]
    former: Annotated[list[FormerState], ENTRIES]
    worker_deaths: Annotated[dict[str, int], COUNTS]
    endpoints: Annotated[dict[str, str], OWN]
    cluster: NotRequired[ClusterState]
    instances: NotRequired[Annotated[dict[str, InstanceState | None], MADE]]


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

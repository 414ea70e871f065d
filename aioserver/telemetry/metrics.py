"""Every metric of the server: its counter, its name, its help text and its labels.

This file is one concept: all metrics stand here, so that no name or label is made elsewhere,
except for the callers' spending (usage/accounting.py) and for those that OpenTelemetry names
(wings/tracing/gen_ai_metrics.py).

Events are counted in attributes of `Metrics` and of its meters, one for each face, provider and
group. The four tables at the end of the file make metrics of these attributes, one row each; names
lack their prefix `aioserver_`, those of counters their suffix `_total`.

Labels come from the configuration or from a list in this file, never from a client, and every set
of labels exists from the start, at 0.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from aioserver import errors, provider_errors
from aioserver.config.models import PREFIX
from aioserver.protocol.bridging.accepted_parameters import LIMIT, MAX_TOKENS, OPTIONAL
from aioserver.protocol.request_headers import CALLS, TURN
from aioserver.telemetry import logs
from aioserver.telemetry.bookkeeping import bookkeeping, nothing
from aioserver.telemetry.bugs import Bugs
from aioserver.telemetry.counters import (
    SHORT_BOUNDS,
    Counter,
    Histogram,
    RecentShare,
    RecentValues,
    Share,
    sum_of,
)
from aioserver.telemetry.outcome import HOMES, NONE, TURNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from aioserver.config import settings

logger = logging.getLogger("aioserver.requests")

FACES = ("websocket", "sse", "openai", "responses_ws", "anthropic", "other")
# The faces whose connections end with a close code.
WEBSOCKETS = ("websocket", "responses_ws")
OK, CLIENT_LEFT, CANCELLED = "ok", "client_left", "cancelled"
OUTCOMES = (
    OK,
    "client_error",
    "rejected",
    "provider_error",
    CLIENT_LEFT,
    errors.SlowClient.outcome,
    CANCELLED,
    "internal_error",
)
# The results of a TLS handshake. `plain`: a request that does not speak TLS.
DONE, RESUMED, FAILED, TIMED_OUT, DISPLACED, PLAIN = HANDSHAKES = (
    *("done", "resumed", "failed", "timeout", "displaced", "plain"),
)
ATTEMPTS = (
    *("ok", "connect_error", "timeout", "http_429", "http_4xx", "http_5xx", "tls"),
    *("loop", "disconnected", "stale", "bad_response", "cancelled"),
)
# Close codes of a WebSocket; any other is counted as "other".
CLOSE_CODES = (
    *("1000", "1001", "1002", "1003", "1005", "1006", "1007", "1008", "1009", "1011", "1012"),
    *("1013", "other"),
)


def _fault_codes(flag: str) -> list[str]:
    """Return the codes of the provider faults for which *flag* is true."""
    faults = provider_errors.subclasses(provider_errors.ProviderFault)
    return sorted({fault.code for fault in faults if getattr(fault, flag)})


# Every error code with the outcome of a request that ends with it; a code may have several.
ERROR_OUTCOMES = sorted(
    {(error.code, error.outcome) for error in provider_errors.subclasses(errors.AioserverError)}
)
# The two kinds of deadlines: for the start of a request, and for the end of its answer.
DEADLINE_KINDS = (errors.DeadlineExceeded.bound, errors.AnswerTooLate.bound)
DENIED_REASONS = sorted({error.reason for error in provider_errors.subclasses(errors.Denied)})
# The results of a call to a hook, by what the hook is shown.
HOOK_OUTCOMES = {
    "request": ("passed", "changed", "refused", "failed", "unseen"),
    "answer": ("passed", "refused", "failed", "unseen", "behind"),
}
# The results of an attempt to continue an answer.
CONTINUED, FAILED = "continued", "failed"
# The APIs that are translated to chat completions, and what is learned from refusals of these.
BRIDGED_APIS = ("messages", "responses")
LEARNABLE = (*OPTIONAL, MAX_TOKENS, LIMIT)
# A held turn that breaks off is retried after these, too.
_BREAKS = {provider_errors.ReadTimeout.code, provider_errors.ProviderBadResponse.code}
RETRY_CODES = sorted({*_fault_codes("retry"), *_BREAKS})
FAILOVER_CODES = _fault_codes("failover")
# Why workers have died that nobody had told to end: by their own exit, by a signal, or killed by
# their parent since they had hung.
EXITED, SIGNALLED, HUNG = DEATHS = ("exit", "signal", "hung")
# The results of turns of which events were held (telemetry/outcome.py), by what is held.
HELD_TURNS = [(hold, result) for hold in (CALLS, TURN) for result in TURNS]


class ProviderMeter:
    """The counts of one provider; *events* are those of its answers, about one a token."""

    def __init__(self) -> None:
        self.events = 0
        self.wait = Histogram()
        self.first_token = Histogram()
        self.interval = Histogram(SHORT_BOUNDS)
        self.gap = Histogram()
        self.attempts = {outcome: Counter() for outcome in ATTEMPTS}
        self.continuations = {result: Counter() for result in (CONTINUED, FAILED)}
        # Attempts whose request was translated, by its API; and the parameters that they have left
        # out, or learned about.
        self.bridged = {api: Counter() for api in BRIDGED_APIS}
        self.left_out = Counter()
        self.learnt = {what: Counter() for what in LEARNABLE}
        # Answers that broke off here and were continued, by the fault's code.
        self.seams: dict[str, Counter] = {}
        # Held turns that broke off here and were whole in another attempt, by the fault's code.
        self.rescued: dict[str, Counter] = {}
        # Tokens of prompts that were read again, by the verdict on their turn.
        self.cache_lost: dict[str, Counter] = {}
        self.retries = {code: Counter() for code in RETRY_CODES}
        self.retries_refused = Counter()
        self.failovers = {code: Counter() for code in FAILOVER_CODES}
        self.key_refused = Counter()
        self.recent_first_tokens = RecentValues()
        self.recent_silences = RecentValues()


# The prefix of our names.
OURS = "aioserver_"
# The names of a group's shares in its state.
KNOWN_SHARE, CACHED_SHARE = "known_share", "cached_share"
NO_GROUPS: Mapping[str, settings.Group] = MappingProxyType({})
# The meter of a stream that no provider fills yet: its counts are not shown.
NO_METER = ProviderMeter()


class FaceMeter:
    """The counts of one *face*; *connections* and *waiting* are the present numbers."""

    def __init__(self, face: str) -> None:
        self.face = face
        self.waiting = Counter()
        self.opened = Counter()
        # By close code, which is empty if the face is not a WebSocket.
        self.closed = {code: Counter() for code in (CLOSE_CODES if face in WEBSOCKETS else ("",))}
        self.rejected = Counter()
        self.duration = Histogram()
        self.first_token = Histogram()
        self.overhead = Histogram(SHORT_BOUNDS)

    @property
    def connections(self) -> int:
        """The number of connections that were opened and have not ended."""
        return int(self.opened.value - sum(counter.value for counter in self.closed.values()))


class GroupMeter:
    """The counts of one group: its requests by the provider where they have started last, and by
    home.

    For the prompts of the last minute: the bytes that were *known* where they started, and the
    tokens that were *cached* there, by provider.
    """

    def __init__(self) -> None:
        # By provider and home: each pair that has occurred, since a running request may go on by
        # other settings than those with which it has begun.
        self.starts: dict[tuple[str, ...], Counter] = {}
        self._homes: tuple[str, ...] = (NONE,)
        self.known = RecentShare()
        self.cached: dict[str, RecentShare] = {}

    def apply(self, group: settings.Group) -> None:
        """Count the members of *group* from now on, too."""
        for member in group.members:
            self.cached.setdefault(member.provider, RecentShare())
        if group.affinity == PREFIX:
            self._homes = HOMES
        for labels in product(self.cached, self._homes):
            self.starts.setdefault(labels, Counter())

    def started(self, home: str) -> int:
        """Return how many requests have started last at *home*'s kind of member."""
        return int(sum(count.value for labels, count in self.starts.items() if labels[1] == home))

    def shares(self, now: float) -> dict[str, Share | None]:
        """Return the KNOWN_SHARE and the CACHED_SHARE of the last minute's prompts."""
        return {
            KNOWN_SHARE: self.known.sums(now),
            CACHED_SHARE: sum_of(recent.sums(now) for recent in self.cached.values()),
        }


class Metrics:
    """All counts, for as long as the server lives.

    Always: each set of labels that can occur has its child; any other is a KeyError.
    """

    def __init__(self, providers: Mapping[str, settings.Provider]) -> None:
        self.providers: dict[str, ProviderMeter] = {}
        self.groups: dict[str, GroupMeter] = {}
        self.faces = {face: FaceMeter(face) for face in FACES}
        # Requests for an answer that have ended: by face, provider, code and outcome.
        self.requests: dict[tuple[str, ...], Counter] = {}
        self.outcomes = {outcome: Counter() for outcome in OUTCOMES}
        self.rejections = _counters_for("rejected")
        self.bad_requests = _counters_for("client_error")
        self.auth_failures = {reason: Counter() for reason in DENIED_REASONS}
        self.resumes = {outcome: Counter() for outcome in ("ok", "gap", "not_found")}
        self.handshakes = {outcome: Counter() for outcome in HANDSHAKES}
        self.reloads = {outcome: Counter() for outcome in ("applied", "invalid", "failed")}
        # Limits the log lines about refused requests, by error code: there may be thousands of
        # refusals a second.
        self.refusal_lines = logs.RateLimit(1, logs.SAME_ERROR)
        self.history_turns = {outcome: Counter() for outcome in ("written", "lost")}
        self.spans = {outcome: Counter() for outcome in ("exported", "dropped")}
        self.deadlines = {kind: Counter() for kind in DEADLINE_KINDS}
        self.worker_deaths = {cause: Counter() for cause in DEATHS}
        self.held_turns: dict[tuple[str, ...], Counter] = {
            labels: Counter() for labels in HELD_TURNS
        }
        # By caller and setting, made at the first count; callers are configured.
        self.budget_refusals: dict[tuple[str, ...], Counter] = {}
        self.key_wait = Histogram()
        # By hook, the kind of its input and its result; and the time of decisions by hook.
        self.hook_calls: dict[tuple[str, ...], Counter] = {}
        self.hook_seconds: dict[tuple[str, ...], Histogram] = {}
        self.slow_clients = Counter()
        self.gave_way = Counter()
        self.bugs = Bugs()
        self.admission_wait = {outcome: Histogram() for outcome in ("entered", "refused")}
        self.delay = {cause: Histogram() for cause in ("ours", "client")}
        self.loop_lag = Histogram(SHORT_BOUNDS)
        # Functions that yield the metrics of wings in use.
        self.of_wings: list[Callable[[], Iterable[Family]]] = []
        # From admission, on all faces.
        self.recent_first_tokens = RecentValues()
        self.recent_delays = {cause: RecentValues() for cause in self.delay}
        self.apply(providers)

    def apply(
        self,
        providers: Mapping[str, settings.Provider],
        groups: Mapping[str, settings.Group] = NO_GROUPS,
    ) -> None:
        """Count *providers* and *groups* from now on, too.

        A provider or group that is no longer configured keeps its numbers.
        """
        for name, group in groups.items():
            self.groups.setdefault(name, GroupMeter()).apply(group)
        for name in providers:
            if name not in self.providers:
                self.providers[name] = ProviderMeter()
                self.requests |= {labels: Counter() for labels in _request_labels(name)}

    def apply_hooks(self, names: Iterable[str]) -> None:
        """Count the hooks of these *names* from now on, too."""
        for name in names:
            self.hook_seconds.setdefault((name,), Histogram())
            for event, outcomes in HOOK_OUTCOMES.items():
                for outcome in outcomes:
                    self.hook_calls.setdefault((name, event, outcome), Counter())

    @bookkeeping(nothing)
    def count_error(self, error: errors.AioserverError) -> None:
        """Count *error*, which was sent to a client before any provider was asked.

        A request that is refused for now is logged as well: it has no other line.
        """
        if isinstance(error, errors.Denied):
            self.auth_failures[error.reason].value += 1
        if error.outcome == "rejected":
            self.rejections[error.code].value += 1
            if (left_out := self.refusal_lines.allow(error.code)) is not None:
                fields = {"code": error.code, "reason": str(error), **left_out}
                logger.warning("request refused", extra={"fields": fields})
        elif error.outcome == "client_error" and error.code in self.bad_requests:
            self.bad_requests[error.code].value += 1

    @bookkeeping(nothing)
    def count_deadline(self, error: errors.DeadlineExceeded) -> None:
        """Count *error*, which ends a request at a deadline of its own."""
        self.deadlines[error.bound].value += 1

    @bookkeeping(nothing)
    def count_budget_refusal(self, caller: str, error: errors.TokensExceeded) -> None:
        """Count a request of *caller* that was refused with *error*."""
        labels = caller, error.period
        counter = self.budget_refusals.get(labels)
        if counter is None:
            counter = self.budget_refusals[labels] = Counter()
        counter.value += 1

    @contextmanager
    def resuming(self) -> Iterator[None]:
        """Count how the body of the `with`, an attempt to resume a stream, ends. One that another
        instance answers ends there.
        """
        outcome = "ok"
        try:
            yield
        except errors.AioserverError as error:
            if isinstance(error, errors.ResumeGap):
                outcome = "gap"
            elif isinstance(error, errors.StreamNotFound):
                outcome = "not_found"
            self.resumes[outcome].value += 1
            raise
        self.resumes[outcome].value += 1

    def families(self) -> Iterator[Family]:
        """Yield every metric of the four tables below, and of wings, with its present value."""
        yield from (family_of(row, {"": self}) for row in SERVER_FAMILIES)
        yield from (family_of(row, self.faces, "face") for row in FACE_FAMILIES)
        yield from (family_of(row, self.providers, "provider") for row in PROVIDER_FAMILIES)
        yield from (family_of(row, self.groups, "group") for row in GROUP_FAMILIES)
        for families in self.of_wings:
            yield from families()


def _counters_for(outcome: str) -> dict[str, Counter]:
    """Return a counter for each error code of a request that ends with *outcome*."""
    return {code: Counter() for code, code_outcome in ERROR_OUTCOMES if code_outcome == outcome}


def _request_labels(provider: str) -> Iterator[tuple[str, str, str, str]]:
    for face in FACES:
        for outcome in (OK, CLIENT_LEFT, CANCELLED):
            yield face, provider, "", outcome
        for code, outcome in ERROR_OUTCOMES:
            yield face, provider, code, outcome


Child = Counter | Histogram
Owner = TypeVar("Owner")


class Family(NamedTuple):
    """One metric: a child for each set of labels, all of one type.

    *grows* makes a child, if children are made when they are first counted, so that each instance
    of a cluster has different ones. *prefix* stands before the name.
    """

    name: str
    help: str
    labels: tuple[str, ...]
    children: Mapping[tuple[str, ...], Child]
    grows: Callable[[], Child] | None = None
    prefix: str = OURS


class Row(NamedTuple, Generic[Owner]):
    """One metric in a table.

    *children* returns the only child, or a child for each value of *labels* (a string, or a tuple
    if there are several labels).
    """

    name: str
    children: Callable[[Owner], Child | Mapping[str, Child] | Mapping[tuple[str, ...], Child]]
    help: str
    labels: tuple[str, ...] = ()
    grows: Callable[[], Child] | None = None


def family_of(row: Row[Owner], owners: Mapping[str, Owner], label: str = "") -> Family:
    """Return the metric of *row* over all *owners*.

    The owners' names are the values of *label*, if any.
    """
    merged: dict[tuple[str, ...], Child] = {}
    for name, owner in owners.items():
        owner_values = (name,) if label else ()
        children = row.children(owner)
        if isinstance(children, Counter | Histogram):
            merged[owner_values] = children
        else:
            for values, child in children.items():
                row_values = (values,) if isinstance(values, str) else values
                merged[*owner_values, *row_values] = child
    labels = (label, *row.labels) if label else row.labels
    return Family(row.name, row.help, labels, merged, row.grows)


SERVER_FAMILIES: tuple[Row[Metrics], ...] = (
    Row(
        "requests",
        lambda m: m.requests,
        "Requests for an answer that have ended",
        ("face", "provider", "code", "outcome"),
    ),
    Row(
        "rejections",
        lambda m: m.rejections,
        "Requests and connections refused; they may be tried again later",
        ("code",),
    ),
    Row("resumes", lambda m: m.resumes, "Attempts to resume an answer", ("outcome",)),
    Row(
        "connections_gave_way",
        lambda m: m.gave_way,
        "Idle WebSockets closed because others waited, and their key had most places",
    ),
    Row(
        "history_turns",
        lambda m: m.history_turns,
        "Turns of conversations written to the file, or lost since it failed",
        ("outcome",),
    ),
    Row("trace_spans", lambda m: m.spans, "Spans exported, or dropped", ("outcome",)),
    Row(
        "deadlines",
        lambda m: m.deadlines,
        "Requests ended by a deadline of their own: to start, or for the whole answer",
        ("kind",),
    ),
    Row(
        "held_turns",
        lambda m: m.held_turns,
        "Turns of which something was held until the model had finished",
        ("hold", "result"),
    ),
    Row(
        "worker_deaths",
        lambda m: m.worker_deaths,
        "Workers that have died without being told to end",
        ("cause",),
    ),
    Row(
        "budget_refusals",
        lambda m: m.budget_refusals,
        "Requests refused since a budget of their key has too little left",
        ("caller", "period"),
        grows=Counter,
    ),
    Row(
        "key_wait_seconds",
        lambda m: m.key_wait,
        "Time for which requests have waited for a limit of their own key; only of those that waited",
    ),
    Row(
        "hook_calls",
        lambda m: m.hook_calls,
        "Calls to a hook with a request or an answer, by result",
        ("hook", "event", "outcome"),
        grows=Counter,
    ),
    Row(
        "hook_seconds",
        lambda m: m.hook_seconds,
        "Time for one decision of a hook, about a request or a whole answer",
        ("hook",),
    ),
    Row("slow_clients", lambda m: m.slow_clients, "Clients dropped because they read nothing"),
    Row(
        "bad_requests",
        lambda m: m.bad_requests,
        "Requests that were invalid or not allowed",
        ("code",),
    ),
    Row(
        "auth_failures", lambda m: m.auth_failures, "Requests that were denied access", ("reason",)
    ),
    Row("tls_handshakes", lambda m: m.handshakes, "TLS handshakes of clients", ("outcome",)),
    Row("reloads", lambda m: m.reloads, "Reloads of the configuration", ("outcome",)),
    Row("errors", lambda m: m.bugs, "Bugs in the server; the log has a traceback of each"),
    Row("log_lines_dropped", lambda _: logs.dropped(), "Log lines that could not be written"),
    Row(
        "admission_wait_seconds",
        lambda m: m.admission_wait,
        "Time from arrival until a place was entered or refused",
        ("outcome",),
    ),
    Row(
        "delay_seconds",
        lambda m: m.delay,
        "Longest time that the server, or a client that read nothing, held up an answer",
        ("by",),
    ),
    Row("loop_lag_seconds", lambda m: m.loop_lag, "How late the event loop called a timer"),
)
FACE_FAMILIES: tuple[Row[FaceMeter], ...] = (
    Row(
        "connections_rejected",
        lambda m: m.rejected,
        "Connections refused because no place was free",
    ),
    Row(
        "connections_closed",
        lambda m: m.closed,
        "Connections that have ended; code: the close code of a WebSocket",
        ("code",),
    ),
    Row(
        "request_duration_seconds",
        lambda m: m.duration,
        "Time from admission to the end of the answer",
    ),
    Row(
        "first_token_seconds",
        lambda m: m.first_token,
        "Time from admission to the first content of the answer, waits included",
    ),
    Row(
        "overhead_seconds",
        lambda m: m.overhead,
        "Time that the server itself took from admission to the provider's queue",
    ),
)
PROVIDER_FAMILIES: tuple[Row[ProviderMeter], ...] = (
    Row(
        "cache_lost_tokens",
        lambda m: m.cache_lost,
        "Tokens of prompts that the provider's cache has lost since the last turn, by verdict",
        ("verdict",),
        grows=Counter,
    ),
    Row(
        "provider_attempts",
        lambda m: m.attempts,
        "Attempts that were sent to the provider",
        ("outcome",),
    ),
    Row(
        "retries",
        lambda m: m.retries,
        "Further attempts at the same provider, by the fault of the one before",
        ("reason",),
    ),
    Row(
        "retries_refused",
        lambda m: m.retries_refused,
        "Further attempts that were not made, since the budget of retries was used up",
    ),
    Row(
        "continuations",
        lambda m: m.continuations,
        "Attempts to continue an answer that broke off, here or elsewhere",
        ("result",),
    ),
    Row(
        "bridged_requests",
        lambda m: m.bridged,
        "Attempts whose request was translated to a chat completion, by its API",
        ("api",),
    ),
    Row(
        "left_out_tools",
        lambda m: m.left_out,
        "Hosted tools that were left out of a request, since the provider cannot run them",
    ),
    Row(
        "learnt_repeats",
        lambda m: m.learnt,
        "Requests that were sent once more at once, without what the provider has refused",
        ("what",),
    ),
    Row("failovers", lambda m: m.failovers, "Requests that went on to a fallback", ("reason",)),
    Row("provider_wait_seconds", lambda m: m.wait, "Time in the provider's queue"),
    Row(
        "provider_first_token_seconds",
        lambda m: m.first_token,
        "Time from sending the request to the first content of the answer",
    ),
    Row(
        "token_interval_seconds", lambda m: m.interval, "Mean time between two events of an answer"
    ),
    Row(
        "provider_gap_seconds",
        lambda m: m.gap,
        "Longest silence of the provider in an answer, to its end, less the lag of our event loop",
    ),
)
GROUP_FAMILIES: tuple[Row[GroupMeter], ...] = (
    Row(
        "group_starts",
        lambda m: m.starts,
        "Requests by the member of a group (llm.models) at which they last started",
        ("provider", "home"),
    ),
)
